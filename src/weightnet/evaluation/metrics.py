"""Metrics of predicted against measured properties, for many bootstrap resamples at once.

A resample of networks is a column of counts: how often each network was drawn. Every metric here
takes the counts of R resamples as ``weights`` of shape [B, R] and returns [R] values, each
exactly the metric of the table in which network b is repeated ``weights[b, r]`` times (tests
compare with scipy on such tables). The first column that `draw_weights` makes is all ones: the
metric itself.

tau-b (Kendall 1945, https://doi.org/10.1093/biomet/33.3.239) is a ratio of quadratic forms of the
counts::

    tau_b(w) = w' (X o Y) w / sqrt(w' (X o X) w * w' (Y o Y) w)
    X_ij = sign(x_i - x_j), Y_ij = sign(y_i - y_j)

so 1,000 resamples cost one matrix product instead of 1,000 sorts.

Degenerate input: where the measured values are all equal, tau, Spearman and R2 are NaN (nothing
to predict); where only the predictions are all equal, tau and Spearman are 0 (a constant ranks
nothing). Values must be finite: the caller leaves out networks without a measurement.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

METRICS = ("tau", "spearman", "r2", "mae", "coverage")
EXACT_PAIRS = 2000
"""Up to so many networks tau's numerator is exact in every resample; beyond, its first-order
expansion in the counts is used, whose error is of order 1 / B. The metric itself is always
exact."""

Floats = NDArray[np.float64]
Counts = NDArray[np.float32]


def tau(measured: ArrayLike, predicted: ArrayLike, weights: Counts) -> Floats:
    """Kendall's tau-b: [B], [B], [B, R] -> [R]."""
    x_groups, x = _groups(measured, weights)
    y_groups, y = _groups(predicted, weights)
    total = _squares(weights.sum(axis=0, dtype=np.float64)[None])
    x_pairs = total - _squares(x_groups)
    y_pairs = total - _squares(y_groups)
    concordant = _concordant(x, y, weights)
    return _correlation(concordant, x_pairs, y_pairs)


def spearman(measured: ArrayLike, predicted: ArrayLike, weights: Counts) -> Floats:
    """Spearman's rank correlation, ties at their mean rank: [B], [B], [B, R] -> [R]."""
    x, y = (_centred_ranks(values, weights) for values in (measured, predicted))
    weighted = x * weights
    return _correlation(_dot(weighted, y), _dot(weighted, x), _dot(y * weights, y))


def r2(measured: ArrayLike, predicted: ArrayLike, weights: Counts) -> Floats:
    """Share of variance explained, 1 - residual / total; negative where the mean is better: [B],
    [B], [B, R] -> [R]."""
    y, prediction = _finite(measured), _finite(predicted)
    y, prediction = y - y.mean(), prediction - y.mean()
    table = np.stack([np.ones_like(y), y, y**2, (y - prediction) ** 2])
    count, first, second, residual = table @ weights.astype(np.float64)
    spread = second - first**2 / count
    constant = spread <= 1e-12 * np.maximum(second, 1e-300)
    return np.where(constant, np.nan, 1.0 - residual / np.where(constant, 1.0, spread))


def mae(measured: ArrayLike, predicted: ArrayLike, weights: Counts) -> Floats:
    """Mean absolute error, in the property's unit: [B], [B], [B, R] -> [R]."""
    return _mean(np.abs(_finite(measured) - _finite(predicted)), weights)


def coverage(measured: ArrayLike, low: ArrayLike, high: ArrayLike, weights: Counts) -> Floats:
    """Share of the measurements inside their predicted interval, ends included: [B], [B] or
    [B, R], the same, [B, R] -> [R]."""
    y = _finite(measured)[:, None]
    low, high = (np.asarray(end).reshape(len(y), -1) for end in (low, high))
    counts = weights.astype(np.float64)
    shares: Floats = (((low <= y) & (y <= high)) * counts).sum(axis=0) / counts.sum(axis=0)
    return shares


def draw_weights(strata: ArrayLike, draws: int, generator: np.random.Generator) -> Counts:
    """Draw bootstrap counts: [B, 1 + draws], the first column all ones.

    Networks are drawn with replacement within each stratum (an int per network), so that every
    stratum keeps its size.
    """
    codes = np.asarray(strata)
    weights = np.ones((len(codes), 1 + draws), dtype=np.float32)
    for code in np.unique(codes):
        rows = np.flatnonzero(codes == code)
        counts = generator.multinomial(len(rows), np.full(len(rows), 1.0 / len(rows)), size=draws)
        weights[rows, 1:] = counts.T
    return weights


def interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of resampled values [R]; NaN where most resamples are
    degenerate."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0 or 2 * len(finite) < len(values):
        return float("nan"), float("nan")
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(finite, [tail, 100.0 - tail])
    return float(low), float(high)


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            "values must be finite, however: some are NaN or infinite; leave those networks out"
        )
    return array


def _groups(values: ArrayLike, weights: Counts) -> tuple[Counts, NDArray[np.intp]]:
    """Return the counts of each distinct value, ascending, [G, R], and each network's group
    [B]."""
    array = _finite(values)
    distinct, group = np.unique(array, return_inverse=True)
    order = np.argsort(group, kind="stable")
    if len(distinct) == len(array):
        return weights[order], group
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    return np.add.reduceat(weights[order], starts, axis=0), group


def _concordant(x: NDArray[np.intp], y: NDArray[np.intp], weights: Counts) -> Floats:
    """Return concordant less discordant pairs, each counted twice: [B], [B], [B, R] -> [R]."""
    size = len(x)
    x, y = x.astype(np.int32), y.astype(np.int32)
    block = max(1, 4_000_000 // max(size, 1))
    exact = size <= EXACT_PAIRS
    result = np.zeros(weights.shape[1])
    for start in range(0, size, block):
        rows = slice(start, start + block)
        signs = np.sign(x[rows, None] - x) * np.sign(y[rows, None] - y)
        if exact:  # integers below 2**24: float32 products are exact
            result += _dot(weights[rows], signs.astype(np.float32) @ weights)
        else:
            surplus = signs.sum(axis=1, dtype=np.float64)
            result += 2.0 * surplus @ weights[rows].astype(np.float64) - surplus.sum()
    return result


def _centred_ranks(values: ArrayLike, weights: Counts) -> Counts:
    """Return each network's mean rank in each resample, less the mean of all ranks: [B, R]; exact
    in float32."""
    groups, group = _groups(values, weights)
    upto = np.cumsum(groups, axis=0)
    ranks: Counts = (upto - groups / 2 - upto[-1] / 2)[group]
    return ranks


def _correlation(product: Floats, x_square: Floats, y_square: Floats) -> Floats:
    defined = (x_square > 0) & (y_square > 0)
    value = product / np.sqrt(np.where(defined, x_square * y_square, 1.0))
    return np.where(x_square > 0, np.where(defined, np.clip(value, -1.0, 1.0), 0.0), np.nan)


def _dot(left: NDArray[np.float32], right: NDArray[np.float32]) -> Floats:
    product: Floats = np.einsum("br,br->r", left, right, dtype=np.float64)
    return product


def _squares(groups: NDArray[np.floating]) -> Floats:
    product: Floats = np.einsum("gr,gr->r", groups, groups, dtype=np.float64)
    return product


def _mean(values: Floats, weights: Counts) -> Floats:
    counts = weights.astype(np.float64)
    mean: Floats = (values @ counts) / counts.sum(axis=0)
    return mean
