"""Robust standardization of features and targets, the same rule for both.

One diverged network with a loss of 1e30 must not flatten the scale of all others, so center and
scale are the mean and the standard deviation of winsorized columns: values beyond three
inter-decile ranges from the deciles count as if they lay there. Missing values (NaN or infinite)
take no part and stay missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

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
        from weightnet.tokens.scratch import blocks  # tokens import torch

        count = _sum(values, lambda rows: np.isfinite(rows), np.int64)
        last = np.maximum(count - 1, 0)
        places = [np.round(part * last).astype(np.int64) for part in (0.0, 0.1, 0.9, 1.0)]
        found = np.zeros((4, values.shape[1]))
        for block in blocks(values.shape[1], len(values)) if len(values) else ():
            some = values[:, block]
            ordered = np.clip(some, -_HUGE, _HUGE)
            ordered[~np.isfinite(some)] = np.inf
            ordered.sort(axis=0)
            for row, place in zip(found, places, strict=True):
                row[block] = np.take_along_axis(ordered, place[None, block], axis=0)[0]
        least, low, high, most = np.where(count > 0, found, 0.0)
        reach = _REACH * (high - low)
        low = np.where(reach > 0, low - reach, least).astype(values.dtype)
        high = np.where(reach > 0, high + reach, most).astype(values.dtype)
        total = np.maximum(count, 1)

        def held(rows: Array) -> Array:
            known = np.isfinite(rows)
            return np.where(known, np.clip(np.where(known, rows, 0), low, high), 0)

        center = _sum(values, held, np.float64) / total
        middle = center.astype(values.dtype)

        def squares(rows: Array) -> Array:
            return np.square(np.where(np.isfinite(rows), held(rows) - middle, 0))

        scale = np.sqrt(_sum(values, squares, np.float64) / total)
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


def _sum(values: Array, function: Callable[[Array], Array], dtype: DTypeLike) -> Array:
    """The sum over the rows of ``function(values)`` [B, F] -> [F]; of blocks of rows if there are
    many: NumPy adds up rows one after another, so that blocks change no bit."""
    from weightnet.tokens.scratch import blocks, fits

    if fits(values.nbytes):
        return np.asarray(function(values).sum(axis=0, dtype=dtype))
    total = None
    for rows in blocks(*values.shape):
        part = function(values[rows]).astype(dtype)
        total = (part if total is None else np.concatenate([total[None], part])).sum(axis=0)
    return np.asarray(total)
