"""Folds: what calibrates was never seen by what predicted it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from weightnet.predictors import Predictor, build
from weightnet.predictors.folds import cut_folds

Parts = tuple[Any, Any, Any]  # of conftest
PROPERTIES = ("test_accuracy", "test_loss")
FIT = {"epochs": 60, "patience": 60, "learning_rate": 3e-3, "folds": 3}


def frame(count: int) -> pd.DataFrame:
    return pd.DataFrame({"run": [f"run{index}" for index in range(count)]})


def test_every_network_is_left_out_once_by_folds_of_a_size_and_one_member_sees_all() -> None:
    nothing, *folds = cut_folds(frame(100), np.zeros((100, 2)), 3, seed=0)
    assert not nothing.any()
    np.testing.assert_array_equal(np.sum(folds, axis=0), 1)
    assert sorted(fold.sum() for fold in folds) == [33, 33, 34]
    _, *other = cut_folds(frame(100), np.zeros((100, 2)), 3, seed=1)
    assert any((a != b).any() for a, b in zip(folds, other, strict=True))


def test_checkpoints_of_a_run_stay_together() -> None:
    group = [f"group{index // 5}" for index in range(100)]
    folds = cut_folds(frame(100).assign(group=group), np.zeros((100, 1)), 4, seed=0)
    assert len(folds) == 5
    assert all(len(set(fold[5 * i : 5 * i + 5])) == 1 for fold in folds for i in range(20))


@pytest.mark.parametrize(("measured", "members"), [([0], 1), ([0, 1], 1), (range(30), 4)])
def test_a_property_known_of_few_networks_is_left_out_nowhere(
    measured: Sequence[int], members: int
) -> None:
    targets = np.full((30, 2), np.nan)
    targets[:, 0] = 0.0
    targets[measured, 1] = 0.0
    folds = cut_folds(frame(30), targets, 3, seed=3)
    assert len(folds) == members
    assert all(np.isfinite(targets[~fold, 1]).any() for fold in folds)


def test_one_network_can_be_fitted() -> None:
    (fold,) = cut_folds(frame(1), np.zeros((1, 1)), 3, seed=0)
    assert not fold.any()


def covered(predictor: Predictor, zoo: Any, labels: Any) -> float:
    prediction = predictor.predict(zoo)
    return float(((prediction.low <= labels) & (labels <= prediction.high)).mean())


def test_what_was_learned_by_heart_does_not_narrow_the_intervals(
    parts: Parts, zoo_of: Any
) -> None:
    rng = np.random.default_rng(5)
    train = parts[0].with_values("property.test_loss", rng.normal(size=len(parts[0])))
    config = {"hidden": 64, "dropout": 0.0, "fit": FIT}
    nothing = train.select(np.arange(0))
    predictor = build("stats", config, ("test_loss",), 0).fit(train, nothing)
    truth = train.frame[["property.test_loss"]].to_numpy()
    by_heart = np.abs(predictor.predict(train).mean - truth).mean()
    table, unseen = predictor.calibration
    assert list(table["run"]) == list(train.frame["run"])
    assert np.abs(unseen.mean - truth).mean() > 1.5 * by_heart
    assert covered(predictor, zoo_of(1000, seed=1), rng.normal(size=(1000, 1))) > 0.88


def test_intervals_are_no_wider_than_asked(parts: Parts, zoo_of: Any) -> None:
    train, validation, _ = parts
    predictor = build("stats", {"fit": FIT}, PROPERTIES, 0).fit(train, validation)
    zoo = zoo_of(1000, seed=1)
    labels = zoo.frame[[f"property.{name}" for name in PROPERTIES]].to_numpy()
    assert 0.86 < covered(predictor, zoo, labels) < 0.94


def test_folds_that_cannot_be_cut_calibrate_on_validation(parts: Parts) -> None:
    train, validation, _ = parts
    one = train.select(np.arange(1))
    predictor = build("stats", {"fit": {**FIT, "epochs": 2}}, PROPERTIES, 0).fit(one, validation)
    assert list(predictor.calibration[0]["run"]) == list(validation.frame["run"])
