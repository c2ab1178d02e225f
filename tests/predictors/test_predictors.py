"""What every predictor promises, whatever it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from weightnet.predictors import Predictor, build
from weightnet.predictors.ranks import mean_tau

Zoo = Any  # of conftest
Parts = tuple[Zoo, Zoo, Zoo]
PROPERTIES = ("test_accuracy", "test_loss")
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"size": 64, "fit": {"epochs": 25, "learning_rate": 3e-3}},
    "stats": {"fit": {"epochs": 25, "learning_rate": 3e-3}},
    "gbm": {"candidates": 2, "rounds": 80},
    "norms": {"candidates": 2, "rounds": 80},
    "hyperparameters": {"candidates": 2, "rounds": 80},
    "shuffled": {"candidates": 2, "rounds": 80},
    "mean": {},
    "family_mean": {},
}
LEARNING = ("mlp", "stats", "gbm", "hyperparameters")


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def fitted(name: str, parts: Parts, seed: int = 0) -> Predictor:
    train, validation, _ = parts
    return build(name, SMALL[name], PROPERTIES, seed).fit(train, validation)


def measured(zoo: Zoo) -> np.ndarray:
    return zoo.frame[[f"property.{name}" for name in PROPERTIES]].to_numpy()


@pytest.mark.parametrize("name", LEARNING)
def test_recovers_a_signal(name: str, parts: Parts) -> None:
    prediction = fitted(name, parts).predict(parts[2])
    assert prediction.properties == PROPERTIES
    assert mean_tau(prediction.mean, measured(parts[2])) > 0.6


def test_shuffled_labels_teach_nothing(parts: Parts) -> None:
    taus = [
        mean_tau(fitted("shuffled", parts, seed).predict(parts[2]).mean, measured(parts[2]))
        for seed in range(3)
    ]
    assert abs(np.mean(taus)) < 0.15


@pytest.mark.parametrize("name", SMALL)
def test_intervals_cover(name: str, parts: Parts, zoo_of: Callable[..., Zoo]) -> None:
    predictor = fitted(name, parts)
    zoo = zoo_of(1000, seed=1)
    prediction = predictor.predict(zoo)
    inside = (prediction.low <= measured(zoo)) & (measured(zoo) <= prediction.high)
    # 100 calibrating networks let the coverage itself vary by .03; stopping early costs a little
    assert 0.81 < inside.mean() < 0.97


@pytest.mark.parametrize("name", SMALL)
def test_save_and_load_change_nothing(name: str, parts: Parts, tmp_path: Path) -> None:
    predictor = fitted(name, parts)
    before = predictor.predict(parts[2])
    for _ in range(2):  # the second time over an existing folder
        predictor.save(tmp_path / "saved")
    loaded = Predictor.load(tmp_path / "saved")
    after = loaded.predict(parts[2])
    for field in dataclasses.fields(before)[1:]:
        assert np.array_equal(getattr(before, field.name), getattr(after, field.name))
    loaded.save(tmp_path / "again")
    assert read_all(tmp_path / "saved") == read_all(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "saved"]
    assert len({path.stat().st_mode for path in (tmp_path / "saved").iterdir()}) == 1
    assert not [path for path in (tmp_path / "saved").iterdir() if path.suffix in (".pkl", ".pt")]


@pytest.mark.parametrize("name", SMALL)
def test_a_flipped_bit_is_never_read(name: str, parts: Parts, tmp_path: Path) -> None:
    fitted(name, parts).save(tmp_path / "saved")
    generator = np.random.default_rng(0)
    for path in sorted(path for path in (tmp_path / "saved").rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for bit in generator.integers(0, 8 * len(whole), 40):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="train it again"):
                Predictor.load(tmp_path / "saved")
        path.write_bytes(whole)
    Predictor.load(tmp_path / "saved")


@pytest.mark.parametrize("name", SMALL)
def test_equal_seeds_give_equal_files(name: str, parts: Parts, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        fitted(name, parts, seed=3).save(tmp_path / folder)
    assert read_all(tmp_path / "first") == read_all(tmp_path / "second")


@pytest.mark.parametrize("name", SMALL)
def test_missing_targets(name: str, parts: Parts) -> None:
    train, validation, test = parts
    accuracy = train.frame["property.test_accuracy"].to_numpy().copy()
    accuracy[::3], accuracy[1], accuracy[2] = np.nan, np.inf, 1e30
    train = train.with_values("property.test_accuracy", accuracy)
    losses = validation.frame["property.test_loss"].to_numpy().copy()
    losses[:50] = np.nan
    validation = validation.with_values("property.test_loss", losses)
    unknown = test.with_values("property.test_loss", np.nan)
    prediction = build(name, SMALL[name], PROPERTIES, 0).fit(train, validation).predict(unknown)
    assert prediction.mean.shape == (len(test), 2)
    for values in (prediction.mean, prediction.low, prediction.high):
        assert np.isfinite(values).all()
    if name in LEARNING:
        assert mean_tau(prediction.mean, measured(test)) > 0.5


@pytest.mark.parametrize("name", SMALL)
def test_without_measured_validation_networks(name: str, parts: Parts) -> None:
    train, validation, test = parts
    for empty in (validation.select([]), validation.with_values("property.test_loss", np.nan)):
        prediction = build(name, SMALL[name], PROPERTIES, 0).fit(train, empty).predict(test)
        assert np.isfinite(prediction.mean).all()
        assert np.isinf(prediction.high[:, 1]).all()


@pytest.mark.parametrize("name", SMALL)
def test_no_networks_give_an_empty_prediction(name: str, parts: Parts) -> None:
    assert fitted(name, parts).predict(parts[2].select([])).mean.shape == (0, 2)


def test_unusable_properties(parts: Parts) -> None:
    train, validation, _ = parts
    with pytest.raises(ValueError, match=r"must be distinct names.*properties=\[\]"):
        build("mean", None, (), 0)
    with pytest.raises(ValueError, match=r"among those measured \(test_accuracy, test_loss\).*x"):
        build("mean", None, ("x",), 0).fit(train, validation)
    blank = train.with_values("property.test_loss", np.nan)
    with pytest.raises(ValueError, match="test_loss must be measured on at least one"):
        build("mean", None, PROPERTIES, 0).fit(blank, validation)


def test_unfitted_and_absent_predictors(parts: Parts, tmp_path: Path) -> None:
    predictor = build("mean", None, PROPERTIES, 0)
    with pytest.raises(ValueError, match="must be fitted or loaded first"):
        predictor.predict(parts[2])
    with pytest.raises(ValueError, match="must be fitted or loaded first"):
        predictor.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="must hold a saved predictor"):
        Predictor.load(tmp_path)
    (tmp_path / "predictor.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match=r"must have format 1.*format=0"):
        Predictor.load(tmp_path)
