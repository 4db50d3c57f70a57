"""See the whole system work in minutes: a teacher trained and distilled on this machine.

Text is the standard library of the running Python, so nothing is downloaded. Every stage is one of
the public commands (`taid-data ...`, `taid-megatron train | evaluate | export`) in a process of its
own, and its files stay: a second call, or one after an interruption, goes on from what is there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from data_tools.manifest import write_atomically
from taid_megatron.config.checks import EngineAbilities, check
from taid_megatron.config.errors import UserError
from taid_megatron.config.load import dump
from taid_megatron.quickstart import results
from taid_megatron.quickstart.stages import VOCAB_SIZE, Plan, Sizes, Stage, plan
from taid_megatron.runtime.distributed import abilities

_FREE_BYTES = 500 * 2**20


class StageFailedError(RuntimeError):
    """A command of the quick start did not end with 0; its own output says why."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what} ended with exit code {code}; its message is above")
        self.code = code


def run(folder: Path, fresh: bool = False, sizes: Sizes | None = None) -> int:
    """Corpus, tokenizer, teacher, students, evaluation, export; summary.json and report.html.

    Returns the exit code: that of a stage that failed, or 1 where a check of the summary failed.
    Raises UserError where nothing can be written to the folder.
    """
    console = Console(highlight=False)
    machine = abilities()
    _require_room(folder)
    if fresh:
        _remove(folder)
    stages = plan(folder, sizes or Sizes(), machine)
    try:
        with _timed(folder) as seconds:
            _prepare_data(folder, console)
            for stage in _in_order(stages):
                _train(stage, console, machine)
            _evaluate(stages, console)
            exported = _export(folder, stages.students["taid"][0], console)
    except StageFailedError as error:
        console.print(f"[red]{error}[/red]")
        return error.code
    summary = results.summarize(stages, exported, round(seconds(), 1))
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    report = results.report(folder, stages, summary)
    results.show(summary, console)
    console.print(f"Summary: {folder / 'summary.json'}", soft_wrap=True)
    console.print(f"Report: {report.resolve()}", soft_wrap=True)
    return 0 if results.all_passed(summary) else 1


@contextmanager
def _timed(folder: Path) -> Iterator[Callable[[], float]]:
    """Gives the seconds that all calls for a folder took so far, interrupted ones included.

    One that is killed leaves nothing of its own.
    """
    path, started = folder / "seconds.json", time.perf_counter()
    before = json.loads(path.read_text()) if path.is_file() else 0.0

    def so_far() -> float:
        return before + time.perf_counter() - started

    try:
        yield so_far
    finally:
        write_atomically(path, json.dumps(so_far()).encode() + b"\n")


def _in_order(stages: Plan) -> list[Stage]:
    students = [stage for seeds in stages.students.values() for stage in seeds]
    last = [] if stages.pipeline is None else [stages.pipeline]
    return [stages.teacher, *students, *last]


# ---- data ----------------------------------------------------------------------------------------


def _require_room(folder: Path) -> None:
    """Refuse early what would fail late: a folder that cannot be written to, a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written to ({error.strerror}); give --folder another place"
        ) from error
    free = shutil.disk_usage(folder).free
    if free < _FREE_BYTES:
        raise UserError(
            f"{folder}: {free // 2**20} MiB are free there, {_FREE_BYTES // 2**20} are needed; "
            "make room, or give --folder another place"
        )


def _prepare_data(folder: Path, console: Console) -> None:
    corpus, model, data = folder / "corpus", folder / "tokenizer.model", folder / "data"

    def make(title: str, command: str, *arguments: object) -> None:
        console.rule(title)
        _call(f"taid-data {command}", "data_tools.cli", command, *arguments)

    if not (corpus / "held_out.jsonl").is_file():
        make("Collecting text: the sources of this Python's standard library", "corpus", corpus)
    if not model.is_file():
        options = ("--out", model, "--vocab-size", VOCAB_SIZE)
        title = f"Training a tokenizer of {VOCAB_SIZE:,} tokens"
        make(title, "tokenizer", corpus / "train.jsonl", *options)
    for part in ("train", "held_out"):
        if not (data / f"{part}.manifest.json").is_file():
            inputs = (corpus / f"{part}.jsonl", "--tokenizer", model, "--out", data / part)
            make(f"Turning {part}.jsonl into tokens", "prepare", *inputs)


def _call(what: str, module: str, *arguments: object, threads: int | None = None) -> None:
    line = [sys.executable, "-m", module, *map(str, arguments)]
    environment = dict(os.environ)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    if code := subprocess.run(line, env=environment, check=False).returncode:
        raise StageFailedError(what, code)


# ---- training ------------------------------------------------------------------------------------


def _train(stage: Stage, console: Console, machine: EngineAbilities) -> None:
    """Run `taid-megatron train` under torchrun, unless the stage is done."""
    if stage.is_done():
        console.print(f"{stage.title}: done before, in {stage.folder}", soft_wrap=True)
        return
    check(stage.config, stage.ranks, engine=machine)
    console.rule(stage.title)
    if stage.folder.exists() and not stage.was_configured_so():
        # what is there was made by other settings or stopped before its first checkpoint
        shutil.rmtree(stage.folder)
    path = stage.folder.parent / f"{stage.folder.name}.yaml"
    path.write_text(dump(stage.config))
    _call(
        f"taid-megatron train {path}",
        "torch.distributed.run",
        *("--standalone", "--nproc-per-node", stage.ranks, "-m", "taid_megatron", "train", path),
        threads=1 if machine.has_cuda else max((os.cpu_count() or 1) // stage.ranks, 1),
    )


# ---- evaluation and export -----------------------------------------------------------------------


def _evaluate(stages: Plan, console: Console) -> None:
    """`taid-megatron evaluate` on every student, two at once where there are two cores."""
    students = [stage for seeds in stages.students.values() for stage in seeds]
    open_ones = [stage for stage in students if not _is_newer(_evaluation(stage), stage)]
    if not open_ones:
        return
    console.rule("Held-out evaluation of every student")
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, 2)) as pool:
        list(pool.map(_evaluate_one, open_ones))


def _evaluate_one(stage: Stage) -> None:
    out = _evaluation(stage).parent
    line = ("evaluate", stage.folder, "--out", out)
    _call(f"taid-megatron evaluate {stage.folder}", "taid_megatron", *line, threads=1)


def _evaluation(stage: Stage) -> Path:
    return stage.folder / "evaluation" / "evaluation.json"


def _export(folder: Path, student: Stage, console: Console) -> Path:
    """The exported folder, and beside it what transformers made of it; the latter's path."""
    exported, found = folder / "exported", folder / "exported.json"
    model, texts = folder / "tokenizer.model", folder / "corpus" / "held_out.jsonl"
    if not _is_newer(exported / "config.json", student):
        console.rule("Exporting the TAID student as a Hugging Face model")
        shutil.rmtree(exported, ignore_errors=True)
        options = ("--out", exported, "--tokenizer", model)
        _call(
            "taid-megatron export", "taid_megatron", "export", student.folder, *options, threads=1
        )
        found.unlink(missing_ok=True)
    if not found.is_file():
        console.rule("Loading it with transformers")
        inputs = (student.last_checkpoint, exported, model, texts, found)
        module = "taid_megatron.quickstart.check_export"
        _call("the check of the exported model", module, *inputs)
    return found


def _is_newer(path: Path, stage: Stage) -> bool:
    """Whether a file is there and was made after the stage's last checkpoint."""
    done = stage.last_checkpoint / "state.json"
    return path.is_file() and path.stat().st_mtime >= done.stat().st_mtime


def _remove(folder: Path) -> None:
    """What the quick start itself made there, and nothing else."""
    folders: Sequence[Path] = [folder / name for name in ("corpus", "data", "teacher", "exported")]
    for path in (*folders, *folder.glob("student-*")):
        if path.is_dir():
            shutil.rmtree(path)
    for pattern in ("tokenizer.*", "*.yaml", "*.json", "report.html", "plots/*.png"):
        for file in folder.glob(pattern):
            file.unlink()
