"""Messages along a network's own weights, forward and backward, computed once and without
parameters.

Each channel holds a mean and a variance. A layer multiplies them by its weights (matrix products
with the sums and the squares of each kernel), adds its bias, applies its normalization, and
passes on the mean and variance behind its activation, integrated over a Gaussian. Started with
zero mean and unit variance at the input this is mean-field signal propagation (Poole et al. 2016,
https://arxiv.org/abs/1606.05340) through the weights at hand instead of random ones; the backward
message is the expected squared gradient (Schoenholz et al. 2017,
https://arxiv.org/abs/1611.01232). As with precomputed graph convolutions (SIGN, Rossi et al. 2020,
https://arxiv.org/abs/2004.11198), a learner reads the messages as features. No input is run
through the network; permuting hidden channels permutes messages and changes none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from weightnet.symmetry.spec import Layer
from weightnet.tokens.features import EPSILON, LIMIT, Doubles, finite, segments
from weightnet.tokens.layout import LayerLayout, Layout
from weightnet.tokens.networks import Networks, Stack
from weightnet.tokens.scratch import scratch_zeros
from weightnet.tokens.tokenizer import Floats

PULSES = ("white", "flat")  # neighbouring pixels of the input are independent, or equal
TOKEN_MESSAGES = tuple(
    f"{pulse}_{name}"
    for pulse in PULSES
    for name in ("mean", "log_spread", "ratio", "on", "gradient", "carried")
)
_TINY = 1e-12
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_STEP = 1e-3
_ROUNDING = 1e-10  # variance that rounding alone may give: no spread

Activation = Callable[[Doubles], Doubles]
ACTIVATION_FUNCTIONS: dict[str, Activation] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "selu": lambda x: 1.0507 * np.where(x > 0, x, 1.6733 * np.expm1(np.minimum(x, 0))),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "silu": lambda x: x * _sigmoid(x),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "tanh": np.tanh,
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "sigmoid": lambda x: _sigmoid(x),
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "softplus": lambda x: np.logaddexp(0, x),
}


def _sigmoid(x: Doubles) -> Doubles:
    return 0.5 * (1 + np.tanh(0.5 * x))


@dataclass(frozen=True)
class _Moments:
    """Of what passes a layer's tokens, [n, outputs] each: before the activation, behind it, and
    the expected squared slope."""

    mean: Doubles
    variance: Doubles
    passed_mean: Doubles
    passed_variance: Doubles
    slope: Doubles
    on: Doubles


@dataclass(frozen=True)
class _Wires:
    """A layer's weights between channels: ``sums`` and ``squares`` [n, groups, outputs per group,
    channels per group] over kernel positions; ``gain`` [n, outputs] of its normalization,
    ``offset`` [n, outputs] added behind it. ``sources`` [groups, channels per group]."""

    sources: NDArray[np.int32]
    sums: Doubles
    squares: Doubles
    gain: Doubles
    offset: Doubles


def token_messages(networks: Networks) -> Floats:
    """The messages at each token, ordered by network, layer, index: float32
    [L, len(TOKEN_MESSAGES)].

    ``mean``, ``log_spread`` and their ``ratio`` before the activation, the share of the time that
    it is ``on`` (above 0), the expected squared ``gradient`` of the outputs, and ``carried``,
    gradient times variance: how much of the output the neuron carries. asinh or log scale.
    """
    shape = (int(networks.token_offsets[-1]), len(TOKEN_MESSAGES))
    out: Floats = scratch_zeros(shape, np.float32)
    for stack in networks.stacks():  # smaller ones give other last digits: tanh is vectorized
        with np.errstate(over="ignore", invalid="ignore"):
            found = np.nan_to_num(_stack_messages(stack), posinf=LIMIT, neginf=-LIMIT)
        out[stack.tokens] = np.clip(found, -LIMIT, LIMIT)
    return out


def message_statistics(
    messages: Floats, layer_offsets: NDArray[np.int64], layer_starts: NDArray[np.int64]
) -> tuple[tuple[str, ...], Floats]:
    """Names and values [B, S]: mean and spread of each message over the first, middle and last
    hidden layer, the outputs, and over all layers.

    Args:
        messages: [L, len(TOKEN_MESSAGES)].
        layer_offsets, layer_starts: as in `TokenFeatures`.
    """
    first = layer_offsets[:-1]
    counts = np.maximum(np.diff(layer_offsets), 1)[:, None]
    mean = np.add.reduceat(messages.astype(np.float64), first, axis=0) / counts
    square = np.add.reduceat(messages.astype(np.float64) ** 2, first, axis=0) / counts
    variance = square - mean**2
    spread = np.sqrt(np.where(variance > _ROUNDING, variance, 0))
    table = np.concatenate([mean, spread], axis=1)
    rows = []
    for start, stop in itertools.pairwise(layer_starts):
        layers = table[start:stop]
        hidden = layers[:-1] if len(layers) > 1 else layers
        parts = [hidden[0], hidden[len(hidden) // 2], hidden[-1], layers[-1]]
        rows.append(np.concatenate([*parts, layers.mean(axis=0), layers.std(axis=0)]))
    names = [f"{m}_{kind}" for kind in ("mean", "spread") for m in TOKEN_MESSAGES]
    places = ("first", "middle", "last", "outputs", "average", "variation")
    columns = tuple(f"message_{place}_{name}" for place in places for name in names)
    return columns, np.array(rows, np.float32).reshape(len(rows), len(columns))


def _stack_messages(stack: Stack) -> Doubles:
    """[n, tokens, len(TOKEN_MESSAGES)]."""
    plan = stack.layout
    wires = list(_wires(stack))
    parts = []
    for pulse in PULSES:
        passed = _forward(plan, wires, pulse, len(stack))
        gradient = _backward(plan, wires, passed, pulse, len(stack))
        mean = np.concatenate([one.mean for one in passed], axis=1)
        variance = np.concatenate([one.variance for one in passed], axis=1)
        on = np.concatenate([one.on for one in passed], axis=1)
        spread = np.sqrt(variance + _TINY)
        log_gradient = 0.5 * np.log(gradient + _TINY)
        ratio = np.clip(mean / spread, -20, 20)
        carried = log_gradient + np.log(spread)
        parts += [np.arcsinh(mean), np.log(spread), ratio, on, log_gradient, carried]
    return np.stack(parts, axis=2)


def _forward(plan: Layout, wires: list[_Wires], pulse: str, n: int) -> list[_Moments]:
    """Means and variances layer by layer; layers that share channels (residuals) add up.

    A norm that stands alone writes the channels that it reads: what is behind it is ``shown`` to
    the layers that follow, and what is before it stays for other norms to read (pre-activation,
    concatenations).
    """
    count = len(plan.channel_space)
    state = np.zeros((2, n, count))  # mean and variance
    state[1][:, plan.channel_space == -1] = 1
    shown = state.copy()
    passed = []
    for one, wire in zip(plan.layers, wires, strict=True):
        norm = one.layer.kind == "norm"
        mean, variance = (state if norm else shown)[..., wire.sources]
        squares = wire.squares if pulse == "white" else wire.sums**2
        z = np.einsum("ngoc,ngc->ngo", wire.sums, mean).reshape(n, -1)
        v = np.einsum("ngoc,ngc->ngo", squares, variance).reshape(n, -1)
        moments = _activate(z * wire.gain + wire.offset, v * wire.gain**2, one.layer.activation)
        channels = plan.channel[one.tokens]
        behind = np.stack([moments.passed_mean, moments.passed_variance])
        if not norm:
            state[..., channels] += behind
            behind = state[..., channels]
        shown[..., channels] = behind
        passed.append(moments)
    return passed


def _backward(
    plan: Layout, wires: list[_Wires], passed: list[_Moments], pulse: str, n: int
) -> Doubles:
    """The expected squared gradient of the outputs (each of variance 1) at each token: [n,
    tokens]."""
    gradient, shown = (np.zeros((n, len(plan.channel_space))) for _ in range(2))
    out = np.zeros((n, plan.tokens))
    last = len(plan.layers) - 1
    for index in range(last, -1, -1):
        one, wire, moments = plan.layers[index], wires[index], passed[index]
        norm, channels = one.layer.kind == "norm", plan.channel[one.tokens]
        if index == last:
            here = np.ones((n, one.outputs))
        else:
            here = shown[:, channels] + (0 if norm else gradient[:, channels])
        if norm:
            shown[:, channels] = 0  # what is before it is read by norms alone, or anew
        here = here * moments.slope
        out[:, one.tokens] = here
        squares = wire.squares if pulse == "white" else wire.sums**2
        back = (here * wire.gain**2).reshape(n, squares.shape[1], -1)
        sent = np.einsum("ngoc,ngo->ngc", squares, back)
        to = gradient if norm else shown
        np.add.at(to.T, wire.sources.reshape(-1), sent.reshape(n, -1).T)
    return out


def _activate(mean: Doubles, variance: Doubles, activation: str) -> _Moments:
    """Moments behind an activation, by Gauss-Hermite quadrature."""
    mean, variance = np.clip(mean, -LIMIT, LIMIT), np.clip(variance, 0, LIMIT**2)
    spread = np.sqrt(variance)
    function = ACTIVATION_FUNCTIONS.get(activation, ACTIVATION_FUNCTIONS["relu"])
    total = float(_WEIGHTS.sum())
    first, second = np.zeros_like(mean), np.zeros_like(mean)
    slope = np.zeros_like(mean)
    for node, weight in zip(_NODES, _WEIGHTS / total, strict=True):
        z = mean + node * spread
        value = function(z)
        first += weight * value
        second += weight * value**2
        slope += weight * ((function(z + _STEP) - function(z - _STEP)) / (2 * _STEP)) ** 2
    on = 0.5 * (1 + erf(mean / (np.sqrt(2) * spread + _TINY)))
    if activation == "relu":
        slope = on
    elif activation == "identity":
        slope = np.ones_like(mean)
    return _Moments(mean, variance, first, np.maximum(second - first**2, 0), slope, on)


def scalars(stack: Stack) -> dict[str, Doubles]:
    """Bias, scale, shift, mean and variance [n, tokens] each, where a layer has them."""
    names = ("bias", "scale", "shift", "mean", "variance")
    return {name: finite(stack.scalar(name)).astype(np.float64) for name in names}


def normalization(layer: Layer, here: Mapping[str, Doubles]) -> tuple[Doubles, Doubles]:
    """What a layer's bias and normalization do to its weighted sums: times ``gain``, plus
    ``offset``, [n, outputs] each.

    Args:
        here: the layer's own `scalars`, [n, outputs] each.
    """
    gain, offset = np.ones_like(here["bias"]), np.zeros_like(here["bias"])
    if layer.bias is not None:
        offset = offset + here["bias"]
    if layer.mean is not None:
        offset = offset - here["mean"]
    if layer.variance is not None:
        gain = gain / np.sqrt(np.maximum(here["variance"], 0) + EPSILON)
    if layer.scale is not None:
        gain = gain * here["scale"]
    offset = offset * gain
    if layer.shift is not None:
        offset = offset + here["shift"]
    return gain, offset


def _wires(stack: Stack) -> Iterator[_Wires]:
    own, n = scalars(stack), len(stack)
    for one in stack.layout.layers:
        here = {name: values[:, one.tokens] for name, values in own.items()}
        gain, offset = normalization(one.layer, here)
        sources = one.sources.reshape(one.groups, -1)
        if one.fan_in:
            sums, squares = _reduce(finite(stack.weight(one)), one)
        else:  # a norm that stands alone passes each channel on
            sums = squares = np.ones((n, one.outputs, 1, 1))
            sources = one.sources.reshape(one.outputs, 1)
        yield _Wires(sources, sums, squares, gain, offset)


def _reduce(weight: Floats, one: LayerLayout) -> tuple[Doubles, Doubles]:
    """Sums and sums of squares of [n, outputs, fan-in] over each channel's taps."""
    n, outputs, _ = weight.shape
    channels = len(one.sources) // one.groups
    sums = np.empty((n, outputs, channels))
    squares = np.empty_like(sums)
    first = 0
    for _, taps, size in segments(one):
        part = weight[:, :, taps].reshape(n, outputs, -1, size)
        span = slice(first, first + part.shape[2])
        sums[:, :, span] = part.sum(axis=-1, dtype=np.float64)
        squares[:, :, span] = np.einsum("noct,noct->noc", part, part, dtype=np.float64)
        first = span.stop
    shape = (n, one.groups, outputs // one.groups, channels)
    return sums.reshape(shape), squares.reshape(shape)
