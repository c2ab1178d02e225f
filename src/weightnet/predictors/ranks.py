"""Kendall's tau-b averaged over properties, for training to watch; evaluation has it in full."""

from __future__ import annotations

import numpy as np

from weightnet.predictors.scaling import Array


def mean_tau(predicted: Array, measured: Array) -> float:
    """Mean tau-b over the columns of [B, P] arrays, on known values; a constant column counts 0.

    Returns NaN when no column has two known values.
    """
    from scipy.stats import kendalltau

    taus = []
    for column in range(measured.shape[1]):
        known = np.isfinite(measured[:, column]) & np.isfinite(predicted[:, column])
        if known.sum() < 2:
            continue
        x, y = predicted[known, column], measured[known, column]
        constant = np.ptp(x) == 0 or np.ptp(y) == 0
        taus.append(0.0 if constant else float(kendalltau(x, y).statistic))
    return float(np.mean(taus)) if taus else float("nan")
