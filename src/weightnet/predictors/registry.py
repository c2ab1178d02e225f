"""The predictors by name: what each is, for tables, and how to build it, with lazy imports."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from weightnet.params import Params, parse
from weightnet.predictors.interface import Predictor


@dataclass(frozen=True)
class Entry:
    """One predictor of the registry.

    ``module`` holds the config class named ``config`` and a function
    ``build(name, config, properties, seed) -> Predictor``; it is imported on first use.
    A ``published`` system reads only the networks that it accepts: it is compared where both
    predicted, and is no contender for the best of a column.
    """

    kind: Literal["ours", "baseline", "published", "floor", "control"]
    module: str
    config: str
    description: str
    reads_weights: bool = True
    needs_forward: bool = False


PREDICTORS: dict[str, Entry] = {
    "weightnet": Entry(
        "ours",
        "weightnet.predictors.weightnet",
        "WeightNetConfig",
        "attention over neuron tokens, which tell what noise and random fields become along the "
        "weights (the network itself is not run), averaged with LightGBM on the same statistics",
    ),
    "weightnet_probe": Entry(
        "ours",
        "weightnet.predictors.weightnet",
        "WeightNetConfig",
        "LightGBM on WeightNet's statistics and on answers to probes distilled from the "
        "training networks; where no probes fit, WeightNet with responses to random probes",
        needs_forward=True,
    ),
    "mlp": Entry(
        "baseline", "weightnet.predictors.vectors", "MlpConfig", "MLP on flat canonical weights"
    ),
    "stats": Entry(
        "baseline", "weightnet.predictors.vectors", "StatsConfig", "MLP on weight statistics"
    ),
    "gbm": Entry(
        "baseline",
        "weightnet.predictors.trees",
        "TreeConfig",
        "LightGBM on weight statistics, tuned on validation",
    ),
    "nfn": Entry(
        "published",
        "weightnet.predictors.nfn",
        "NfnConfig",
        "neural functional (HNP layers, HNPPool) on the networks that it accepts: plain chains",
    ),
    "mean": Entry(
        "floor",
        "weightnet.predictors.floors",
        "FloorConfig",
        "mean of the training networks",
        reads_weights=False,
    ),
    "family_mean": Entry(
        "floor",
        "weightnet.predictors.floors",
        "FloorConfig",
        "mean of the family's training networks",
        reads_weights=False,
    ),
    "norms": Entry("floor", "weightnet.predictors.trees", "TreeConfig", "LightGBM on layer norms"),
    "hyperparameters": Entry(
        "floor",
        "weightnet.predictors.trees",
        "TreeConfig",
        "LightGBM on the training recipe, not from weights",
        reads_weights=False,
    ),
    "shuffled": Entry(
        "control", "weightnet.predictors.trees", "TreeConfig", "gbm trained on permuted labels"
    ),
}


def entry(name: str) -> Entry:
    """Return the registry's entry for ``name``.

    Raises:
        ValueError: if no predictor has this name.
    """
    if name not in PREDICTORS:
        raise ValueError(
            f"predictor must be one of {', '.join(PREDICTORS)}, however: predictor={name}"
        )
    return PREDICTORS[name]


def config_class(name: str) -> type[Params]:
    """Return the class of the section ``train_predictor.<name>`` of params.yaml.

    Raises:
        ValueError: if no predictor has this name.
    """
    found = entry(name)
    return cast("type[Params]", getattr(importlib.import_module(found.module), found.config))


def build(
    name: str, config: Params | Mapping[str, Any] | None, properties: Sequence[str], seed: int
) -> Predictor:
    """Return a new, unfitted predictor.

    Args:
        config: its configuration, or the plain section of params.yaml, or None for the defaults.

    Raises:
        ValueError: if the name or a key or value of the configuration is wrong.
    """
    expected = config_class(name)
    if not isinstance(config, Params):
        config = parse(expected, dict(config or {}), f"train_predictor.{name}")
    if not isinstance(config, expected):
        raise ValueError(
            f"config of {name} must be {expected.__name__}, however: it is {type(config).__name__}"
        )
    module = importlib.import_module(entry(name).module)
    return cast("Predictor", module.build(name, config, properties, seed))
