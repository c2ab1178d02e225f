"""The figure of ablations: what each change costs or gains, and the learning curve."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from weightnet.report.figures.canvas import BLACK, BLUE, GREY, blank, empty, select, styled
from weightnet.report.names import property_name


@styled
def ablations(table: pd.DataFrame, *, properties: list[str]) -> Figure:
    """Draw each ablation's difference to its base in tau with its interval, a panel for each of
    ``properties``; ablations of one group stand together.

    Args:
        table: ablation, group, property, metric, difference, difference_low, difference_high.
    """
    title = "What each change does to tau (right of the line: better than unchanged)"
    rows = select(table, metric="tau")
    rows = rows[np.isfinite(rows["difference"].astype(float))]
    rows = rows[rows["property"].isin(properties)]
    if rows.empty:
        return empty(title, "no ablations")
    names = list(dict.fromkeys(rows["ablation"]))[::-1]
    groups = rows.drop_duplicates("ablation").set_index("ablation")["group"]
    figure = blank(3.4 + 2.6 * len(properties), 1.2 + 0.24 * len(names))
    for i, name in enumerate(properties):
        axes = figure.add_subplot(1, len(properties), i + 1)
        own = select(rows, property=name).set_index("ablation").reindex(names)
        at = np.arange(len(names))
        middle = own["difference"].to_numpy(dtype=float)
        low, high = (own[f"difference_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
        axes.errorbar(
            middle,
            at,
            xerr=np.abs(np.stack([middle - low, high - middle])),
            fmt="o",
            color=BLUE,
            ecolor=BLACK,
            elinewidth=0.9,
            capsize=2,
            markersize=4,
        )
        axes.axvline(0, color=BLACK, linewidth=0.8, linestyle="--")
        for edge in range(1, len(names)):
            if groups[names[edge]] != groups[names[edge - 1]]:
                axes.axhline(edge - 0.5, color=GREY, linewidth=0.5, linestyle=":")
        axes.set_yticks(at, names if i == 0 else [])
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_xlabel("difference in tau")
        axes.set_title(property_name(name).title)
        axes.grid(axis="x")
    figure.suptitle(title)
    return figure
