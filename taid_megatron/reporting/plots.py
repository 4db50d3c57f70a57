"""Pictures as PNG bytes: lines over steps, and bars of several runs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Distinct in print and for the colour-blind (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
REFERENCE = "#777777"
MANY = 400
"""Points above which a curve is drawn thin, under the means of every hundredth of it."""


@dataclass(frozen=True)
class Line:
    """One curve; dashed for what is a reference and not a measurement."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    colour: str | None = None
    """None: the next one of COLOURS."""


def lines(title: str, x_label: str, y_label: str, curves: Sequence[Line]) -> bytes:
    """Curves in one frame, the legend beside them. Of long ones the mean is drawn over all."""
    figure, axes = _frame(title)
    for number, line in enumerate(curves):
        colour = line.colour or COLOURS[number % len(COLOURS)]
        x, y = line.x, line.y
        if len(x) > MANY and not line.dashed:
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            x, y = _means(x, len(x) // 100), _means(y, len(y) // 100)
        axes.plot(
            x,
            y,
            label=line.label,
            color=colour,
            linestyle="--" if line.dashed else "-",
            linewidth=1.3 if line.dashed else 1.8,
            marker="o" if len(line.x) <= 12 and not line.dashed else None,
            markersize=4,
        )
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _png(figure)


def _means(values: Sequence[float], window: int) -> list[float]:
    """Means of parts of `window` values, the last part maybe shorter."""
    parts = [values[start : start + window] for start in range(0, len(values), window)]
    return [sum(part) / len(part) for part in parts]


def bars(
    title: str,
    y_label: str,
    names: Sequence[str],
    values: Sequence[float],
    spread: Sequence[float] | None = None,
    *,
    logarithmic: bool = False,
    colours: Sequence[str] = COLOURS,
) -> bytes:
    """One bar per name, its value written on it; `spread` as an error bar."""
    figure, axes = _frame(title)
    colours = [colours[number % len(colours)] for number in range(len(names))]
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
