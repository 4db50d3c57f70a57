"""The planner's simulated timeline beside a measured run of two pipeline stages.

    python tests/benchmarks/timeline.py [--rounds 9] [--micro-batches 8] ... [--json FILE]

Two gloo ranks of this machine, one thread each, run whole steps of student and teacher: Megatron's
schedule, the teacher's messages, the loss, the gradients. Each rank times its forwards, the
teacher's part of them and its backwards, waiting for messages left out. Two questions:

- `simulated`: the schedule simulated from those durations, against the same step's duration.
- `predicted`: layers and heads are timed under an even split of the layers; from these times
  `balance` chooses another split and the simulation says how long its step takes, before that split
  has run. Then both splits run, in turns.

Seconds are by the clock, medians of rounds. A rank that shares its core with other work makes
single rounds long; the ratios are those within one round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch.distributed as dist
import yaml
from measure import write_json

from taid_megatron.planning.balance import Split, balance
from taid_megatron.planning.timeline import Durations, simulate
from tests.distributed import allocated
from tests.distributed.ranks import run_ranks

STAGES = 2
WARM_UP_ROUNDS = 2


@dataclass
class Stage:
    """Seconds of one rank in one step, one entry per micro-batch; waiting left out."""

    forward: list[float] = field(default_factory=list)
    """Both models, and on the last stage the loss."""
    teacher: list[float] = field(default_factory=list)
    """The teacher's part of them."""
    backward: list[float] = field(default_factory=list)
    whole: float = 0.0
    """The step, from a moment that all ranks share to this rank's end."""


Step = list[Stage]
"""What the ranks measured in one step, in model order."""


@contextmanager
def timed(into: Stage) -> Iterator[None]:
    """Time every forward and backward that Megatron runs on this rank."""
    from megatron.core.pipeline_parallel import schedules

    from taid_megatron.models.pair import Pair
    from taid_megatron.models.teacher_p2p import PendingTeacher

    waited = [0.0]

    def without_waiting(function, seconds: list[float]):
        def call(*args, **options):
            before, start = waited[0], time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds.append(time.perf_counter() - start - (waited[0] - before))

        return call

    wait = PendingTeacher.wait

    def noted(pending: PendingTeacher):
        start = time.perf_counter()
        try:
            return wait(pending)
        finally:
            waited[0] += time.perf_counter() - start

    forward = without_waiting(schedules.forward_step, into.forward)
    backward = without_waiting(schedules.backward_step, into.backward)
    teacher = without_waiting(Pair._run_teacher, into.teacher)
    with (
        mock.patch.object(schedules, "forward_step", forward),
        mock.patch.object(schedules, "backward_step", backward),
        mock.patch.object(Pair, "_run_teacher", teacher),
        mock.patch.object(PendingTeacher, "wait", noted),
    ):
        yield


def on_rank(
    rank: int, world_size: int, config: str, splits: list[list[str]], rounds: int
) -> list[list[Stage]]:
    """What this rank measures: per split and round; the splits take turns."""
    from taid_megatron.config.load import load
    from taid_megatron.runtime import distributed, log
    from taid_megatron.training.setup import build_trainer

    log.quiet_megatron()
    loaded = [load(config, split) for split in splits]
    world = distributed.start(loaded[0].parallel, loaded[0].run.seed)
    trainers = [build_trainer(one, world, distributed.abilities()) for one in loaded]
    measured: list[list[Stage]] = [[] for _ in splits]
    for round_number in range(WARM_UP_ROUNDS + rounds):
        for trainer, found in zip(trainers, measured, strict=True):
            stage = Stage()
            dist.barrier()
            start = time.perf_counter()
            with timed(stage):
                allocated.one_step(trainer, world_size)
            stage.whole = time.perf_counter() - start
            if round_number >= WARM_UP_ROUNDS:
                found.append(stage)
    distributed.stop(world)
    return measured


def measure(config: Path, splits: Sequence[list[str]], rounds: int) -> list[list[Step]]:
    """Per split, per round: both stages."""
    ranks = run_ranks(STAGES, on_rank, str(config), list(splits), rounds, timeout=900)
    return [
        [list(stages) for stages in zip(*(rank[number] for rank in ranks), strict=True)]
        for number in range(len(splits))
    ]


# ---- from measurements to the simulation ---------------------------------------------------------


def simulated(step: Step) -> float:
    """Seconds of the step by the planner's timeline, from the durations measured in it."""
    forward = [statistics.fmean(stage.forward) for stage in step]
    backward = [statistics.fmean(stage.backward) for stage in step]
    return simulate(Durations(forward, backward), STAGES, 1, len(step[0].forward)).seconds


def whole(step: Step) -> float:
    """Seconds of the step by the clock, the slowest rank's."""
    return max(stage.whole for stage in step)


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a micro-batch."""

    student_forward: float
    """Of one layer; likewise the next two."""
    student_backward: float
    teacher: float
    head_forward: float
    """What the last stage does beside layers: both heads and the loss."""
    head_backward: float

    def durations(self, student: Split, teacher: Split) -> Durations:
        """Of the stages under a split of the layers."""
        heads = [(0.0, 0.0)] * (STAGES - 1) + [(self.head_forward, self.head_backward)]
        parts = list(zip(student, teacher, heads, strict=True))
        return Durations(
            forward=[a * self.student_forward + b * self.teacher + h for a, b, (h, _) in parts],
            backward=[a * self.student_backward + h for a, _, (_, h) in parts],
        )

    def balanced(self, student: int, teacher: int) -> tuple[Split, Split]:
        """The planner's split of so many layers."""
        one = self.student_forward + self.student_backward
        beside = [0.0, self.head_forward + self.head_backward]
        return balance(student, teacher, one, self.teacher, beside)


def typical(steps: Sequence[Step], stage: int, name: str) -> float:
    """Median seconds of a stage's `forward`, `teacher` or `backward` of one micro-batch."""
    return statistics.median(x for step in steps for x in getattr(step[stage], name))


def costs(steps: Sequence[Step], student: Split, teacher: Split) -> Costs:
    """Parts of a micro-batch from steps under that split: the first stage has layers alone."""
    first = {name: typical(steps, 0, name) for name in ("forward", "teacher", "backward")}
    one_forward = (first["forward"] - first["teacher"]) / student[0]
    one_backward, one_teacher = first["backward"] / student[0], first["teacher"] / teacher[0]
    return Costs(
        student_forward=one_forward,
        student_backward=one_backward,
        teacher=one_teacher,
        head_forward=typical(steps, 1, "forward")
        - student[1] * one_forward
        - teacher[1] * one_teacher,
        head_backward=typical(steps, 1, "backward") - student[1] * one_backward,
    )


# ---- the run -------------------------------------------------------------------------------------


def write_config(args: argparse.Namespace, folder: Path) -> Path:
    """A run of the pair on two stages; its data is made up by the step."""

    def shape(layers: int, width: int) -> dict:
        sizes = {"num_layers": layers, "hidden_size": width, "ffn_hidden_size": 2 * width}
        return {**sizes, "vocab_size": args.vocabulary, "num_attention_heads": 4}

    config = {
        "run": {"folder": str(folder / "run")},
        "student": {"architecture": shape(*args.student)},
        "teacher": {"architecture": shape(*args.teacher)},
        "parallel": {"pipeline": STAGES},
        "training": {
            "micro_batch_size": args.batch,
            "global_batch_size": args.batch * args.micro_batches,
            "seq_length": args.seq_length,
            "steps": 1,
            "precision": "fp32",
        },
        "optimizer": {"lr": 1e-3},
        "data": {"blend": "none", "eod_id": 0},
        "logging": {"tensorboard": False, "progress": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def overrides(student: Split, teacher: Split) -> list[str]:
    """What makes the configuration run under a split."""
    return [f"student.layers_per_stage={[*student]}", f"teacher.layers_per_stage={[*teacher]}"]


def compare(args: argparse.Namespace, config: Path) -> dict:
    """Time the parts, choose a split, run both."""

    def half(layers: int) -> Split:
        return layers - layers // 2, layers // 2

    even = half(args.student[0]), half(args.teacher[0])
    (calibration,) = measure(config, [overrides(*even)], args.calibration)
    parts = costs(calibration, *even)
    splits = {"even": even, "balanced": parts.balanced(args.student[0], args.teacher[0])}
    predicted = {
        name: simulate(parts.durations(*split), STAGES, 1, args.micro_batches).seconds
        for name, split in splits.items()
    }
    given = [overrides(*split) for split in splits.values()]
    found = dict(zip(splits, measure(config, given, args.rounds), strict=True))
    rows = [
        {
            "split": name,
            "student_layers": splits[name][0],
            "teacher_layers": splits[name][1],
            "forward_seconds": [typical(steps, k, "forward") for k in range(STAGES)],
            "backward_seconds": [typical(steps, k, "backward") for k in range(STAGES)],
            "measured_seconds": statistics.median(map(whole, steps)),
            "simulated_to_measured": statistics.median(simulated(s) / whole(s) for s in steps),
            "predicted_seconds": predicted[name],
        }
        for name, steps in found.items()
    ]
    pairs = list(zip(found["even"], found["balanced"], strict=True))
    return {
        "rounds": args.rounds,
        "rows": rows,
        "balanced_to_even": {
            "measured": statistics.median(whole(b) / whole(a) for a, b in pairs),
            "simulated": statistics.median(simulated(b) / simulated(a) for a, b in pairs),
            "predicted": predicted["balanced"] / predicted["even"],
        },
    }


def size(text: str) -> tuple[int, int]:
    layers, _, width = text.partition("x")
    return int(layers), int(width)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=size, default=(4, 192), help="layers x width")
    parser.add_argument("--teacher", type=size, default=(12, 384), help="layers x width")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=5, help="rounds that time the parts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures there as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = compare(args, write_config(args, Path(folder)))
    for row in results["rows"]:
        print(
            f"{row['split']:<10} student {row['student_layers']}, teacher {row['teacher_layers']}: "
            f"measured {row['measured_seconds']:.3f} s, simulated / measured "
            f"{row['simulated_to_measured']:.3f}, predicted {row['predicted_seconds']:.3f} s"
        )
    gain = results["balanced_to_even"]
    print("balanced / even: " + ", ".join(f"{name} {value:.3f}" for name, value in gain.items()))
    write_json(args.json, {**vars(args), **results, "json": str(args.json)})


if __name__ == "__main__":
    main()
