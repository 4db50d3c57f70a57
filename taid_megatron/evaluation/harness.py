"""Public suites through lm-eval, an extra of this package (`pip install 'taid-megatron[lm-eval]'`).

lm-eval runs transformers on a Hugging Face folder: a checkpoint is exported to a temporary one.
What is missing (the package, a task, a task's data) is said before anything is measured.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from taid_megatron.checkpointing import store
from taid_megatron.config.errors import UserError
from taid_megatron.conversion.commands import export_checkpoint


class Task(NamedTuple):
    """A task of lm-eval's, and which of its figures a suite reports."""

    name: str
    num_fewshot: int
    metric: str | None
    """As lm-eval names it, without filter; None: the first that it reports."""


SUITES: dict[str, tuple[Task, ...]] = {
    # Open LLM Leaderboard, first version
    "leaderboard": (
        Task("arc_challenge", 25, "acc_norm"),
        Task("hellaswag", 10, "acc_norm"),
        Task("mmlu", 5, "acc"),
        Task("truthfulqa_mc2", 0, "acc"),
        Task("winogrande", 5, "acc"),
        Task("gsm8k", 5, "exact_match"),
    ),
    # seven zero-shot tasks of SmolLM's evaluation
    "smollm": (
        Task("arc_easy", 0, "acc_norm"),
        Task("arc_challenge", 0, "acc_norm"),
        Task("commonsense_qa", 0, "acc"),
        Task("hellaswag", 0, "acc_norm"),
        Task("openbookqa", 0, "acc_norm"),
        Task("piqa", 0, "acc_norm"),
        Task("winogrande", 0, "acc"),
    ),
}


def tasks_of(suite: str) -> tuple[Task, ...]:
    """A suite's tasks; another name is a task of lm-eval's, `name` or `name:shots`."""
    if suite in SUITES:
        return SUITES[suite]
    name, colon, shots = suite.partition(":")
    if not name or (colon and not shots.isdecimal()):
        raise UserError(
            f"--suite {suite}: expected {', '.join(SUITES)}, or a task of lm-eval's as NAME or "
            "NAME:SHOTS"
        )
    return (Task(name, int(shots or 0), None),)


def check(suites: Sequence[str], folder: Path | None) -> None:
    """Raise UserError where a suite cannot run here; loads the tasks' data to know."""
    wanted = [task.name for suite in suites for task in tasks_of(suite)]
    if not wanted:
        return
    for module in ("lm_eval", "transformers"):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"--suite {suites[0]} needs the package {module}, which is not installed; pip "
                "install 'taid-megatron[lm-eval]'"
            )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"--suite {suites[0]} runs on one rank, here are {os.environ['WORLD_SIZE']}; start "
            "`taid-megatron evaluate` without torchrun for it"
        )
    manager = _manager(folder)
    for name in dict.fromkeys(wanted):
        if name not in manager.all_tasks:
            raise UserError(
                f"--suite: lm-eval knows no task {name}; give --tasks FOLDER with its file"
            )
        try:
            manager.load_task_or_group([name])
        except Exception as error:  # of datasets, its hub client, requests, ...
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"--suite: the data of task {name} are not to be had ({reason}); give --tasks "
                "FOLDER with a task file that names local files"
            ) from error


def run(
    suites: Sequence[str],
    folder: Path | None,
    model: Path,
    checkpoint: store.Checkpoint | None,
    tokenizer: Path | None,
) -> dict[str, Any]:
    """Per suite, per task: num_fewshot, metric, value."""
    with tempfile.TemporaryDirectory() as temporary:
        if checkpoint is not None:
            model = Path(temporary) / "model"
            export_checkpoint(checkpoint.path, model, tokenizer=tokenizer)
        return {
            suite: {task.name: _result(task, model, folder) for task in tasks_of(suite)}
            for suite in suites
        }


def _result(task: Task, model: Path, folder: Path | None) -> dict[str, Any]:
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "trust_remote_code": False},
        tasks=[task.name],
        num_fewshot=task.num_fewshot,
        task_manager=_manager(folder),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    figures = {
        name: value
        for name, value in found["results"][task.name].items()
        if isinstance(value, float) and "stderr" not in name
    }
    for name, value in figures.items():
        if task.metric is None or name.partition(",")[0] == task.metric:
            return {"num_fewshot": task.num_fewshot, "metric": name, "value": value}
    raise UserError(
        f"--suite: task {task.name} reports {', '.join(figures) or 'nothing'}, not {task.metric}; "
        "this version of lm-eval is another one than 0.4"
    )


def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))
