"""The look of every figure, in one place: colours, markers, hatches, sizes, and how a figure is
written.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), told apart by colour-blind
people; markers and hatches tell the same things apart in black and white.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from weightnet.durable import replace_file
from weightnet.report.names import PROPERTIES
from weightnet.report.tables import number

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY = "#7A7A7A"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, BLACK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo", "----")
LINES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
KIND_STYLE: Mapping[str, tuple[str, str]] = {
    "ours": (BLUE, "o"),
    "baseline": (ORANGE, "s"),
    "published": (GREEN, "^"),
    "floor": (GREY, "D"),
    "control": (PURPLE, "X"),
    "ceiling": (BLACK, "|"),
}
DPI = 130
FAR = 8  # quartile ranges: what lies farther out is drawn at the edge
Floats = NDArray[np.float64]
_STYLE: Any = {  # matplotlib types its keys one by one
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "hatch.linewidth": 0.6,
    "figure.titlesize": 11.0,
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run ``draw`` with matplotlib's defaults and our style, whatever the user's settings are."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return wrapper


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches that is drawn without a window."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.07, h_pad=0.07)
    FigureCanvasAgg(figure)
    return figure


def grid(
    count: int, columns: int, width: float = 3.0, height: float = 2.7
) -> tuple[Figure, list[Axes]]:
    """Return a figure of at least ``count`` panels, ``columns`` a row; those left over are
    blank."""
    columns = max(1, min(columns, count))
    rows = -(-max(count, 1) // columns)
    figure = blank(max(width * columns, 4.0), height * rows + 0.4)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes


def note(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY)


def looks(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Return a colour, a marker and a hatch for each name; the same names in any order look the
    same."""
    return {
        name: (COLOURS[i % 8], MARKERS[i % 8], HATCHES[i % 8])
        for i, name in enumerate(sorted(set(names)))
    }


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG: the same bytes for the same figure, and never half a file."""
    with replace_file(path) as partial:
        figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None})


def empty(title: str, why: str) -> Figure:
    figure = blank(4.0, 2.0)
    note(figure.add_subplot(), why)
    figure.suptitle(title)
    return figure


def diagonal(axes: Axes, values: Floats) -> Floats:
    """Give both axes the same ends, and a line where they are equal.

    Args:
        axes: What is drawn on.
        values: Pairs [N, 2], N at least 1. A note tells of those far beyond the others, which
            the ends leave out.

    Returns:
        The ends, to which values must be clipped.
    """
    first, third = np.quantile(values, [0.25, 0.75])
    reach = np.array([first, third]) + np.array([-FAR, FAR]) * (third - first)
    ends = np.array([values.min(), values.max()])
    if third > first:
        ends = np.clip(ends, *reach)
    ends += np.array([-1, 1]) * 0.04 * max(float(np.ptp(ends)), 1e-6)
    beyond = int(((values < ends[0]) | (values > ends[1])).any(axis=1).sum())
    if beyond:
        axes.text(
            0.97, 0.03, f"{beyond} beyond, at the edge", ha="right", transform=axes.transAxes
        )
    axes.plot(ends, ends, color=BLACK, linewidth=0.9, linestyle="--", zorder=1)
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    return ends


def in_order(names: object) -> list[str]:
    """Return distinct property names: known ones in their usual order, then the others."""
    found = set(names)  # type: ignore[call-overload]
    return [name for name in PROPERTIES if name in found] + sorted(found - set(PROPERTIES))


def select(table: pd.DataFrame, **keys: str) -> pd.DataFrame:
    for column, value in keys.items():
        table = table[table[column] == value]
    return table


def tau_note(scores: pd.DataFrame | None, predictor: str, split: str, name: str) -> str:
    if scores is None:
        return ""
    row = select(
        scores, predictor=predictor, split=split, property=name, subset="all", metric="tau"
    )
    if row.empty:
        return ""
    value, low, high = (float(row[c].iloc[0]) for c in ("value", "low", "high"))
    return f"\ntau {number(value)} [{number(low)}, {number(high)}]"
