"""What another draw of calibration networks would have made of conformal intervals.

The share of test networks that an interval covers varies with the test networks and with the
networks that calibrated it: n of them leave the coverage of every later network with a standard
deviation of about sqrt(0.9 * 0.1 / n), 3 points for a hundred (Vovk 2012,
https://arxiv.org/abs/1209.2673, proposition 2a). Test networks alone never show that part, so that
the bootstrap of the coverage resamples both.
"""

from __future__ import annotations

import numpy as np

from weightnet.evaluation.metrics import Counts, Floats


def factors(measured: Floats, low: Floats, high: Floats, weights: Counts, level: float) -> Floats:
    """By what each resample of the calibration networks would multiply the half-widths of the
    intervals: [B], [B], [B], [B, 1 + draws] -> [1 + draws].

    1 for the networks as they are, the first column, and where it cannot be told: no interval of
    a finite width, or nothing measured.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs(2 * measured - low - high) / (high - low)  # in half-widths
    order = np.argsort(error, kind="stable")[: np.isfinite(error).sum()]
    result = np.ones(weights.shape[1])
    if len(order):
        seen = np.cumsum(weights[order], axis=0, dtype=np.float64)
        ranks = np.ceil(np.round((seen[-1] + 1) * level, 9))
        reached = np.append(error[order], np.inf)[(seen < ranks).sum(axis=0)]
        result[1:] = reached[1:]
    return result


def widened(low: Floats, high: Floats, factors: Floats) -> tuple[Floats, Floats]:
    """Multiply half-widths by each factor: [B], [B], [R] -> [B, R], [B, R]. Intervals without end,
    or of no width, stay as they are."""
    half = ((high - low) / 2)[:, None]
    stretched = np.isfinite(half) & (half > 0)
    wider = np.where(stretched, half, 0.0) * np.where(stretched, factors - 1.0, 0.0)
    return low[:, None] - wider, high[:, None] + wider
