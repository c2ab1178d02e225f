"""Scores as Markdown: values with intervals, the best in bold, floors and controls marked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from weightnet.report.names import (
    KIND_NAMES,
    MARKS,
    PredictorInfo,
    arrange,
    property_name,
    split_name,
)

SMALLER_IS_BETTER = ("mae",)


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str], *, left: int = 1) -> str:
    """Return a Markdown table: the first ``left`` columns flush left, the others flush right."""
    rule = [":---" if i < left else "---:" for i in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """Return a number as text without a leading zero (``.812``), a true minus, and a dash for
    NaN."""
    if not math.isfinite(value):
        return "-"
    text = f"{abs(value):.{digits}f}"
    if text.startswith("0."):
        text = text[1:]
    return ("\N{MINUS SIGN}" if value < 0 and float(text) != 0 else "") + text


def with_interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """Return ``value [low, high]``; the value alone where there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return number(value, digits)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def mean_with_interval(values: pd.Series) -> tuple[float, float, float]:
    """Return the mean of the known values and its 95% bootstrap interval; NaN for none."""
    known = values.dropna().to_numpy(dtype=np.float64)
    if not len(known):
        return math.nan, math.nan, math.nan
    means = np.random.default_rng(0).choice(known, (1000, len(known))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(known.mean()), float(low), float(high)


def bounds(rows: pd.DataFrame, key: str) -> tuple[float, float, float]:
    """Return value, low and high of the row indexed by ``key``."""
    value, low, high = rows.loc[key, ["value", "low", "high"]].to_numpy(dtype=np.float64)
    return float(value), float(low), float(high)


def score_table(
    scores: pd.DataFrame,
    predictors: Sequence[PredictorInfo],
    *,
    columns: str = "split",
    metric: str = "tau",
    subset: str = "all",
    property: str | None = None,
    split: str | None = None,
    intervals: bool = True,
) -> str:
    """Return a table predictor x split (of one property) or predictor x property (of one split).

    The best value of each column, controls and ceiling aside, is in bold. Where nothing is scored,
    a sentence says so.

    Args:
        scores: predictor, split, property, subset, metric, value, low, high.
        columns: "split" or "property"; the other one is fixed by the argument of its name.
    """
    chosen = scores[(scores["metric"] == metric) & (scores["subset"] == subset)]
    for column, wanted in (("property", property), ("split", split)):
        if wanted is not None:
            chosen = chosen[chosen[column] == wanted]
    if chosen.empty:
        return "Nothing was scored here."
    order = list(dict.fromkeys(chosen[columns]))
    infos = arrange(chosen["predictor"], predictors)
    best = _best(chosen, infos, columns, metric)
    rows = []
    for info in infos:
        own = chosen[chosen["predictor"] == info.name].set_index(columns)
        cells = [info.label, KIND_NAMES[info.kind]]
        for key in order:
            if key not in own.index:
                cells.append("-")
                continue
            value, low, high = bounds(own, key)
            cell = with_interval(value, low, high) if intervals else number(value)
            cells.append(f"**{cell}**" if best.get(key) == info.name else cell)
        rows.append(cells)
    title = split_name if columns == "split" else lambda name: property_name(name).title
    table = markdown(rows, ["predictor", "kind", *(title(key) for key in order)], left=2)
    marked = any(info.label != info.name for info in infos)
    return f"{table}\n\n{MARKS}" if marked else table


def headline_table(
    scores: pd.DataFrame, predictors: Sequence[PredictorInfo], property: str = "test_accuracy"
) -> str:
    """Return the README's table: tau of every predictor on every split, with intervals."""
    return score_table(scores, predictors, property=property)


def difference_table(differences: pd.DataFrame, rivals: Sequence[PredictorInfo]) -> str:
    """Return a table of one predictor's lead over each rival: rows rivals, columns splits.

    Args:
        differences: rival, split, value, low, high of one predictor, property, subset and metric.
    """
    if differences.empty:
        return "Nothing was compared here."
    order = list(dict.fromkeys(differences["split"]))
    rows = []
    for info in arrange(differences["rival"], rivals):
        own = differences[differences["rival"] == info.name].set_index("split")
        cells = [info.label, KIND_NAMES[info.kind]]
        for key in order:
            if key not in own.index:
                cells.append("-")
                continue
            value, low, high = bounds(own, key)
            cells.append(f"{with_interval(value, low, high)} {verdict(low, high)}".rstrip())
        rows.append(cells)
    return markdown(rows, ["rival", "kind", *(split_name(key) for key in order)], left=2)


def verdict(low: float, high: float) -> str:
    """Return what an interval of a difference says: better, worse, or (if it holds 0) nothing."""
    return "better" if low > 0 else "worse" if high < 0 else ""


def inject(text: str, table: str, name: str = "headline") -> str:
    """Return ``text`` with what stands between ``<!-- name:start -->`` and ``<!-- name:end -->``
    replaced.

    Raises:
        ValueError: if the two markers do not occur once each, in this order.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    ordered = text.count(start) == 1 == text.count(end) and text.index(start) < text.index(end)
    if not ordered:
        raise ValueError(
            f"the text must have the markers {start} and {end} once each, in this order, "
            f"however: they occur {text.count(start)} and {text.count(end)} times; put them "
            "around it"
        )
    before, after = text.split(start)[0], text.split(end)[1]
    return f"{before}{start}\n{table}\n{end}{after}"


def _best(
    chosen: pd.DataFrame, infos: Sequence[PredictorInfo], columns: str, metric: str
) -> dict[str, str]:
    """Return the best predictor of each column; coverage has none: nearest to nominal is no
    contest."""
    if metric == "coverage":
        return {}
    contenders = {info.name for info in infos if info.kind in ("ours", "baseline", "floor")}
    best = {}
    for key, group in chosen[chosen["predictor"].isin(contenders)].groupby(columns):
        values = group.set_index("predictor")["value"].dropna()
        if len(values):
            smaller = metric in SMALLER_IS_BETTER
            best[str(key)] = str(values.idxmin() if smaller else values.idxmax())
    return best
