"""Figures of how a predictor was trained."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from weightnet.report.figures.canvas import (
    COLOURS,
    LINES,
    MARKERS,
    blank,
    note,
    select,
    styled,
)
from weightnet.report.names import split_name


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
