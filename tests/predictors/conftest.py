"""A synthetic zoo: a few hidden traits of each network decide its features and its properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

from weightnet.predictors import features
from weightnet.predictors.features import Features


@dataclass(frozen=True)
class Zoo:
    """Stands for `weightnet.tokens.Networks`: a table, and hidden traits [B, 4]."""

    frame: pd.DataFrame
    traits: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.frame)

    def select(self, indices: Any) -> Zoo:
        return Zoo(self.frame.iloc[indices].reset_index(drop=True), self.traits[indices])

    def with_values(self, column: str, values: Any) -> Zoo:
        return Zoo(self.frame.assign(**{column: values}), self.traits)


def make_zoo(count: int, seed: int = 0) -> Zoo:
    rng = np.random.default_rng(seed)
    traits = rng.normal(size=(count, 4))
    noise = rng.normal(size=(count, 2))
    accuracy = np.tanh(traits[:, 0] + 0.5 * traits[:, 1]) + 0.05 * noise[:, 0]
    frame = pd.DataFrame(
        {
            "run": [f"{index:016x}" for index in range(count)],
            "family": rng.choice(["cnn", "vgg11"], count),
            "task": rng.choice(["digits", "fashion"], count),
            "property.test_accuracy": accuracy,
            "property.test_loss": np.exp(-accuracy) + 0.05 * noise[:, 1],
            "recipe.learning_rate": np.exp(traits[:, 0]),
            "recipe.augment": traits[:, 1] > 0,
            "recipe.optimizer": np.where(traits[:, 2] > 0, "sgd", "adam"),
        }
    )
    return Zoo(frame, traits)


def _observe(zoo: Zoo, size: int, seed: int) -> np.ndarray[Any, Any]:
    mixing = np.random.default_rng(seed).normal(size=(4, size))
    return zoo.traits @ mixing


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> tuple[Zoo, Zoo, Zoo]:
    """Train, validation and test zoo; predictors see the fake features of these."""

    def statistics(zoo: Zoo) -> Features:
        return Features(tuple(f"s{i}" for i in range(20)), _observe(zoo, 20, 1))

    def norms(zoo: Zoo) -> Features:
        return Features(("n0", "n1"), _observe(zoo, 2, 2))

    def flat(zoo: Zoo, size: int) -> Features:
        names = tuple(str(i) for i in range(size))
        return Features(names, _observe(zoo, size, 3).astype(np.float32))

    monkeypatch.setattr(features, "weight_features", statistics)
    monkeypatch.setattr(features, "norm_features", norms)
    monkeypatch.setattr(features, "flat_features", flat)
    monkeypatch.setenv("WEIGHTNET_DEVICE", "cpu")
    zoo = make_zoo(420)
    return (
        zoo.select(np.arange(220)),
        zoo.select(np.arange(220, 320)),
        zoo.select(np.arange(320, 420)),
    )


@pytest.fixture
def zoo_of() -> Callable[..., Zoo]:
    """Makes a zoo of so many networks from a seed."""
    return make_zoo
