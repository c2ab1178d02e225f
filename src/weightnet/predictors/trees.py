"""Boosted trees (LightGBM) on any features, one model for each property, tuned on the validation
networks.

`gbm` reads weight statistics, `norms` layer norms, `hyperparameters` the training recipe;
`shuffled` is `gbm` on permuted labels, which can learn nothing but leaks. Tuning is a random
search with a fixed budget, the first candidate being the defaults. Equal inputs give equal files:
one thread, ``deterministic`` with ``force_row_wise``
(https://lightgbm.readthedocs.io/en/stable/Parameters.html#deterministic).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from weightnet.params import Params
from weightnet.predictors import features as feature_functions
from weightnet.predictors.features import Encoder, FeatureFunction
from weightnet.predictors.folds import Fold
from weightnet.predictors.forest import Forest
from weightnet.predictors.interface import Estimate, Log, Predictor, write_json
from weightnet.predictors.ranks import mean_tau
from weightnet.predictors.scaling import Array
from weightnet.randomness import numpy_generator

if TYPE_CHECKING:
    import lightgbm

    from weightnet.tokens import Networks

_FIXED: dict[str, Any] = {
    "objective": "regression",
    "metric": "l2",
    "verbosity": -1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "feature_pre_filter": False,  # or min_data_in_leaf could not vary on one data set
    "bagging_freq": 1,
}


_BAG: dict[str, Any] = {
    "num_leaves": 10,
    "learning_rate": 0.05,
    "min_data_in_leaf": 8,
    "feature_fraction": 0.15,
    "bagging_fraction": 0.7,
    "lambda_l2": 1.0,
}
_BAGS = "trees.json"

_PERMUTATIONS = 16  # of the control


class TreeConfig(Params):
    """Budget of the search.

    ``candidates`` settings are tried for each property; each grows up to ``rounds`` trees and
    stops when ``patience`` more did not lower the validation error. ``bins`` per feature trade
    speed for resolution.
    """

    candidates: int = Field(default=6, gt=0)
    rounds: int = Field(default=400, gt=0)
    patience: int = Field(default=25, gt=0)
    bins: int = Field(default=31, gt=1)


class TreePredictor(Predictor):
    """LightGBM on what ``features`` reads from networks.

    With ``permutations`` above 0 it is a control: that many sets of models, each trained on its
    own permutation of the labels, and the hash of a network's run says which set predicts it. The
    tau of a single permutation is far from 0 by chance (one model orders all networks by one
    random direction); over many it averages out.
    """

    config: TreeConfig

    def __init__(
        self,
        name: str,
        config: TreeConfig,
        properties: Sequence[str],
        seed: int,
        *,
        features: FeatureFunction,
        permutations: int = 0,
    ) -> None:
        super().__init__(name, config, properties, seed)
        self.features, self.permutations = features, permutations
        self.encoder = Encoder()
        # one set of P models, or one for each permutation
        self._models: list[list[Forest]] = []

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
        train_features = self.features(train)
        self.encoder.fit(train_features)
        rows = self.encoder.transform(train_features)
        held_out = self.encoder.transform(self.features(validation))
        self._models = []
        for permutation in range(max(1, self.permutations)):
            generator = numpy_generator(self.seed, "trees", permutation)
            labels, held_out_labels, budget = targets, validation_targets, self.config.candidates
            if self.permutations:  # both parts: choosing by true labels would let true order in
                labels = generator.permutation(targets)
                held_out_labels = generator.permutation(validation_targets)
                budget = math.ceil(budget / self.permutations)
            searches = [
                _Search(rows, labels[:, column], held_out, held_out_labels[:, column], self.config)
                for column in range(len(self.properties))
            ]
            for step, candidate in enumerate(_candidates(budget, generator)):
                for search in searches:
                    search.consider({**candidate, "seed": int(generator.integers(2**31))})
                if log is not None and len(held_out):
                    mean = _predict([search.best for search in searches], held_out)
                    log(_metrics(mean, held_out_labels), permutation * budget + step)
            self._models.append([search.best for search in searches])

    def _estimate(self, networks: Networks) -> Estimate:
        rows = self.encoder.transform(self.features(networks))
        mean = np.empty((len(rows), len(self.properties)))
        runs = networks.frame["run"] if self.permutations else [""] * len(rows)
        chosen = np.array([zlib.crc32(str(run).encode()) % len(self._models) for run in runs])
        for index, models in enumerate(self._models):
            if (chosen == index).any():
                mean[chosen == index] = _predict(models, rows[chosen == index])
        return Estimate(mean, np.ones_like(mean))

    def _write(self, folder: Path) -> None:
        self.encoder.write(folder)
        models = chain.from_iterable(self._models)
        for path, model in zip(self._paths(folder), models, strict=True):
            path.write_text(model.text, encoding="utf-8")

    def _read(self, folder: Path) -> None:
        self.encoder.read(folder)
        models = [Forest(path.read_text(encoding="utf-8")) for path in self._paths(folder)]
        size = len(self.properties)
        self._models = [models[first : first + size] for first in range(0, len(models), size)]

    def _paths(self, folder: Path) -> list[Path]:
        suffixes = [f"-{index}" for index in range(self.permutations)] or [""]
        return [folder / f"{name}{end}.txt" for end in suffixes for name in self.properties]


class _Search:
    """The best model so far for one property (targets [B], NaN where missing)."""

    def __init__(
        self,
        rows: Array,
        targets: Array,
        held_out: Array,
        held_out_targets: Array,
        config: TreeConfig,
    ) -> None:
        import lightgbm

        known, held = np.isfinite(targets), np.isfinite(held_out_targets)
        self.config = config
        settings = {**_FIXED, "max_bin": config.bins}
        self.data = lightgbm.Dataset(
            rows[known], targets[known], params=settings, free_raw_data=False
        )
        self.held_out: lightgbm.Dataset | None = None
        if held.any():
            self.held_out = self.data.create_valid(held_out[held], held_out_targets[held])
        self.error = math.inf
        self._best: Forest | None = None

    @property
    def best(self) -> Forest:
        assert self._best is not None
        return self._best

    def consider(self, candidate: dict[str, Any]) -> None:
        """Train with the settings of ``candidate`` and keep the model if it is better on
        validation.

        Without validation networks there is nothing to choose by: the first candidate stays.
        """
        import lightgbm

        settings = {**_FIXED, "max_bin": self.config.bins, **candidate}
        if self.held_out is None:
            if self._best is None:
                grown = lightgbm.train(settings, self.data, min(100, self.config.rounds))
                self._best = Forest(grown.model_to_string())
            return
        model = lightgbm.train(
            settings,
            self.data,
            self.config.rounds,
            valid_sets=[self.held_out],
            valid_names=["validation"],
            callbacks=[lightgbm.early_stopping(self.config.patience, verbose=False)],
        )
        error = model.best_score["validation"]["l2"]
        if self._best is None or error < self.error:
            self.error = error
            text = model.model_to_string(num_iteration=model.best_iteration)
            self._best = Forest(lightgbm.Booster(model_str=text).model_to_string())


class TreeBags:
    """The average of ``bags`` sets of boosted trees, a model for each of P properties in each set;
    of so many for each fold, if the networks are cut into several.

    There is no search: each model sees other rows and columns at every tree, and grows until the
    validation networks are predicted no better. They read columns that a perceptron overfits on.
    """

    def __init__(self, bags: int) -> None:
        self.bags = bags
        self._models: list[list[Forest]] = []

    def fit(
        self,
        rows: Array,
        targets: Array,
        held_out: Array,
        held_out_targets: Array,
        *,
        seed: int,
        folds: Sequence[Fold],
    ) -> None:
        """Grow the trees on ``rows`` [B, F] and ``targets`` [B, P], NaN where missing."""
        config = TreeConfig(rounds=300, patience=30)
        generator = numpy_generator(seed, "tree bags")
        self._models = []
        for fold in folds:
            for _ in range(self.bags):
                models = []
                for labels, held_out_labels in zip(targets.T, held_out_targets.T, strict=True):
                    search = _Search(rows[~fold], labels[~fold], held_out, held_out_labels, config)
                    search.consider({**_BAG, "seed": int(generator.integers(2**31))})
                    models.append(search.best)
                self._models.append(models)

    def predict(self, rows: Array, fold: int = 0) -> Array:
        """Of ``rows`` [B, F], [B, P], by the trees that were grown without a fold."""
        own = self._models[self.bags * fold : self.bags * (fold + 1)]
        return np.mean([_predict(models, rows) for models in own], axis=0)

    def write(self, folder: Path, name: str = _BAGS) -> None:
        """Write all models to one file."""
        if self.bags:
            texts = [[model.text for model in models] for models in self._models]
            write_json(folder / name, texts)

    def read(self, folder: Path, name: str = _BAGS) -> None:
        """Read what `write` wrote."""
        if self.bags:
            texts = json.loads((folder / name).read_text(encoding="utf-8"))
            self._models = [[Forest(text) for text in models] for models in texts]


def _candidates(count: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Return ``count`` settings: sensible defaults, then random ones."""
    defaults = {
        "num_leaves": 10,
        "learning_rate": 0.08,
        "min_data_in_leaf": 8,
        "feature_fraction": 0.25,
        "bagging_fraction": 0.8,
        "lambda_l2": 1.0,
    }
    drawn = [
        {
            "num_leaves": int(generator.integers(3, 17)),
            "learning_rate": float(np.exp(generator.uniform(math.log(0.04), math.log(0.2)))),
            "min_data_in_leaf": int(generator.integers(3, 25)),
            "feature_fraction": float(generator.uniform(0.1, 0.5)),
            "bagging_fraction": float(generator.uniform(0.5, 1.0)),
            "lambda_l2": float(np.exp(generator.uniform(math.log(0.01), math.log(30)))),
        }
        for _ in range(count - 1)
    ]
    return [defaults, *drawn]


def _predict(models: Sequence[Forest], rows: Array) -> Array:
    """Return [B, P], a column of each model."""
    columns = [model.predict(rows) for model in models]
    return np.stack(columns, axis=1).astype(np.float64)


def _metrics(mean: Array, targets: Array) -> dict[str, float]:
    errors = np.square(mean - targets)
    if not np.isfinite(errors).any():
        return {}
    error = float(np.nanmean(errors))
    return {"validation/mse": error, "validation/tau": mean_tau(mean, targets)}


def build(name: str, config: TreeConfig, properties: Sequence[str], seed: int) -> Predictor:
    """Return ``gbm``, ``norms``, ``hyperparameters`` or ``shuffled``."""
    features: dict[str, FeatureFunction] = {
        "gbm": feature_functions.weight_features,
        "norms": feature_functions.norm_features,
        "hyperparameters": feature_functions.recipe_features,
        "shuffled": feature_functions.weight_features,
    }
    permutations = _PERMUTATIONS if name == "shuffled" else 0
    return TreePredictor(
        name, config, properties, seed, features=features[name], permutations=permutations
    )
