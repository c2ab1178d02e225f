"""One fixed-length vector per network, whatever its architecture: weight statistics, norms, flat
weights.

Weight statistics follow Unterthiner et al. 2020, "Predicting Neural Network Accuracy from Weights"
(https://arxiv.org/abs/2002.11448): mean, variance and the quantiles 0, 25, 50, 75, 100% of each
layer's weights and biases. Layers are taken by position: the first four, the last four
(overlapping in shallow networks, NaN where there are fewer than four), and mean, min, max and std
over all, so that any depth fits. A layer with weights that are not finite (a diverged network) has
NaN statistics. Permuting hidden channels changes none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightnet.tokens.features import (
    EPSILON,
    FEATURE_VALUES,
    LIMIT,
    Doubles,
    finite,
    interpolate,
)
from weightnet.tokens.layout import LayerLayout, Layout
from weightnet.tokens.networks import Networks, Stack
from weightnet.tokens.tokenizer import Floats

ENDS = 4  # layers taken by position at each end
POWER_STEPS = 6  # of the spectral norm's power iteration
TINY = 1e-12  # keeps logarithms finite

_MOMENTS = ("mean", "var", "q0", "q25", "q50", "q75", "q100")
_NORMS = ("log_frobenius", "log_spectral", "log_max_row")
_LAYER = (
    *(f"weight_{name}" for name in _MOMENTS),
    *(f"bias_{name}" for name in _MOMENTS),
    *("scale_mean", "scale_var", "log_variance_mean"),
    *_NORMS,
    *("log_fan_in", "log_width"),
)
_TOTALS = ("depth", "log_parameters", "log_norm")


def weight_statistics(networks: Networks) -> tuple[tuple[str, ...], Doubles]:
    """Names and values [B, F] of the classical statistics, layer norms, depth and size of each
    network."""
    names = (*_positions(_LAYER), *_TOTALS)
    return names, _by_network(networks, len(names), _LAYER)


def layer_norms(networks: Networks) -> tuple[tuple[str, ...], Doubles]:
    """Names and values [B, F] of the norms alone: per layer log Frobenius norm, log spectral norm
    (power iteration) and log of the largest row norm, and depth, log parameter count and log norm
    of the whole."""
    names = (*_positions(_NORMS), *_TOTALS)
    return names, _by_network(networks, len(names), _NORMS)


def flat_weights(networks: Networks, size: int) -> Floats:
    """Each network's weight, bias, scale and shift, layer after layer in forward order, as [B,
    size].

    Shorter networks are padded with zeros; longer ones are thinned evenly, keeping parameter
    floor(k P / size) of P for k = 0 .. size - 1. Values that are not finite stay so.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, however: size={size}")
    out = np.zeros((len(networks), size), np.float32)
    for stack in networks.stacks():
        total = _parameters(stack.layout)
        kept = np.arange(total) if total <= size else np.arange(size) * total // size
        scalars = {field: stack.scalar(field) for field in ("bias", "scale", "shift")}
        first = column = 0
        for one in stack.layout.layers:
            parts = [stack.weight(one).reshape(len(stack), -1)]
            parts += [
                scalars[f][:, one.tokens] for f in scalars if getattr(one.layer, f) is not None
            ]
            for part in parts:
                here = kept[(kept >= first) & (kept < first + part.shape[1])] - first
                out[stack.members[:, None], np.arange(column, column + len(here))] = part[:, here]
                first, column = first + part.shape[1], column + len(here)
    return out


def _positions(names: tuple[str, ...]) -> list[str]:
    """Names of per-layer statistics at the ends and over all layers."""
    ends = [f"first{i}" for i in range(ENDS)] + [f"last{i}" for i in range(ENDS)]
    return [f"{place}_{name}" for place in (*ends, "mean", "min", "max", "std") for name in names]


def _by_network(networks: Networks, width: int, columns: tuple[str, ...]) -> Doubles:
    """Statistics by position, and the totals."""
    out = np.full((len(networks), width), np.nan)
    picked = [_LAYER.index(name) for name in columns]
    for stack in networks.stacks(FEATURE_VALUES):
        layers = [one for one in stack.layout.layers if one.fan_in]
        if not layers:
            continue
        norms_only = columns == _NORMS
        table = np.stack([_layer_statistics(stack, one, norms_only) for one in layers], axis=1)
        frobenius = table[:, :, _LAYER.index("log_frobenius")]
        table = table[:, :, picked]
        ends = np.full((len(stack), 2 * ENDS, len(picked)), np.nan)
        count = min(ENDS, len(layers))
        ends[:, :count] = table[:, :count]
        ends[:, ENDS : ENDS + count] = table[:, ::-1][:, :count]
        over = [table.mean(axis=1), table.min(axis=1), table.max(axis=1), table.std(axis=1)]
        everything = np.log(np.exp(2 * frobenius).sum(axis=1) + TINY) / 2
        size = np.log(max(1, _parameters(stack.layout)))
        totals = np.broadcast_to([len(layers), size], (len(stack), 2))
        parts = [ends.reshape(len(stack), -1), *over, totals, everything[:, None]]
        out[stack.members] = np.clip(np.concatenate(parts, axis=1), -LIMIT, LIMIT)
    return out


def _layer_statistics(stack: Stack, one: LayerLayout, norms_only: bool) -> Doubles:
    """Statistics [n, len(_LAYER)] of one conv or linear layer."""
    out = np.zeros((len(stack), len(_LAYER)))
    found = stack.weight(one)
    weight = finite(found)
    start = _LAYER.index("log_frobenius")
    out[:, start : start + 3] = _layer_norms(weight)
    out[:, start + 3 :] = np.log1p(one.fan_in), np.log(one.outputs)
    if not norms_only:
        _fill_statistics(out, weight, stack, one)
    if weight is not found:
        out[~np.isfinite(found).all(axis=(1, 2)), : start + 3] = np.nan
    return out


def _fill_statistics(out: Doubles, weight: Floats, stack: Stack, one: LayerLayout) -> None:
    """Fill in the moments of weights, biases and normalization parameters."""
    many = len(_MOMENTS)
    out[:, :many] = _moments(weight.reshape(len(stack), -1))
    bias = "bias" if one.layer.bias is not None else "shift"
    if getattr(one.layer, bias) is not None:
        out[:, many : 2 * many] = _moments(finite(stack.scalar(bias)[:, one.tokens]))
    if one.layer.scale is not None:
        scale = finite(stack.scalar("scale")[:, one.tokens]).astype(np.float64)
        out[:, 2 * many], out[:, 2 * many + 1] = scale.mean(axis=1), scale.var(axis=1)
    if one.layer.variance is not None:
        variance = finite(stack.scalar("variance")[:, one.tokens]).astype(np.float64)
        out[:, 2 * many + 2] = np.log(np.maximum(variance, 0) + EPSILON).mean(axis=1)


def _moments(values: Floats) -> Doubles:
    """Mean, variance and quantiles of each row: [n, len(_MOMENTS)]."""
    last = values.shape[1] - 1
    quartiles = (0.0, 0.25, 0.5, 0.75, 1.0)
    needed = sorted({int(f(q * last)) for q in quartiles for f in (np.floor, np.ceil)})
    placed = np.partition(values, needed, axis=1)
    mean = values.mean(axis=1, dtype=np.float64)
    variance = values.var(axis=1, dtype=np.float64)
    return np.stack([mean, variance, *(interpolate(placed, q) for q in quartiles)], axis=1)


def _layer_norms(weight: Floats) -> Doubles:
    """Logarithms of Frobenius norm, spectral norm and largest row norm of [n, outputs, fan-in] as
    [n, 3].

    The power iteration starts from the row norms, so that it follows a permutation of the neurons.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rows = np.sqrt(np.einsum("noi,noi->no", weight, weight, dtype=np.float64))
        left: NDArray[np.floating] = _unit(rows).astype(np.float32)
        for _ in range(POWER_STEPS):
            right = _unit(np.matmul(left[:, None, :], weight)[:, 0])
            left = np.matmul(weight, right[:, :, None])[..., 0]
            spectral = np.linalg.norm(left.astype(np.float64), axis=1)
            left = _unit(left)
    frobenius = np.linalg.norm(rows, axis=1)
    spectral = np.where(np.isfinite(spectral), spectral, frobenius)
    return np.log(np.stack([frobenius, spectral, rows.max(axis=1)], axis=1) + TINY)


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1).astype(vectors.dtype)


def _parameters(plan: Layout) -> int:
    """Weights, biases, scales and shifts."""
    vectors = ("bias", "scale", "shift")
    return plan.values + sum(
        one.outputs * sum(getattr(one.layer, field) is not None for field in vectors)
        for one in plan.layers
    )
