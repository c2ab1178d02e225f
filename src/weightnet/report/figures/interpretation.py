"""Figures of what a predictor looks at: layers and neurons, beside a randomized model."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from weightnet.report.figures.canvas import BLACK, BLUE, ORANGE, empty, grid, note, select, styled
from weightnet.report.names import property_name


@styled
def importance(importance: pd.DataFrame, agreement: pd.DataFrame, *, property: str) -> Figure:
    """Draw what carries the prediction of a property: a panel of depth for each family, one of
    neurons by norm, one of the rank correlations between maps.

    Args:
        importance: run, family, model, property, view (depth or norm), position, importance.
        agreement: run, family, model, property, correlation.
    """
    title = f"What carries the prediction of {property_name(property).title}"
    rows = select(importance, property=property)
    if rows.empty:
        return empty(title, "no importance")
    families = sorted(set(rows["family"]))
    figure, panels = grid(len(families) + 2, 5, 2.3, 2.2)
    for axes, family in zip(panels, families, strict=False):
        _bars(axes, select(rows, family=family, view="depth"))
        axes.set_title(family)
        axes.set_xlabel("relative depth")
    _bars(panels[len(families)], select(rows, view="norm"))
    panels[len(families)].set_title("neurons, all families")
    panels[len(families)].set_xlabel("rank of norm in the layer")
    for axes in panels[: len(families) + 1 : 5]:
        axes.set_ylabel("share of attribution")
    _boxes(panels[len(families) + 1], select(agreement, property=property))
    handles: list[Line2D | Patch] = [
        Patch(facecolor=BLUE, edgecolor=BLACK, label="trained (mean ± standard error)"),
        Line2D([], [], color=ORANGE, linestyle="--", label="randomized"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    return figure


def _bars(axes: Axes, rows: pd.DataFrame) -> None:
    """Mean share by position, with standard errors over networks; the randomized one as steps."""
    if rows.empty:
        note(axes, "no attribution")
        return
    for model in ("trained", "randomized"):
        grouped = select(rows, model=model).groupby("position")["importance"]
        mean, error = grouped.mean(), grouped.sem().fillna(0.0)
        width = 1.0 / max(1, len(mean))
        if model == "trained":
            axes.bar(
                mean.index,
                mean,
                0.92 * width,
                color=BLUE,
                edgecolor=BLACK,
                linewidth=0.5,
                yerr=error,
                ecolor=BLACK,
                capsize=2,
                error_kw={"linewidth": 0.8},
            )
        elif len(mean):
            edges = [*(mean.index - width / 2), mean.index[-1] + width / 2]
            axes.stairs(mean, edges, color=ORANGE, linestyle="--", linewidth=1.6)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)


def _boxes(axes: Axes, rows: pd.DataFrame) -> None:
    """One box over networks for each model whose map is compared with the trained one's."""
    groups = {
        model: own["correlation"].dropna().to_numpy()
        for model in ("retrained", "randomized")
        if (own := select(rows, model=model))["correlation"].notna().any()
    }
    if not groups:
        note(axes, "no correlations")
        return
    axes.boxplot(
        list(groups.values()),
        tick_labels=list(groups),
        whis=(5, 95),
        showfliers=False,
        medianprops={"color": BLACK},
    )
    axes.axhline(0, color=BLACK, linewidth=0.6, linestyle=":")
    axes.set_ylim(-1, 1)
    axes.set_title("map against the trained one")
    axes.set_xlabel("other model")
    axes.set_ylabel("rank correlation")
