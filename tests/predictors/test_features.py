"""Scaling and encoding hold against missing, infinite and unknown values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from weightnet.predictors.features import Encoder, Features, recipe_features
from weightnet.predictors.scaling import Standardizer

anything = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=anything))
def test_standardizing_is_always_finite_or_missing(values: np.ndarray) -> None:
    standardizer = Standardizer.fit(values, limit=5.0)
    found = standardizer.transform(values)
    assert np.array_equal(np.isnan(found), ~np.isfinite(values))
    assert (np.abs(found[np.isfinite(values)]) <= 5).all()


def test_standardizing_is_undone_and_ignores_outliers() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(500, 3))
    standardizer = Standardizer.fit(values, limit=100.0)
    assert np.allclose(standardizer.inverse(standardizer.transform(values)), values)
    assert np.allclose(standardizer.center, values.mean(axis=0))
    assert np.allclose(standardizer.scale, values.std(axis=0))
    values[:5] = 1e30
    spoiled = Standardizer.fit(values, limit=100.0)
    assert np.allclose(spoiled.scale, standardizer.scale, rtol=0.5)


@pytest.mark.parametrize("limit", [None, 5.0])
def test_other_columns_are_laid_out_as_in_training(limit: float | None, tmp_path: Path) -> None:
    encoder = Encoder(limit)
    table = np.random.default_rng(0).normal(size=(30, 3))
    encoder.fit(Features(("a", "b", "kind=x"), table))
    other = Features(("z", "kind=y", "b"), np.array([[7.0, 1.0, 2.0], [7.0, 0.0, np.inf]]))
    found = encoder.transform(other)
    assert found.shape == (2, encoder.size)
    assert np.isfinite(found[:, 2]).all()  # an indicator that is not there is 0, not missing
    assert np.isnan(found[0, 0]) == (limit is None)
    assert found[1, 3] > found[0, 3]  # more is missing
    encoder.write(tmp_path)
    again = Encoder(limit)
    again.read(tmp_path)
    assert np.array_equal(again.transform(other), found, equal_nan=True)


def test_recipes_become_columns(zoo_of: Callable[..., Any]) -> None:
    zoo = zoo_of(100)
    names = [f"{index}" for index in range(100)]
    found = recipe_features(zoo.with_values("recipe.id", names))
    assert set(found.names) == {
        "family=cnn",
        "family=vgg11",
        "task=digits",
        "task=fashion",
        "recipe.learning_rate",
        "recipe.augment",
        "recipe.optimizer=adam",
        "recipe.optimizer=sgd",
    }
    assert found.values.shape == (100, 8) and found.values.dtype == np.float64
