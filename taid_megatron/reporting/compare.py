"""`taid-megatron report RUN...`: runs beside each other, as a page, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taid_megatron.reporting.page import Picture, Section, Table, Text, write
from taid_megatron.reporting.plots import Line, lines
from taid_megatron.reporting.runs import Run, load

# key of metrics.jsonl, words of the table, how to write it
_FIGURES = (
    ("step", "steps", "{:,.0f}"),
    ("loss", "last loss", "{:.4f}"),
    ("kl", "last KL", "{:.4f}"),
    ("held_out_kl", "held-out KL", "{:.4f}"),
    ("held_out_perplexity", "held-out perplexity", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)
# title, y axis, keys; a picture is left out where no run has its figure
_PICTURES = (
    ("What is optimised", "loss, nats per token", "loss"),
    ("Distance to the teacher", "KL(teacher || student), nats per token", "kl"),
    ("Held-out distance to the teacher", "KL(teacher || student), nats per token", "held_out_kl"),
    ("Held-out perplexity", "perplexity", "held_out_perplexity"),
    ("Learning rate", "learning rate", "lr"),
    ("Gradient norm before clipping", "norm", "grad_norm"),
    ("Throughput", "tokens per second, all ranks", "tokens_per_second"),
)


def report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write OUT (HTML) and the same table beside it as .md and .json; their paths.

    Raises ValueError, in one line, where a folder is no run.
    """
    names = _names(folders)
    runs = [load(folder, name) for folder, name in zip(folders, names, strict=True)]
    table = summary_table(runs)
    sections = [
        Section("Runs", [table, Text(f"Folders: {', '.join(str(run.folder) for run in runs)}")]),
        Section("Over the steps", list(pictures(runs))),
    ]
    write(out, "Comparison of runs", sections)
    markdown, values = out.with_suffix(".md"), out.with_suffix(".json")
    markdown.write_text(table.markdown() + "\n", encoding="utf-8")
    values.write_text(json.dumps([_values(run) for run in runs], indent=1) + "\n")
    return [out, markdown, values]


def summary_table(runs: Sequence[Run]) -> Table:
    """One row per run, its last figures."""
    rows = [
        [
            run.name,
            run.config["loss"]["name"],
            *(_cell(run, key, form) for key, _, form in _FIGURES),
        ]
        for run in runs
    ]
    return Table(["run", "loss", *(words for _, words, _ in _FIGURES)], rows)


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """One picture per figure that some run has logged, and t beside its straight line."""
    found = []
    for title, y_label, key in _PICTURES:
        curves = [Line(run.name, *run.series(key)) for run in runs if run.series(key)[0]]
        if curves:
            found.append(Picture(lines(title, "optimizer step", y_label, curves), title))
    with_t = [run for run in runs if run.series("t")[0]]
    if with_t:
        curves = [Line(run.name, *run.series("t")) for run in with_t]
        curves += [Line(f"{run.name}: straight line", *run.linear_t, dashed=True) for run in with_t]
        png = lines("Interpolation", "optimizer step", "t", curves)
        found.insert(2, Picture(png, "TAID's t over the steps, beside the straight line"))
    return found


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts; as much of the paths as it takes to tell them apart."""
    if not folders:
        raise ValueError("no run folder given")
    resolved = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a run folder is given twice: {', '.join(map(str, folders))}")


def _cell(run: Run, key: str, form: str) -> str:
    value = run.last(key)
    return "" if value is None else form.format(value)


def _values(run: Run) -> dict[str, Any]:
    figures = {key: run.last(key) for key, _, _ in _FIGURES}
    return {"run": run.name, "folder": str(run.folder), "loss": run.config["loss"], **figures}
