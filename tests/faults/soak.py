"""Faults again and again, seeded, until the time is over: `bash tests/soak.sh [seconds] [seed]`.

Each round is a run of six steps in a folder of its own, on one or two ranks, saving beside the
training or not, struck some times and then resumed to its end. After every fault what is published
must be whole, and as it was; no process may be left; in the end every figure must be, bit for bit,
that of a run which nothing struck. The result is a table and soak.json; the exit code is 1 where
anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from taid_megatron.checkpointing import manifest, store, writer
from taid_megatron.training import stopping

from ..distributed import toy
from ..distributed.ranks import RankFailure, run_ranks
from . import test_kill, test_stopping, test_watchdog
from .test_checkpoints import DAMAGES

STEPS = 6
EQUAL = ("step", "loss", "grad_norm", "t", "lr", "consumed_samples")
PHASES = ("_optimizer_step", "_held_out", "_save", "_resume")
_TOLD_SECONDS = 60.0


class Straight:
    """The run that nothing strikes, on so many ranks: its figures and its length."""

    def __init__(self, config: Path, folder: Path, ranks: int) -> None:
        began = time.monotonic()
        settings = [f"run.folder={folder}", *_layout(ranks)]
        assert run_ranks(ranks, test_kill._run, str(config), settings, None, 0) == [0] * ranks
        self.seconds = time.monotonic() - began
        self.figures = _figures(folder)


class Round:
    """One run folder, struck by faults."""

    def __init__(self, config: Path, run: Path, straight: Straight, ranks: int, rng: random.Random):
        self.config, self.run, self.straight = config, run, straight
        self.ranks, self.rng = ranks, rng
        self.asynchronous = rng.random() < 0.5
        self.settings = [*_layout(ranks), *([test_kill.ASYNCHRONOUS] * self.asynchronous)]

    def kill_in_save(self) -> bool:
        """kill -9 of a rank as it enters one of a save's windows."""
        windows = [*test_kill.WINDOWS]
        if not self.asynchronous:
            windows.remove(test_kill.WRITING)
        window = self.rng.choice(windows)
        kill = partial(test_kill._kill_in, window, self.rng.randrange(1, 3))
        on_all = window in test_kill.ON_ALL_RANKS
        return self._strike(kill, self.rng.randrange(self.ranks) if on_all else 0)

    def kill_anywhere(self) -> bool:
        """kill -9 of a rank at a random moment."""
        kill = partial(_later, self.rng.uniform(0.0, self.straight.seconds))
        return self._strike(kill, self.rng.randrange(self.ranks))

    def kill_writer(self) -> bool:
        """kill -9 of the process that brings a save to the disk: told on all ranks."""
        if self._done() or not self.asynchronous:
            return False
        run = [f"run.folder={self.run}", *self.settings]
        victim = self.rng.randrange(self.ranks)
        kill = partial(_kill_writers, self.rng.randrange(1, 3))
        try:
            run_ranks(self.ranks, test_kill._run, str(self.config), run, kill, victim)
        except writer.WriterError as error:
            told = str(error)
        else:
            return False  # it was done before
        assert f"on rank {victim} its writer, process" in told, told
        assert "died (SIGKILL)" in told, told
        assert test_stopping.status(self.run)["exit_code"] == 1
        return True

    def stop_a_rank(self) -> bool:
        """SIGSTOP of one of two ranks in a step: named, and both end."""
        if self._done() or self.ranks != 2:
            return False
        victim, step = self.rng.randrange(2), self._next_step()
        fault = partial(test_watchdog._signal, signal.SIGSTOP, step)
        settings = [f"run.folder={self.run}", *self.settings, "training.silence_timeout=4"]
        with pytest.raises(RankFailure, match=f"{victim}: {-signal.SIGKILL}"):
            run_ranks(2, test_watchdog._run, str(self.config), settings, victim, fault, grace=60)
        told = test_stopping.status(self.run)
        assert told["exit_code"] == 1, told
        assert f"rank {victim} (process " in told["error"], told
        return True

    def one_signal(self) -> bool:
        """SIGTERM or SIGUSR1 in a step, an evaluation, a save or the load: a checkpoint and 75."""
        phase, number = self.rng.choice(PHASES), self.rng.choice([signal.SIGTERM, signal.SIGUSR1])
        if self._done() or (phase == "_held_out" and self._next_step() > 3):
            return False  # the evaluation that is left is the last step's, after which it is done
        code, *others = self._signalled(phase, number)
        assert others == [code] * len(others)
        told = test_stopping.status(self.run)
        if code == 0:  # in the last save or evaluation: done all the same
            assert told["step"] == STEPS, told
            return True
        assert (code, told["state"], told["exit_code"]) == (75, "stopped", 75), told
        assert store.newest(self.run / "checkpoints").step == told["step"]
        return True

    def two_signals(self) -> bool:
        """The second ends it at once."""
        if self._done() or self.ranks != 1:
            return False
        with pytest.raises(RankFailure, match=f"{{0: {-signal.SIGUSR1}}}"):
            self._signalled("_optimizer_step", signal.SIGTERM, signal.SIGUSR1)
        return True

    def damage(self) -> bool:
        """A byte flipped, a file cut, emptied or removed: found, and the file named."""
        newest = store.newest(self.run / "checkpoints")
        if newest is None:
            return False
        names = sorted(path.name for path in newest.path.iterdir())
        name, damage = self.rng.choice(names), self.rng.choice(DAMAGES)
        file, kept = newest.path / name, (newest.path / name).read_bytes()
        if not kept:
            return False
        damage(file, self.rng.randrange(1 << 30))
        fault = manifest.problem(newest.path, full=True)
        assert fault is not None, f"{damage.__name__} of {name} was not found"
        assert name in fault, fault
        file.write_bytes(kept)
        return True

    def finish(self) -> None:
        """The run goes on to its end, and is the one that nothing struck."""
        test_kill._published(self.run)
        settings = [f"run.folder={self.run}", *self.settings]
        codes = run_ranks(self.ranks, test_kill._run, str(self.config), settings, None, 0)
        assert codes == [0] * self.ranks
        assert store.newest(self.run / "checkpoints").step == STEPS
        test_kill._published(self.run)
        assert not (self.run / stopping.LOCK).exists()
        for name, expected in self.straight.figures.items():
            assert _figures(self.run)[name] == expected, name

    def _strike(self, kill: Callable[[], object], victim: int) -> bool:
        if self._done():
            return False
        settings = (f"run.folder={self.run}", *self.settings)
        return test_kill._strike(self.config, self.run, self.ranks, kill, victim, settings)

    def _signalled(self, phase: str, *numbers: int) -> list[int]:
        settings = [f"run.folder={self.run}", *self.settings, "evaluation.every=3"]
        disturbance, victim = (phase, 1, *numbers), self.rng.randrange(self.ranks)
        return run_ranks(
            self.ranks, test_stopping._run, str(self.config), settings, disturbance, victim
        )

    def _next_step(self) -> int:
        newest = store.newest(self.run / "checkpoints")
        return newest.step + 1 if newest else 1

    def _done(self) -> bool:
        return self._next_step() > STEPS


def _layout(ranks: int) -> tuple[str, ...]:
    return (*test_kill.LENGTH, f"parallel.tensor={ranks}")


def _figures(run: Path) -> dict[str, list[Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    trained = [record for record in records if "loss" in record]
    return {name: toy.column(trained, name) for name in EQUAL}


def _later(seconds: float) -> None:
    timer = threading.Timer(seconds, test_kill._die)
    timer.daemon = True
    timer.start()


def _kill_writers(on_call: int) -> None:
    """The n-th writer of this rank dies as soon as it has started."""
    popen, calls = writer.subprocess.Popen, []

    def deadly(command: Any, *args: Any, **kwargs: Any) -> Any:
        process = popen(command, *args, **kwargs)
        if writer._START in command:  # and no compiler's
            calls.append(None)
            if len(calls) == on_call:
                process.kill()
        return process

    writer.subprocess.Popen = deadly  # type: ignore[misc,assignment]


# How often each is drawn.
FAULTS: dict[str, tuple[Callable[[Round], bool], int]] = {
    "kill -9 of a rank in a window of a save": (Round.kill_in_save, 5),
    "kill -9 of a rank at a random moment": (Round.kill_anywhere, 8),
    "kill -9 of a save's writer": (Round.kill_writer, 1),
    "SIGSTOP of a rank": (Round.stop_a_rank, 1),
    "SIGTERM or SIGUSR1": (Round.one_signal, 3),
    "two signals": (Round.two_signals, 1),
    "damage of a checkpoint's file": (Round.damage, 4),
}


@contextmanager
def _told_to(path: Path) -> Iterator[None]:
    """What this process and its ranks say goes into a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with path.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in zip((1, 2), kept, strict=True):
            os.dup2(before, descriptor)
            os.close(before)


def _round(this: Round, struck: dict[str, int]) -> tuple[str, str] | None:
    """Strike a run some times and resume it. What failed (the fault, and how), if anything did."""
    name = ""
    try:
        for _ in range(this.rng.randrange(1, 12)):
            (name,) = this.rng.choices([*struck], [FAULTS[name][1] for name in struck])
            struck[name] += FAULTS[name][0](this)
        name = "resuming to the end"
        this.finish()
    except KeyboardInterrupt:
        raise
    except BaseException:  # pytest's failures, and torch's of a checkpoint
        return name, traceback.format_exc()
    return None


def soak(folder: Path, seconds: float, seed: int, only: str = "") -> dict[str, Any]:
    """Rounds until the time is over; what was done and what failed. only: part of faults' names."""
    rng, config = random.Random(seed), toy.write_config(folder)
    with _told_to(folder / "straight.log"):
        straight = {ranks: Straight(config, folder / f"{ranks}", ranks) for ranks in (1, 2)}
    struck = {name: 0 for name in FAULTS if only in name}
    failures: list[dict[str, Any]] = []
    rounds, began, told = 0, time.monotonic(), 0.0
    while (passed := time.monotonic() - began) < seconds:
        if passed - told >= _TOLD_SECONDS:
            told = passed
            faults = f"{sum(struck.values())} faults, {len(failures)} failed"
            print(f"{passed / 60:.0f} min: {rounds} rounds, {faults}", flush=True)
        ranks, rounds = 1 if rng.random() < 0.6 else 2, rounds + 1
        run, log = folder / f"run{rounds}", folder / f"run{rounds}.log"
        with _told_to(log):
            failed = _round(Round(config, run, straight[ranks], ranks, rng), struck)
        if failed:
            name, what = failed
            failures.append({"round": rounds, "fault": name, "what": what, "log": log.read_text()})
            print(f"round {rounds}, {name}: {what}", flush=True)
        log.unlink()
        shutil.rmtree(run, ignore_errors=True)
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "rounds": rounds,
        "faults": struck,
        "failures": failures,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
    }


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| fault | times | failed |", "| --- | --- | --- |"]
    for name, times in result["faults"].items():
        failed = sum(failure["fault"] == name for failure in result["failures"])
        lines.append(f"| {name} | {times} | {failed} |")
    unfinished = sum(failure["fault"] not in FAULTS for failure in result["failures"])
    lines.append(f"| resumed to the end afterwards | {result['rounds']} | {unfinished} |")
    return "\n".join(lines)


def main() -> int:
    """Run it, print the table, write the JSON."""
    parser = argparse.ArgumentParser(prog="tests/soak.sh")
    parser.add_argument("seconds", nargs="?", type=float, default=3600.0)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", "kill"])
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        result = soak(Path(folder), asked.seconds, asked.seed, asked.only)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\n{result['seconds']} s, seed {result['seed']}: {asked.out}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
