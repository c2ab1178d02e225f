"""What carries a prediction: the share of each layer and each neuron, for each property.

A token's attribution is its integrated gradient (Sundararajan et al. 2017,
https://arxiv.org/abs/1703.01365): the gradient of the predicted mean along the straight way from
the average token, to which standardized features are 0, times the token's features, summed over
the features. It is positive where the neuron raises the prediction. A network's attributions are
divided by the sum of their absolute values. What a predictor reads of the network as a whole
(statistics) has no token and is not shared out.

The sanity check is the same predictor with random weights (Adebayo et al. 2018,
https://arxiv.org/abs/1810.03292): a map that looks the same for both would explain nothing. How
much two maps may differ by chance, the same predictor trained from another seed tells. Maps are
compared with their signs: absolute values are alike for any two models, because both multiply by
the same features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from weightnet.compute import default_device, spread_map
from weightnet.predictors.fitting import Batches, FitConfig, seeded
from weightnet.predictors.interface import Predictor
from weightnet.predictors.learned import ModulePredictor
from weightnet.predictors.scaling import Array
from weightnet.tokens import Networks, token_features

BINS = 8
VIEWS = ("depth", "norm")
STEPS = 8  # of the way from the average token
IMPORTANCE = ["run", "family", "model", "property", "view", "position", "importance"]
AGREEMENT = ["run", "family", "model", "property", "correlation", "top_tenth"]


class Interpretation(NamedTuple):
    """``importance`` (columns `IMPORTANCE`): of each network, the share of the absolute
    attribution in each of 8 bins of a view: ``depth`` (0 first layer, 1 last) or ``norm`` (rank of
    the neuron's incoming weights among its layer's by norm, 0 smallest, 1 largest). ``position``
    is the middle of the bin.

    ``agreement`` (columns `AGREEMENT`): of each network, Spearman's correlation between a model's
    attributions of all neurons, with their signs, and those of the ``trained`` one (NaN for
    itself), and the share of the absolute attribution that the most important tenth of the
    neurons carries.

    ``model`` is ``trained``, ``retrained`` (another seed, if given) or ``randomized``.
    """

    importance: pd.DataFrame
    agreement: pd.DataFrame


def interpret(
    predictor: Predictor,
    networks: Networks,
    *,
    other: Predictor | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Interpretation:
    """Attribute the predictions of a fitted predictor that reads tokens to layers and neurons.

    Args:
        other: the same predictor trained from another seed.
        advance: Called for each ``model`` that is done.

    Raises:
        ValueError: if a predictor does not read tokens.
    """
    reading = _reading_tokens(predictor)
    with seeded(predictor.seed, "random importance"):
        random = [reading.reader.module(len(predictor.properties)) for _ in reading.modules]
    models = {"trained": (reading, reading.modules)}
    if other is not None:
        again = _reading_tokens(other)
        models["retrained"] = (again, again.modules)
    models["randomized"] = (reading, random)
    maps = {}
    for name, values in zip(models, _attributions(list(models.values()), networks), strict=True):
        maps[name] = values
        advance()
    features = token_features(networks)
    norm = features.values[:, features.names.index("row_l2")]
    shares, agreements = [], []
    for b in range(len(networks)):
        tokens = slice(*features.token_offsets[b : b + 2])
        layer = features.layer[tokens]
        views = {"depth": layer / max(1, layer[-1]), "norm": _rank_within(norm[tokens], layer)}
        origin = {name: networks.frame[name].iat[b] for name in ("run", "family")}
        for model, values in maps.items():
            for p, name in enumerate(predictor.properties):
                signed = values[tokens, p]
                own = np.abs(signed)
                key: dict[str, Any] = {**origin, "model": model, "property": name}
                for view, position in views.items():
                    bins = np.minimum(position * BINS, BINS - 1).astype(np.int64)
                    weight = np.bincount(bins, own, BINS)
                    shares += [
                        {
                            **key,
                            "view": view,
                            "position": (i + 0.5) / BINS,
                            "importance": weight[i],
                        }
                        for i in range(BINS)
                    ]
                first = maps["trained"][tokens, p]
                agreements.append(
                    {
                        **key,
                        "correlation": np.nan if model == "trained" else _spearman(first, signed),
                        "top_tenth": np.sort(own)[::-1][: max(1, round(len(own) / 10))].sum(),
                    }
                )
    return Interpretation(
        pd.DataFrame(shares, columns=IMPORTANCE), pd.DataFrame(agreements, columns=AGREEMENT)
    )


def attributions(predictor: Predictor, networks: Networks) -> Array:
    """Return each token's share of its network's attribution, with its sign, float64 [L, P]: of
    the mean of the predictor's modules. Absolute values sum to 1 for each network.

    Raises:
        ValueError: if the predictor does not read tokens.
    """
    reading = _reading_tokens(predictor)
    (values,) = _attributions([(reading, reading.modules)], networks)
    return values


def _attributions(
    models: Sequence[tuple[ModulePredictor, Sequence[nn.Module]]], networks: Networks
) -> Generator[Array]:
    """Those of the mean of each model's modules, which read what its predictor does: model by
    model, modules in processes side by side."""
    counts = np.array([plan.tokens for plan in networks.layouts()], dtype=np.int64)
    network = np.repeat(np.arange(len(counts)), counts)
    work: list[tuple[Any, ...]] = []
    for predictor, modules in models:
        batches = predictor.reader.batches(networks, training=False)
        work += [(module, batches, counts, predictor.fit_config) for module in modules]
    with spread_map(len(work)) as spread:
        found = spread(_module_attributions, *zip(*work, strict=True))
        for _, modules in models:
            values: Array = np.mean([next(found) for _ in modules], axis=0)
            totals = np.zeros((len(counts), values.shape[1]))
            np.add.at(totals, network, np.abs(values))
            yield values / np.maximum(totals, 1e-300)[network]


def _module_attributions(
    module: nn.Module, batches: Batches, counts: NDArray[np.int64], config: FitConfig
) -> Array:
    """Integrated gradients [L, P] of networks with ``counts`` tokens: those of a network add up to
    its prediction less that of the same network with average tokens."""
    device = default_device()
    module.to(device).eval()
    parts = []
    for indices in batches.cut(torch.arange(batches.count), config):
        size = int(counts[indices.numpy()].sum())
        batch: Any = batches.collate(indices).to(device)
        ends = {
            field.name: value
            for field in dataclasses.fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
            and value.is_floating_point()
            and value.ndim == 2
            and len(value) == size
        }
        assert ends, "a batch of tokens holds features of each token"
        steps = ((step + 0.5) / STEPS for step in range(STEPS))
        slopes = [_slopes(module, batch, ends, way) / STEPS for way in steps]
        parts.append(torch.stack(slopes).sum(dim=0).double().cpu().numpy())
    return np.concatenate(parts)


def _slopes(module: nn.Module, batch: Any, ends: dict[str, Tensor], way: float) -> Tensor:
    """How fast each token moves each predicted mean where the features are ``way`` times those in
    ``ends`` [L, P]: gradient times features, summed over the features."""
    inputs = {name: (way * end).requires_grad_() for name, end in ends.items()}
    mean, _ = module(dataclasses.replace(batch, **inputs))
    columns = []
    for p in range(mean.shape[1]):
        gradients = torch.autograd.grad(
            mean[:, p].sum(), list(inputs.values()), retain_graph=True, allow_unused=True
        )
        products = [
            (gradient * end).sum(dim=1)
            for gradient, end in zip(gradients, ends.values(), strict=True)
            if gradient is not None
        ]
        columns.append(torch.stack(products).sum(dim=0))
    return torch.stack(columns, dim=1)


def _reading_tokens(predictor: Predictor) -> ModulePredictor:
    from weightnet.predictors.weightnet import TokenReader

    if not isinstance(predictor, ModulePredictor) or not isinstance(predictor.reader, TokenReader):
        raise ValueError(
            f"predictor must read tokens, as weightnet does, however: {predictor.name} does not"
        )
    return predictor


def _rank_within(values: Array, layer: Array) -> Array:
    """The rank of each value among its layer's, from 0 to 1; .5 for one alone."""
    order = np.lexsort((values, layer))
    counts = np.bincount(layer)
    starts = np.cumsum(counts) - counts
    ranks = np.empty(len(values))
    ranks[order] = np.arange(len(values)) - starts[layer[order]] + 0.5
    return ranks / counts[layer]


def _spearman(x: Array, y: Array) -> float:
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)
