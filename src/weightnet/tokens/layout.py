"""Where the tokens of an architecture lie and how its channels connect them: everything that
depends on the spec alone, computed once per distinct spec.

A *token* is one output channel of one layer, in order (layer, index). A *channel* is a node that
layers write to and read from: one per channel of each space, then the fixed network inputs, then
the fixed outputs of each layer. Ids of both are local to the network; `concatenate_ranges` shifts
them when networks are put together.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightnet.symmetry.spec import Layer, PermutationSpec, Segment

KINDS = ("conv", "linear", "norm")
ACTIVATIONS = (
    *(
        "identity",
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "gelu",
        "silu",
        "mish",
        "hardswish",
    ),
    *("tanh", "hardtanh", "sigmoid", "hardsigmoid", "softplus", "softmax", "log_softmax", "other"),
)

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class LayerLayout:
    """One layer's tokens and wiring.

    ``fan_in`` is the number of weights of one token: ``inputs`` (width of axis 1 of the weight) x
    kernel. ``sources`` [groups x channels per group] are the channels read, group by group;
    ``runs`` are the (channels, repeat) of consecutive segments of one group, so that a flattened
    input's H x W positions fall to one channel. A grouped layer's spec describes one group; each
    group reads and writes one channel.
    """

    layer: Layer
    first: int
    outputs: int
    inputs: int
    fan_in: int
    groups: int
    sources: Ints
    runs: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> slice:
        """The layer's tokens within its network."""
        return slice(self.first, self.first + self.outputs)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight tensor in the state dict."""
        if self.layer.kind == "linear":
            return (self.outputs, self.inputs)
        return (self.outputs, self.inputs, *self.layer.kernel)


@dataclass(frozen=True, eq=False)
class Layout:
    """All layers, and per token: ``layer``, ``index`` (position in the layer's output), ``space``
    (index into spec.spaces, -1 if fixed), ``space_index``, ``channel`` (the node written). Per
    channel: ``channel_space`` (-1 network input, -2 fixed output) and ``channel_index``."""

    spec: PermutationSpec
    layers: tuple[LayerLayout, ...]
    layer: Ints
    index: Ints
    space: Ints
    space_index: Ints
    channel: Ints
    channel_space: Ints
    channel_index: Ints

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.layer)

    @property
    def values(self) -> int:
        """Number of weights (without biases and normalization parameters)."""
        return sum(one.outputs * one.fan_in for one in self.layers)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows that tokens become when weights are chunked to ``max_row`` values: per row
    ``token`` and ``chunk``, per token ``first`` (the row of its chunk 0), per layer
    ``layer_first`` [layers + 1]."""

    token: Ints
    chunk: Ints
    chunks: Ints
    first: NDArray[np.int64]
    layer_first: NDArray[np.int64]

    @property
    def count(self) -> int:
        """Number of rows of one network."""
        return len(self.token)


def spec_id(spec: PermutationSpec) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the spec's JSON."""
    return hashlib.sha256(spec.to_json().encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def layout(spec: PermutationSpec) -> Layout:
    """Lay out the tokens and channels of ``spec``.

    Raises:
        ValueError: if a layer's kind is unknown, or its inputs, groups and outputs do not fit
        together.
    """
    space_first: dict[str | None, int] = {}
    channel_space: list[Ints] = []
    nodes = 0
    for number, space in enumerate(spec.spaces):
        space_first[space.name] = nodes
        channel_space.append(np.full(space.size, number, dtype=np.int32))
        nodes += space.size
    fixed_inputs = max((_fixed_inputs(layer) for layer in spec.layers), default=0)
    space_first[None] = nodes
    channel_space.append(np.full(fixed_inputs, -1, dtype=np.int32))
    nodes += fixed_inputs

    numbers = {space.name: number for number, space in enumerate(spec.spaces)}
    layers: list[LayerLayout] = []
    columns: list[tuple[Ints, ...]] = []
    first = 0
    for position, layer in enumerate(spec.layers):
        if layer.kind not in KINDS or layer.index != position:
            raise ValueError(
                "a spec's layers must be conv, linear or norm and numbered in order, however: "
                "layer "
                f"{layer.name!r} at {position} has kind={layer.kind!r}, index={layer.index}; "
                "trace the module"
            )
        outputs = _width(layer.outputs)
        space_ids, indices, channels = [], [], []
        fixed = 0
        for segment in layer.outputs:
            index = np.repeat(np.arange(segment.size, dtype=np.int32), segment.repeat)
            number = -1
            if segment.space is None:
                index += fixed
                channels.append(nodes + index)
                fixed += segment.size
            else:
                channels.append(space_first[segment.space] + index)
                number = numbers[segment.space]
            indices.append(index)
            space_ids.append(np.full(len(index), number, dtype=np.int32))
        nodes += fixed
        channel_space.append(np.full(fixed, -2, dtype=np.int32))
        channel = _join(channels)
        columns.append((np.full(outputs, position, np.int32), np.arange(outputs, dtype=np.int32)))
        columns[-1] += (_join(space_ids), _join(indices), channel)
        layers.append(_wire(layer, first, channel, columns[-1][2] >= 0, space_first))
        first += outputs
    joined = [_join([column[i] for column in columns]) for i in range(5)]
    spaces = _join(channel_space)
    sizes = [len(part) for part in channel_space]
    channel_index = concatenate_ranges(np.zeros(len(sizes), np.int64), np.array(sizes, np.int64))
    layer_id, index, space_id, space_index, channel = joined
    return Layout(
        spec,
        tuple(layers),
        layer_id,
        index,
        space_id,
        space_index,
        channel,
        spaces,
        channel_index.astype(np.int32),
    )


@functools.lru_cache(maxsize=256)
def rows(spec: PermutationSpec, max_row: int) -> Rows:
    """Lay out the rows of ``spec`` when a row holds at most ``max_row`` weights."""
    plan = layout(spec)
    per_layer = np.array(
        [max(1, math.ceil(one.fan_in / max_row)) for one in plan.layers], np.int64
    )
    chunks = per_layer[plan.layer]
    first = np.cumsum(chunks) - chunks
    token = np.repeat(np.arange(plan.tokens, dtype=np.int32), chunks)
    chunk = np.arange(len(token)) - first[token]
    outputs = np.array([one.outputs for one in plan.layers], np.int64)
    layer_first = np.concatenate([[0], np.cumsum(outputs * per_layer)])
    return Rows(
        token,
        chunk.astype(np.int32),
        chunks[token].astype(np.int32),
        first.astype(np.int64),
        layer_first,
    )


def concatenate_ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[s, s + 1, .., s + c - 1]`` for each start and count, one after another."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - counts), counts)


def _wire(
    layer: Layer,
    first: int,
    written: Ints,
    moving: NDArray[np.bool_],
    space_first: dict[str | None, int],
) -> LayerLayout:
    """Find the channels that ``layer`` reads and the widths of its weight.

    ``written`` [outputs] are the channels that it writes, ``moving`` those that belong to a space.
    """
    outputs = len(written)
    nodes, runs = [], []
    fixed = 0
    for segment in layer.inputs:
        start = space_first[segment.space]
        if segment.space is None:
            start, fixed = start + fixed, fixed + segment.size
        nodes.append(start + np.arange(segment.size, dtype=np.int32))
        runs.append((segment.size, segment.repeat))
    sources, inputs, groups = _join(nodes), _width(layer.inputs), layer.groups
    if layer.kind == "norm":  # one identity edge per token
        sources, inputs, groups, runs = _spread(sources, runs), 0, outputs, [(1, 1)]
    elif groups > 1:  # a group's inputs are one channel, the one that it also writes to
        leaders = slice(0, outputs, max(1, outputs // groups))
        fixed_nodes = space_first[None] + np.arange(groups, dtype=np.int32)
        if outputs % groups == 0:
            sources = np.where(moving[leaders], written[leaders], fixed_nodes)
        runs = [(1, inputs)]
    if outputs % groups or len(sources) != groups * sum(size for size, _ in runs):
        raise ValueError(
            f"a layer's inputs and outputs must fit its kind and groups, however: {layer.name!r} "
            "has "
            f"inputs={_width(layer.inputs)}, outputs={outputs}, groups={groups}; trace the module "
            "again"
        )
    kernel = layer.kernel[0] * layer.kernel[1]
    sources = sources.astype(np.int32)
    return LayerLayout(
        layer, first, outputs, inputs, inputs * kernel, groups, sources, tuple(runs)
    )


def _spread(nodes: Ints, runs: list[tuple[int, int]]) -> Ints:
    """One node per index instead of one per channel."""
    sizes, repeats = ([size for size, _ in runs], [repeat for _, repeat in runs])
    return np.repeat(nodes, np.repeat(repeats, sizes).astype(np.int64))


def _width(segments: tuple[Segment, ...]) -> int:
    return sum(segment.size * segment.repeat for segment in segments)


def _fixed_inputs(layer: Layer) -> int:
    """How many fixed input channels the layer distinguishes."""
    if layer.groups > 1:
        return layer.groups if any(segment.space is None for segment in layer.outputs) else 0
    return sum(segment.size for segment in layer.inputs if segment.space is None)


def _join(parts: list[Ints]) -> Ints:
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
