"""What came out: summary.json, the tables on the screen, plots and report.html."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable

from taid_megatron import __version__
from taid_megatron.config.schema import Config
from taid_megatron.quickstart.stages import Plan, Stage
from taid_megatron.reporting import page
from taid_megatron.reporting.plots import COLOURS, REFERENCE, Line, bars, lines
from taid_megatron.reporting.runs import Run, load
from taid_megatron.schedules import TAIDSchedule

PIPELINE_TOLERANCE = 1e-4
"""Relative: the same losses on another layout, up to the order of sums."""
LOGIT_TOLERANCE = 1e-4
"""Absolute, fp32: the exported model's logits."""
REPLAYED_ALPHAS = (5e-4, 1e-2, 1e-1)

# key of evaluation.json, words, how to write it
FIGURES = (
    ("perplexity", "perplexity", "{:.2f}"),
    ("kl", "KL", "{:.4f}"),
    ("top1_agreement", "top-1", "{:.1%}"),
    ("head_mass", "head", "{:.1%}"),
    ("tail_mass", "tail", "{:.2e}"),
)
LEGEND = (
    "KL: KL(teacher || student), nats per token. top-1: how often the most likely token is the "
    "teacher's. head, tail: probability on the teacher's 10 likeliest tokens, and on the 20% of "
    "the vocabulary that it ranks lowest."
)
_PIPED_COLUMNS = 120
_OF_TEACHER = {"kl": 0.0, "top1_agreement": 1.0}

Summary = dict[str, Any]


def summarize(stages: Plan, exported: Path, seconds: float) -> Summary:
    """All figures, as they go into summary.json; seconds: over all calls."""
    evaluations = {
        method: [_held_out(stage) for stage in seeds] for method, seeds in stages.students.items()
    }
    any_student = next(iter(evaluations.values()))[0]
    taid = stages.students["taid"][0]
    steps = [record for record in taid.records() if "loss" in record]
    pipeline = None
    if stages.pipeline is not None:
        pipeline = _compare(taid.records(), stages.pipeline.records())
    export = json.loads(exported.read_text())
    close = export["max_logit_difference"] <= LOGIT_TOLERANCE
    return {
        "teacher": {
            "parameters": _parameters(stages.teacher.config),
            **{key: any_student.get(f"teacher_{key}", _OF_TEACHER.get(key)) for key, *_ in FIGURES},
        },
        "students": {
            method: {
                "parameters": _parameters(stages.students[method][0].config),
                "seeds": len(found),
                **{key: _spread([values[key] for values in found]) for key, *_ in FIGURES},
            }
            for method, found in evaluations.items()
        },
        "t_first_and_last": [steps[0]["t"], steps[-1]["t"]],
        "pipeline_check": pipeline,
        "export_check": {
            **export,
            "tolerance": LOGIT_TOLERANCE,
            "passed": close and not export["texts_with_other_ids"],
        },
        "machine": {
            "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "taid_megatron": __version__,
        },
        "seconds": seconds,
    }


def all_passed(summary: Summary) -> bool:
    """Whether both checks of the summary hold."""
    pipeline = summary["pipeline_check"]
    return summary["export_check"]["passed"] and (pipeline is None or pipeline["passed"])


def _held_out(stage: Stage) -> dict[str, float]:
    return json.loads((stage.folder / "evaluation" / "evaluation.json").read_text())["held_out"]


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, and standard deviation where there is more than one."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


def _parameters(config: Config) -> int:
    """Weights of an untied, bias-free, gated architecture as the quick start builds it."""
    shape = config.student.architecture
    assert shape is not None
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


# ---- tables --------------------------------------------------------------------------------------


def table(summary: Summary) -> page.Table:
    """Teacher and students on held-out text."""
    teacher = summary["teacher"]
    rows = [
        ["teacher", _millions(teacher), *(form.format(teacher[key]) for key, _, form in FIGURES)]
    ]
    for method, found in summary["students"].items():
        cells = [_cell(found[key], form) for key, _, form in FIGURES]
        rows.append([method, _millions(found), *cells])
    return page.Table(["", "weights", *(words for _, words, _ in FIGURES)], rows)


def _millions(model: Summary) -> str:
    return f"{model['parameters'] / 1e6:.2f} M"


def _cell(value: dict[str, float | None], form: str) -> str:
    text = form.format(value["mean"])
    deviation = value["deviation"]
    return text if deviation is None else f"{text} ± {form.format(deviation)}"


def verdicts(summary: Summary) -> list[str]:
    """The two checks, in words."""
    check, export = summary["pipeline_check"], summary["export_check"]
    found = ["One GPU: the comparison of two layouts was left out."]
    if check is not None:
        verdict = "the same losses" if check["passed"] else "DIFFERENT losses"
        found = [
            f"Tensor parallel and pipeline parallel give {verdict} over {check['steps']} steps "
            f"(largest relative difference {check['max_relative_difference']:.1e}, allowed "
            f"{check['tolerance']:.0e})."
        ]
    verdict = "the same model" if export["passed"] else "ANOTHER model"
    ids = len(export["texts_with_other_ids"])
    found.append(
        f"transformers loads the exported student as {verdict} (largest difference of logits "
        f"{export['max_logit_difference']:.1e}, allowed {export['tolerance']:.0e}; token ids "
        f"differ in {ids} of {export['texts']} texts)."
    )
    return found


def show(summary: Summary, console: Console) -> None:
    """Print the table, the checks and a continuation."""
    own = table(summary)
    shown = RichTable(title="Held-out text")
    for number, name in enumerate(own.header):
        shown.add_column(name, justify="right" if number else "left")
    for row in own.rows:
        shown.add_row(*row)
    width = console.width
    if not console.is_terminal:  # a pipe counts as 80 columns, which would tear the cells apart
        console.width = max(width, _PIPED_COLUMNS)
    console.print(shown)
    console.width = width
    console.print(LEGEND)
    for line in verdicts(summary):
        console.print(line)
    console.print("A continuation by the exported student:")
    console.print(summary["export_check"]["continuation"], markup=False, soft_wrap=True)


# ---- plots and page ------------------------------------------------------------------------------


def report(folder: Path, stages: Plan, summary: Summary) -> Path:
    """Write plots/*.png and report.html; the page's path."""
    runs = {method: load(seeds[0].folder, method) for method, seeds in stages.students.items()}
    pictures = {
        "interpolation": (
            _interpolation(runs["taid"], runs["taid-linear"]),
            "t over the steps. Dashed: other alpha, replayed on the objectives that this run had; "
            "small ones lie on the straight line.",
        ),
        "objectives": (
            _objectives(runs),
            "What TAID lowers starts small, for its target starts near the student; where t is 1 "
            "it is the KL to the teacher. Forward KL lowers that from the start.",
        ),
        "held_out": (_curves(runs), "Distance to the teacher on held-out text while training."),
        "head": (
            _masses(summary, "head_mass", logarithmic=False),
            "Probability on the teacher's 10 likeliest tokens.",
        ),
        "tail": (
            _masses(summary, "tail_mass", logarithmic=True),
            "Probability on the 20% of the vocabulary that the teacher ranks lowest.",
        ),
    }
    (folder / "plots").mkdir(exist_ok=True)
    for name, (png, _) in pictures.items():
        (folder / "plots" / f"{name}.png").write_bytes(png)
    machine = summary["machine"]
    path = folder / "report.html"
    page.write(
        path,
        "taid-megatron quick start",
        [
            page.Section(
                "Held-out text",
                [
                    table(summary),
                    page.Text(LEGEND),
                    page.Text(
                        "Small models, few steps: the table shows that the parts work together, "
                        "not how good the methods are. "
                        + _seeds(summary)
                        + f" {machine['device']}, {machine['cores']} cores, torch "
                        f"{machine['torch']}; {summary['seconds']:.0f} s over all calls."
                    ),
                ],
            ),
            page.Section(
                "While training", [page.Picture(png, caption) for png, caption in pictures.values()]
            ),
            page.Section("Checks", [page.Text(line) for line in verdicts(summary)]),
            page.Section(
                "A continuation by the exported student",
                [page.Text(summary["export_check"]["continuation"], verbatim=True)],
            ),
        ],
    )
    return path


def _seeds(summary: Summary) -> str:
    count = next(iter(summary["students"].values()))["seeds"]
    if count == 1:
        return "One seed: differences between methods may be chance (--seeds 3 tells)."
    return f"Mean and standard deviation over {count} seeds."


def _interpolation(taid: Run, linear: Run) -> bytes:
    steps, values = taid.series("t")
    own = taid.config["taid"]
    curves = [
        Line(f"TAID, alpha {own['alpha']:g}", steps, values),
        Line("straight line", *linear.series("t")),
    ]
    objectives = taid.series("objective")[1]
    total = taid.config["training"]["steps"]
    for alpha in REPLAYED_ALPHAS:
        schedule = TAIDSchedule(own["t_start"], own["t_end"], alpha, own["beta"], total)
        replayed = [schedule.t, *(schedule.update(value) for value in objectives)][:-1]
        curves.append(Line(f"alpha {alpha:g}, replayed", steps, replayed, dashed=True))
    return lines("Interpolation", "optimizer step", "t", curves)


def _objectives(runs: dict[str, Run]) -> bytes:
    curves = [
        Line("taid: its objective", *runs["taid"].series("objective")),
        Line("taid: KL to the teacher", *runs["taid"].series("kl"), dashed=True),
        Line("forward-kl: its objective", *runs["forward-kl"].series("objective")),
    ]
    return lines("Objectives", "optimizer step", "nats per token", curves)


def _curves(runs: dict[str, Run]) -> bytes:
    curves = [Line(method, *run.series("held_out_kl")) for method, run in runs.items()]
    return lines("Held-out distance", "optimizer step", "KL(teacher || student), nats", curves)


def _masses(summary: Summary, key: str, *, logarithmic: bool) -> bytes:
    students = summary["students"]
    values = [summary["teacher"][key], *(found[key]["mean"] for found in students.values())]
    deviations = [found[key]["deviation"] for found in students.values()]
    spread = None if None in deviations else [0.0, *deviations]
    title = {"head_mass": "Mass on the head", "tail_mass": "Mass on the tail"}[key]
    names = ["teacher", *students]
    # a student's bar has the colour of its line in _curves
    colours = (REFERENCE, *COLOURS)
    return bars(
        title, "probability", names, values, spread, logarithmic=logarithmic, colours=colours
    )
