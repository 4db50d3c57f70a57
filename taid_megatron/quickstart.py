"""See the whole system work in minutes: a teacher trained and distilled on this machine.

Text is the standard library of the running Python, so nothing is downloaded. Every stage is one of
the public commands (`taid-data ...`, `taid-megatron train ...`) in a process of its own, and its
files stay: a second call goes on from what is there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from taid_megatron.config.checks import EngineAbilities, check
from taid_megatron.config.load import dump
from taid_megatron.config.schema import Config
from taid_megatron.runtime.distributed import abilities

VOCAB_SIZE = 2048
SEQ_LENGTH = 128
PIPELINE_STEPS = 20
PIPELINE_TOLERANCE = 1e-4
"""Relative: the same losses on another layout, up to the order of sums."""


@dataclass(frozen=True)
class Sizes:
    """How much work: the defaults fit five minutes on two cores."""

    teacher_steps: int = 300
    student_steps: int = 100
    held_out_samples: int = 256


@dataclass(frozen=True)
class Stage:
    """A training run of the quick start."""

    name: str
    config: Config
    ranks: int

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.config.run.folder

    def records(self) -> list[dict[str, Any]]:
        """What the run logged."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def is_done(self) -> bool:
        """Whether its last checkpoint is there, made by this very configuration."""
        last = self.config.training.stop_at or self.config.training.steps
        done = self.folder / "checkpoints" / f"step_{last:08d}" / "state.json"
        ran = self.folder / "config.yaml"
        return done.is_file() and ran.is_file() and ran.read_text() == dump(self.config)


class StageFailedError(RuntimeError):
    """A command of the quick start did not end with 0; its own output says why."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what} ended with exit code {code}; its message is above")
        self.code = code


def run(folder: Path, fresh: bool = False, sizes: Sizes | None = None) -> int:
    """Corpus, tokenizer, teacher, TAID student, the same on a pipeline; summary.json.

    Returns the exit code: that of a stage that failed, or 1 where the pipeline's losses differ.
    """
    console = Console(highlight=False)
    sizes, machine = sizes or Sizes(), abilities()
    if fresh:
        _remove(folder)
    started = time.perf_counter()
    try:
        _prepare_data(folder, console)
        teacher, student, pipeline = _stages(folder, sizes, machine)
        _train(teacher, "Training the teacher by cross-entropy", console, machine)
        _train(student, "Distilling the student by TAID", console, machine)
        if pipeline is not None:
            title = f"The first {PIPELINE_STEPS} steps again, as a pipeline of two stages"
            _train(pipeline, title, console, machine)
    except StageFailedError as error:
        console.print(f"[red]{error}[/red]")
        return error.code
    summary = _summarize(teacher, student, pipeline)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    path = folder / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    _show(summary, console)
    console.print(f"Summary: {path}", soft_wrap=True)
    check = summary["pipeline_check"]
    return 0 if check is None or check["passed"] else 1


def _prepare_data(folder: Path, console: Console) -> None:
    corpus, model, data = folder / "corpus", folder / "tokenizer.model", folder / "data"
    if not (corpus / "held_out.jsonl").is_file():
        console.rule("Collecting text: the sources of this Python's standard library")
        _taid_data("corpus", corpus)
    if not model.is_file():
        console.rule(f"Training a tokenizer of {VOCAB_SIZE:,} tokens")
        _taid_data(
            *("tokenizer", corpus / "train.jsonl", "--out", model, "--vocab-size", VOCAB_SIZE)
        )
    for part in ("train", "held_out"):
        if not (data / f"{part}.manifest.json").is_file():
            console.rule(f"Turning {part}.jsonl into tokens")
            _taid_data(
                "prepare", corpus / f"{part}.jsonl", "--tokenizer", model, "--out", data / part
            )


def _taid_data(command: str, *arguments: object) -> None:
    line = [sys.executable, "-m", "data_tools.cli", command, *map(str, arguments)]
    if code := subprocess.run(line, check=False).returncode:
        raise StageFailedError(f"taid-data {command}", code)


def _stages(
    folder: Path, sizes: Sizes, machine: EngineAbilities
) -> tuple[Stage, Stage, Stage | None]:
    """The teacher's run, the student's, and the student's start on a pipeline of two stages."""
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
        "run": {"folder": str(folder / "student-taid")},
        "student": {"architecture": {**shape, **_width(128)}},
        "teacher": {"checkpoint": str(folder / "teacher")},
        "loss": {"name": "taid"},
        # in so short a run the paper's alpha of 5e-4 would never leave the straight line
        "taid": {"t_start": 0.4, "alpha": 0.03},
        "training": {**batch, "micro_batch_size": 4, "steps": sizes.student_steps},
        # so long a warm-up that the two layouts' rounding is not blown up in the steps compared
        "optimizer": {"lr": 3e-3, "warmup_steps": sizes.student_steps // 5},
        "parallel": {"tensor": ranks},
        "evaluation": {**common["evaluation"], "every": max(sizes.student_steps // 4, 1)},
    }
    first_steps = min(PIPELINE_STEPS, sizes.student_steps)
    pipeline = {
        **student,
        "run": {"folder": str(folder / "student-taid-pipeline")},
        "training": {**student["training"], "stop_at": first_steps},
        "parallel": {"pipeline": ranks},
        "evaluation": common["evaluation"],
    }
    return (
        Stage("teacher", Config.model_validate(teacher), ranks),
        Stage("student", Config.model_validate(student), ranks),
        Stage("pipeline", Config.model_validate(pipeline), ranks) if ranks == 2 else None,
    )


def _width(hidden_size: int) -> dict[str, int]:
    return {"num_layers": 4, "hidden_size": hidden_size, "ffn_hidden_size": 2 * hidden_size}


def _train(stage: Stage, title: str, console: Console, machine: EngineAbilities) -> None:
    """Run `taid-megatron train` under torchrun, unless the stage is done."""
    if stage.is_done():
        console.print(f"{title}: done before, in {stage.folder}", soft_wrap=True)
        return
    check(stage.config, stage.ranks, engine=machine)
    console.rule(title)
    if stage.folder.exists() and not _resumes(stage):
        # what is there was made by other settings or stopped before its first checkpoint
        shutil.rmtree(stage.folder)
    path = stage.folder.parent / f"{stage.folder.name}.yaml"
    path.write_text(dump(stage.config))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", str(stage.ranks), "-m", "taid_megatron", "train", str(path)]
    threads = 1 if machine.has_cuda else max((os.cpu_count() or 1) // stage.ranks, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if code := subprocess.run(line, env=environment, check=False).returncode:
        raise StageFailedError(f"taid-megatron train {path}", code)


def _resumes(stage: Stage) -> bool:
    ran = stage.folder / "config.yaml"
    return ran.is_file() and ran.read_text() == dump(stage.config)


def _summarize(teacher: Stage, student: Stage, pipeline: Stage | None) -> dict[str, Any]:
    records = student.records()
    held_out = [record for record in records if "held_out_kl" in record]
    steps = [record for record in records if "loss" in record]
    last = held_out[-1]
    return {
        "teacher": {
            "parameters": _parameters(teacher.config),
            "held_out_cross_entropy": last["held_out_teacher_cross_entropy"],
            "held_out_perplexity": last["held_out_teacher_perplexity"],
        },
        "student": {
            "parameters": _parameters(student.config),
            "held_out_cross_entropy": last["held_out_cross_entropy"],
            "held_out_perplexity": last["held_out_perplexity"],
            "held_out_kl": last["held_out_kl"],
            "held_out_kl_by_step": {str(r["step"]): r["held_out_kl"] for r in held_out},
            "t_first_and_last": [steps[0]["t"], steps[-1]["t"]],
        },
        "pipeline_check": None if pipeline is None else _compare(records, pipeline.records()),
        "folders": {stage.name: str(stage.folder) for stage in (teacher, student)},
    }


def _parameters(config: Config) -> int:
    """Weights of an untied, bias-free, gated architecture as the quick start builds it."""
    shape = config.student.architecture
    kv_width = shape.query_groups * shape.head_channels
    attention = shape.hidden_size * (2 * shape.hidden_size + 2 * kv_width)
    layer = attention + 3 * shape.hidden_size * shape.ffn_width + 2 * shape.hidden_size
    return shape.num_layers * layer + (2 * shape.vocab_size + 1) * shape.hidden_size


def _compare(tensor: list[dict[str, Any]], pipeline: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the losses on the two layouts are apart, over the steps that both have."""
    expected = {record["step"]: record["loss"] for record in tensor if "loss" in record}
    differences = [
        abs(record["loss"] - expected[record["step"]]) / abs(expected[record["step"]])
        for record in pipeline
        if "loss" in record
    ]
    worst = max(differences)
    return {
        "steps": len(differences),
        "max_relative_difference": worst,
        "tolerance": PIPELINE_TOLERANCE,
        "passed": worst <= PIPELINE_TOLERANCE,
    }


def _show(summary: dict[str, Any], console: Console) -> None:
    table = Table(title="Held-out text")
    table.add_column("")
    for name in ("parameters", "perplexity", "KL(teacher || ·), nats per token"):
        table.add_column(name, justify="right")
    teacher, student = summary["teacher"], summary["student"]
    table.add_row(
        "teacher", f"{teacher['parameters']:,}", f"{teacher['held_out_perplexity']:.2f}", "0"
    )
    table.add_row(
        "student",
        f"{student['parameters']:,}",
        f"{student['held_out_perplexity']:.2f}",
        f"{student['held_out_kl']:.4f}",
    )
    console.print(table)
    check = summary["pipeline_check"]
    if check is None:
        console.print("One GPU: the comparison of two layouts was left out.")
        return
    verdict = "the same losses" if check["passed"] else "[red]DIFFERENT losses[/red]"
    console.print(
        f"Tensor parallel and pipeline parallel give {verdict} over {check['steps']} steps "
        f"(largest relative difference {check['max_relative_difference']:.1e}, allowed "
        f"{check['tolerance']:.0e})."
    )


def _remove(folder: Path) -> None:
    """What the quick start itself made there, and nothing else."""
    for name in ("corpus", "data", "teacher", "student-taid", "student-taid-pipeline"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("tokenizer.*", "*.yaml", "summary.json"):
        for file in folder.glob(pattern):
            file.unlink()
