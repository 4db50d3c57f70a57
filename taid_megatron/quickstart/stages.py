"""The training runs of the quick start, as configurations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taid_megatron.config.checks import EngineAbilities
from taid_megatron.config.load import dump
from taid_megatron.config.schema import Config

VOCAB_SIZE = 2048
SEQ_LENGTH = 128
PIPELINE_STEPS = 20
SEED = 1234

METHODS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"loss": {"name": "cross_entropy"}},
    "forward-kl": {"loss": {"name": "forward_kl"}},
    "taid-linear": {"loss": {"name": "taid"}, "taid": {"adaptive": False}},
    "taid": {"loss": {"name": "taid"}},
}
"""What sets the students apart; the last one is exported."""


@dataclass(frozen=True)
class Sizes:
    """How much work: the defaults fit some ten minutes on two cores."""

    teacher_steps: int = 300
    student_steps: int = 100
    held_out_samples: int = 256
    seeds: int = 1


LONG = Sizes(teacher_steps=1200, student_steps=300, held_out_samples=512, seeds=3)
"""About an hour on two cores."""


@dataclass(frozen=True)
class Stage:
    """A training run of the quick start."""

    title: str
    config: Config
    ranks: int

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.run.folder

    @property
    def last_checkpoint(self) -> Path:
        """Where its last checkpoint is when it is done."""
        last = self.config.training.stop_at or self.config.training.steps
        return self.folder / "checkpoints" / f"step_{last:08d}"

    def records(self) -> list[dict[str, Any]]:
        """What the run logged."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def is_done(self) -> bool:
        """Whether its last checkpoint is there, made by this very configuration."""
        return (self.last_checkpoint / "state.json").is_file() and self.was_configured_so()

    def was_configured_so(self) -> bool:
        """Whether what is in the folder was made by this very configuration."""
        ran = self.folder / "config.yaml"
        return ran.is_file() and ran.read_text() == dump(self.config)


@dataclass(frozen=True)
class Plan:
    """All runs: the teacher, students by method and seed, and the check on a pipeline."""

    teacher: Stage
    students: dict[str, list[Stage]]
    pipeline: Stage | None
    """None on one GPU."""


def plan(folder: Path, sizes: Sizes, machine: EngineAbilities) -> Plan:
    """What the quick start trains in `folder` on this machine."""
    ranks = min(machine.gpu_count, 2) if machine.has_cuda else 2
    shape = {"vocab_size": VOCAB_SIZE, "num_attention_heads": 4, "num_query_groups": 2}
    common: dict[str, Any] = {
        "data": {"blend": str(folder / "data/train"), "validation": str(folder / "data/held_out")},
        "evaluation": {"samples": sizes.held_out_samples},
    }
    batch = {"global_batch_size": 16, "seq_length": SEQ_LENGTH, "precision": "fp32"}
    teacher = {
        **common,
        "run": {"folder": str(folder / "teacher")},
        "student": {"architecture": {**shape, **_width(256)}},
        "loss": {"name": "cross_entropy"},
        "training": {**batch, "micro_batch_size": 8, "steps": sizes.teacher_steps},
        "optimizer": {"lr": 2e-3, "warmup_steps": sizes.teacher_steps // 10},
    }
    student = {
        **common,
        "student": {"architecture": {**shape, **_width(128)}},
        "teacher": {"checkpoint": str(folder / "teacher")},
        "training": {**batch, "micro_batch_size": 4, "steps": sizes.student_steps},
        # so long a warm-up that the two layouts' rounding is not blown up in the steps compared
        "optimizer": {"lr": 3e-3, "warmup_steps": sizes.student_steps // 5},
        "parallel": {"tensor": ranks},
        "evaluation": {**common["evaluation"], "every": max(sizes.student_steps // 4, 1)},
    }

    def distil(method: str, seed: int) -> Stage:
        changes = METHODS[method]
        # in so short a run the paper's alpha of 5e-4 would never leave the straight line
        taid = {"t_start": 0.4, "alpha": min(3 / sizes.student_steps, 1.0)}
        name = f"student-{method}" + (f"-seed{seed}" if seed else "")
        config = {
            **student,
            **changes,
            "taid": {**taid, **changes.get("taid", {})},
            "run": {"folder": str(folder / name), "seed": SEED + seed},
        }
        return Stage(f"Student by {method}", Config.model_validate(config), ranks)

    taid = distil("taid", 0)
    pipeline = {
        **taid.config.model_dump(mode="json"),
        "run": {"folder": str(folder / "student-taid-pipeline"), "seed": SEED},
        "parallel": {"pipeline": ranks},
        "evaluation": common["evaluation"],
    }
    first_steps = min(PIPELINE_STEPS, sizes.student_steps)
    pipeline["training"] = {**pipeline["training"], "stop_at": first_steps}
    title = f"The first {first_steps} steps of TAID again, as a pipeline of two stages"
    return Plan(
        teacher=Stage("Teacher by cross-entropy", Config.model_validate(teacher), ranks),
        students={
            method: [distil(method, seed) for seed in range(sizes.seeds)] for method in METHODS
        },
        pipeline=Stage(title, Config.model_validate(pipeline), ranks) if ranks == 2 else None,
    )


def _width(hidden_size: int) -> dict[str, int]:
    return {"num_layers": 4, "hidden_size": hidden_size, "ffn_hidden_size": 2 * hidden_size}
