"""Perceptrons on one vector per network: `mlp` on canonical weights, `stats` on statistics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from weightnet.params import Params
from weightnet.predictors import features as feature_functions
from weightnet.predictors.features import Encoder, FeatureFunction
from weightnet.predictors.fitting import Batches, FitConfig
from weightnet.predictors.interface import Predictor
from weightnet.predictors.learned import ModulePredictor

if TYPE_CHECKING:
    from weightnet.tokens import Networks

_LIMIT = 5.0  # standard deviations beyond which features are cut off


class PerceptronConfig(Params):
    """``layers`` hidden layers of ``hidden`` units, with dropout."""

    hidden: int = Field(default=128, gt=0)
    layers: int = Field(default=2, gt=0)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    fit: FitConfig = FitConfig()


class StatsConfig(PerceptronConfig):
    """Perceptron on weight statistics."""


class MlpConfig(PerceptronConfig):
    """Perceptron on at most ``size`` weights of each network; larger networks are thinned."""

    size: int = Field(default=8192, gt=0, le=20000)
    hidden: int = Field(default=64, gt=0)
    fit: FitConfig = FitConfig(epochs=40, patience=10)


class Perceptron(nn.Module):
    """Vectors [B, F] -> mean and log_sigma [B, P]."""

    def __init__(
        self, inputs: int, properties: int, *, hidden: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        stack: list[nn.Module] = []
        for layer in range(layers):
            width = hidden if layer else inputs
            stack += [
                nn.Linear(width, hidden),
                nn.LayerNorm(hidden),
                nn.SiLU(),
                nn.Dropout(dropout),
            ]
        self.body = nn.Sequential(*stack)
        self.head = nn.Linear(hidden, 2 * properties)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log_sigma [B, P] for ``vectors`` [B, F]."""
        mean, log_sigma = self.head(self.body(vectors)).chunk(2, dim=-1)
        return mean, log_sigma


class VectorReader:
    """Reads networks through ``features``, standardized on the training networks, float32."""

    def __init__(self, features: FeatureFunction, config: PerceptronConfig) -> None:
        self.features, self.config = features, config
        self.encoder = Encoder(_LIMIT)

    def prepare(self, train: Networks) -> None:
        """Measure the scale of each feature."""
        self.encoder.fit(self.features(train))

    def batches(self, networks: Networks, *, training: bool) -> Batches:
        """Read all vectors at once; a batch is a Tensor [B, F]."""
        rows = self.encoder.transform(self.features(networks)).astype(np.float32)
        vectors = torch.from_numpy(rows)
        return Batches(lambda indices: vectors[indices], len(vectors))

    def module(self, properties: int) -> Perceptron:
        """Return a new perceptron."""
        config = self.config
        return Perceptron(
            self.encoder.size,
            properties,
            hidden=config.hidden,
            layers=config.layers,
            dropout=config.dropout,
        )

    def write(self, folder: Path) -> None:
        """Write the scale of the features."""
        self.encoder.write(folder)

    def read(self, folder: Path) -> None:
        """Read what `write` wrote."""
        self.encoder.read(folder)


def build(name: str, config: PerceptronConfig, properties: Sequence[str], seed: int) -> Predictor:
    """Return ``mlp`` or ``stats``."""
    features: FeatureFunction = feature_functions.weight_features
    if isinstance(config, MlpConfig):
        features = partial(feature_functions.flat_features, size=config.size)
    reader = VectorReader(features, config)
    return ModulePredictor(name, config, properties, seed, reader=reader, fit=config.fit)
