"""What a run folder tells: its configuration, its logged steps, its last evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        name: what pictures and tables call it.
        config: config.yaml as plain values.
        records: the objects of metrics.jsonl, in order.
        evaluation: evaluation/evaluation.json (`taid-megatron evaluate RUN --out RUN/evaluation`),
            empty where there is none.
        status: run_status.json, empty where there is none.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    evaluation: dict[str, Any]
    status: dict[str, Any]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a logged figure, where it was logged."""
        found = [(r["step"], r[key]) for r in self.records if r.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, key: str) -> float | None:
        """The last value of a logged figure."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def steps_with(self, key: str) -> list[int]:
        """Steps whose record has that key: `skipped`, `resumed_from`, ..."""
        return [record["step"] for record in self.records if record.get(key) is not None]

    def held_out(self, key: str) -> float | None:
        """A figure of its last evaluation on held-out text."""
        return self.evaluation.get("held_out", {}).get(key)

    @property
    def linear_t(self) -> tuple[list[int], list[float]]:
        """The straight line that TAID's t never lags behind, over the logged steps."""
        steps = self.series("t")[0]
        taid, total = self.config["taid"], self.total_steps
        span = taid["t_end"] - taid["t_start"]
        return steps, [taid["t_start"] + span * min(1.0, (n - 1) / total) for n in steps]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, which the straight line ends with."""
        training = self.config["training"]
        if training.get("steps"):
            return training["steps"]
        # rounded up, as the trainer does
        return -(-training["tokens"] // (training["global_batch_size"] * training["seq_length"]))


def load(folder: Path, name: str | None = None) -> Run:
    """Read a run folder. Raises ValueError, in one line, where it is none or cannot be read."""
    config, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    for path in (config, metrics):
        if not path.is_file():
            raise ValueError(f"{folder} is no run folder: it has no {path.name}")
    lines = metrics.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break  # a process that was killed left it unfinished
            raise ValueError(f"{metrics}, line {number}: not a record of metrics") from None
        records.append(record)
    return Run(
        name=name or folder.name,
        folder=folder,
        config=yaml.safe_load(config.read_text(encoding="utf-8")),
        records=records,
        evaluation=_json(folder / "evaluation" / "evaluation.json"),
        status=_json(folder / "run_status.json"),
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file. Raises ValueError, in one line."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); write it again, or remove it") from None
