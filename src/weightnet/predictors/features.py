"""Networks as feature vectors: weight statistics, layer norms, flat weights, recipe columns.

An `Encoder` remembers the columns of the training networks and lays any other networks out the
same way, so that architectures with more, fewer or other layers can be predicted; what is missing
or not finite (diverged weights) is marked in one additional column.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from weightnet.predictors.interface import read_arrays, write_arrays, write_json
from weightnet.predictors.scaling import Array, Standardizer

if TYPE_CHECKING:
    from weightnet.tokens import Networks

_HUGE = 1e30
_CATEGORIES = (
    64  # a text column with more values than this identifies networks, it does not describe them
)


@dataclass(frozen=True)
class Features:
    """Named columns, ``values`` [B, F]. ``column=value`` names an indicator: absent means 0."""

    names: tuple[str, ...]
    values: Array


FeatureFunction = Callable[["Networks"], Features]


def weight_features(networks: Networks) -> Features:
    """Statistics of the weights of every layer."""
    from weightnet.tokens import weight_statistics

    names, values = weight_statistics(networks)
    return Features(tuple(names), values)


def norm_features(networks: Networks) -> Features:
    """Norms of the layers, nothing else."""
    from weightnet.tokens import layer_norms

    names, values = layer_norms(networks)
    return Features(tuple(names), values)


def flat_features(networks: Networks, size: int) -> Features:
    """At most ``size`` weights in canonical order, padded with zeros."""
    from weightnet.tokens import flat_weights

    values = np.asarray(flat_weights(networks, size), dtype=np.float32)
    return Features(tuple(str(index) for index in range(size)), values)


def recipe_features(networks: Networks) -> Features:
    """How the networks were made, not their weights: columns ``recipe.*``, family and task."""
    names: list[str] = []
    columns: list[Array] = []
    for name in networks.frame.columns:
        if not (name.startswith("recipe.") or name in ("family", "task")):
            continue
        column = networks.frame[name]
        if pd.api.types.is_numeric_dtype(column):  # bool included
            names.append(name)
            columns.append(column.to_numpy(dtype=np.float64, na_value=np.nan))
            continue
        values = sorted({str(value) for value in column.dropna()})
        if len(values) <= _CATEGORIES:
            text = column.astype(str).to_numpy()
            names.extend(f"{name}={value}" for value in values)
            columns.extend((text == value).astype(np.float64) for value in values)
    empty = np.zeros((len(networks), 0))
    return Features(tuple(names), np.stack(columns, axis=1) if columns else empty)


class Encoder:
    """Lays features out as a matrix [B, F + 1] with the columns of the training networks.

    Args:
        limit: None for trees, which keep units and take missing values as NaN; or the number of
            standard deviations to which standardized columns are limited, missing values being 0.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.names: tuple[str, ...] = ()
        self.standardizer: Standardizer | None = None

    @property
    def size(self) -> int:
        """Number of columns, F + 1."""
        return len(self.names) + 1

    def fit(self, features: Features) -> None:
        """Remember the columns, and their scale if there is a limit."""
        self.names = features.names
        if self.limit is not None:
            values = _by_rows(features, self.size, self._laid_out)
            self.standardizer = Standardizer.fit(values, self.limit)

    def transform(self, features: Features) -> Array:
        """Return the matrix [B, F + 1]."""
        return _by_rows(features, self.size, self._transform)

    def _transform(self, features: Features) -> Array:
        values = self._laid_out(features)
        if self.standardizer is None:
            return values
        return np.nan_to_num(self.standardizer.transform(values), copy=False, nan=0.0)

    def write(self, folder: Path) -> None:
        """Write the columns to ``folder``."""
        write_json(folder / "columns.json", self.names)
        if self.standardizer is not None:
            arrays = {"center": self.standardizer.center, "scale": self.standardizer.scale}
            write_arrays(folder / "columns.safetensors", arrays)

    def read(self, folder: Path) -> None:
        """Read what `write` wrote."""
        self.names = tuple(json.loads((folder / "columns.json").read_text(encoding="utf-8")))
        if self.limit is not None:
            arrays = read_arrays(folder / "columns.safetensors")
            self.standardizer = Standardizer(arrays["center"], arrays["scale"], self.limit)

    def _laid_out(self, features: Features) -> Array:
        values = features.values
        if features.names != self.names:
            place = {name: index for index, name in enumerate(features.names)}
            absent = [0.0 if "=" in name else np.nan for name in self.names]
            laid_out = np.tile(np.array(absent, dtype=values.dtype), (len(values), 1))
            shared = [index for index, name in enumerate(self.names) if name in place]
            laid_out[:, shared] = values[:, [place[self.names[index]] for index in shared]]
            values = laid_out
        missing = ~np.isfinite(values)
        indicator = (
            missing.mean(axis=1, keepdims=True)
            if len(self.names)
            else missing.sum(1, keepdims=True)
        )
        bounded = np.where(missing, np.nan, np.clip(values, -_HUGE, _HUGE))
        return np.concatenate([bounded, indicator.astype(values.dtype)], axis=1)


def _by_rows(features: Features, columns: int, function: Callable[[Features], Array]) -> Array:
    """What ``function`` makes of each row [B, columns]; of blocks of rows if they are many."""
    from weightnet.tokens.scratch import blocks, fits, scratch_zeros

    values = features.values
    if fits(max(values.nbytes, len(values) * columns * values.itemsize)):
        return function(features)
    out: Array = scratch_zeros((len(values), columns), values.dtype)
    for rows in blocks(len(values), max(columns, values.shape[1])):
        out[rows] = function(Features(features.names, values[rows]))
    return out
