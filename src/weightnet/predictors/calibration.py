"""Split-conformal prediction intervals, normalized by the predicted spread.

With n exchangeable calibration networks, the interval ``mean +- q * spread``, where q is the k-th
smallest of ``|measured - mean| / spread`` and ``k = ceil((n + 1) * level)``, covers a new
network's value with probability at least ``level``, whatever the predictor (Lei et al. 2018,
https://arxiv.org/abs/1604.04173, section 5.2). The networks that calibrate here also stopped the
training early, so coverage is measured again on the test networks.
"""

from __future__ import annotations

import math

import numpy as np

from weightnet.predictors.scaling import Array

LEVEL = 0.9


def conformal_factors(measured: Array, mean: Array, spread: Array, level: float = LEVEL) -> Array:
    """Return q [P], in units of the spread, from calibration networks (all arrays [B, P]).

    Missing measurements (NaN or infinite) are left out for each property alone. Where fewer
    networks remain than ``level`` needs (9 for 90%), q is infinite: no finite interval could keep
    the promise.

    Raises:
        ValueError: if ``level`` is not inside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, however: level={level}")
    factors = np.full(measured.shape[1], np.inf)
    for column in range(measured.shape[1]):
        known = np.isfinite(measured[:, column])
        residual = np.abs(measured[known, column] - mean[known, column]) / spread[known, column]
        # rounded first: (9 + 1) * 0.9 is 9.000000000000002 for some levels in floating point
        rank = math.ceil(round((len(residual) + 1) * level, 9))
        if rank <= len(residual):
            factors[column] = np.partition(residual, rank - 1)[rank - 1]
    return factors
