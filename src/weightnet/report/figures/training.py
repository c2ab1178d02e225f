"""Figures of how a predictor was trained and of what it looks at."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from weightnet.report.figures.canvas import (
    BLACK,
    BLUE,
    COLOURS,
    LINES,
    MARKERS,
    ORANGE,
    blank,
    empty,
    grid,
    note,
    select,
    styled,
)
from weightnet.report.names import (
    property_name,
    split_name,
)

Floats = NDArray[np.float64]


@styled
def training_curves(curves: pd.DataFrame, *, split: str = "iid") -> Figure:
    """Draw training loss and validation tau by epoch, a thin line for each seed, a look for each
    predictor.

    Args:
        curves: predictor, split, seed, epoch, metric ("train/loss" or "validation/tau"), value.
    """
    chosen = select(curves, split=split)
    title = f"Training, {split_name(split)} (one line for each seed)"
    names = sorted(set(chosen["predictor"]))
    figure = blank(8.6, 3.4)
    for i, (metric, label) in enumerate(
        [("train/loss", "training loss"), ("validation/tau", "validation tau, mean of properties")]
    ):
        axes = figure.add_subplot(1, 2, i + 1)
        rows = chosen[(chosen["metric"] == metric) & np.isfinite(chosen["value"])]
        if rows.empty:
            note(axes, f"no {label}")
            continue
        for (name, _), line in rows.groupby(["predictor", "seed"]):
            at = names.index(str(name))
            line = line.sort_values("epoch")
            axes.plot(
                line["epoch"],
                line["value"],
                LINES[at % 4],
                color=COLOURS[at % 8],
                linewidth=1.1,
                alpha=0.85,
                marker=MARKERS[at % 8],
                markersize=4,
                markevery=(0.05, 0.2),
            )
        if metric == "train/loss" and (rows["value"] > 0).all():
            axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid()
    handles = [
        Line2D(
            [],
            [],
            linestyle=LINES[i % 4],
            color=COLOURS[i % 8],
            marker=MARKERS[i % 8],
            markersize=4,
            label=name,
        )
        for i, name in enumerate(names)
    ]
    if handles:
        figure.legend(handles=handles, loc="outside right center")
    figure.suptitle(title)
    return figure


@styled
def layer_importance(
    importance: pd.DataFrame, *, property: str | None = None, bins: int = 8
) -> Figure:
    """Draw which depth carries a prediction: share of importance by relative depth, a panel for
    each family.

    Args:
        importance: run, family, depth (0 first layer, 1 last), importance, optionally
        ``property`` and ``model``
            ("trained" or "randomized": the same network with random weights, which must look
            otherwise).
        property: the property to show; None for the mean of all.
    """
    rows = importance if property is None else select(importance, property=property)
    rows = rows[np.isfinite(rows["importance"]) & np.isfinite(rows["depth"])]
    of = property_name(property).title if property else "all properties"
    title = f"Where the prediction of {of} comes from"
    families = sorted(set(rows["family"]))
    if not families:
        return empty(title, "no importance")
    rows = rows.assign(model=rows.get("model", "trained"))
    models = sorted(set(rows["model"]), key=lambda model: (model != "trained", model))
    figure, panels = grid(len(families), 4, 2.6, 2.3)
    edges = np.linspace(0.0, 1.0, bins + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    for i, (axes, family) in enumerate(zip(panels, families, strict=False)):
        for m, model in enumerate(models):
            own = rows[(rows["family"] == family) & (rows["model"] == model)]
            if own.empty:
                continue
            mean, error = _depth_profile(own, edges)
            if m == 0:
                axes.bar(
                    centres,
                    mean,
                    0.92 / bins,
                    color=BLUE,
                    edgecolor=BLACK,
                    linewidth=0.5,
                    yerr=error,
                    ecolor=BLACK,
                    capsize=2,
                    error_kw={"linewidth": 0.8},
                )
            else:
                axes.stairs(mean, edges, color=ORANGE, linestyle="--", linewidth=1.6)
        axes.set_title(family)
        axes.set_xlabel("relative depth")
        if i % 4 == 0:
            axes.set_ylabel("share of importance")
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
    handles: list[Line2D | Patch] = [
        Patch(
            facecolor=BLUE,
            edgecolor=BLACK,
            label=f"{models[0]} (mean ± standard error over networks)",
        )
    ]
    handles += [Line2D([], [], color=ORANGE, linestyle="--", label=model) for model in models[1:]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(title)
    return figure


def _depth_profile(rows: pd.DataFrame, edges: Floats) -> tuple[Floats, Floats]:
    """Return the mean share of importance in each bin of depth, and its standard error over
    networks."""
    at = np.clip(np.digitize(rows["depth"], edges) - 1, 0, len(edges) - 2)
    table = rows.assign(bin=at).pivot_table(
        index="run", columns="bin", values="importance", aggfunc="sum"
    )
    table = table.reindex(columns=range(len(edges) - 1)).fillna(0.0)
    shares = table.to_numpy(dtype=np.float64)
    shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-300)
    error = shares.std(axis=0) / np.sqrt(len(shares))
    return shares.mean(axis=0), error
