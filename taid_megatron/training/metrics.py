"""A run's numbers: metrics.jsonl, TensorBoard and the line on the screen, written by one rank."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from taid_megatron.config.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

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
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        cut_off(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = _open_events(folder / "tensorboard", resume_step) if tensorboard else None
        self._screen = _screen(total_steps, resume_step) if progress else None

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
        if self._screen is not None:
            self._screen.show(step, record)

    def close(self) -> None:
        """Write out what is still held. Closing again does nothing."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._screen is not None:
            self._screen.close()


def cut_off(path: Path, last_step: int) -> None:
    """Keep the records up to last_step of a metrics.jsonl; replaces the file at once or not at all.

    A last line that a killed process left unfinished goes too. A file with nothing to cut is left
    alone. Raises UserError where another line is no record.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        last = lines.pop()
        kept = [*_up_to(path, lines, last_step)]
        changed = bool(last)
    else:
        kept = [*_up_to(path, lines, last_step)]
        changed = len(kept) < len(lines)
    if not changed:
        return
    new = path.with_suffix(".jsonl.new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
