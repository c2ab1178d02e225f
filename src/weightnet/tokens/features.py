"""Per-token features: the statistics of a neuron's incoming row, of its outgoing column, and of
its place.

Permuting hidden channels permutes tokens and changes no value: every statistic is a reduction over
a set, computed in float64 and stored in float32. Values that are not finite (diverged networks)
count as 0 or as the largest float32 of their sign before statistics; ``row_nonfinite`` says how
many there were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightnet.tokens.layout import ACTIVATIONS, KINDS, LayerLayout, Layout, concatenate_ranges
from weightnet.tokens.networks import Networks, Stack
from weightnet.tokens.scratch import scratch_zeros, take
from weightnet.tokens.tokenizer import Floats

BLOCK_VALUES = 1 << 21  # weights that are held in float64 at a time
FEATURE_VALUES = 1 << 19  # weights of networks looked at together: temporaries are larger
EPSILON = 1e-5  # of BatchNorm
LIMIT = 1e9  # features are clipped here
NEAR_ZERO = 0.1  # of the row's root mean square

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
ROW_FEATURES = (
    *(
        "row_mean",
        "row_std",
        "row_l1",
        "row_l2",
        "row_min",
        "row_q10",
        "row_q25",
        "row_q50",
        "row_q75",
    ),
    *("row_q90", "row_max", "row_skew", "row_kurtosis", "row_near_zero", "row_nonfinite"),
)
OWN_FEATURES = (
    *(
        "bias",
        "scale",
        "shift",
        "running_mean",
        "log_variance",
        "has_bias",
        "has_norm",
        "effective_l2",
    ),
)
OUT_FEATURES = ("out_mean", "out_std", "out_l2", "out_max", "log_readers")
PLACE_FEATURES = (
    *(
        "log_fan_in",
        "depth",
        "log_width",
        "log_kernel",
        "log_stride",
        "log_groups",
        "depthwise",
        "fixed",
    ),
)
FEATURES = (*ROW_FEATURES, *OWN_FEATURES, *OUT_FEATURES, *PLACE_FEATURES)

Doubles = NDArray[np.float64]
Longs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Features of the tokens of some networks, ordered by network, layer, index.

    values       float32 [L, F], named by ``names``
    network      int64 [L]: position of the network; layer: index of the layer in its network
    kind, activation   int64 [L]: codes into `KINDS`, `ACTIVATIONS` (unknown: "other")
    space, channel     int64 [L]: number of the space in the spec (-1: fixed), channel in the space
    token_offsets      int64 [B + 1]: the tokens of network b are token_offsets[b] .. [b + 1]
    layer_offsets      int64 [layers of all networks + 1]: the tokens of each layer, in order
    layer_starts       int64 [B + 1]: the layers of network b are layer_starts[b] .. [b + 1]
    responses    float32 [L, probes], or None if the tokens carry none
    """

    names: tuple[str, ...]
    values: Floats
    network: Longs
    layer: Longs
    kind: Longs
    activation: Longs
    space: Longs
    channel: Longs
    token_offsets: Longs
    layer_offsets: Longs
    layer_starts: Longs
    responses: Floats | None = None

    def __len__(self) -> int:
        return len(self.token_offsets) - 1

    @property
    def layer_segment(self) -> Longs:
        """Number of each token's layer among the layers of all networks [L]."""
        return self.layer_starts[self.network] + self.layer

    def select(self, networks: Sequence[int] | Longs) -> TokenFeatures:
        """The features of these networks, renumbered from 0: a batch."""
        chosen = np.asarray(networks, np.int64)
        tokens, token_offsets = gather_ranges(self.token_offsets, chosen)
        layers, layer_starts = gather_ranges(self.layer_starts, chosen)
        return TokenFeatures(
            names=self.names,
            values=take(self.values, tokens),
            network=np.repeat(np.arange(len(chosen)), np.diff(token_offsets)),
            layer=self.layer[tokens],
            kind=self.kind[tokens],
            activation=self.activation[tokens],
            space=self.space[tokens],
            channel=self.channel[tokens],
            token_offsets=token_offsets,
            layer_offsets=_offsets(np.diff(self.layer_offsets)[layers]),
            layer_starts=layer_starts,
            responses=None if self.responses is None else take(self.responses, tokens),
        )


def token_features(networks: Networks) -> TokenFeatures:
    """Compute the features of every token; all networks of one spec at once."""
    plans = networks.layouts()
    token_offsets = networks.token_offsets
    widths = [np.array([one.outputs for one in plan.layers], np.int64) for plan in plans]
    total = int(token_offsets[-1])
    values: Floats = scratch_zeros((total, len(FEATURES)), np.float32)
    codes: Longs = scratch_zeros((6, total), np.int64)
    responses: Floats | None = None
    answered = 0
    for stack in networks.stacks(FEATURE_VALUES):
        where = stack.tokens
        values[where] = np.clip(_stack_features(stack), -LIMIT, LIMIT)
        codes[0, where] = stack.members[:, None]
        codes[1:, where] = _codes(stack.layout)[:, None]
        found = stack.responses()
        if found is None:
            continue
        if responses is None:
            responses = scratch_zeros((total, found.shape[2]), found.dtype)
        if found.dtype != responses.dtype:
            responses = responses.astype(np.promote_types(found.dtype, responses.dtype))
        if found.shape[2] == responses.shape[1]:
            responses[where] = found
            answered += len(stack)
    return TokenFeatures(
        names=FEATURES,
        values=values,
        network=codes[0],
        layer=codes[1],
        kind=codes[2],
        activation=codes[3],
        space=codes[4],
        channel=codes[5],
        token_offsets=token_offsets,
        layer_offsets=_offsets(np.concatenate(widths) if widths else np.zeros(0, np.int64)),
        layer_starts=_offsets(np.array([len(width) for width in widths], np.int64)),
        responses=responses if answered == len(networks) else None,
    )


def token_rows(networks: Networks, size: int) -> Floats:
    """The first ``size`` weights of every token's incoming row, in the order in which the tokens
    store them, and zeros after a shorter row [L, size]."""
    rows = np.zeros((int(networks.token_offsets[-1]), size), np.float32)
    for stack in networks.stacks():
        for one in stack.layout.layers:
            if one.fan_in:
                weight = finite(stack.weight(one)[..., :size])
                where = stack.tokens[:, one.tokens]
                rows[where, : weight.shape[-1]] = np.clip(weight, -LIMIT, LIMIT)
    return rows


def gather_ranges(offsets: Longs, chosen: Longs) -> tuple[Longs, Longs]:
    """The positions of the chosen ranges, one after another, and their new offsets."""
    counts = offsets[chosen + 1] - offsets[chosen]
    return concatenate_ranges(offsets[chosen], counts), _offsets(counts)


def finite(values: Floats) -> Floats:
    """Values with NaN replaced by 0 and infinities by the largest float32; unchanged if all are
    finite."""
    if bool(np.isfinite(values).all()):
        return values
    top = float(np.finfo(np.float32).max)
    return np.nan_to_num(values, nan=0.0, posinf=top, neginf=-top)


def interpolate(rising: NDArray[np.floating], quantile: float) -> Doubles:
    """A quantile of rows that are sorted (or partitioned at its neighbours) along the last
    axis."""
    place = quantile * (rising.shape[-1] - 1)
    low, high = int(np.floor(place)), int(np.ceil(place))
    below, above = rising[..., low].astype(np.float64), rising[..., high].astype(np.float64)
    return np.asarray(below + (place - low) * (above - below))


def _stack_features(stack: Stack) -> Doubles:
    """Features [n, tokens, F] of the networks of one spec."""
    plan = stack.layout
    out = np.zeros((len(stack), plan.tokens, len(FEATURES)))
    row, own, outgoing = (len(ROW_FEATURES), len(OWN_FEATURES), len(OUT_FEATURES))
    columns = _Columns(len(stack), plan)
    for one in plan.layers:
        if not one.fan_in:
            continue
        weight = stack.weight(one)
        for networks, outputs in _blocks(weight, one):
            block = weight[networks, outputs]
            clean = finite(block)
            where = slice(one.first + outputs.start, one.first + outputs.stop)
            out[networks, where, :row] = _row_statistics(clean)
            if clean is not block:
                out[networks, where, row - 1] = 1 - np.isfinite(block).mean(axis=-1)
            columns.add(clean, one, networks)
    out[:, :, row : row + own] = _own_statistics(stack, out[:, :, ROW_FEATURES.index("row_l2")])
    out[:, :, row + own : row + own + outgoing] = columns.statistics()[:, plan.channel]
    out[:, :, row + own + outgoing :] = _place(plan)
    return out


def _blocks(weight: Floats, one: LayerLayout) -> Iterator[tuple[slice, slice]]:
    """Cut [n, outputs, fan-in] into blocks of bounded size; grouped layers keep their outputs
    together."""
    n, outputs, fan_in = weight.shape
    if outputs * fan_in <= BLOCK_VALUES or one.groups > 1:
        size = max(1, BLOCK_VALUES // (outputs * fan_in))
        for first in range(0, n, size):
            yield slice(first, min(n, first + size)), slice(0, outputs)
    else:
        size = max(1, BLOCK_VALUES // fan_in)
        for network in range(n):
            for first in range(0, outputs, size):
                yield slice(network, network + 1), slice(first, min(outputs, first + size))


def _row_statistics(block: Floats) -> Doubles:
    """Statistics [n, o, len(ROW_FEATURES)] of rows [n, o, fan-in]."""
    fan_in = block.shape[-1]
    rising = np.sort(block, axis=-1)
    values = block.astype(np.float64)
    mean = values.mean(axis=-1)
    square = np.einsum("noi,noi->no", values, values)
    size = np.abs(values)
    absolute = size.sum(axis=-1)
    threshold = NEAR_ZERO * np.sqrt(square / fan_in)
    small = (size < threshold[..., None]).mean(axis=-1)
    values -= mean[..., None]
    np.multiply(values, values, out=size)
    variance = size.mean(axis=-1)
    third = np.einsum("noi,noi->no", size, values) / fan_in
    fourth = np.einsum("noi,noi->no", size, size) / fan_in
    spread = variance > 1e-12 * np.maximum(square / fan_in, 1e-30)
    safe = np.where(spread, variance, 1.0)
    columns = [mean, np.sqrt(variance), absolute / np.sqrt(fan_in), np.sqrt(square)]
    columns += [rising[..., 0], *(interpolate(rising, q) for q in QUANTILES), rising[..., -1]]
    columns += [
        np.where(spread, third / safe**1.5, 0),
        np.where(spread, fourth / safe**2, 0),
        small,
    ]
    columns += [np.zeros_like(mean)]
    return np.stack(columns, axis=-1)


def _own_statistics(stack: Stack, row_l2: Doubles) -> Doubles:
    """Bias and normalization parameters [n, tokens, len(OWN_FEATURES)]; neutral values where
    absent."""
    plan = stack.layout

    def has(field: str) -> NDArray[np.bool_]:
        here = [getattr(one.layer, field) is not None for one in plan.layers]
        return np.array(here, bool)[plan.layer]

    def column(field: str, neutral: float) -> Doubles:
        values = finite(stack.scalar(field)[:, has(field)]).astype(np.float64)
        full = np.full((len(stack), plan.tokens), neutral)
        full[:, has(field)] = values
        return full

    scale, variance = (
        column("scale", 1.0),
        np.maximum(column("variance", 1.0 - EPSILON), 0.0) + EPSILON,
    )
    row_l2 = np.where(np.array([one.fan_in for one in plan.layers])[plan.layer] > 0, row_l2, 1.0)
    normed = has("mean") | has("scale")
    columns = [
        column("bias", 0.0),
        scale,
        column("shift", 0.0),
        column("mean", 0.0),
        np.log(variance),
    ]
    columns += [np.broadcast_to(flag, scale.shape) for flag in (has("bias"), normed)]
    return np.stack([*columns, np.abs(scale) / np.sqrt(variance) * row_l2], axis=-1)


class _Columns:
    """Sums over all weights that read a channel, over every layer and segment that contains it."""

    def __init__(self, n: int, plan: Layout) -> None:
        channels = len(plan.channel_space)
        self._count = np.zeros(channels)
        self._sum, self._square, self._top = (np.zeros((n, channels)) for _ in range(3))
        for one in plan.layers:
            if one.fan_in:
                for nodes, _, size in segments(one):
                    np.add.at(self._count, nodes, float(one.outputs // one.groups * size))

    def add(self, block: Floats, one: LayerLayout, networks: slice) -> None:
        """Add the outputs ``block`` [n, o, fan-in] of a layer (all outputs if it is grouped)."""
        n = block.shape[0]
        grouped = block.reshape(n, one.groups, -1, one.fan_in)
        for nodes, taps, size in segments(one):
            part = grouped[..., taps].reshape(n, one.groups, grouped.shape[2], -1, size)
            wide = part.astype(np.float64)
            sums = wide.sum(axis=(2, 4)).reshape(n, -1)
            squares = np.einsum("ngocs,ngocs->ngc", wide, wide).reshape(n, -1)
            tops = np.abs(part).max(axis=(2, 4)).reshape(n, -1)
            at: Any = (slice(None), nodes)  # a concatenation may contain a channel twice
            np.add.at(self._sum[networks], at, sums)
            np.add.at(self._square[networks], at, squares)
            np.maximum.at(self._top[networks], at, tops)

    def statistics(self) -> Doubles:
        """Statistics [n, channels, len(OUT_FEATURES)]."""
        count = np.maximum(self._count, 1)
        mean = self._sum / count
        std = np.sqrt(np.maximum(self._square / count - mean**2, 0))
        readers = np.broadcast_to(np.log1p(self._count), mean.shape)
        return np.stack([mean, std, np.sqrt(self._square), self._top, readers], axis=-1)


def segments(one: LayerLayout) -> Iterator[tuple[NDArray[np.int32], slice, int]]:
    """A layer's input segments: channels [groups x channels], their places in a row, values per
    channel."""
    kernel = one.fan_in // one.inputs
    first = tap = 0
    for channels, repeat in one.runs:
        size = repeat * kernel
        nodes = one.sources if one.groups > 1 else one.sources[first : first + channels]
        yield nodes, slice(tap, tap + channels * size), size
        first, tap = first + channels, tap + channels * size


def _place(plan: Layout) -> Doubles:
    """Where a token stands [tokens, len(PLACE_FEATURES)]; from the spec alone."""
    last = max(1, len(plan.layers) - 1)
    rows = []
    for one in plan.layers:
        layer = one.layer
        kernel, stride = layer.kernel[0] * layer.kernel[1], layer.stride[0] * layer.stride[1]
        depthwise = layer.kind == "conv" and layer.groups == one.outputs > 1
        rows.append([np.log1p(one.fan_in), layer.index / last, np.log(max(1, one.outputs))])
        rows[-1] += [np.log(kernel), np.log(stride), np.log(layer.groups), float(depthwise), 0.0]
    places = np.array(rows, np.float64).reshape(-1, len(PLACE_FEATURES))[plan.layer]
    places[:, -1] = plan.space < 0
    return places


def _codes(plan: Layout) -> Longs:
    """Layer, kind, activation, space, channel in the space [5, tokens]."""
    other = ACTIVATIONS.index("other")
    kinds = np.array([KINDS.index(one.layer.kind) for one in plan.layers], np.int64)
    known = {name: code for code, name in enumerate(ACTIVATIONS)}
    activations = np.array(
        [known.get(one.layer.activation, other) for one in plan.layers], np.int64
    )
    layer = plan.layer
    return np.stack(
        [layer, kinds[layer], activations[layer], plan.space, plan.space_index]
    ).astype(np.int64)


def _offsets(counts: Longs) -> Longs:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
