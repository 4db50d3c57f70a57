"""Faults again and again, seeded, until the time is over: `bash tests/soak.sh [seconds] [seed]`.

Each round is a run of six steps in a folder of its own, on one or two ranks, struck some times and
then resumed to its end. Everything published must be whole and as it was, after every fault; what
is left must go on. The result is a table and soak.json; the exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from taid_megatron.checkpointing import manifest, store
from taid_megatron.training import stopping

from ..distributed import toy
from ..distributed.ranks import RankFailure, run_ranks
from . import test_kill, test_stopping, test_watchdog
from .test_checkpoints import DAMAGES

LENGTH = test_kill.LENGTH


class Round:
    """One run folder, struck by faults."""

    def __init__(self, config: Path, run: Path, rng: random.Random) -> None:
        self.config, self.run, self.rng = config, run, rng
        self.ranks = 1 if rng.random() < 0.6 else 2

    def kill_in_save(self) -> bool:
        """kill -9 of a rank as it enters one of a save's windows."""
        window, call = self.rng.choice([*test_kill.WINDOWS]), self.rng.randrange(1, 3)
        kill = partial(test_kill._kill_in, window, call)
        return test_kill._strike(self.config, self.run, self.ranks, kill, 0)

    def kill_anywhere(self) -> bool:
        """kill -9 of a rank at a random moment."""
        kill = partial(_later, self.rng.uniform(0.2, 4.0))
        victim = self.rng.randrange(self.ranks)
        return test_kill._strike(self.config, self.run, self.ranks, kill, victim)

    def stop_a_rank(self) -> bool:
        """SIGSTOP of one of two ranks in a step: named, and both end."""
        if self._done():
            return False
        victim, step = self.rng.randrange(2), self._next_step()
        fault = partial(test_watchdog._signal, signal.SIGSTOP, step)
        settings = [f"run.folder={self.run}", *LENGTH, "parallel.tensor=2"]
        with pytest.raises(RankFailure, match=f"{victim}: {-signal.SIGKILL}"):
            run_ranks(2, test_watchdog._run, str(self.config), settings, victim, fault, grace=60)
        told = test_stopping.status(self.run)
        assert told["exit_code"] == 1, told
        assert f"rank {victim} (process " in told["error"], told
        return True

    def one_signal(self) -> bool:
        """SIGTERM or SIGUSR1 in a step, an evaluation, a save or the load: a checkpoint and 75."""
        phase = self.rng.choice(["_optimizer_step", "_held_out", "_save", "_resume"])
        number = self.rng.choice([signal.SIGTERM, signal.SIGUSR1])
        if self._done() or (phase == "_held_out" and self._next_step() > 3):
            return False  # the evaluation that is left is the last step's, after which it is done
        (code,) = self._signalled(1, phase, number)
        told = test_stopping.status(self.run)
        if code == 0:  # in the last save or evaluation: done all the same
            assert told["step"] == 6, told
            return True
        assert (code, told["state"], told["exit_code"]) == (75, "stopped", 75), told
        assert store.newest(self.run / "checkpoints").step == told["step"]
        return True

    def two_signals(self) -> bool:
        """The second ends it at once."""
        if self._done():
            return False
        with pytest.raises(RankFailure, match=f"{{0: {-signal.SIGUSR1}}}"):
            self._signalled(1, "_optimizer_step", signal.SIGTERM, signal.SIGUSR1)
        return True

    def _signalled(self, call: int, phase: str, *numbers: int) -> list[int]:
        settings = [f"run.folder={self.run}", *LENGTH, "evaluation.every=3"]
        disturbance = (phase, call, *numbers)
        return run_ranks(1, test_stopping._run, str(self.config), settings, disturbance, 0)

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
        """Every published checkpoint is whole; the run goes on to its end, on one rank."""
        test_kill._published(self.run)
        settings = [f"run.folder={self.run}", *LENGTH]
        assert run_ranks(1, test_kill._run, str(self.config), settings, None, 0) == [0]
        assert store.newest(self.run / "checkpoints").step == 6
        assert not (self.run / stopping.LOCK).exists()
        records = [json.loads(line) for line in (self.run / "metrics.jsonl").open()]
        trained = [record for record in records if "loss" in record]
        assert toy.column(trained, "consumed_samples") == [8, 16, 24, 32, 40, 48]

    def _next_step(self) -> int:
        newest = store.newest(self.run / "checkpoints")
        return newest.step + 1 if newest else 1

    def _done(self) -> bool:
        return self._next_step() > 6


def _later(seconds: float) -> None:
    timer = threading.Timer(seconds, test_kill._die)
    timer.daemon = True
    timer.start()


# How often each is drawn.
FAULTS: dict[str, tuple[Callable[[Round], bool], int]] = {
    "kill -9 in a window of a save": (Round.kill_in_save, 4),
    "kill -9 at a random moment": (Round.kill_anywhere, 4),
    "SIGSTOP of a rank": (Round.stop_a_rank, 1),
    "SIGTERM or SIGUSR1": (Round.one_signal, 3),
    "two signals": (Round.two_signals, 1),
    "damage of a checkpoint's file": (Round.damage, 4),
}


def soak(folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Rounds until the time is over; what was done and what failed."""
    rng, config = random.Random(seed), toy.write_config(folder)
    struck = dict.fromkeys(FAULTS, 0)
    failures: list[dict[str, Any]] = []
    rounds, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        run, rounds = folder / f"run{rounds}", rounds + 1
        this, name = Round(config, run, rng), ""
        try:
            for _ in range(rng.randrange(1, 6)):
                weights = [weight for _, weight in FAULTS.values()]
                (name,) = rng.choices([*FAULTS], weights)
                struck[name] += FAULTS[name][0](this)
            name = "resuming to the end"
            this.finish()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append({"round": rounds, "fault": name, "what": traceback.format_exc()})
            print(f"round {rounds}, {name}: {error}", flush=True)
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
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as folder:
        result = soak(Path(folder), asked.seconds, asked.seed)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{table(result)}\n\n{result['seconds']} s, seed {result['seed']}: {asked.out}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
