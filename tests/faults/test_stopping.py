"""Signals end a run with a checkpoint and code 75; a run folder has one writer; how it ended shows.

The signal is sent from within the phase that it is to hit.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from taid_megatron.checkpointing import manifest, store
from taid_megatron.config.errors import UserError
from taid_megatron.config.load import load
from taid_megatron.training import loop, stopping

from ..distributed import toy
from ..distributed.ranks import RankFailure, run_ranks

LENGTH = ("training.steps=6", "checkpoint.every=2", "evaluation.every=3")


def _send_within(phase: str, on_call: int, *signals: int) -> None:
    """Make a phase of the loop send this process signals when it is entered the n-th time."""
    function, calls = getattr(loop, phase), []

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == on_call:
            for number in signals:
                os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(loop, phase, disturbed)


def _run(
    rank: int, size: int, config: str, overrides: list[str], disturbance: tuple, bad_rank: int
) -> int:
    if rank == bad_rank and disturbance:
        _send_within(*disturbance)
    return loop.run(load(config, overrides))


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / stopping.STATUS).read_text())


@pytest.mark.parametrize(
    ("ranks", "disturbance", "bad_rank", "stopped_at"),
    [
        pytest.param(2, ("_optimizer_step", 3, signal.SIGTERM), 1, 3, id="SIGTERM, step, rank 1"),
        pytest.param(1, ("_save", 1, signal.SIGUSR1), 0, 3, id="SIGUSR1, save"),
        pytest.param(1, ("_held_out", 1, signal.SIGTERM), 0, 4, id="SIGTERM, evaluation"),
        pytest.param(1, ("_resume", 1, signal.SIGUSR1), 0, 1, id="SIGUSR1, load"),
    ],
)
def test_a_signal_ends_the_run_with_a_checkpoint_to_go_on_from(
    config, straight, tmp_path, ranks, disturbance, bad_rank, stopped_at
) -> None:
    overrides = [f"run.folder={tmp_path}", *LENGTH]
    if ranks > 1:
        overrides.append("parallel.tensor=2")
    codes = run_ranks(ranks, _run, str(config), overrides, disturbance, bad_rank)
    assert codes == [75] * ranks
    ended = status(tmp_path)
    assert (ended["state"], ended["exit_code"], ended["step"]) == ("stopped", 75, stopped_at)
    assert store.newest(tmp_path / "checkpoints").step == stopped_at
    assert not (tmp_path / stopping.LOCK).exists()
    assert not list((tmp_path / "checkpoints").glob(".*"))
    if ranks > 1:
        return  # resuming is the same on any layout
    assert run_ranks(1, _run, str(config), overrides, (), 0) == [0]
    ended = status(tmp_path)
    assert (ended["state"], ended["exit_code"], ended["step"]) == ("done", 0, 6)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    undisturbed = [json.loads(line) for line in (straight / "metrics.jsonl").open()]
    for figure in ("loss", "grad_norm", "t", "consumed_samples"):
        assert toy.column(records, figure) == toy.column(undisturbed, figure)


def test_a_second_signal_ends_it_at_once_and_the_last_checkpoint_is_whole(config, tmp_path) -> None:
    overrides = [f"run.folder={tmp_path}", *LENGTH]
    twice = ("_optimizer_step", 3, signal.SIGUSR1, signal.SIGTERM)
    with pytest.raises(RankFailure, match=f"{{0: {-signal.SIGTERM}}}"):
        run_ranks(1, _run, str(config), overrides, twice, 0)
    assert status(tmp_path)["state"] == "running"  # the truth died with it
    newest = store.newest(tmp_path / "checkpoints")
    assert newest.step == 2
    assert manifest.problem(newest.path, full=True) is None
    assert (tmp_path / stopping.LOCK).exists()
    # its lock is stale: the next run takes it over and goes on
    assert run_ranks(1, _run, str(config), overrides, (), 0) == [0]
    assert store.newest(tmp_path / "checkpoints").step == 6


def _deaf(rank: int, size: int) -> None:
    """Two signals while the main thread is in a call that gives no handler a chance."""

    def send() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            time.sleep(0.2)
            os.kill(os.getpid(), number)

    with stopping.Signals():
        threading.Thread(target=send, daemon=True).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)


def test_a_second_signal_is_heard_while_the_main_thread_waits() -> None:
    with pytest.raises(RankFailure, match=f"{{0: {128 + signal.SIGUSR1}}}"):
        run_ranks(1, _deaf)


def test_the_status_has_refusals_and_failures(config, tmp_path) -> None:
    overrides = [f"run.folder={tmp_path}", *LENGTH]
    with pytest.raises(UserError):
        run_ranks(1, _run, str(config), [*overrides, "training.seq_length=65536"], (), 0)
    ended = status(tmp_path)
    assert (ended["state"], ended["exit_code"]) == ("failed", 2)
    assert "train.bin" in ended["error"]
    with pytest.raises(RuntimeError, match="made up"), stopping.recorded(tmp_path):
        raise RuntimeError("made up")
    assert (status(tmp_path)["exit_code"], status(tmp_path)["error"]) == (1, "made up")


def _other_process() -> dict[str, Any]:
    """A lock's content for a process that is gone."""
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    return {"host": socket.gethostname(), "pid": gone.pid, "started": time.time(), "token": "x"}


def test_a_live_writer_is_refused_and_a_stale_lock_taken_over(tmp_path, capsys) -> None:
    first, second = stopping.RunLock(tmp_path), stopping.RunLock(tmp_path)
    first.take()
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .* writes in this run folder"):
        second.take()
    first.check()
    first.release()
    lock = tmp_path / stopping.LOCK
    assert list(tmp_path.iterdir()) == []

    here = {"host": socket.gethostname(), "token": "x"}
    elsewhere = {"host": "another-host", "pid": 1, "started": 1.0, "token": "x"}
    stale = [
        (_other_process(), 0),
        ({**here, "pid": os.getpid(), "started": 1.0}, 0),  # our number, another process
        (elsewhere, 1000),
        ("not json", 1000),
    ]
    for content, age in stale:
        lock.write_text(json.dumps(content) if isinstance(content, dict) else content)
        os.utime(lock, (time.time() - age, time.time() - age))
        taker = stopping.RunLock(tmp_path)
        taker.take()
        assert "taken over" in capsys.readouterr().err
        taker.release()
        assert not lock.exists()
    lock.write_text(json.dumps(elsewhere))
    with pytest.raises(UserError, match="process 1 on another-host"):
        stopping.RunLock(tmp_path).take()


def test_a_run_that_lost_its_folder_writes_no_more(tmp_path) -> None:
    lock = stopping.RunLock(tmp_path)
    lock.take()
    (tmp_path / stopping.LOCK).write_text(json.dumps({**_other_process(), "token": "another"}))
    with pytest.raises(UserError, match="belongs to another run"):
        lock.check()
    lock.release()
    assert (tmp_path / stopping.LOCK).exists()


def test_two_runs_in_one_folder(config, tmp_path) -> None:
    """The second is refused on all its ranks, and the first one's status stays."""
    lock = stopping.RunLock(tmp_path)
    lock.take()
    stopping.write_status(tmp_path, "running", None)
    with pytest.raises(UserError, match="writes in this run folder"):
        run_ranks(2, _run, str(config), [f"run.folder={tmp_path}", *LENGTH], (), 0)
    assert status(tmp_path)["state"] == "running"
    lock.release()
