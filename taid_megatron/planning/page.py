"""A plan as a picture of its timeline (PNG) and as one HTML page without outside links."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taid_megatron.config.errors import UserError
from taid_megatron.planning.plan import Plan
from taid_megatron.planning.show import tables

if TYPE_CHECKING:
    from rich.table import Table

_STYLE = (
    "body{font:15px sans-serif;margin:2em auto;max-width:75em;padding:0 1em}"
    "table{border-collapse:collapse;margin:.5em 0 2em}td,th{padding:.2em .7em;"
    "border-bottom:1px solid #ddd}"
    "img{max-width:100%}"
)


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
    figure = Figure(figsize=(14, 1.6 + 0.5 * ranks), layout="constrained")
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
        f"First micro-batches of a step: forward of both models (blue), backward of the student "
        f"(orange); lighter: another chunk. Waiting {plan.timeline.bubble:.0%} of this picture, "
        f"{plan.figures['time']['bubble']:.1%} of a whole step",
        fontsize=10,
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def page(plan: Plan, title: str) -> str:
    """One HTML page: the tables and the picture inside it."""
    image = base64.b64encode(picture(plan)).decode("ascii")
    parts = [_html(table) for table in tables(plan.figures)]
    parts.insert(4, f'<img alt="timeline" src="data:image/png;base64,{image}">')
    share = plan.figures["assumed_efficiency"]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>Computed, not measured: matrix "
        f"products at {share:.0%} of the peak. GPU figures: "
        f"{html.escape(plan.figures['gpu']['source'])}.</p>{''.join(parts)}</html>\n"
    )


def write(path: Path, content: bytes | str) -> None:
    """Raises UserError where it cannot be written."""
    try:
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another") from None


def _html(table: Table) -> str:
    sides = [column.justify for column in table.columns]
    rows = zip(*(column.cells for column in table.columns), strict=True)
    head = _row("th", sides, [column.header for column in table.columns])
    body = "".join(_row("td", sides, row) for row in rows)
    return f"<h2>{html.escape(str(table.title))}</h2><table>{head}{body}</table>"


def _row(tag: str, sides: Sequence[str], cells: Iterable[object]) -> str:
    return (
        "<tr>"
        + "".join(
            f'<{tag} style="text-align:{side}">{html.escape(str(cell))}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )
        + "</tr>"
    )
