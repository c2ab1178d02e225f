"""How much a predictor's output changes when a network is replaced by an equivalent one.

Permuting hidden neurons, and scaling the two sides of ReLU-like units by inverse factors, change
the weights and not the function (Ainsworth et al. 2022, https://arxiv.org/abs/2209.04836), hence
not a single property: a predictor that answers differently for the copy has read something that is
not there.

Copies go through the same door as the originals (``canonicalize``, then ``build``), so the audit
is of the whole path from a checkpoint to a prediction. What remains for an invariant predictor is
the rounding of float32 sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from weightnet.evaluation import metrics
from weightnet.evaluation.metrics import Floats
from weightnet.symmetry import (
    PermutationSpec,
    permute,
    random_permutation,
    random_scales,
    rescale,
)
from weightnet.tokens import Networks

ALL_FAMILIES = "all"
COLUMNS = (
    "predictor",
    "split",
    "family",
    "transformation",
    "property",
    "largest",
    "relative",
    "tau",
    "tau_copies",
    "n",
)

State = Mapping[str, torch.Tensor]
Transformation = Callable[[PermutationSpec, State, torch.Generator], State]
Build = Callable[[pd.DataFrame, dict[str, PermutationSpec], Sequence[State]], Networks]


class Estimate(Protocol):
    """What a predictor returns: ``mean`` [B, P] of ``properties`` [P]."""

    @property
    def properties(self) -> tuple[str, ...]: ...
    @property
    def mean(self) -> Floats: ...


class Predicts(Protocol):
    """The part of a predictor that is audited."""

    name: str

    def predict(self, networks: Networks) -> Estimate: ...


def permuted(spec: PermutationSpec, state: State, generator: torch.Generator) -> State:
    """Return an equivalent network with the hidden channels of every space in random order."""
    return permute(spec, random_permutation(spec, generator), state)


def rescaled(spec: PermutationSpec, state: State, generator: torch.Generator) -> State:
    """Return an equivalent network with every ReLU-like channel scaled by a random positive
    factor."""
    return rescale(spec, random_scales(spec, generator), state)


TRANSFORMATIONS: dict[str, Transformation] = {"permuted": permuted, "rescaled": rescaled}


def audit(
    predictor: Predicts,
    networks: Networks,
    *,
    split: str,
    generator: torch.Generator,
    copies: int = 2,
    canonicalize: Callable[[PermutationSpec, State], State] | None = None,
    build: Build | None = None,
    transformations: Mapping[str, Transformation] = TRANSFORMATIONS,
    batch: int = 64,
) -> pd.DataFrame:
    """Compare a fitted predictor's output for networks and for equivalent copies of them.

    Args:
        predictor: has ``name`` and ``predict``.
        networks: the originals, as read from the shards.
        split: the split that the predictor was trained on, for the table.
        generator: draws the copies.
        copies: equivalent copies of each network and transformation.
        canonicalize: what was done to the originals before they became tokens; None for nothing.
        build: makes networks of ``(frame, specs, states)``; `Networks.from_states` if None. Pass
            one that adds the probe responses where the originals carry them.
        batch: copies held in memory at a time.

    Returns:
        One row per family (and ``all``), transformation and property: ``largest`` absolute change,
        in the property's unit; ``relative``: that, divided by the property's standard deviation
        over ``networks``; ``tau`` of the originals and ``tau_copies``, its mean over the copies
        (NaN where unmeasured); ``n`` networks.

    Raises:
        ValueError: if there is no network or no copy, or a prediction is not finite.
    """
    if len(networks) == 0 or copies < 1:
        raise ValueError(
            f"an audit needs networks and copies, however: networks={len(networks)}, "
            f"copies={copies}; audit a split with test networks"
        )
    original = predictor.predict(networks)
    names = original.properties
    frame = networks.frame
    measured = frame[[f"property.{name}" for name in names]].to_numpy(dtype=np.float64)
    families = frame["family"].to_numpy(dtype=str)
    rows = []
    for label, transformation in transformations.items():
        changed = np.stack(
            [
                _predict_copies(
                    predictor, networks, transformation, generator, canonicalize, build, batch
                )
                for _ in range(copies)
            ]
        )
        if not (np.isfinite(changed).all() and np.isfinite(original.mean).all()):
            raise ValueError(
                f"predictions must be finite, however: {predictor.name} on {label} copies gives "
                "NaN or infinity; leave out diverged networks or correct the predictor"
            )
        for family in [ALL_FAMILIES, *sorted(set(families))]:
            members = families == family if family != ALL_FAMILIES else np.ones(len(frame), bool)
            for p, name in enumerate(names):
                largest = float(np.abs(changed[:, members, p] - original.mean[members, p]).max())
                taus = [_tau(measured[members, p], one[members, p]) for one in changed]
                rows.append(
                    {
                        "predictor": predictor.name,
                        "split": split,
                        "family": family,
                        "transformation": label,
                        "property": name,
                        "largest": largest,
                        "relative": largest / _spread(measured[:, p]),
                        "tau": _tau(measured[members, p], original.mean[members, p]),
                        "tau_copies": float(np.mean(taus)),
                        "n": int(members.sum()),
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _predict_copies(
    predictor: Predicts,
    networks: Networks,
    transformation: Transformation,
    generator: torch.Generator,
    canonicalize: Callable[[PermutationSpec, State], State] | None,
    build: Build | None,
    batch: int,
) -> Floats:
    """Return the predictions for one equivalent copy of each network: [B, P]."""
    parts = []
    for start in range(0, len(networks), batch):
        rows = range(start, min(start + batch, len(networks)))
        states: list[State] = []
        for i in rows:
            spec = networks.spec(i)
            state = transformation(spec, networks.state(i), generator)
            states.append(canonicalize(spec, state) if canonicalize else state)
        chosen = networks.frame.iloc[list(rows)].reset_index(drop=True)
        copy = (build or Networks.from_states)(chosen, dict(networks.specs), states)
        parts.append(predictor.predict(copy).mean)
    return np.concatenate(parts)


def _tau(measured: Floats, predicted: Floats) -> float:
    known: NDArray[np.bool_] = np.isfinite(measured)
    if known.sum() < 2:
        return float("nan")
    once = np.ones((int(known.sum()), 1), dtype=np.float32)
    return float(metrics.tau(measured[known], predicted[known], once)[0])


def _spread(measured: Floats) -> float:
    """Return the standard deviation of the measured values; NaN where there is none to compare
    with."""
    known = measured[np.isfinite(measured)]
    spread = float(known.std()) if len(known) > 1 else 0.0
    return spread if spread > 0 else float("nan")
