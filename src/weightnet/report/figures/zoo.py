"""Figures of the zoo itself: how properties spread, and how well a measurement repeats itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from weightnet.report.figures.canvas import (
    BLACK,
    COLOURS,
    GREY,
    diagonal,
    empty,
    grid,
    in_order,
    looks,
    note,
    styled,
    tau_note,
)
from weightnet.report.names import (
    CEILING,
    PROPERTIES,
    property_name,
)


@styled
def zoo_distributions(networks: pd.DataFrame) -> Figure:
    """Draw how each property spreads, by family and task, and test against train accuracy.

    Each family is a row of two histograms, one task above its line and the others below.

    Args:
        networks: family, task and ``property.<name>``.
    """
    names = in_order(c.removeprefix("property.") for c in networks if c.startswith("property."))
    families = sorted(set(networks["family"]))
    if networks.empty or not names:
        return empty("The zoo", "no networks")
    tasks = sorted(set(networks["task"]))
    counts = networks["family"].value_counts()
    figure, panels = grid(len(names) + 1, 4, 3.1, 1.1 + max(1.7, 0.36 * len(families)))
    styles = {
        task: (COLOURS[i % 8], ("", "/////", "....", "xxxx")[i % 4])
        for i, task in enumerate(tasks)
    }
    for position, (axes, name) in enumerate(zip(panels, names, strict=False)):
        values = networks[f"property.{name}"].to_numpy(dtype=np.float64)
        known = values[np.isfinite(values)]
        if not len(known):
            note(axes, f"no {property_name(name).title} measured")
            continue
        top = (
            np.percentile(known, 99)
            if name not in PROPERTIES or name == "test_loss"
            else known.max()
        )
        edges = np.linspace(known.min(), max(float(top), known.min() + 1e-6), 25)
        for row, family in enumerate(families):
            axes.axhline(row, color=GREY, linewidth=0.5)
            for i, task in enumerate(tasks):
                mine = (networks["family"] == family) & (networks["task"] == task)
                own = np.clip(values[mine.to_numpy() & np.isfinite(values)], edges[0], edges[-1])
                heights, _ = np.histogram(own, edges)
                scaled = 0.42 * heights / max(int(heights.max(initial=0)), 1)
                colour, hatch = styles[task]
                axes.stairs(
                    row + (-scaled if i == 0 else scaled),
                    edges,
                    baseline=row,
                    fill=True,
                    facecolor=(colour, 0.55),
                    edgecolor=colour,
                    hatch=hatch,
                    linewidth=0.7,
                )
        axes.set_ylim(len(families) - 0.5, -0.5)
        labels = [f"{family} ({counts[family]})" for family in families]
        axes.set_yticks(range(len(families)), labels if position % 4 == 0 else [])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(property_name(name).axis)
    _accuracy_scatter(panels[len(names)], networks, families)
    look = looks(families)
    handles: list[Line2D | Patch] = [
        Patch(facecolor=(c, 0.55), edgecolor=c, hatch=h, label=task)
        for task, (c, h) in styles.items()
    ]
    handles += [
        Line2D([], [], linestyle="none", color=look[f][0], marker=look[f][1], label=f)
        for f in families
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10))
    figure.suptitle(f"The zoo: {len(networks)} networks; each histogram scaled to its peak")
    return figure


@styled
def ceilings(
    networks: pd.DataFrame, scores: pd.DataFrame | None = None, *, split: str = "iid"
) -> Figure:
    """Draw each property measured on one half of the test images against the other half. A network
    far beyond the others is drawn at the edge.

    Args:
        networks: family, ``half_a.<name>`` and ``half_b.<name>``.
        scores: where given, titles give the ceiling's tau on the test networks of ``split``.
    """
    names = in_order(c.removeprefix("half_a.") for c in networks if c.startswith("half_a."))
    names = [name for name in names if f"half_b.{name}" in networks]
    title = "What measurement noise allows: two disjoint halves of the images"
    if not names or networks.empty:
        return empty(title, "no halves measured")
    look = looks(networks["family"])
    figure, panels = grid(len(names), 4, 2.8, 2.5)
    for axes, name in zip(panels, names, strict=False):
        halves = networks[[f"half_a.{name}", f"half_b.{name}"]]
        halves = halves[np.isfinite(halves).all(axis=1)]
        if halves.empty:
            note(axes, "no finite halves")
            continue
        ends = diagonal(axes, halves.to_numpy(dtype=np.float64))
        for family, own in halves.clip(*ends).groupby(networks["family"]):
            colour, marker, _ = look[str(family)]
            axes.scatter(
                own[f"half_a.{name}"],
                own[f"half_b.{name}"],
                s=9,
                marker=marker,
                facecolor=colour,
                edgecolor="none",
                alpha=0.6,
                clip_on=False,
            )
        axes.set_xlabel(f"{property_name(name).title}, half A")
        axes.set_ylabel("half B")
        axes.set_title(property_name(name).title + tau_note(scores, CEILING, split, name))
    handles = [
        Line2D([], [], linestyle="none", color=look[f][0], marker=look[f][1], label=f)
        for f in look
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    figure.suptitle(title)
    return figure


def _accuracy_scatter(axes: Axes, networks: pd.DataFrame, families: Sequence[str]) -> None:
    train, test = "property.train_accuracy", "property.test_accuracy"
    if train not in networks or test not in networks:
        axes.set_axis_off()
        return
    look = looks(families)
    for family in families:
        own = networks[networks["family"] == family]
        colour, marker, _ = look[family]
        axes.scatter(
            own[train],
            own[test],
            s=9,
            marker=marker,
            facecolor=colour,
            edgecolor="none",
            alpha=0.65,
        )
    axes.plot([0, 1], [0, 1], color=BLACK, linewidth=0.9, linestyle="--")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("train accuracy (share of images)")
    axes.set_ylabel("test accuracy")
