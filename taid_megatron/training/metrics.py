"""A run's numbers: metrics.jsonl, TensorBoard and the line on the screen, written by one rank."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from taid_megatron.config.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from taid_megatron.training.wandb_log import WandbLog

Value = float | int | str | bool | None

# What a person is shown of a record, in this order; all of it is in metrics.jsonl.
_SHOWN = {
    "loss": "loss {:.4f}",
    "kl": "kl {:.4f}",
    "t": "t {:.3f}",
    "lr": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "held_out_kl": "held-out kl {:.4f}",
    "held_out_perplexity": "held-out perplexity {:.2f}",
}


class MetricsWriter:
    """Writes each record where the run's user looks for it. Use on one rank; close() at the end.

    folder: the run's; metrics.jsonl and tensorboard/ are made in it. tensorboard: write events.
    progress: show records, as a bar on a terminal and as a line of text elsewhere. total_steps:
    where the run ends, for the time left. resume_step: the step the run goes on from, 0 at the
    start; what an interrupted process logged after it is cut off, for it will be logged again.
    Raises UserError where metrics.jsonl cannot be read.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        tensorboard: bool,
        progress: bool,
        total_steps: int,
        resume_step: int = 0,
        wandb: WandbLog | None = None,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        cut_off(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = _open_events(folder / "tensorboard", resume_step) if tensorboard else None
        self._screen = _screen(total_steps, resume_step) if progress else None
        self._wandb = wandb

    def log(self, record: Mapping[str, Value]) -> None:
        """Write one record: flat, its `step` an int, the rest figures of that step.

        A float that is not finite is written as null and named in `non_finite`, so that each line
        stays valid JSON. Raises ValueError without a step, TypeError for a value of another type.
        """
        step = record.get("step")
        if not isinstance(step, int):
            raise ValueError(f"a record needs its step, an int: {dict(record)}")
        self._file.write(_json_line(record))
        self._file.flush()
        if self._events is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(record)
        if self._screen is not None:
            self._screen.show(step, record)

    def close(self) -> None:
        """Write out what is still held. Closing again does nothing."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None
        if self._screen is not None:
            self._screen.close()


def cut_off(path: Path, last_step: int) -> None:
    """Keep a metrics.jsonl's records up to last_step; it is replaced whole or not at all.

    A last line that a killed process left unfinished goes too. A file with nothing to cut is left
    alone. Raises UserError where another line is no record.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    finished = [line for line in lines if line.endswith("\n")]
    steps = [_step_of(line, path, number) for number, line in enumerate(finished, start=1)]
    kept = [line for line, step in zip(finished, steps, strict=True) if step <= last_step]
    if len(kept) == len(lines):
        return
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _step_of(line: str, path: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}, line {number}: not a record of metrics: {line.strip()[:60]!r}; mend the line "
            "or move the file away"
        ) from None


def _json_line(record: Mapping[str, Value]) -> str:
    line: dict[str, Value | list[str]] = {}
    non_finite = []
    for name, value in record.items():
        if not (value is None or isinstance(value, (int, float, str))):
            raise TypeError(f"{name} is a {type(value).__name__}: records hold plain numbers, text")
        if isinstance(value, float) and not math.isfinite(value):
            non_finite.append(name)
            value = None
        line[name] = value
    if non_finite:
        line["non_finite"] = list(non_finite)
    return json.dumps(line) + "\n"


def _open_events(folder: Path, resume_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an interrupted process wrote from that step on
    return SummaryWriter(str(folder), purge_step=resume_step + 1, flush_secs=10)


def _screen(total_steps: int, resume_step: int) -> _Lines:
    kind = _Bar if sys.stdout.isatty() else _Lines
    return kind(total_steps, resume_step)


class _Lines:
    """A line of text per record, as a log file or a pipe wants it."""

    def __init__(self, total_steps: int, resume_step: int) -> None:
        self.total_steps = total_steps
        self.resume_step = resume_step
        self._started = time.monotonic()

    def show(self, step: int, record: Mapping[str, Value]) -> None:
        print(f"step {step}/{self.total_steps}  {self.figures(step, record)}", flush=True)

    def close(self) -> None:
        """Nothing is held."""

    def figures(self, step: int, record: Mapping[str, Value]) -> str:
        """The figures of a record that are shown, and the time left at the mean pace so far."""
        parts = [
            text.format(record[name]) for name, text in _SHOWN.items() if _is_number(record, name)
        ]
        done, left = step - self.resume_step, self.total_steps - step
        if done > 0 and left > 0:
            seconds = (time.monotonic() - self._started) / done * left
            parts.append(f"time left {_clock(seconds)}")
        return "  ".join(parts)


class _Bar(_Lines):
    """A bar that stays on the last line of a terminal; other output goes above it."""

    def __init__(self, total_steps: int, resume_step: int) -> None:
        super().__init__(total_steps, resume_step)
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            auto_refresh=False,  # it changes with a record; a thread would take CPU time
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=resume_step, figures=""
        )
        self._progress.start()

    def show(self, step: int, record: Mapping[str, Value]) -> None:
        figures = self.figures(step, record)
        self._progress.update(self._task, completed=step, figures=figures, refresh=True)

    def close(self) -> None:
        self._progress.stop()


def _is_number(record: Mapping[str, Value], name: str) -> bool:
    return isinstance(record.get(name), (int, float))


def _clock(seconds: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any: 0:31, 2:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
