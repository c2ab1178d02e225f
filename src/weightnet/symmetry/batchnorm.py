"""Fold a BatchNorm into the layer that it follows: its redundancy, taken out of the weights.

A conv or linear layer followed by a BatchNorm in eval mode is one affine map,

    w x + b  ->  f (w x + b - mean) + shift,    f = scale / sqrt(variance + epsilon),

so ``(w, scale, variance)`` say the same in many ways. Folded, ``w' = f w`` and the norm is the
identity, in the same tensors: scale 1, variance ``1 - epsilon``, mean 0, and the constant ``f (b -
mean) + shift`` in the layer's bias, else in the norm's shift (else, with its sign changed, in the
mean). A norm that stands alone, as before the convs of a DenseNet, is left as it is: a unit that
is not linear lies between it and any layer.
"""

from __future__ import annotations

import dataclasses

import torch

from weightnet.symmetry.permute import State, along, check_state
from weightnet.symmetry.spec import Layer, PermutationSpec


def fold_batchnorm(spec: PermutationSpec, state: State) -> dict[str, torch.Tensor]:
    """The same function with every BatchNorm that follows a conv or linear layer folded into it.

    The result loads into the module that ``state`` belongs to. A folded state stays as it is.

    Raises:
        ValueError: if the state does not fit the spec.
    """
    check_state(spec, state)
    folded = dict(state)
    fold_batchnorm_into(spec, folded)
    return folded


def fold_batchnorm_into(spec: PermutationSpec, state: dict[str, torch.Tensor]) -> None:
    """`fold_batchnorm` without checks, in place of the old tensors; also for a stack."""
    for layer in spec.layers:
        if _foldable(layer):
            state.update(_fold(layer, state))


def without_batchnorm(spec: PermutationSpec) -> PermutationSpec:
    """The spec for what `fold_batchnorm` returns: its layers have a bias instead of a norm."""
    layers = tuple(
        dataclasses.replace(
            layer,
            bias=layer.bias or layer.shift,
            scale=None,
            shift=None,
            mean=None,
            variance=None,
            epsilon=None,
        )
        if _foldable(layer)
        else layer
        for layer in spec.layers
    )
    return dataclasses.replace(spec, layers=layers)


def _foldable(layer: Layer) -> bool:
    return layer.kind != "norm" and layer.epsilon is not None


def _fold(layer: Layer, state: State) -> dict[str, torch.Tensor]:
    assert layer.weight and layer.mean and layer.variance and layer.epsilon is not None
    weight, variance = state[layer.weight], state[layer.variance]

    def vector(key: str | None, default: float) -> torch.Tensor:
        return (
            torch.full_like(variance, default, dtype=torch.float64)
            if key is None
            else state[key].double()
        )

    factor = vector(layer.scale, 1.0) / (variance.double() + layer.epsilon).sqrt()
    near = (factor - 1).abs() <= torch.finfo(weight.dtype).eps  # folded: 1 - epsilon is rounded
    factor = torch.where(near, 1.0, factor)
    constant = factor * (vector(layer.bias, 0.0) - vector(layer.mean, 0.0))
    constant += vector(layer.shift, 0.0)
    found = {
        layer.weight: weight * along(factor, 0, weight),
        layer.variance: torch.full_like(variance, 1 - layer.epsilon),
        layer.mean: torch.zeros_like(state[layer.mean]),
    }
    if layer.scale is not None:
        found[layer.scale] = torch.ones_like(state[layer.scale])
    if layer.shift is not None:
        found[layer.shift] = torch.zeros_like(state[layer.shift])
    home = layer.bias or layer.shift or layer.mean
    found[home] = (-constant if home == layer.mean else constant).to(state[home])
    return found
