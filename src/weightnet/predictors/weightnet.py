"""WeightNet: attention over a network's neurons and layers, one head per property.

A network is a set of layers, a layer a set of neurons (tokens), each with statistics of its
weights and what reaches it along the network's weights (no parameters to overfit on some hundred
networks): moments of noise forward and of gradients backward (`messages`), and random `fields`,
which tell how neurons vary together. Each block lets the neurons of a layer exchange information
through a few induced points (Set Transformer, Lee et al. 2019, https://arxiv.org/abs/1810.00825),
at a cost linear in the layer's width, and then lets the layers' summaries attend to each other.
Each property reads the layers by an attention of its own, whose weights say which layers carry the
prediction, beside statistics of the whole network.

Invariance: tokens carry no position inside their layer, and every operation on them is pointwise
or a sum over a set, so reordering hidden neurons changes nothing but the order of floating-point
sums. Networks of any depth and width go through one set of weights in one batch: tokens are
packed, without padding; only the (few) layers are padded and masked.

With some hundred networks to learn from, boosted trees read the statistics better than a
perceptron does and the attention reads what no statistic holds, so that both are fitted and
averaged in equal parts (``trees``). `weightnet_probe` also distills probes of its own from the
training networks (`LearnedProbes`); networks that share the inputs and outputs of some of these
are predicted by trees that read how they answer, beside the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from weightnet.params import Params
from weightnet.predictors.features import Encoder, Features, weight_features
from weightnet.predictors.fitting import Batches, FitConfig
from weightnet.predictors.interface import Estimate, Log, Predictor, read_arrays, write_arrays
from weightnet.predictors.learned import ModulePredictor
from weightnet.predictors.learned_probes import LearnedProbes, LearnedProbesConfig
from weightnet.predictors.scaling import Array
from weightnet.predictors.trees import TreeBags
from weightnet.tokens import (
    ACTIVATIONS,
    KINDS,
    TOKEN_MESSAGES,
    TokenFeatures,
    message_statistics,
    response_features,
    response_statistics,
    spectral_statistics,
    token_features,
    token_fields,
    token_messages,
    token_rows,
)
from weightnet.tokens.features import gather_ranges
from weightnet.tokens.scratch import BLOCK, blocks, scratch_zeros, take

if TYPE_CHECKING:
    from weightnet.tokens import Networks

Floats = NDArray[np.float32]
Longs = NDArray[np.int64]

_LIMIT = 5.0  # standard deviations beyond which features are cut off
_REACH = 1.5  # standard deviations that the network reads: it must not extrapolate to new families
ACCURACY = "test_accuracy"  # learned probes are distilled from the networks that are best at it
_RAW = 64  # weights of a neuron that a raw token holds
_SCALES = (1.0, 30.0)  # features are read as asinh(scale * x): small and large values both resolve


class WeightNetConfig(Params):
    """The shape of WeightNet and how it is fitted.

    Attributes:
        width: D, the width of a token's embedding.
        heads: attention heads, a divisor of ``width``.
        blocks: how often neurons and then layers exchange information.
        points: induced points of a layer.
        dropout: of the blocks and the heads.
        training_layers, training_tokens: of a deeper network so many layers, and of a wider layer
            so many neurons, drawn anew for each batch, are seen in training; prediction sees all.
        intra_layer, cross_layer: whether neurons of a layer, and layers, attend to each other.
        tokens: what a token says of its neuron's weights: their ``statistics``, or the ``raw``
            values (the first 64 of the incoming row, in the order of the canonical form).
        messages: whether tokens carry messages along the network's weights (`token_messages`).
        fields: whether tokens and statistics carry what random fields become that are sent along
            the weights (`token_fields`).
        spectra: whether the statistics hold those of the layers' singular values
            (`spectral_statistics`).
        embeddings: whether tokens carry embeddings of layer kind and activation.
        statistics: whether the heads also read statistics of the whole network.
        trees: sets of boosted trees on the same statistics beside each module that is fitted (see
            ``fit.folds``), whose average makes up half of the prediction; 0 for the attention
            alone.
        learned_probes: of `weightnet_probe`, the probes that are distilled from the training
            networks, beside the fixed ones.
    """

    width: int = Field(default=64, gt=0)
    heads: int = Field(default=4, gt=0)
    blocks: int = Field(default=1, gt=0)
    points: int = Field(default=4, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    training_layers: int = Field(default=20, gt=0)
    training_tokens: int = Field(default=4, gt=0)
    intra_layer: bool = True
    cross_layer: bool = True
    tokens: Literal["statistics", "raw"] = "statistics"
    messages: bool = True
    fields: bool = True
    spectra: bool = True
    embeddings: bool = True
    statistics: bool = True
    trees: int = Field(default=1, ge=0)
    learned_probes: LearnedProbesConfig = LearnedProbesConfig()
    fit: FitConfig = FitConfig(
        epochs=24, patience=10, batch_size=32, learning_rate=2e-3, weight_decay=0.05, folds=3
    )


@dataclass(frozen=True)
class TokenBatch:
    """Packed tokens of B networks.

    Attributes:
        values: features [L, F].
        kind, activation: codes [L].
        segment: the number of each token's layer among all layers [L], ascending.
        place: the layer's position in the padded matrix of layers, [layers]: network * depth +
        layer. depth: layers of the deepest network.
        statistics: [B, S].
    """

    values: Tensor
    kind: Tensor
    activation: Tensor
    segment: Tensor
    place: Tensor
    depth: int
    statistics: Tensor

    def to(self, device: torch.device) -> Self:
        """The batch on ``device``."""
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in fields(self)
            if field.name != "depth"
        }
        return replace(self, **moved)


class InducedAttention(nn.Module):
    """Neurons of a layer exchange information through ``points`` induced points."""

    def __init__(self, width: int, heads: int, points: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(points, heads, width // heads))
        self.keys_values = nn.Linear(width, 2 * width)
        self.point_norm = nn.LayerNorm(width)
        self.back_queries = nn.Linear(width, width)
        self.back_keys_values = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, segment: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        """tokens [L, D] -> tokens [L, D] and the layers' points [layers, points, D]."""
        size, width = tokens.shape
        heads = (size, self.heads, width // self.heads)
        scale = (width // self.heads) ** -0.5
        keys, values = self.keys_values(self.norm(tokens)).chunk(2, dim=1)
        scores = torch.einsum("lhd,phd->lph", keys.view(heads), self.queries) * scale
        weights = segment_softmax(scores.flatten(1), segment, layers).view_as(scores)
        weighted = (weights.unsqueeze(3) * values.view(heads).unsqueeze(1)).flatten(1)
        points = segment_sum(weighted, segment, layers).view(layers, self.points, width)
        normed = self.point_norm(points)
        back_keys, back_values = (
            part.view(layers, self.points, *heads[1:])[segment]
            for part in self.back_keys_values(normed).chunk(2, dim=2)
        )
        queries = self.back_queries(self.norm(tokens)).view(heads)
        scores = (queries.unsqueeze(1) * back_keys).sum(dim=3) * scale
        read = (scores.softmax(dim=1).unsqueeze(3) * back_values).sum(dim=1).flatten(1)
        return tokens + self.dropout(self.out(read)), points


class Feedforward(nn.Module):
    """A residual two-layer perceptron, applied to each row alone."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x + self.body(x)


class Block(nn.Module):
    """Neurons attend inside their layer, layers attend to layers, layers speak to their
    neurons."""

    def __init__(self, config: WeightNetConfig) -> None:
        super().__init__()
        width = config.width
        self.intra = (
            InducedAttention(width, config.heads, config.points, config.dropout)
            if config.intra_layer
            else None
        )
        self.gather = nn.Linear(width * (2 + (config.points if config.intra_layer else 0)), width)
        self.cross = (
            nn.MultiheadAttention(width, config.heads, dropout=config.dropout, batch_first=True)
            if config.cross_layer
            else None
        )
        self.cross_norm = nn.LayerNorm(width)
        self.layer_forward = Feedforward(width, config.dropout)
        self.spread = nn.Linear(width, width)
        self.token_forward = Feedforward(width, config.dropout)

    def forward(
        self, tokens: Tensor, layers: Tensor, batch: TokenBatch, padding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tokens [L, D] and layer summaries [B, depth, D] -> the same, one exchange later."""
        count = len(batch.place)
        points = None
        if self.intra is not None:
            tokens, points = self.intra(tokens, batch.segment, count)
        summary = [segment_mean(tokens, batch.segment, count)]
        summary.append(segment_max(tokens, batch.segment, count))
        if points is not None:
            summary.append(points.flatten(1))
        gathered = self.gather(torch.cat(summary, dim=1))
        flat = layers.flatten(0, 1)
        flat = flat.index_add(0, batch.place, gathered)
        layers = flat.view_as(layers)
        if self.cross is not None:
            normed = self.cross_norm(layers)
            read, _ = self.cross(
                normed, normed, normed, key_padding_mask=padding, need_weights=False
            )
            layers = layers + read
        layers = self.layer_forward(layers)
        told = self.spread(layers.flatten(0, 1)[batch.place])
        return self.token_forward(tokens + told[batch.segment]), layers


class WeightNet(nn.Module):
    """Packed tokens of B networks -> mean and log sigma of P properties, standardized: [B, P]."""

    def __init__(
        self, features: int, statistics: int, properties: int, config: WeightNetConfig
    ) -> None:
        super().__init__()
        width = config.width
        self.embed = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.kind = _embedding(len(KINDS), width) if config.embeddings else None
        self.activation = _embedding(len(ACTIVATIONS), width) if config.embeddings else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, properties)
        read = (3 if config.statistics else 2) * width
        self.statistics = (
            nn.Sequential(
                nn.Linear(statistics, 2 * width),
                nn.LayerNorm(2 * width),
                nn.GELU(),
                nn.Dropout(config.dropout),
                nn.Linear(2 * width, width),
            )
            if config.statistics
            else None
        )
        self.hidden = nn.Sequential(
            nn.LayerNorm(read), nn.Linear(read, width), nn.GELU(), nn.Dropout(config.dropout)
        )
        self.head_weight = nn.Parameter(torch.randn(properties, 2, width) * width**-0.5 * 0.1)
        self.head_bias = nn.Parameter(torch.zeros(properties, 2))

    def forward(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Return mean and log sigma, [B, P] each."""
        layers, padding = self._encode(batch)
        importance = self._importance(layers, padding)
        count = len(layers)
        pooled = torch.einsum("bnp,bnd->bpd", importance, layers)
        known = (~padding).unsqueeze(2).to(layers.dtype)
        average = (layers * known).sum(dim=1) / known.sum(dim=1)
        shared = [average]
        if self.statistics is not None:
            shared.append(self.statistics(batch.statistics.clamp(-_REACH, _REACH)))
        together = torch.cat(shared, dim=1).unsqueeze(1).expand(-1, pooled.shape[1], -1)
        hidden = self.hidden(torch.cat([pooled, together], dim=2))
        out = torch.einsum("bpd,pkd->bpk", hidden, self.head_weight) + self.head_bias
        assert out.shape[0] == count
        return out[..., 0], out[..., 1]

    def layer_importance(self, batch: TokenBatch) -> Tensor:
        """How much each property reads each layer: [B, depth, P], sums to 1 over layers."""
        return self._importance(*self._encode(batch))

    def _encode(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        tokens = self.embed(batch.values.clamp(-_REACH, _REACH))
        if self.kind is not None and self.activation is not None:
            tokens = tokens + self.kind(batch.kind) + self.activation(batch.activation)
        count = len(batch.statistics)
        layers = tokens.new_zeros(count, batch.depth, tokens.shape[1])
        padding = torch.ones(count * batch.depth, dtype=torch.bool, device=tokens.device)
        padding[batch.place] = False
        padding = padding.view(count, batch.depth)
        for block in self.blocks:
            tokens, layers = block(tokens, layers, batch, padding)
        return self.norm(layers), padding

    def _importance(self, layers: Tensor, padding: Tensor) -> Tensor:
        scores = self.read(layers).masked_fill(padding.unsqueeze(2), -torch.inf)
        return scores.softmax(dim=1)


def _embedding(codes: int, width: int) -> nn.Embedding:
    table = nn.Embedding(codes, width)
    nn.init.normal_(table.weight, std=0.1)
    return table


def segment_sum(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sum rows [L, K] by segment -> [segments, K]."""
    return values.new_zeros(segments, values.shape[1]).index_add(0, segment, values)


def segment_mean(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Average rows [L, K] by segment -> [segments, K]; no segment may be empty."""
    counts = torch.bincount(segment, minlength=segments).unsqueeze(1)
    return segment_sum(values, segment, segments) / counts


def segment_max(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Largest of rows [L, K] by segment -> [segments, K]; no segment may be empty."""
    index = segment.unsqueeze(1).expand_as(values)
    start = values.new_full((segments, values.shape[1]), -torch.inf)
    return start.scatter_reduce(0, index, values, "amax", include_self=False)


def segment_softmax(scores: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Softmax of rows [L, K] over each segment, column by column."""
    top = segment_max(scores.detach(), segment, segments)
    raised = (scores - top[segment]).exp()
    return raised / segment_sum(raised, segment, segments)[segment]


Read = tuple[TokenFeatures, Features, Features]
"""The tokens of networks, what is known of each, and statistics of the whole networks."""


_TOGETHER: WeakKeyDictionary[Networks, dict[tuple[object, ...], Read]] = WeakKeyDictionary()
"""What was read of `Networks.read_together`, by what the reader was to read."""


class TokenReader:
    """Reads networks as packed token batches, standardized on the training networks."""

    def __init__(self, config: WeightNetConfig, *, responses: bool) -> None:
        if config.width % config.heads:
            raise ValueError(
                f"width must be a multiple of heads, however: width={config.width}, "
                f"heads={config.heads}"
            )
        self.config, self.responses = config, responses
        self.tokens, self.statistics = Encoder(_LIMIT), Encoder(_LIMIT)
        self._known: WeakKeyDictionary[Networks, Read] = WeakKeyDictionary()

    def prepare(self, train: Networks) -> None:
        """Measure the scale of each token feature and statistic."""
        _, values, statistics = self._read_networks(train)
        self.tokens.fit(values)
        self.statistics.fit(statistics)

    def batches(self, networks: Networks, *, training: bool) -> Batches:
        """Read all tokens once; a batch picks the tokens of its networks."""
        features, values, statistics = self._read_networks(networks)
        tokens = _Tokens(
            features,
            torch.from_numpy(self.tokens.transform(values).astype(np.float32, copy=False)),
            torch.from_numpy(self.statistics.transform(statistics).astype(np.float32)),
            self.config.training_layers if training else None,
            self.config.training_tokens if training else None,
        )
        return Batches(tokens.collate, len(networks), tokens.cost)

    def rows(self, networks: Networks) -> Array:
        """The statistics of whole networks, standardized [B, S]."""
        return self.statistics.transform(self._read_networks(networks)[2])

    def module(self, properties: int) -> WeightNet:
        """Return a new WeightNet."""
        return WeightNet(self.tokens.size, self.statistics.size, properties, self.config)

    def write(self, folder: Path) -> None:
        """Write the scales."""
        for name, encoder in (("tokens", self.tokens), ("statistics", self.statistics)):
            (folder / name).mkdir()
            encoder.write(folder / name)

    def read(self, folder: Path) -> None:
        """Read what `write` wrote."""
        self.tokens.read(folder / "tokens")
        self.statistics.read(folder / "statistics")

    def _read_networks(self, networks: Networks) -> Read:
        """Read ``networks`` once for as long as they live: reading takes as long as fitting."""
        if networks not in self._known:
            if networks.origin is None:
                self._known[networks] = self._read(networks)
            else:
                self._known[networks] = self._select(*networks.origin)
        return self._known[networks]

    def _select(self, networks: Networks, chosen: Longs) -> Read:
        """Read some of ``networks``, of which others are read too, perhaps by other readers."""
        config = self.config
        kind = (config.tokens, config.messages, config.fields, config.spectra, self.responses)
        read = _TOGETHER.setdefault(networks, {})
        if kind not in read:
            read[kind] = self._read(networks)
        features, values, statistics = read[kind]
        tokens, _ = gather_ranges(features.token_offsets, chosen)
        return (
            features.select(chosen),
            Features(values.names, take(values.values, tokens)),
            Features(statistics.names, take(statistics.values, chosen)),
        )

    def _read(self, networks: Networks) -> Read:
        features = token_features(networks)
        own = Features(features.names, features.values)
        if self.config.tokens == "raw":
            own = _raw_tokens(networks, features)
        names = [f"{name}*{scale:g}" for scale in _SCALES for name in own.names]
        whole = weight_features(networks)
        columns: list[str] = list(whole.names)
        statistics = [whole.values]
        if self.config.spectra:
            spectrum, singular = spectral_statistics(networks)
            columns += spectrum
            statistics.append(singular)
        messages = None
        if self.config.messages:
            messages = token_messages(networks)
            names += TOKEN_MESSAGES
            told, table = _by_networks(message_statistics, messages, features)
            columns += told
            statistics.append(table.astype(np.float64))
        answers = []
        if self.config.fields:
            answers.append(("field", "fields", token_fields(networks)))
        if self.responses:
            if features.responses is None:
                raise ValueError(
                    "tokens must carry probe responses, however: they carry none; set "
                    "tokenize_zoo.probes.count above 0 and run `dvc repro tokenize_zoo`"
                )
            answers.append(("response", "probe", features.responses))
        for name, of_networks, responses in answers:
            names += response_features(responses[:1], name)[0]
            found, table = response_statistics(
                responses, features.layer_offsets, features.layer_starts, of_networks
            )
            columns += found
            statistics.append(table.astype(np.float64))
        everything = scratch_zeros((len(networks), len(columns)), np.float64)
        np.concatenate(statistics, axis=1, out=everything)
        values = scratch_zeros((len(features.values), len(names)), np.float32)
        for rows in blocks(*values.shape):
            parts = [np.arcsinh(own.values[rows] * np.float32(scale)) for scale in _SCALES]
            if messages is not None:
                parts.append(messages[rows])
            parts += [response_features(told[rows], name)[1] for name, _, told in answers]
            np.concatenate(parts, axis=1, out=values[rows])
        return (
            features,
            Features(tuple(names), values),
            Features(tuple(columns), everything),
        )


def _raw_tokens(networks: Networks, features: TokenFeatures) -> Features:
    """The weights of each token and its place, without what is computed from many weights."""
    summaries = ("row_", "out_", "effective_")
    kept = [i for i, name in enumerate(features.names) if not name.startswith(summaries)]
    names = [*(features.names[i] for i in kept), *(f"weight_{i}" for i in range(_RAW))]
    values = [features.values[:, kept], token_rows(networks, _RAW)]
    return Features(tuple(names), np.concatenate(values, axis=1))


def _by_networks(
    function: Callable[[Floats, Longs, Longs], tuple[Sequence[str], Floats]],
    values: Floats,
    features: TokenFeatures,
) -> tuple[Sequence[str], Floats]:
    """Statistics of each network's tokens, of some networks at a time."""
    size = max(1, BLOCK * len(features) // max(1, values.size))
    found = []
    for first in range(0, max(1, len(features)), size):
        starts = features.layer_starts[first : first + size + 1]
        offsets = features.layer_offsets[starts[0] : starts[-1] + 1]
        rows = values[offsets[0] : offsets[-1]]
        found.append(function(rows, offsets - offsets[0], starts - starts[0]))
    return found[0][0], np.concatenate([table for _, table in found])


class _Tokens:
    """All tokens of some networks in memory, and batches of them."""

    def __init__(
        self,
        features: TokenFeatures,
        values: Tensor,
        statistics: Tensor,
        layers: int | None,
        width: int | None,
    ) -> None:
        self.values, self.statistics = values, statistics
        self.layers, self.width = layers, width
        self.kind = torch.from_numpy(features.kind)
        self.activation = torch.from_numpy(features.activation)
        self.layer_starts = torch.from_numpy(features.layer_starts)
        self.layer_offsets = torch.from_numpy(features.layer_offsets)
        self.widths = self.layer_offsets.diff()
        seen = self.widths if width is None else self.widths.clamp(max=width)
        total = torch.cat([torch.zeros(1, dtype=torch.int64), seen.cumsum(0)])
        self.cost = total[self.layer_starts].diff()
        if layers is not None:
            share = (layers / self.layer_starts.diff()).clamp(max=1)
            self.cost = (self.cost * share).ceil().long()

    def collate(self, networks: Tensor) -> TokenBatch:
        """The batch of these networks; in training, of some of their layers and tokens."""
        layers = _ranges(self.layer_starts[networks], self.layer_starts[networks + 1])
        depths = self.layer_starts[networks + 1] - self.layer_starts[networks]
        if self.layers is not None:
            layers = layers[_sample(depths, self.layers)]
            depths = depths.clamp(max=self.layers)
        rows = _ranges(self.layer_offsets[layers], self.layer_offsets[layers + 1])
        widths = self.widths[layers]
        if self.width is not None:
            rows = rows[_sample(widths, self.width)]
            widths = widths.clamp(max=self.width)
        depth = int(depths.max())
        first = torch.arange(len(networks)) * depth
        return TokenBatch(
            values=self.values[rows],
            kind=self.kind[rows],
            activation=self.activation[rows],
            segment=torch.arange(len(layers)).repeat_interleave(widths),
            place=_ranges(first, first + depths),
            depth=depth,
            statistics=self.statistics[networks],
        )


def _sample(sizes: Tensor, most: int) -> Tensor:
    """Of groups of ``sizes``, laid out one after another, the positions of at most ``most`` random
    members each, in order."""
    group = torch.arange(len(sizes)).repeat_interleave(sizes)
    if not bool((sizes > most).any()):
        return torch.arange(len(group))
    order = torch.argsort(group + torch.rand(len(group), dtype=torch.float64))
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order[rank < most].sort().values


def _ranges(starts: Tensor, stops: Tensor) -> Tensor:
    """The integers of several ranges, one after another."""
    lengths = stops - starts
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)


class WeightNetPredictor(ModulePredictor):
    """`WeightNet`, averaged with trees on the statistics that its heads read."""

    reader: TokenReader

    def __init__(
        self, name: str, config: WeightNetConfig, properties: Sequence[str], seed: int
    ) -> None:
        probed = name == "weightnet_probe"
        learned = config.learned_probes
        if learned.per_class and not (probed and config.trees):
            raise ValueError(
                "learned_probes.per_class must be 0 where only weights are read, and without "
                f"trees, however: {learned.per_class} of {name} with trees={config.trees}"
            )
        reader = TokenReader(config, responses=probed)
        super().__init__(name, config, properties, seed, reader=reader, fit=config.fit)
        self.trees = TreeBags(config.trees)
        self.answer_trees = TreeBags(config.trees * config.fit.members)
        self.probes = LearnedProbes(learned, seed) if learned.per_class else None
        self.narrower = np.ones(len(properties))  # the spread where there are answers
        self._answers: WeakKeyDictionary[Networks, Array] = WeakKeyDictionary()

    def _train(
        self,
        train: Networks,
        targets: Array,
        validation: Networks,
        validation_targets: Array,
        *,
        log: Log | None,
        checkpoint: Path | None,
    ) -> None:
        if self.probes is not None and ACCURACY not in self.properties:
            raise ValueError(
                f"properties must have {ACCURACY}, by which learned probes choose teachers, "
                f"however: {', '.join(self.properties)}; set learned_probes.per_class=0"
            )
        super()._train(
            train, targets, validation, validation_targets, log=log, checkpoint=checkpoint
        )
        if self.trees.bags:
            rows, held_out = self.reader.rows(train), self.reader.rows(validation)
            self.trees.fit(
                rows, targets, held_out, validation_targets, seed=self.seed, folds=self.folds
            )
        if self.probes is not None:
            self.probes.fit(train, targets[:, self.properties.index(ACCURACY)])
            known, held_out_known = self._answered(train), self._answered(validation)
            if known.any():
                self.answer_trees.fit(
                    self._answer_rows(train)[known],
                    targets[known],
                    self._answer_rows(validation)[held_out_known],
                    validation_targets[held_out_known],
                    seed=self.seed,
                    folds=[np.zeros(known.sum(), dtype=bool)],
                )
                self.narrower = self._gain(validation, validation_targets)

    def _estimate_unseen(
        self, train: Networks, validation: Networks, validation_targets: Array
    ) -> Estimate | None:
        if self.probes is not None:
            return None  # all training networks had a part in the probes
        return super()._estimate_unseen(train, validation, validation_targets)

    def _gain(self, validation: Networks, targets: Array) -> Array:
        """How large the errors are of trees that read answers, in units of those without [P]."""
        known = self._answered(validation)
        told = self.answer_trees.predict(self._answer_rows(validation)[known]) - targets[known]
        untold = super()._estimate(validation).mean[known] - targets[known]
        measured = np.isfinite(told)
        squares = [np.where(measured, one, 0) ** 2 for one in (told, untold)]
        least = np.finfo(np.float64).tiny
        return np.sqrt((squares[0].sum(0) + least) / (squares[1].sum(0) + least)).clip(0.1, 1)

    def _estimate(self, networks: Networks) -> Estimate:
        mean, spread = super()._estimate(networks)
        if self.probes is not None and (known := self._answered(networks)).any():
            mean[known] = self.answer_trees.predict(self._answer_rows(networks)[known])
            spread[known] *= self.narrower
        return Estimate(mean, spread)

    def _ask(self, member: int, networks: Networks, batches: Batches, chosen: Longs) -> Estimate:
        """A network and its trees on statistics, which need no answers."""
        mean, spread = super()._ask(member, networks, batches, chosen)
        if self.trees.bags:
            mean = (mean + self.trees.predict(self.reader.rows(networks)[chosen], member)) / 2
        return Estimate(mean, spread)

    def _answer_rows(self, networks: Networks) -> Array:
        """The statistics of whole networks and their answers to the learned probes [B, S]."""
        assert self.probes is not None
        if networks not in self._answers:
            answers = self.probes.features(networks).values
            self._answers[networks] = np.concatenate([self.reader.rows(networks), answers], axis=1)
        return self._answers[networks]

    def _answered(self, networks: Networks) -> NDArray[np.bool_]:
        """Which networks have answers to learned probes [B]."""
        known: NDArray[np.bool_] = np.isfinite(self._answer_rows(networks)[:, -1])
        return known

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        self.trees.write(folder)
        if self.probes is not None:
            self.probes.write(folder)
            self.answer_trees.write(folder, "answer-trees.json")
            write_arrays(folder / "answers.safetensors", {"narrower": self.narrower})

    def _read(self, folder: Path) -> None:
        super()._read(folder)
        self.trees.read(folder)
        if self.probes is not None:
            self.probes.read(folder)
            self.answer_trees.read(folder, "answer-trees.json")
            self.narrower = read_arrays(folder / "answers.safetensors")["narrower"]


def build(name: str, config: WeightNetConfig, properties: Sequence[str], seed: int) -> Predictor:
    """Return ``weightnet`` or, reading probe responses as well, ``weightnet_probe``."""
    return WeightNetPredictor(name, config, properties, seed)
