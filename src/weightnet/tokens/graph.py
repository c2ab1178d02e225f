"""The network's own weights as a graph, for messages between neurons along them.

Channels are the nodes that layers write to and read from; tokens are the layers' output neurons.
One edge runs from every channel that a layer reads to every token of that layer that it reaches,
with the weights between the two (all kernel positions, and all H x W positions of a flattened
channel) reduced to `EDGES`. A norm layer, which has no weight, is one edge per token with its
effective scale.

A message passing step is: gather channels at ``edges_source``, multiply, add at ``edges_target``;
then tokens write to their channel ``token_channel``. Permuting hidden channels renumbers nodes and
changes no edge value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weightnet.tokens.features import (
    EPSILON,
    LIMIT,
    Doubles,
    Longs,
    finite,
    gather_ranges,
    segments,
)
from weightnet.tokens.layout import Ints, LayerLayout
from weightnet.tokens.networks import Networks, Stack
from weightnet.tokens.tokenizer import Floats

EDGES = ("sum", "mean_abs", "peak")  # peak: the value of the largest magnitude, with its sign


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges of some networks, ordered by network, layer, target token, source.

    edges_source   int32 [E]: channel id
    edges_target   int32 [E]: token id (position in `TokenFeatures`)
    edge_values    float32 [E, K], named by `EDGES`
    token_channel  int32 [L]: the channel that each token writes to (residual layers share them)
    channels       number of channels
    channel_space  int32 [channels]: number of the space in the spec, -1 network input, -2 fixed
                   output; channel_index: position in that space
    *_offsets      int64 [B + 1]: each network's edges, tokens and channels
    """

    edges_source: Ints
    edges_target: Ints
    edge_values: Floats
    token_channel: Ints
    channels: int
    channel_space: Ints
    channel_index: Ints
    edge_offsets: Longs
    token_offsets: Longs
    channel_offsets: Longs

    def __len__(self) -> int:
        return len(self.edge_offsets) - 1

    def select(self, networks: Sequence[int] | Longs) -> Graph:
        """The graph of these networks, ids renumbered from 0: a batch that fits
        `TokenFeatures.select`."""
        chosen = np.asarray(networks, np.int64)
        edges, edge_offsets = gather_ranges(self.edge_offsets, chosen)
        tokens, token_offsets = gather_ranges(self.token_offsets, chosen)
        nodes, channel_offsets = gather_ranges(self.channel_offsets, chosen)
        to_channel = (channel_offsets[:-1] - self.channel_offsets[chosen]).astype(np.int32)
        to_token = (token_offsets[:-1] - self.token_offsets[chosen]).astype(np.int32)
        per_edge, per_token = np.diff(edge_offsets), np.diff(token_offsets)
        return Graph(
            edges_source=self.edges_source[edges] + np.repeat(to_channel, per_edge),
            edges_target=self.edges_target[edges] + np.repeat(to_token, per_edge),
            edge_values=self.edge_values[edges],
            token_channel=self.token_channel[tokens] + np.repeat(to_channel, per_token),
            channels=int(channel_offsets[-1]),
            channel_space=self.channel_space[nodes],
            channel_index=self.channel_index[nodes],
            edge_offsets=edge_offsets,
            token_offsets=token_offsets,
            channel_offsets=channel_offsets,
        )


@dataclass(frozen=True, eq=False)
class DenseBlock:
    """One layer of ``n`` networks of one spec. Output o of group g reads the channels
    ``sources[g]``.

    members   int64 [n]: positions of the networks
    tokens    the layer's tokens within each network
    sources   int32 [groups, channels per group]: channels within each network
    values    float32 [n, groups, outputs per group, channels per group, K]
    """

    members: Longs
    layer: int
    tokens: slice
    sources: Ints
    values: Floats


def layer_blocks(networks: Networks) -> Graph:
    """Compute the edges of every layer of every network, all networks of one spec at once."""
    plans = networks.layouts()
    edges = {id(plan): sum(_edge_count(one) for one in plan.layers) for plan in plans}
    edge_offsets = _cumulate([edges[id(plan)] for plan in plans])
    token_offsets = _cumulate([plan.tokens for plan in plans])
    channel_offsets = _cumulate([len(plan.channel_space) for plan in plans])
    source = np.zeros(edge_offsets[-1], np.int32)
    target = np.zeros(edge_offsets[-1], np.int32)
    values = np.zeros((edge_offsets[-1], len(EDGES)), np.float32)
    for stack in networks.stacks():
        first_edge = edge_offsets[stack.members]
        first_token = token_offsets[stack.members].astype(np.int32)
        first_channel = channel_offsets[stack.members].astype(np.int32)
        for block in _stack_blocks(stack):
            n, groups, outputs, channels, _ = block.values.shape
            count = groups * outputs * channels
            local_source = np.broadcast_to(
                block.sources[:, None], (groups, outputs, channels)
            ).reshape(-1)
            local_target = np.repeat(np.arange(block.tokens.start, block.tokens.stop), channels)
            where = (first_edge[:, None] + np.arange(count)).reshape(-1)
            source[where] = (first_channel[:, None] + local_source).reshape(-1)
            target[where] = (first_token[:, None] + local_target.astype(np.int32)).reshape(-1)
            values[where] = block.values.reshape(n * count, -1)
            first_edge = first_edge + count
    shifts = channel_offsets[:-1].astype(np.int32)
    return Graph(
        edges_source=source,
        edges_target=target,
        edge_values=values,
        token_channel=_concatenate([p.channel + s for p, s in zip(plans, shifts, strict=True)]),
        channels=int(channel_offsets[-1]),
        channel_space=_concatenate([plan.channel_space for plan in plans]),
        channel_index=_concatenate([plan.channel_index for plan in plans]),
        edge_offsets=edge_offsets,
        token_offsets=token_offsets,
        channel_offsets=channel_offsets,
    )


def dense_blocks(networks: Networks) -> Iterator[DenseBlock]:
    """The same edges as one dense block per layer: less memory for large networks, and a message
    is a matrix product. Blocks of one stack of networks come in forward order."""
    for stack in networks.stacks():
        yield from _stack_blocks(stack)


def _stack_blocks(stack: Stack) -> Iterator[DenseBlock]:
    for one in stack.layout.layers:
        values = _reduce(finite(stack.weight(one)), one) if one.fan_in else _scales(stack, one)
        sources = one.sources.reshape(one.groups, -1)
        yield DenseBlock(stack.members, one.layer.index, one.tokens, sources, values)


def _reduce(weight: Floats, one: LayerLayout) -> Floats:
    """Reduce [n, outputs, fan-in] to [n, groups, outputs per group, channels per group, K]."""
    n, outputs, _ = weight.shape
    channels = len(one.sources) // one.groups
    out = np.empty((n, outputs, channels, len(EDGES)), np.float32)
    first = 0
    for _, taps, size in segments(one):
        part = weight[:, :, taps].reshape(n, outputs, -1, size)
        block = out[:, :, first : first + part.shape[2]]
        first += part.shape[2]
        if size == 1:
            block[..., 0] = block[..., 2] = part[..., 0]
            np.abs(part[..., 0], out=block[..., 1])
            continue
        with np.errstate(over="ignore"):
            block[..., 0] = part.sum(axis=-1)
            block[..., 1] = np.abs(part).mean(axis=-1)
        high, low = part.max(axis=-1), part.min(axis=-1)
        block[..., 2] = np.where(high >= -low, high, low)
    np.clip(out, -LIMIT, LIMIT, out=out)
    return out.reshape(n, one.groups, outputs // one.groups, channels, len(EDGES))


def _scales(stack: Stack, one: LayerLayout) -> Floats:
    """Edges of a norm layer: scale / sqrt(variance + eps), 1 where it has none."""
    scale = np.ones((len(stack), one.outputs))
    if one.layer.scale is not None:
        scale = finite(stack.scalar("scale")[:, one.tokens]).astype(np.float64)
    if one.layer.variance is not None:
        variance = finite(stack.scalar("variance")[:, one.tokens]).astype(np.float64)
        scale = scale / np.sqrt(np.maximum(variance, 0) + EPSILON)
    values: Doubles = np.clip(np.stack([scale, np.abs(scale), scale], axis=-1), -LIMIT, LIMIT)
    return values.astype(np.float32).reshape(len(stack), one.outputs, 1, 1, len(EDGES))


def _edge_count(one: LayerLayout) -> int:
    return one.outputs * (len(one.sources) // one.groups)


def _cumulate(counts: list[int]) -> Longs:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _concatenate(parts: list[NDArray[np.int32]]) -> Ints:
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
