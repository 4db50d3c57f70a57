"""Signals through launch/torchrun.sh to real ranks: a checkpoint and code 75; the second at once.

A file that Python imports at its start, on the ranks' path, sends them from within the phase that
they are to hit, to the script as Slurm or a person would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from taid_megatron.checkpointing import folder as folders
from taid_megatron.checkpointing import manifest
from taid_megatron.training import stopping

from ..unit.launch.stand_ins import ROOT

pytestmark = pytest.mark.slow  # each starts torchrun and all that it imports
LENGTH = ("training.steps=6", "checkpoint.every=2", "evaluation.every=3")
LOADING, STEP, EVALUATION, SAVE = (
    *("loading", "step 3", "the evaluation after step 3"),
    "the save of step 2",
)
STRIKE = """
import json, os, sys, threading, time
def arm(rank, phase, signals, pause, hold):
    while not hasattr(sys.modules.get("taid_megatron.training.watchdog"), "Watchdog"):
        time.sleep(0.005)
    watchdog = sys.modules["taid_megatron.training.watchdog"].Watchdog
    begin, enter = watchdog._begin, watchdog.__enter__
    def strike():
        for number in signals:
            time.sleep(pause)
            os.kill(int(os.environ["STRIKE_PID"]), number)
    def entered(self):
        if phase == "loading" and self._rank == rank:
            threading.Thread(target=strike).start()
        return enter(self)
    def struck(self, name, *rest):
        begin(self, name, *rest)
        if name == phase and self._rank == rank:
            threading.Thread(target=strike).start()
        if name == phase and self._rank == 1:
            time.sleep(hold)  # the others wait for it, in a collective
    watchdog._begin, watchdog.__enter__ = struck, entered
if "RANK" in os.environ:
    threading.Thread(target=arm, args=json.loads(os.environ["STRIKE"]), daemon=True).start()
"""


def launch(
    config: Path,
    folder: Path,
    ranks: int,
    phase: str,
    signals: list[int],
    *,
    pause: float = 0.0,
    hold: float = 0.0,
) -> tuple[int, str]:
    """A run under the script, struck by signals `pause` s into a phase; its code and its words."""
    path = folder / "path"
    path.mkdir(parents=True)
    (path / "sitecustomize.py").write_text(STRIKE)
    settings = (f"run.folder={folder / 'run'}", f"parallel.tensor={ranks}", *LENGTH)
    script = f'export STRIKE_PID=$$; exec bash {ROOT}/launch/torchrun.sh "$@"'
    process = subprocess.Popen(
        [
            "bash",
            "-c",
            script,
            "-",
            "--nproc-per-node",
            str(ranks),
            "train",
            str(config),
            *settings,
        ],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": f"{path}:{ROOT}",
            "OMP_NUM_THREADS": "1",
            "STRIKE": json.dumps([0, phase, signals, pause, hold]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=240)
        deadline = time.monotonic() + 30
        while (left := _of_run(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], said
    finally:
        for orphan in _of_run(folder):
            orphan.kill()
    return process.returncode, said


def _of_run(folder: Path) -> list[psutil.Process]:
    mark = f"run.folder={folder / 'run'}"
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if mark in (process.info["cmdline"] or ())
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


def newest_whole(folder: Path) -> folders.Checkpoint:
    """The newest checkpoint of a run; all of them are whole."""
    found = folders.published(folder / "run/checkpoints")
    assert [manifest.problem(each.path, full=True) for each in found] == [None] * len(found)
    return found[0]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / stopping.STATUS).read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("phase", [LOADING, STEP, EVALUATION, SAVE])
def test_one_signal_is_a_checkpoint_and_75(config, tmp_path, phase, number) -> None:
    code, said = launch(config, tmp_path, 2, phase, [number])
    assert code == 75, said
    ended = status(tmp_path)
    assert (ended["state"], ended["exit_code"]) == ("stopped", 75)
    assert newest_whole(tmp_path).step == ended["step"] < 6
    assert not (tmp_path / "run" / stopping.LOCK).exists()


def test_the_second_signal_does_not_wait(config, tmp_path) -> None:
    """One rank is in a step, the other waits for it in a collective, where Python hears nothing."""
    began = time.time()
    code, said = launch(
        config, tmp_path, 2, STEP, [signal.SIGUSR1, signal.SIGTERM], pause=1.0, hold=200.0
    )
    assert code not in (0, 75), said
    assert newest_whole(tmp_path).step == 2
    assert began < status(tmp_path)["started"]
    assert "Traceback" not in said.partition("torch/distributed")[0]
