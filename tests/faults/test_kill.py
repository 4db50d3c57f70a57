"""kill -9 at each window of a save: nothing published is ever lost or mixed.

At random moments, and again and again: soak.py.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from taid_megatron.checkpointing import folder as folders
from taid_megatron.checkpointing import manifest, store, writer
from taid_megatron.config.load import load
from taid_megatron.training import loop

from ..distributed import toy
from ..distributed.ranks import RankFailure, run_ranks

LENGTH = ("training.steps=6", "checkpoint.every=2", "checkpoint.keep=2")

# Where a save can be hit: the function that is entered when the process dies.
WRITING = "while the writer writes"  # asynchronous saves have one
WINDOWS: dict[str, tuple[Any, str]] = {
    "before the shards": (store.dist_checkpointing, "save"),
    WRITING: (writer.Writer, "done"),
    "between shards and hashes": (manifest, "record"),
    "before the manifest": (manifest, "write"),
    "before the rename": (folders, "publish"),
    "before the pointer": (folders, "write_atomically"),
    "before the old one goes": (folders, "remove_old"),
}
ON_ALL_RANKS = {"before the shards", WRITING, "between shards and hashes"}  # else the first alone
ASYNCHRONOUS = "checkpoint.asynchronous=true"


def _die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in(window: str, on_call: int) -> None:
    module, name = WINDOWS[window]
    function, calls = getattr(module, name), []

    def deadly(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return (_die if len(calls) == on_call else function)(*args, **kwargs)

    setattr(module, name, deadly)


def _run(
    rank: int, size: int, config: str, overrides: list[str], kill: Callable | None, victim: int
) -> int:
    if kill is not None and rank == victim:
        kill()
    return loop.run(load(config, overrides))


def _survivors(run: Path) -> list[psutil.Process]:
    """Processes forked from this one that are not its children any more; a save's writers."""
    me = psutil.Process()
    mine = {child.pid for child in me.children(recursive=True)} | {me.pid}
    command, found = me.cmdline(), []
    for process in psutil.process_iter(["cmdline", "pid", "create_time", "status"]):
        info = process.info
        words = info["cmdline"] or []
        if words == command or any(f'"{run}/' in word for word in words):
            others = info["pid"] not in mine and info["create_time"] > me.create_time()
            if others and info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _published(run: Path) -> dict[str, dict[str, bytes]]:
    """Every published checkpoint with its bytes; all of them sound."""
    found = {}
    for checkpoint in folders.published(run / "checkpoints"):
        assert manifest.problem(checkpoint.path, full=True) is None
        assert checkpoint.state()["step"] == checkpoint.step
        found[checkpoint.path.name] = {
            path.name: path.read_bytes() for path in checkpoint.path.iterdir()
        }
    return found


def _strike(
    config: Path, run: Path, ranks: int, kill: Callable, victim: int, settings: Sequence[str]
) -> bool:
    """One run that is to be killed. Whether it was; checks what it left."""
    before = _published(run)
    ended: BaseException | None = None
    try:
        run_ranks(ranks, _run, str(config), [*settings], kill, victim)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # torch's of a checkpoint is no Exception
        ended = error
    # where a rank is left, it is the one to say that its peer is gone
    gone = any(word in str(ended).lower() for word in ("closed", "reset", "broken pipe"))
    assert ended is None or gone or isinstance(ended, RankFailure), ended
    deadline = time.monotonic() + 20
    while (left := _survivors(run)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    after = _published(run)
    for name in before.keys() & after.keys():
        assert after[name] == before[name], f"{name} was written again"
    newest = store.newest(run / "checkpoints")
    if before:
        assert newest is not None
        assert newest.path.name >= max(before)
    return ended is not None


def _finish(config: Path, run: Path, straight: Path) -> None:
    """What is left goes on to the end, and is the run that was never killed."""
    assert run_ranks(1, _run, str(config), [f"run.folder={run}", *LENGTH], None, 0) == [0]
    assert store.newest(run / "checkpoints").step == 6
    assert not [path for path in (run / "checkpoints").glob(".*")]
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    records = [record for record in records if "resumed_from" not in record]
    expected = [json.loads(line) for line in (straight / "metrics.jsonl").open()]
    for figure in ("step", "loss", "t", "consumed_samples"):
        assert toy.column(records, figure) == toy.column(expected, figure), figure


@pytest.mark.parametrize("more", [(), (ASYNCHRONOUS,)], ids=["blocking", "asynchronous"])
def test_killed_at_every_window_of_a_save(config, straight, tmp_path, more) -> None:
    """One after the other in one run folder: windows after the rename leave one save less."""
    windows = [window for window in WINDOWS if more or window != WRITING]
    for window in windows:
        settings = (f"run.folder={tmp_path}", *LENGTH, *more)
        killed = _strike(config, tmp_path, 1, partial(_kill_in, window, 1), 0, settings)
        assert killed, window
    _finish(config, tmp_path, straight)
