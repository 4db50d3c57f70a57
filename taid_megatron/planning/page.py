"""A plan as a picture of its timeline (PNG) and as one HTML page without outside links."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from taid_megatron.config.errors import UserError
from taid_megatron.planning.plan import Plan
from taid_megatron.planning.show import tables
from taid_megatron.reporting.page import Picture, Section, Table, Text
from taid_megatron.reporting.page import page as html

if TYPE_CHECKING:
    from rich.table import Table as RichTable


def picture(plan: Plan) -> bytes:
    """PNG: one row per pipeline rank, forwards and backwards of the first micro-batches.

    Raises UserError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "the picture needs matplotlib, which is not installed; pip install matplotlib, or "
            "leave --picture and --page out"
        ) from None
    ranks = plan.timeline.ranks
    figure = Figure(figsize=(9.5, 1.5 + 0.45 * ranks), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for event in plan.timeline.events:
        backward, stage, micro_batch = event.operation
        chunk = stage // ranks
        colours = ("#e0812c", "#f2b880") if backward else ("#2f6db3", "#8fb8e0")
        width = event.end - event.start
        axes.barh(event.rank, width, left=event.start, color=colours[chunk % 2], edgecolor="white")
        if width > plan.timeline.seconds / 60:
            axes.text(
                event.start + width / 2,
                event.rank,
                str(micro_batch),
                ha="center",
                va="center",
                fontsize=8,
                color="black" if chunk % 2 else "white",
            )
    axes.invert_yaxis()
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.set_xlabel("seconds")
    axes.set_title(
        "First micro-batches of a step: forward of both models (blue), backward of the student "
        f"(orange)\nlighter: another chunk. Waiting {plan.timeline.bubble:.0%} of this picture, "
        f"{plan.figures['time']['bubble']:.1%} of a whole step",
        fontsize=10,
        loc="left",
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return stream.getvalue()


def page(plan: Plan, title: str) -> str:
    """One HTML page: the tables and the picture inside it."""
    share = plan.figures["assumed_efficiency"]
    about = (
        f"Computed, not measured: matrix products at {share:.0%} of the peak. GPU figures: "
        f"{plan.figures['gpu']['source']}."
    )
    sections = [Section(str(table.title), [_cells(table)]) for table in tables(plan.figures)]
    sections[0] = Section(sections[0].title, [*sections[0].parts, Text(about)])
    caption = "Simulated, by Megatron's order of work; the numbers are micro-batches."
    sections.insert(4, Section("Timeline", [Picture(picture(plan), caption)]))
    return html(title, sections)


def write(path: Path, content: bytes | str) -> None:
    """Raises UserError where it cannot be written."""
    try:
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another") from None


def _cells(table: RichTable) -> Table:
    rows = zip(*(column.cells for column in table.columns), strict=True)
    header = [str(column.header) for column in table.columns]
    left = [n for n, column in enumerate(table.columns) if column.justify == "left"]
    return Table(header, [list(map(str, row)) for row in rows], left)
