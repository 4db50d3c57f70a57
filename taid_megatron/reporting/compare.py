"""`taid-megatron report RUN...`: runs beside each other, as a page, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taid_megatron.reporting.page import Picture, Section, Table, Text, write
from taid_megatron.reporting.plots import COLOURS, MANY, REFERENCE, Line, bars, lines
from taid_megatron.reporting.runs import Run, load

# key of metrics.jsonl, words of the table, how to write it
_FIGURES = (
    ("step", "steps", "{:,.0f}"),
    ("loss", "last loss", "{:.4f}"),
    ("kl", "last KL", "{:.4f}"),
    ("held_out_kl", "held-out KL", "{:.4f}"),
    ("held_out_perplexity", "held-out perplexity", "{:.2f}"),
    ("head_mass", "head", "{:.1%}"),
    ("tail_mass", "tail", "{:.2e}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)
_NATS = "KL(teacher || student), nats per token"
# title, y axis, key, caption; a picture is left out where no run has its figure
_PICTURES = (
    (
        *("What is optimised", "loss, nats per token", "loss"),
        "The loss that each run lowers. Different losses are different quantities: compare them "
        "by the distance to the teacher.",
    ),
    (
        *("Distance to the teacher", _NATS, "kl"),
        "Forward KL on the training batches, whatever the run's loss is.",
    ),
    (
        *("Held-out distance to the teacher", _NATS, "held_out_kl"),
        "The same on held-out text.",
    ),
    (
        *("Held-out perplexity", "perplexity", "held_out_perplexity"),
        "Of the students; dashed: of their teacher.",
    ),
    (
        *("Learning rate", "learning rate", "lr"),
        "As it was at each step.",
    ),
    (
        *("Gradient norm", "global norm, before clipping", "grad_norm"),
        "Spikes here often come before spikes of the loss.",
    ),
    (
        *("Throughput", "tokens per second, all ranks", "tokens_per_second"),
        "Of each logged step, waiting for data included.",
    ),
)
# title, key of evaluation.json, caption, whether the axis is logarithmic
_MASSES = (
    ("Mass on the head", "head_mass", "Probability on the teacher's 10 likeliest tokens.", False),
    (
        *("Mass on the tail", "tail_mass"),
        "Probability on the 20% of the vocabulary that the teacher ranks lowest.",
        True,
    ),
)
# key of metrics.jsonl, words of the table
_EVENTS = (
    ("skipped", "skipped steps"),
    ("loss_spike", "loss spikes"),
    ("resumed_from", "restarts"),
    ("config_changes", "changed settings"),
    ("checkpoint_faults", "damaged checkpoints passed over"),
)
_LISTED = 5
"""Steps of an event that are named; of more the count is given."""


def report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write OUT (HTML) and the same table beside it as .md and .json; their paths.

    Raises ValueError, in one line, where a folder is no run.
    """
    names = _names(folders)
    runs = [load(folder, name) for folder, name in zip(folders, names, strict=True)]
    table = summary_table(runs)
    sections = [
        Section("Runs", [table, Text(f"Folders: {', '.join(str(run.folder) for run in runs)}")]),
        Section("What happened", [events_table(runs)]),
        Section("Over the steps", list(pictures(runs))),
    ]
    write(out, "Comparison of runs", sections)
    markdown, values = out.with_suffix(".md"), out.with_suffix(".json")
    markdown.write_text(
        f"{table.markdown()}\n\n{events_table(runs).markdown()}\n", encoding="utf-8"
    )
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
    return Table(["run", "loss", *(words for _, words, _ in _FIGURES)], rows, left=(0, 1))


def events_table(runs: Sequence[Run]) -> Table:
    """One row per run: how it ended, and at which steps something happened to it."""
    rows = [
        [run.name, _state(run), *(_steps(run.steps_with(key)) for key, _ in _EVENTS)]
        for run in runs
    ]
    header = ["run", "state", *(words for _, words in _EVENTS)]
    return Table(header, rows, left=range(len(header)))


def _state(run: Run) -> str:
    """How run_status.json says it ended; a run that was killed still says that it runs."""
    status = run.status
    reason = status.get("error") or status.get("signal")
    state = str(status.get("state", "not known"))
    return f"{state}: {reason[:60]}" if reason else state


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "none"
    named = ", ".join(map(str, steps[:_LISTED]))
    more = f", {len(steps) - _LISTED} more" if len(steps) > _LISTED else ""
    return f"{len(steps)}: step {named}{more}"


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """One picture per figure that some run has logged, and t beside its straight line."""
    found = []
    colours = _colours(runs)
    for title, y_label, key, caption in _PICTURES:
        curves = [
            Line(run.name, *run.series(key), colour=colours[run.name])
            for run in runs
            if run.series(key)[0]
        ]
        if not curves:
            continue
        if key == "held_out_perplexity":
            curves += _teachers(runs)
        if any(len(curve.x) > MANY for curve in curves):
            caption += " Thin: every step; thick: means of a hundredth of the run."
        found.append(Picture(lines(title, "optimizer step", y_label, curves), caption))
        if key == "kl":
            found += _interpolation(runs, colours)
    return found + _masses(runs, colours)


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    """A run has one colour in all pictures."""
    return {run.name: COLOURS[number % len(COLOURS)] for number, run in enumerate(runs)}


def _interpolation(runs: Sequence[Run], colours: dict[str, str]) -> list[Picture]:
    """t of the runs that have one, each straight line in its runs' colour."""
    runs = [run for run in runs if run.series("t")[0]]
    if not runs:
        return []
    curves = [Line(run.name, *run.series("t"), colour=colours[run.name]) for run in runs]
    taids = [(run.config["taid"], run.total_steps) for run in runs]
    if len({(taid["t_start"], taid["t_end"], steps) for taid, steps in taids}) == 1:
        longest = max((run.linear_t for run in runs), key=lambda line: line[0][-1])
        curves.append(Line("straight line", *longest, dashed=True, colour=REFERENCE))
    else:
        curves += [
            Line(f"{run.name}: straight line", *run.linear_t, dashed=True, colour=colours[run.name])
            for run in runs
        ]
    caption = "The teacher's share in the target's logits. Dashed: the straight line from t_start "
    png = lines("Interpolation t", "optimizer step", "t", curves)
    return [Picture(png, caption + "to t_end that it never lags behind.")]


def _teachers(runs: Sequence[Run]) -> list[Line]:
    """The teachers' held-out perplexity, once where all runs have the same."""
    found = {
        run.name: run.series("held_out_teacher_perplexity")
        for run in runs
        if run.series("held_out_teacher_perplexity")[0]
    }
    values = [round(y[-1], 6) for _, y in found.values()]
    if len(set(values)) == 1:
        longest = max(found.values(), key=lambda series: series[0][-1])
        return [Line("teacher", *longest, dashed=True, colour=REFERENCE)]
    return [
        Line(f"{name}: teacher", *series, dashed=True, colour=REFERENCE)
        for name, series in found.items()
    ]


def _masses(runs: Sequence[Run], colours: dict[str, str]) -> list[Picture]:
    """Head and tail of the runs that `taid-megatron evaluate` has measured against a teacher."""
    found = []
    for title, key, caption, logarithmic in _MASSES:
        students = {run.name: value for run in runs if (value := run.held_out(key)) is not None}
        if not students:
            continue
        teachers: dict[float, str] = {}
        for run in runs:
            value = run.held_out(f"teacher_{key}")
            if value is not None and run.name in students:
                teachers.setdefault(value, run.name)
        several = len(teachers) > 1
        names = [f"teacher of {name}" if several else "teacher" for name in teachers.values()]
        png = bars(
            title,
            "probability",
            [*names, *students],
            [*teachers, *students.values()],
            logarithmic=logarithmic,
            colours=[*[REFERENCE] * len(names), *(colours[name] for name in students)],
        )
        found.append(Picture(png, f"{caption} From the last `taid-megatron evaluate` of each run."))
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
    value = _figure(run, key)
    return "" if value is None else form.format(value)


def _figure(run: Run, key: str) -> float | None:
    """The last value logged; of the masses that of the last evaluation."""
    return run.held_out(key) if key.endswith("_mass") else run.last(key)


def _values(run: Run) -> dict[str, Any]:
    figures = {key: _figure(run, key) for key, _, _ in _FIGURES}
    events = {words.replace(" ", "_"): run.steps_with(key) for key, words in _EVENTS}
    about = {"run": run.name, "folder": str(run.folder), "loss": run.config["loss"]}
    return {**about, **figures, "state": run.status.get("state"), **events}
