"""A plan as tables for the terminal."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from taid_megatron.planning.doctor import Finding

_GIB = 2**30


def tables(figures: dict[str, Any]) -> list[Table]:
    """The plan's tables, in the order in which they are read."""
    made = [_overview(figures), _stages(figures), _memory(figures), _time(figures)]
    return [*made, _layouts(figures)]


def show(figures: dict[str, Any]) -> None:
    """Print them; plain text where the output is not a terminal."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for table in tables(figures):
        console.print(table)
    console.print(
        f"Times are computed, not measured: matrix products at {figures['assumed_efficiency']:.0%} "
        "of the peak (--efficiency). Memory: "
        f"{figures['usable_share_of_memory']:.0%} of a GPU is planned with."
    )
    if not figures["fits"]:
        console.print(
            "This layout does NOT fit; the ranked layouts below their title do or say so."
        )


def show_findings(findings: list[Finding]) -> None:
    """Print the doctor's table."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table()
    for column in ("", "state", "found", "mend"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, finding.state, escape(finding.found), escape(finding.mend))
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _overview(figures: dict[str, Any]) -> Table:
    batch, counts = figures["batch"], figures["parameters"]
    table = _table(f"Run on {figures['gpus']} x {figures['gpu']['name']}", "", "")
    table.add_row("student", f"{counts['student']:,} parameters")
    if counts["teacher"] is not None:
        table.add_row("teacher", f"{counts['teacher']:,} parameters")
    table.add_row(
        "batch",
        f"{batch['global_batch_size']} sequences = {batch['data_parallel_size']} replicas x "
        f"{batch['micro_batches_per_step']} micro-batches x {batch['micro_batch_size']}",
    )
    table.add_row("length", f"{batch['steps']:,} steps, {batch['tokens']:,} tokens")
    return table


def _stages(figures: dict[str, Any]) -> Table:
    table = _table(
        *("Stages (parameters per rank; seconds per micro-batch)", "stage", "pipeline rank"),
        *("student layers", "parameters", "teacher layers", "parameters", "forward", "backward"),
    )
    for row in figures["stages"]:
        values = [
            *(row["stage"], row["pipeline_rank"], row["student_layers"]),
            f"{row['student_parameters_per_rank']:,}",
            "-" if row["teacher_layers"] is None else row["teacher_layers"],
            "-" if row["teacher_layers"] is None else f"{row['teacher_parameters_per_rank']:,}",
            f"{row['forward_seconds']:.4g}",
            f"{row['backward_seconds']:.4g}",
        ]
        table.add_row(*map(str, values))
    return table


def _memory(figures: dict[str, Any]) -> Table:
    ranks = figures["memory"]
    names = [f"pipeline rank {rank}" for rank in range(len(ranks))]
    table = _table("Memory per GPU, GiB", "part", *names)
    for part in ranks[0]:
        label = part.replace("_", " ").replace("fp8", "FP8")
        table.add_row(label, *(f"{rank[part] / _GIB:.2f}" for rank in ranks))
    for kind, size in figures["logits"].items():
        blanks = [""] * (len(ranks) - 1)
        table.add_row(f"logits and loss, {kind}", *blanks, f"{size / _GIB:.2f}")
    return table


def _time(figures: dict[str, Any]) -> Table:
    time, traffic = figures["time"], figures["traffic"]
    table = _table("One optimizer step", "", "")
    for name in ("seconds", "compute", "tensor", "waiting", "data", "optimizer"):
        table.add_row(f"{name} (s)" if name != "seconds" else "whole (s)", f"{time[name]:.4g}")
    table.add_row("bubble", f"{time['bubble']:.1%}")
    table.add_row("tokens per second", f"{time['tokens_per_second']:,.0f}")
    table.add_row("days for the run", f"{time['days']:.2f}")
    for name, size in traffic.items():
        table.add_row(f"sent: {name.replace('_', ' ')} (GiB per GPU)", f"{size / _GIB:.3f}")
    if figures["balance"]:
        gain = figures["balance"]["gain"]
        table.add_row("gain of --balance", f"{gain:.1%}")
        for model, layers in figures["layers_per_stage"].items():
            if layers:
                table.add_row(f"{model}.layers_per_stage", str(layers))
    return table


def _layouts(figures: dict[str, Any]) -> Table:
    table = _table("Layouts", "layout", "GiB", "tokens/s", "days", "why not")
    table.columns[-1].justify = "left"
    for row in figures["layouts"]:
        table.add_row(
            row["name"],
            f"{row['memory_bytes'] / _GIB:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['days']:.2f}",
            row["reason"] or "best",
        )
    return table
