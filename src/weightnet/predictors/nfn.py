"""A published rival: neural functionals, equivariant to permutations of hidden neurons (Zhou et
al. 2023, https://arxiv.org/abs/2302.14040), from their authors' package `nfn`.

Layers of HNP type (inputs and outputs of the read network keep their order) end in HNPPool, as in
the paper's prediction of accuracy from the weights of CNNs. A module of theirs is made for one
number of layers and one kernel size; its parameters do not depend on widths. So this predictor
accepts plain chains - convolutions, then one linear layer, each hidden channel written by one
layer only: no residual, concatenation or group - of at most ``layers`` layers and odd kernels of
at most ``kernel``. What is smaller is brought to that size without loss: kernels are padded with
zeros, and depth with identity convolutions before the last layer (exact for ReLU); BatchNorm is
folded into its convolution. A module for each size would learn from too few networks.

Invariance: each step is the package's, or acts on every weight of a layer alike.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from weightnet.params import Params
from weightnet.predictors.fitting import Batches, FitConfig
from weightnet.predictors.interface import Predictor, read_arrays, write_arrays
from weightnet.predictors.learned import ModulePredictor
from weightnet.predictors.scaling import Array
from weightnet.tokens import layout

if TYPE_CHECKING:
    from weightnet.symmetry.spec import PermutationSpec
    from weightnet.tokens import Networks, Stack

_LIMIT = 10.0  # root mean squares beyond which weights are cut off
_HUGE = 1e3  # weights of diverged networks count as this for the scale
_EPSILON = 1e-5  # of BatchNorm


class NfnConfig(Params):
    """The shape of the functional and how it is fitted.

    Attributes:
        channels: of each equivariant layer (in the paper 16, 16, 5).
        hidden: units of the two layers of the head.
        layers, kernel: of the deepest network, and the largest kernel, that are accepted.
        inputs, outputs: image channels and classes of every network that is accepted.
    """

    channels: list[int] = Field(default=[8, 8, 5], min_length=1)
    hidden: int = Field(default=128, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    layers: int = Field(default=7, ge=3)
    kernel: int = Field(default=5, gt=0)
    inputs: int = Field(default=1, gt=0)
    outputs: int = Field(default=10, gt=0)
    fit: FitConfig = FitConfig(epochs=40, patience=12, batch_size=16, weight_decay=0.01)


@dataclass(frozen=True)
class WeightBatch:
    """Networks of equal widths together: ``groups`` are (weights, biases) of each layer, [n,
    outputs, inputs, kernel, kernel] (the last layer [n, outputs, inputs]) and [n, outputs];
    ``order`` [B] puts the networks of all groups into the batch's order."""

    groups: tuple[tuple[tuple[Tensor, ...], tuple[Tensor, ...]], ...]
    order: Tensor

    def to(self, device: torch.device) -> Self:
        """The batch on ``device``."""
        groups = tuple(
            (tuple(w.to(device) for w in weights), tuple(b.to(device) for b in biases))
            for weights, biases in self.groups
        )
        return type(self)(groups, self.order.to(device))


class Functional(nn.Module):
    """HNP layers, HNPPool and a perceptron: batch -> mean and log_sigma [B, P]."""

    def __init__(self, properties: int, config: NfnConfig) -> None:
        super().__init__()
        from nfn.common import ArraySpec, NetworkSpec
        from nfn.layers import HNPLinear, HNPPool, TupleOp

        square = (config.kernel, config.kernel)
        weights = [ArraySpec((-1, config.inputs, *square))]
        weights += [ArraySpec((-1, -1, *square))] * (config.layers - 2)
        weights += [ArraySpec((config.outputs, -1))]
        biases = [ArraySpec((-1,))] * (config.layers - 1) + [ArraySpec((config.outputs,))]
        spec = NetworkSpec(weights, biases)
        steps: list[nn.Module] = []
        for before, after in zip([1, *config.channels], config.channels, strict=False):
            steps += [HNPLinear(spec, before, after), TupleOp(nn.ReLU())]
        self.functional = nn.Sequential(*steps, HNPPool(spec), nn.Flatten())
        pooled = config.channels[-1] * HNPPool.get_num_outs(spec)
        self.head = nn.Sequential(
            nn.LayerNorm(pooled),
            nn.Linear(pooled, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 2 * properties),
        )

    def forward(self, batch: WeightBatch) -> tuple[Tensor, Tensor]:
        """Return mean and log sigma, [B, P] each."""
        from nfn.common import WeightSpaceFeatures

        pooled = [
            self.functional(
                WeightSpaceFeatures(
                    tuple(weight.unsqueeze(1) for weight in weights),
                    tuple(bias.unsqueeze(1) for bias in biases),
                )
            )
            for weights, biases in batch.groups
        ]
        mean, log_sigma = self.head(torch.cat(pooled)[batch.order]).chunk(2, dim=1)
        return mean, log_sigma


class WeightReader:
    """Reads chains as weight tensors, each layer's divided by their root mean square over
    the training networks: padding stays 0."""

    def __init__(self, config: NfnConfig) -> None:
        self.config = config
        self.scale: Array = np.ones((config.layers, 2))

    def accepts(self, spec: PermutationSpec) -> bool:
        """Whether a network of this spec can be read."""
        config, plan = self.config, layout(spec).layers
        last = len(plan) - 1
        written = [segment.space for one in plan for segment in one.layer.outputs]
        chain = all(
            one.layer.kind == ("linear" if i == last else "conv")
            and one.groups == 1
            and len(one.layer.inputs) == len(one.layer.outputs) == 1
            and one.layer.inputs[0].repeat == 1
            and (i == 0 or one.layer.inputs[0].space == plan[i - 1].layer.outputs[0].space)
            and (i == last or max(one.layer.kernel) <= config.kernel)
            and (i == last or all((config.kernel - k) % 2 == 0 for k in one.layer.kernel))
            for i, one in enumerate(plan)
        )
        return (
            chain
            and 3 <= len(plan) <= config.layers
            and len(set(written)) == len(written)
            and plan[0].layer.inputs[0].space is None
            and written[-1] is None
            and plan[0].inputs == config.inputs
            and plan[last].outputs == config.outputs
        )

    def prepare(self, train: Networks) -> None:
        """Measure the root mean square of each layer's weights and biases."""
        if importlib.util.find_spec("nfn") is None:
            raise ValueError(
                "predictor nfn must have the package nfn, however: it is not installed; "
                "run `pip install -e '.[nfn]'`"
            )
        totals = np.zeros((2, *self.scale.shape))
        for stack in train.stacks():
            for part, tensors in enumerate(self._read(stack)):
                for layer, values in enumerate(tensors):
                    known = np.clip(values[values != 0].astype(np.float64), -_HUGE, _HUGE)
                    totals[:, layer, part] += np.square(known).sum(), len(known)
        square, count = totals
        self.scale = np.where(square > 0, np.sqrt(square / np.maximum(count, 1)), 1.0)

    def batches(self, networks: Networks, *, training: bool) -> Batches:
        """Read all weights once; a batch takes networks of equal widths together.

        Raises:
            ValueError: if a network is not accepted.
        """
        refused = [
            name
            for name in networks.frame["spec"].unique()
            if not self.accepts(networks.specs[name])
        ]
        if refused:
            raise ValueError(
                f"predictor nfn must be given chains of at most {self.config.layers} layers, "
                f"however: {len(refused)} of the architectures are not; choose by `accepts`"
            )
        stacks: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        where = np.zeros((len(networks), 2), np.int64)
        cost = torch.zeros(len(networks), dtype=torch.int64)
        for stack in networks.stacks():
            where[stack.members, 0] = len(stacks)
            where[stack.members, 1] = np.arange(len(stack))
            weights, biases = (
                tuple(_scaled(one, self.scale[i, part]) for i, one in enumerate(tensors))
                for part, tensors in enumerate(self._read(stack))
            )
            cost[stack.members] = sum(one[0].numel() for one in weights)
            stacks.append((weights, biases))

        def collate(indices: Tensor) -> WeightBatch:
            chosen = where[indices.numpy()]
            groups, positions = [], []
            for number in np.unique(chosen[:, 0]):
                members = np.flatnonzero(chosen[:, 0] == number)
                rows = torch.from_numpy(chosen[members, 1])
                weights, biases = stacks[number]
                groups.append((tuple(w[rows] for w in weights), tuple(b[rows] for b in biases)))
                positions.append(members)
            order = torch.from_numpy(np.argsort(np.concatenate(positions)))
            return WeightBatch(tuple(groups), order)

        return Batches(collate, len(networks), cost)

    def module(self, properties: int) -> Functional:
        """Return a new functional."""
        return Functional(properties, self.config)

    def write(self, folder: Path) -> None:
        """Write the scale of the weights."""
        write_arrays(folder / "scale.safetensors", {"scale": self.scale})

    def read(self, folder: Path) -> None:
        """Read what `write` wrote."""
        self.scale = read_arrays(folder / "scale.safetensors")["scale"]

    def _read(self, stack: Stack) -> tuple[list[Array], list[Array]]:
        """Weights and biases of each of ``layers`` layers; BatchNorm folded, size padded."""
        plan, kernel = stack.layout.layers, self.config.kernel
        weights, biases = [], []
        for one in plan:
            weight, bias = _folded(stack, one)
            if one.layer.kind == "conv":
                margin = [((kernel - k) // 2,) * 2 for k in one.layer.kernel]
                weight = np.pad(weight, [(0, 0)] * 3 + margin)
            weights.append(weight)
            biases.append(bias)
        width = plan[-1].inputs
        identity = np.zeros((len(stack), width, width, kernel, kernel), np.float32)
        identity[:, np.arange(width), np.arange(width), kernel // 2, kernel // 2] = 1
        missing = self.config.layers - len(plan)
        weights[-1:-1] = [identity] * missing
        biases[-1:-1] = [np.zeros((len(stack), width), np.float32)] * missing
        return weights, biases


def _scaled(values: Array, scale: float) -> Tensor:
    scaled = np.clip(values / scale, -_LIMIT, _LIMIT)
    return torch.from_numpy(np.nan_to_num(scaled, nan=0.0).astype(np.float32))


def _folded(stack: Stack, one: Any) -> tuple[Array, Array]:
    """A layer's weight [n, *shape] and bias [n, outputs], with its normalization folded in."""
    weight = stack.weight(one).reshape(len(stack), *one.weight_shape)
    shape = (len(stack), one.outputs)

    def column(field: str, neutral: float) -> Array:
        if getattr(one.layer, field) is None:
            return np.full(shape, neutral, np.float32)
        return stack.scalar(field)[:, one.tokens]

    deviation = np.sqrt(np.maximum(column("variance", 1 - _EPSILON), 0) + _EPSILON)
    gain = column("scale", 1.0) / deviation
    bias = column("shift", 0.0) + (column("bias", 0.0) - column("mean", 0.0)) * gain
    return weight * gain.reshape(*shape, *[1] * (weight.ndim - 2)), bias


class NfnPredictor(ModulePredictor):
    """A `ModulePredictor` that reads chains only."""

    reader: WeightReader

    def accepts(self, networks: Networks) -> NDArray[np.bool_]:
        """Which of ``networks`` are chains of the configured size [B]."""
        known = {name: self.reader.accepts(networks.specs[name]) for name in networks.specs}
        return np.array([known[name] for name in networks.frame["spec"]], dtype=bool)


def build(name: str, config: NfnConfig, properties: Sequence[str], seed: int) -> Predictor:
    """Return ``nfn``."""
    reader = WeightReader(config)
    return NfnPredictor(name, config, properties, seed, reader=reader, fit=config.fit)
