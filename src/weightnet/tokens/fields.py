"""Random fields sent along a network's own weights: how its channels vary together.

The messages of `weightnet.tokens.messages` give each channel a mean and a variance, as if channels
were independent; whether a network tells inputs apart lies in what they do together. So smooth
random fields (`ProbesConfig.inputs`: no image of any task) pass the layers too. They live on a
torus of `SIDE` x `SIDE` positions: a convolution's kernel reads neighbours on the torus, a linear
layer behind a flatten reads positions spread over it, and one behind convolutions without a
flatten reads their mean. Tokens do not tell of strides, padding and pooling, and none is imitated;
the module is not needed, and its architecture is not run. Without them running statistics do not
fit, so that BatchNorm goes by the fields' own, as it does in training. What comes out is read as
responses to probes are (`response_features`, `response_statistics`). Permuting hidden channels
permutes fields and changes none.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from weightnet.tokens.features import Doubles, finite, segments
from weightnet.tokens.layout import LayerLayout
from weightnet.tokens.messages import ACTIVATION_FUNCTIONS, normalization, scalars
from weightnet.tokens.networks import Networks, Stack
from weightnet.tokens.probes import VIEWS, ProbesConfig
from weightnet.tokens.scratch import scratch_zeros
from weightnet.tokens.tokenizer import Floats

FIELDS = 8
SIDE = 4
COLUMNS = VIEWS * FIELDS
_LIMIT = 1e6
_STACK = 1 << 15  # weights of networks looked at together: fields are larger


def token_fields(networks: Networks) -> Floats:
    """The fields at each token before its activation, averaged over one half of the torus, ordered
    by network, layer, index: float32 [L, COLUMNS], laid out as probe responses.

    Over all of it many fields have mean 0, to which a first convolution would answer with its bias
    and rounding.
    """
    out: Floats = scratch_zeros((int(networks.token_offsets[-1]), COLUMNS), np.float32)
    for stack in networks.stacks(_STACK):
        with np.errstate(over="ignore", invalid="ignore"):
            out[stack.tokens] = _stack_fields(stack)
    return out


def _stack_fields(stack: Stack) -> Floats:
    """[n, tokens, COLUMNS]; layers that share channels (residuals) add up.

    A norm that stands alone writes the channels that it reads: what is behind it is ``shown`` to
    the layers that follow, and what is before it stays for other norms to read (pre-activation,
    concatenations).
    """
    plan, n = stack.layout, len(stack)
    fields = np.zeros((n, len(plan.channel_space), SIDE**2, COLUMNS))
    inputs = plan.channel_space == -1
    fields[:, inputs] = _inputs(int(inputs.sum()))
    norms = any(one.layer.kind == "norm" for one in plan.layers)
    shown = fields.copy() if norms else fields
    spread = np.zeros(len(plan.channel_space), bool)  # over positions: written by convolutions
    own = scalars(stack)
    out = np.empty((n, plan.tokens, COLUMNS), np.float32)
    for one in plan.layers:
        kind = one.layer.kind
        z = fields[:, one.sources] if kind == "norm" else _layer(stack, one, shown, spread)
        here = {name: values[:, one.tokens] for name, values in own.items()}
        if one.layer.variance is not None:
            clean = z[..., :FIELDS]
            bias = here["bias"] if one.layer.bias is not None else 0
            here["mean"] = clean.mean(axis=(2, 3)) + bias
            here["variance"] = clean.var(axis=(2, 3))
        gain, offset = normalization(one.layer, here)
        z *= gain[:, :, None, None]
        z += offset[:, :, None, None]
        z = np.clip(np.nan_to_num(z, copy=False), -_LIMIT, _LIMIT, out=z)
        out[:, one.tokens] = z[:, :, : SIDE**2 // 2].mean(axis=2)
        channels = plan.channel[one.tokens]
        activation = ACTIVATION_FUNCTIONS.get(one.layer.activation, ACTIVATION_FUNCTIONS["relu"])
        if kind == "norm":
            shown[:, channels] = activation(z)
            continue
        fields[:, channels] += activation(z)
        if norms:
            shown[:, channels] = fields[:, channels]
        spread[channels] = kind == "conv"
    return out


@functools.lru_cache(maxsize=16)
def _inputs(channels: int) -> Doubles:
    """The fields [channels, positions, COLUMNS] that enter."""
    drawn = ProbesConfig(count=FIELDS).inputs((channels, SIDE, SIDE)).double().numpy()
    return np.ascontiguousarray(drawn.reshape(COLUMNS, channels, SIDE**2).transpose(1, 2, 0))


def _layer(stack: Stack, one: LayerLayout, fields: Doubles, spread: NDArray[np.bool_]) -> Doubles:
    """What the layer's weights make of ``fields`` [n, channels, positions, COLUMNS]: [n, outputs,
    positions, COLUMNS]."""
    n = len(stack)
    per_group = one.outputs // one.groups
    weight = (
        finite(stack.weight(one)).astype(np.float64).reshape(n, one.groups, per_group, one.fan_in)
    )
    out = np.zeros((n, one.groups, per_group, SIDE**2 * COLUMNS))
    for nodes, taps, size in segments(one):
        source = fields[:, nodes].reshape(n, one.groups, -1, SIDE**2, COLUMNS)
        if one.layer.kind == "linear" and size == 1 and spread[nodes].any():
            source = np.broadcast_to(source.mean(axis=3, keepdims=True), source.shape)
        read = source[:, :, :, _neighbours(one, size)]
        out += np.matmul(weight[..., taps], read.reshape(n, one.groups, -1, out.shape[-1]))
    return out.reshape(n, one.outputs, SIDE**2, COLUMNS)


def _neighbours(one: LayerLayout, size: int) -> NDArray[np.int64]:
    """The positions that the ``size`` values of one channel read at each position: [size,
    positions]."""
    rows, columns = one.layer.kernel
    step, middle = (1, 1), (rows // 2, columns // 2)
    if one.layer.kind == "linear":  # positions of a flattened map, spread over the torus
        rows = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0)
        columns = size // rows
        step, middle = (max(1, SIDE // rows), max(1, SIDE // columns)), (0, 0)
    y = (np.arange(rows) - middle[0]) * step[0]
    x = (np.arange(columns) - middle[1]) * step[1]
    here = np.arange(SIDE)
    down = (y[:, None, None, None] + here[:, None]) % SIDE
    right = (x[:, None, None] + here) % SIDE
    return np.asarray((down * SIDE + right).reshape(rows * columns, SIDE**2))
