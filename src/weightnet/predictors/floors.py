"""Floors that look at no weight: the mean of all training networks, or of the same family's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from weightnet.params import Params
from weightnet.predictors.interface import Estimate, Log, Predictor, read_arrays, write_arrays
from weightnet.predictors.scaling import Array

if TYPE_CHECKING:
    from weightnet.tokens import Networks


class FloorConfig(Params):
    """Nothing to choose."""


class MeanPredictor(Predictor):
    """Predicts the mean of the training networks; ``by_family``, of those of the same family.

    A family without measurements of a property gets the mean of all networks.
    """

    def __init__(
        self,
        name: str,
        config: FloorConfig,
        properties: Sequence[str],
        seed: int,
        *,
        by_family: bool,
    ) -> None:
        super().__init__(name, config, properties, seed)
        self.by_family = by_family
        self._means: dict[str, Array] = {}
        self._overall: Array = np.zeros(len(properties))

    def _train(
        self,
        train: Networks,
        targets: Array,
        validation: Networks,
        validation_targets: Array,
        *,
        log: Log | None,
        checkpoint: Path | None,
    ) -> None:
        self._overall = _known_mean(targets, np.zeros(targets.shape[1]))
        self._means = {}
        if self.by_family:
            families = train.frame["family"].to_numpy()
            for family in sorted(set(families)):
                self._means[str(family)] = _known_mean(targets[families == family], self._overall)

    def _estimate(self, networks: Networks) -> Estimate:
        families = networks.frame["family"] if self.by_family else [""] * len(networks)
        mean = np.stack([self._means.get(str(family), self._overall) for family in families])
        return Estimate(mean, np.ones_like(mean))

    def _write(self, folder: Path) -> None:
        families = {f"family.{family}": mean for family, mean in self._means.items()}
        write_arrays(folder / "means.safetensors", {"overall": self._overall, **families})

    def _read(self, folder: Path) -> None:
        arrays = read_arrays(folder / "means.safetensors")
        self._overall = arrays.pop("overall")
        self._means = {name.removeprefix("family."): mean for name, mean in arrays.items()}


def build(name: str, config: FloorConfig, properties: Sequence[str], seed: int) -> Predictor:
    """Return the floor ``mean`` or ``family_mean``."""
    return MeanPredictor(name, config, properties, seed, by_family=name == "family_mean")


def _known_mean(targets: Array, fallback: Array) -> Array:
    """Mean of each column [P] over its known values; ``fallback`` [P] where there is none."""
    known = np.isfinite(targets)
    count = known.sum(axis=0)
    total = np.where(known, targets, 0.0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), fallback)
