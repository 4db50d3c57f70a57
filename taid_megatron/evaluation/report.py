"""Results as one table: on the screen, as Markdown, and all of them as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_tools.manifest import write_atomically

Row = tuple[str, str, str]

# (section, key, words, how to write it); the teacher's figure is at teacher_<key>
_FIGURES = (
    ("held_out", "perplexity", "held-out perplexity", "{:.4g}"),
    ("held_out", "kl", "KL(teacher || student), nats per token", "{:.4f}"),
    ("held_out", "top1_agreement", "most likely token is the teacher's", "{:.2%}"),
    ("held_out", "head_mass", "mass on the teacher's 10 likeliest tokens", "{:.2%}"),
    ("held_out", "tail_mass", "mass on the 20% it ranks lowest", "{:.2e}"),
    ("last_word", "accuracy", "last word guessed", "{:.2%}"),
    ("last_word", "perplexity", "last word's perplexity", "{:.4g}"),
)


def rows(results: dict[str, Any]) -> list[Row]:
    """(figure, the model's, the teacher's) of all that was measured."""
    found = []
    for section, key, words, form in _FIGURES:
        values = results.get(section, {})
        if key in values:
            teacher = values.get(f"teacher_{key}")
            found.append((words, form.format(values[key]), _cell(teacher, form)))
    for suite, tasks in results.get("suites", {}).items():
        for task, figures in tasks.items():
            what = f"{suite}: {task}, {figures['num_fewshot']}-shot, {figures['metric']}"
            found.append((what, f"{figures['value']:.2%}", ""))
    return found


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=results["model"])
    for name in ("", "model", "teacher"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows(results):
        table.add_row(*row)
    Console(highlight=False).print(table)


def write(results: dict[str, Any], folder: Path) -> None:
    """evaluation.md, then evaluation.json, each whole or not at all: where it is, both are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {results['model']}", "", "| | model | teacher |", "| --- | ---: | ---: |"]
    lines += [
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
        for row in rows(results)
    ]
    write_atomically(folder / "evaluation.md", "\n".join([*lines, ""]).encode())
    write_atomically(folder / "evaluation.json", json.dumps(results, indent=1).encode() + b"\n")


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
