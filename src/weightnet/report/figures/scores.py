"""Figures of scores: the headline, heat maps, predicted against measured, errors, the audit.

Whiskers are 95% bootstrap intervals over runs unless a title says otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from weightnet.report.figures.canvas import (
    BLACK,
    GREY,
    KIND_STYLE,
    blank,
    diagonal,
    empty,
    grid,
    in_order,
    looks,
    select,
    styled,
    tau_note,
)
from weightnet.report.names import (
    CEILING,
    KIND_NAMES,
    KINDS,
    MARKS,
    METRIC_NAMES,
    PredictorInfo,
    arrange,
    property_name,
    split_name,
)
from weightnet.report.tables import bounds, number


@styled
def tau_with_intervals(
    scores: pd.DataFrame,
    predictors: Sequence[PredictorInfo],
    *,
    property: str = "test_accuracy",
    subset: str = "all",
) -> Figure:
    """Draw every predictor's tau on every split with its interval: the headline.

    Args:
        scores: predictor, split, property, subset, metric, value, low, high.
    """
    chosen = select(scores, metric="tau", subset=subset, property=property)
    splits = list(dict.fromkeys(chosen["split"]))
    infos = [one for one in arrange(chosen["predictor"], predictors) if one.kind != "ceiling"]
    title = f"Rank agreement with the measured {property_name(property).title}"
    if not splits or not infos:
        return empty(title, "no scores")
    figure, panels = grid(len(splits), 4, 2.75, 1.3 + 0.31 * len(infos))
    for i, (axes, split) in enumerate(zip(panels, splits, strict=False)):
        rows = chosen[chosen["split"] == split].set_index("predictor")
        for y, info in enumerate(infos):
            if info.name not in rows.index:
                continue
            colour, marker = KIND_STYLE[info.kind]
            value, low, high = bounds(rows, info.name)
            axes.plot([low, high], [y, y], color=colour, linewidth=1.6)
            axes.plot([low, high], [y, y], "|", color=colour, markersize=7)
            face = colour if info.kind == "ours" else "white"
            style = {"color": colour, "markerfacecolor": face, "markersize": 5.0}
            axes.plot([value], [y], marker, linestyle="none", **style)  # type: ignore[arg-type]
            axes.annotate(
                number(value, 2),
                (value, y),
                xytext=(0, 5),
                fontsize=7.2,
                ha="center",
                textcoords="offset points",
            )
        if CEILING in rows.index:
            value, low, high = bounds(rows, CEILING)
            if np.isfinite(low) and np.isfinite(high):
                axes.axvspan(low, high, color=BLACK, alpha=0.12, linewidth=0)
            axes.axvline(
                float(rows.loc[CEILING, "value"]), color=BLACK, linestyle="--", linewidth=1
            )
        axes.axvline(0.0, color=GREY, linewidth=0.8)
        axes.set_ylim(len(infos) - 0.5, -0.5)
        axes.set_yticks(range(len(infos)), [one.label for one in infos] if i % 4 == 0 else [])
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("Kendall tau-b")
        axes.set_title(split_name(split))
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in infos)]
    handles = [
        Line2D(
            [],
            [],
            color=KIND_STYLE[k][0],
            marker=KIND_STYLE[k][1],
            label=KIND_NAMES[k],
            markerfacecolor=KIND_STYLE[k][0] if k == "ours" else "white",
            linewidth=2,
        )
        for k in kinds
    ]
    if (chosen["predictor"] == CEILING).any():
        label = "ceiling: two halves of the test images"
        handles.append(Line2D([], [], color=BLACK, linestyle="--", linewidth=1, label=label))
    marks = MARKS if any(one.label != one.name for one in infos) else None
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        title=marks,
        title_fontsize=7.2,
    )
    figure.suptitle(title)
    return figure


@styled
def heatmap(
    scores: pd.DataFrame,
    predictors: Sequence[PredictorInfo],
    *,
    columns: str = "split",
    property: str = "test_accuracy",
    split: str = "iid",
    metric: str = "tau",
    subset: str = "all",
) -> Figure:
    """Draw predictor x split (of ``property``) or predictor x property (of ``split``) as a heat
    map.

    The intervals stand in the cells; rules separate ours, baselines, floors, controls and the
    ceiling.
    """
    fixed = {"property": property} if columns == "split" else {"split": split}
    chosen = select(scores, metric=metric, subset=subset, **fixed)
    keys = list(dict.fromkeys(chosen[columns]))
    infos = arrange(chosen["predictor"], predictors)
    of = property_name(property).title if columns == "split" else split_name(split)
    title = f"{METRIC_NAMES.get(metric, metric)}: {of}"
    if not keys or not infos:
        return empty(title, "no scores")
    values, lows, highs = (
        chosen.pivot(index="predictor", columns=columns, values=c)
        .reindex(index=[one.name for one in infos], columns=keys)
        .to_numpy(dtype=np.float64)
        for c in ("value", "low", "high")
    )
    figure = blank(max(2.2 + 1.25 * len(keys), 5.0), 1.3 + 0.42 * len(infos))
    axes = figure.add_subplot()
    shown = np.ma.masked_invalid(values)
    scale = Normalize(0.0, 1.0) if metric != "mae" else Normalize()
    image = axes.imshow(shown, cmap="cividis", aspect="auto", norm=scale)
    for row, column in np.ndindex(*values.shape):
        value, low, high = values[row, column], lows[row, column], highs[row, column]
        text = number(float(value))
        if np.isfinite(low) and np.isfinite(high):
            text += f"\n[{number(float(low), 2)}, {number(float(high), 2)}]"
        dark = np.isfinite(value) and float(scale(float(value))) < 0.55
        colour = "white" if dark else "black"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.2)
    for row in range(1, len(infos)):
        if infos[row].kind != infos[row - 1].kind:
            axes.axhline(row - 0.5, color="white", linewidth=4)
    names = [split_name(k) if columns == "split" else property_name(k).title for k in keys]
    axes.set_xticks(range(len(keys)), [name.replace(" ", "\n") for name in names])
    axes.set_yticks(range(len(infos)), [f"{one.label} · {KIND_NAMES[one.kind]}" for one in infos])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(
        image, ax=axes, shrink=0.8, extend="min" if metric != "mae" else "neither"
    )
    bar.set_label(METRIC_NAMES.get(metric, metric))
    axes.set_title(title)
    if any(one.label != one.name for one in infos):
        axes.set_xlabel(MARKS, fontsize=7.2, color=GREY, labelpad=8)
    return figure


@styled
def predicted_against_measured(
    predictions: pd.DataFrame,
    networks: pd.DataFrame,
    *,
    predictor: str,
    split: str,
    scores: pd.DataFrame | None = None,
) -> Figure:
    """Draw each test network once per property: measured across, predicted up, 90% interval as a
    line.

    A network that several seeds test is shown as its first seed predicts it. One far beyond the
    others is drawn at the edge. Titles give the tau of ``scores`` (averaged over seeds) where it
    is given.

    Args:
        predictions: predictor, split, seed, run, property, measured, predicted, low, high (and
        part). networks: run and family.
    """
    rows = select(predictions, predictor=predictor, split=split)
    if "part" in rows:
        rows = rows[rows["part"] == "test"]
    rows = rows.sort_values("seed", kind="stable").drop_duplicates(["run", "property"])
    rows = rows[np.isfinite(rows["measured"]) & np.isfinite(rows["predicted"])]
    rows = rows.drop(columns="family", errors="ignore").merge(
        networks[["run", "family"]], on="run"
    )
    title = f"{predictor}, {split_name(split)}: predicted against measured"
    names = in_order(rows["property"])
    if not names:
        return empty(title, "no test predictions")
    look = looks(networks["family"])
    figure, panels = grid(len(names) + 1, 4)
    for axes, name in zip(panels, names, strict=False):
        own = rows[rows["property"] == name]
        ends = diagonal(axes, own[["measured", "predicted"]].to_numpy(dtype=np.float64))
        own = own.assign(**own[["measured", "predicted", "low", "high"]].clip(*ends))
        lines = (own["measured"], own["low"], own["high"])
        axes.vlines(*lines, color=GREY, alpha=0.15, linewidth=0.7, zorder=2)
        for family, part in own.groupby("family"):
            colour, marker, _ = look[str(family)]
            axes.scatter(
                part["measured"],
                part["predicted"],
                s=13,
                marker=marker,
                zorder=3,
                facecolor=colour,
                edgecolor="white",
                linewidth=0.3,
                alpha=0.85,
                clip_on=False,
            )
        axes.set_xlabel(f"measured {property_name(name).axis}")
        axes.set_ylabel("predicted")
        axes.set_title(property_name(name).title + tau_note(scores, predictor, split, name))
    handles = [
        Line2D([], [], linestyle="none", color=look[f][0], marker=look[f][1], label=f)
        for f in sorted(set(rows["family"]))
    ]
    handles.append(Line2D([], [], color=BLACK, linestyle="--", linewidth=0.9, label="perfect"))
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, label="90% interval"))
    corner = panels[len(names)]
    corner.set_axis_off()
    corner.legend(handles=handles, loc="center", title="families", ncols=1 + (len(handles) > 9))
    figure.suptitle(title)
    return figure


@styled
def error_by_family(
    predictions: pd.DataFrame,
    networks: pd.DataFrame,
    predictors: Sequence[PredictorInfo],
    *,
    property: str = "test_accuracy",
    split: str = "iid",
) -> Figure:
    """Draw the absolute errors of every predictor in every family: box of quartiles, whiskers at
    5% and 95%.

    Args:
        predictions: predictor, split, seed, run, property, measured, predicted (and part).
        networks: run and family.
    """
    rows = select(predictions, property=property, split=split)
    if "part" in rows:
        rows = rows[rows["part"] == "test"]
    rows = rows.drop(columns="family", errors="ignore").merge(
        networks[["run", "family"]], on="run"
    )
    rows = rows.assign(error=(rows["predicted"] - rows["measured"]).abs())
    rows = rows[np.isfinite(rows["error"])]
    families = sorted(set(rows["family"]))
    infos = arrange(rows["predictor"], predictors)
    title = f"Error in {property_name(property).title} by family, {split_name(split)}"
    if not families:
        return empty(title, "no test predictions")
    figure, panels = grid(len(families), 4, 2.7, 1.0 + 0.27 * len(infos))
    controls = [one.name for one in infos if one.kind == "control"]
    judged = rows.loc[~rows["predictor"].isin(controls), "error"]
    limit = float(np.percentile(judged, 99)) if len(judged) else float(rows["error"].max())
    for i, (axes, family) in enumerate(zip(panels, families, strict=False)):
        own = rows[rows["family"] == family]
        for y, info in enumerate(infos):
            errors = own.loc[own["predictor"] == info.name, "error"].to_numpy(dtype=np.float64)
            if not len(errors):
                continue
            colour = KIND_STYLE[info.kind][0]
            axes.boxplot(
                [errors],
                positions=[y],
                orientation="horizontal",
                widths=0.6,
                whis=(5, 95),
                showfliers=False,
                patch_artist=True,
                boxprops={
                    "facecolor": (colour, 0.45),
                    "edgecolor": colour,
                    "hatch": "" if info.kind == "ours" else "////",
                },
                medianprops={"color": BLACK, "linewidth": 1.6},
                whiskerprops={"color": colour},
                capprops={"color": colour},
            )
        axes.set_ylim(len(infos) - 0.5, -0.5)
        axes.set_yticks(range(len(infos)), [one.label for one in infos] if i % 4 == 0 else [])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, limit * 1.03 or 1.0)
        axes.grid(axis="x")
        axes.set_title(f"{family} ({own['run'].nunique()} networks)")
        axes.set_xlabel(f"absolute error\n({property_name(property).unit or 'its unit'})")
    figure.suptitle(title)
    return figure


@styled
def invariance(
    audit: pd.DataFrame, predictors: Sequence[PredictorInfo], *, family: str = "all"
) -> Figure:
    """Draw each predictor's largest change under equivalent copies, in standard deviations of the
    property.

    Args:
        audit: predictor, family, transformation, property, relative (and split). Exact zeros
        stand at the left edge.
    """
    rows = select(audit, family=family)
    rows = rows[np.isfinite(rows["relative"])]
    title = "Largest change of a prediction when the network is replaced by an equivalent one"
    kinds = list(dict.fromkeys(rows["transformation"]))
    infos = arrange(rows["predictor"], predictors)
    if not kinds:
        return empty(title, "no audit")
    floor = 1e-9
    figure, panels = grid(len(kinds), 2, 4.3, 1.2 + 0.27 * len(infos))
    for i, (axes, kind) in enumerate(zip(panels, kinds, strict=False)):
        own = rows[rows["transformation"] == kind]
        for y, info in enumerate(infos):
            values = own.loc[own["predictor"] == info.name, "relative"].to_numpy(dtype=np.float64)
            if not len(values):
                continue
            colour, marker = KIND_STYLE[info.kind]
            worst = max(float(values.max()), floor)
            axes.barh(
                y,
                worst - floor,
                left=floor,
                height=0.6,
                color=(colour, 0.45),
                edgecolor=colour,
                hatch="" if info.kind == "ours" else "////",
            )
            axes.plot(
                np.maximum(values, floor),
                np.full(len(values), y),
                marker,
                color=colour,
                markerfacecolor="white",
                markersize=4,
                linestyle="none",
                clip_on=False,
            )
            text = _short(float(values.max()))
            axes.annotate(
                text,
                (worst, y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        axes.axvline(1e-4, color=BLACK, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(floor, max(10.0, float(rows["relative"].max()) * 30))
        axes.set_ylim(len(infos) - 0.5, -0.5)
        axes.set_yticks(range(len(infos)), [one.label for one in infos] if i % 2 == 0 else [])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("standard deviations of the property\n(dotted: rounding of float32)")
        axes.set_title(f"hidden channels {kind}")
    figure.suptitle(title)
    return figure


def _short(value: float) -> str:
    if value == 0.0:
        return "exactly 0"
    return f"{value:.2g}" if 0.001 <= value < 100 else f"{value:.0e}"
