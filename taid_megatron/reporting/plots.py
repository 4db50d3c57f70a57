"""Pictures as PNG bytes: lines over steps, and bars of several runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Distinct in print and for the colour-blind (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


@dataclass(frozen=True)
class Line:
    """One curve; dashed for what is a reference and not a measurement."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def lines(title: str, x_label: str, y_label: str, curves: Sequence[Line]) -> bytes:
    """Curves in one frame, the legend beside them."""
    figure, axes = _frame(title)
    for number, line in enumerate(curves):
        axes.plot(
            line.x,
            line.y,
            label=line.label,
            color=COLOURS[number % len(COLOURS)],
            linestyle="--" if line.dashed else "-",
            linewidth=1.3 if line.dashed else 1.8,
            marker="o" if len(line.x) <= 12 else None,
            markersize=4,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _png(figure)


def bars(
    title: str,
    y_label: str,
    names: Sequence[str],
    values: Sequence[float],
    spread: Sequence[float] | None = None,
    *,
    logarithmic: bool = False,
) -> bytes:
    """One bar per name, its value written on it; `spread` as an error bar."""
    figure, axes = _frame(title)
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
    drawn = axes.bar(range(len(names)), values, yerr=spread, color=colours, capsize=4, width=0.65)
    axes.bar_label(drawn, fmt="{:.3g}", padding=2, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=15, ha="right")
    axes.set_ylabel(y_label)
    if logarithmic:
        axes.set_yscale("log")
    axes.margins(y=0.15)
    return _png(figure)


def _frame(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
