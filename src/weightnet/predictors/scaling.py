"""Robust standardization of features and targets, the same rule for both.

One diverged network with a loss of 1e30 must not flatten the scale of all others, so center and
scale are the mean and the standard deviation of winsorized columns: values beyond three
inter-decile ranges from the deciles count as if they lay there. Missing values (NaN or infinite)
take no part and stay missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_REACH = 3.0  # inter-decile ranges beyond the deciles that still count in full
_HUGE = 1e12  # squares of larger values would overflow float32


@dataclass(frozen=True)
class Standardizer:
    """``(x - center) / scale``, limited to ``[-limit, limit]``; center, scale are float64 [F]."""

    center: Array
    scale: Array
    limit: float

    @classmethod
    def fit(cls, values: Array, limit: float) -> Self:
        """Measure center and scale of the columns of ``values`` [B, F]; constant: scale 1."""
        finite = np.isfinite(values)
        count = finite.sum(axis=0)
        ordered = np.sort(np.where(finite, np.clip(values, -_HUGE, _HUGE), np.inf), axis=0)
        last = np.maximum(count - 1, 0)
        columns = np.arange(values.shape[1])

        def at(fraction: float) -> Array:
            if len(values) == 0:
                return np.zeros(values.shape[1])
            found = ordered[np.round(fraction * last).astype(np.int64), columns].astype(np.float64)
            return np.where(count > 0, found, 0.0)

        low, high = at(0.1), at(0.9)
        reach = _REACH * (high - low)
        low = np.where(reach > 0, low - reach, at(0.0)).astype(values.dtype)
        high = np.where(reach > 0, high + reach, at(1.0)).astype(values.dtype)
        total = np.maximum(count, 1)
        held = np.clip(np.where(finite, values, 0), low, high)
        center = np.where(finite, held, 0).sum(axis=0, dtype=np.float64) / total
        held = np.where(finite, held - center.astype(values.dtype), 0)
        scale = np.sqrt(np.square(held).sum(axis=0, dtype=np.float64) / total)
        constant = scale <= 1e-7 * np.abs(center) + 1e-30
        return cls(center, np.where(constant, 1.0, scale), limit)

    def transform(self, values: Array) -> Array:
        """Standardize ``values`` [B, F], in their dtype; missing values become NaN."""
        center, scale = self.center.astype(values.dtype), self.scale.astype(values.dtype)
        known = np.where(np.isfinite(values), np.clip(values, -_HUGE, _HUGE), np.nan)
        clipped: Array = np.clip((known - center) / scale, -self.limit, self.limit)
        return clipped

    def inverse(self, values: Array) -> Array:
        """Return standardized ``values`` [B, F] in the units of the data."""
        restored: Array = values * self.scale + self.center
        return restored
