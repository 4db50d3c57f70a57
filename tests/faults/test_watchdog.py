"""A rank that dies, stops, hangs or fails ends the run on all ranks, is named.

The fault strikes within a step. What is waited for is shortened here; the rest is as in a run.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from taid_megatron.checkpointing import store
from taid_megatron.config.load import load
from taid_megatron.training import diagnosis, loop, stopping, watchdog

from ..distributed import toy
from ..distributed.ranks import RankFailure, run_ranks

RANKS = 2
LENGTH = (
    *("training.steps=6", "checkpoint.every=2", "parallel.tensor=2"),
    "training.silence_timeout=4",
)
KILLED = -signal.SIGKILL


def _wait_less() -> None:
    diagnosis.BEAT_SECONDS, diagnosis.GRACE_SECONDS = 0.5, 1.5
    watchdog._TICK_SECONDS = 0.2


def _run(
    rank: int, size: int, config: str, overrides: list[str], bad_rank: int, fault: Callable | None
) -> int:
    _wait_less()
    if fault is not None and rank == bad_rank:
        step = loop._optimizer_step

        def broken(trainer: Any, batches: Any) -> Any:
            return fault(trainer.watch) or step(trainer, batches)

        loop._optimizer_step = broken
    return loop.run(load(config, overrides))


def _signal(number: int, step: int, watch: watchdog.Watchdog) -> None:
    if watch._now[0] != f"step {step}":
        return
    # Told of this step, and not stopped with the test store's file locked.
    for _ in range(2):
        last = watch._exchanged
        while watch._exchanged == last:
            time.sleep(0.01)
    time.sleep(0.1)
    os.kill(os.getpid(), number)


def _never_return(step: int, watch: watchdog.Watchdog) -> None:
    while watch._now[0] == f"step {step}":
        time.sleep(0.1)


def _raise(step: int, watch: watchdog.Watchdog) -> None:
    if watch._now[0] == f"step {step}":
        raise ValueError("made up")


def _strike(config: Path, folder: Path, bad_rank: int, fault: Callable, *overrides: str) -> str:
    """One run that a fault ends; how the ranks ended. Its status and lock are checked."""
    settings = [f"run.folder={folder}", *LENGTH, *overrides]
    with pytest.raises((RankFailure, ValueError)) as ended:
        run_ranks(RANKS, _run, str(config), settings, bad_rank, fault, grace=60)
    left = json.loads((folder / stopping.STATUS).read_text())
    assert (left["state"], left["exit_code"]) == ("failed", 1)
    assert left["started"] < left["ended"]
    return f"{left['error']} {ended.value} {ended.value.__cause__}"


def _records(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [record for record in records if "resumed_from" not in record]


def test_a_lost_rank_is_named_and_the_run_goes_on_bit_for_bit(config, tmp_path, capfd) -> None:
    """One run, struck at every second step and resumed; rank 0 is watched as the others are."""
    whole = [f"run.folder={tmp_path / 'straight'}", *LENGTH]
    assert run_ranks(RANKS, _run, str(config), whole, 0, None) == [0, 0]
    run = tmp_path / "run"

    told = _strike(config, run, 1, partial(_signal, signal.SIGKILL, 3))
    assert "rank 1 (process " in told
    assert "died in step 3" in told
    assert f"{{0: 1, 1: {KILLED}}}" in told
    assert not (run / stopping.LOCK).exists()
    assert store.newest(run / "checkpoints").step == 2

    told = _strike(config, run, 0, partial(_signal, signal.SIGSTOP, 5))
    assert "rank 0 (process " in told
    assert "given no sign of life for 4 s; its last was in step 5" in told
    assert f"{{0: {KILLED}, 1: 1}}" in told  # a stopped rank is not left to its launcher
    said = capfd.readouterr().err
    assert said.count("the run ends, to be resumed") == 2  # one rank speaks
    assert "rank 1: error: rank 0" in said
    assert store.newest(run / "checkpoints").step == 4

    told = _strike(config, run, 1, partial(_never_return, 6), "training.step_timeout=2")
    assert "rank 1 (process " in told
    assert "did not get on: in step 6 for " in told
    assert "in _never_return" in told
    assert "{0: 1, 1: 1}" in told
    assert "_never_return" in capfd.readouterr().err  # the rank's stacks

    assert run_ranks(RANKS, _run, str(config), [f"run.folder={run}", *LENGTH], 0, None) == [0, 0]
    straight = _records(tmp_path / "straight")
    for figure in ("step", "loss", "grad_norm", "t", "lr", "consumed_samples"):
        assert toy.column(_records(run), figure) == toy.column(straight, figure), figure


def test_the_cause_is_what_a_rank_failed_with(config, tmp_path) -> None:
    """Not the connection that the others lose by it."""
    told = _strike(config, tmp_path, 1, partial(_raise, 2))
    assert "rank 1 (process " in told
    assert "failed in step 2: ValueError: made up" in told
