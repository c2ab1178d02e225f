"""Hand-made specs and random states for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from weightnet.symmetry import permute, random_permutation, trace
from weightnet.symmetry.spec import Axis, Layer, PermutationSpec, Segment, Space
from weightnet.tokens import Networks, TokensConfig, layout
from weightnet.zoo.architectures import build

State = dict[str, torch.Tensor]


def layer(
    index: int, kind: str, fields: str, inputs: list, outputs: list, **options: object
) -> Layer:
    """A layer named l0, l1, ...; ``fields`` are its tensors, segments are (space, size[,
    repeat])."""
    name = f"l{index}"
    keys = {
        "weight": "weight",
        "bias": "bias",
        "scale": "bn.weight",
        "shift": "bn.bias",
        "mean": "bn.running_mean",
        "variance": "bn.running_var",
    }
    tensors = {
        field: f"{name}.{key}" if field in fields.split() else None for field, key in keys.items()
    }
    defaults = {"kernel": (1, 1), "stride": (1, 1), "groups": 1, "activation": "relu"}
    segments = {
        "inputs": tuple(Segment(*one) for one in inputs),
        "outputs": tuple(Segment(*one) for one in outputs),
    }
    return Layer(
        index=index, name=name, kind=kind, **tensors, **{**defaults, **options}, **segments
    )


NORM = "scale shift mean variance"


def small_cnn(width: int = 4) -> PermutationSpec:
    """conv-bn-relu, conv-relu, flatten (2 x 2), linear."""
    a, b = ("a", width), ("b", 3)
    layers = (
        layer(0, "conv", f"weight {NORM}", [(None, 2)], [a], kernel=(3, 3), stride=(2, 2)),
        layer(1, "conv", "weight bias", [a], [b], kernel=(3, 1), activation="gelu"),
        layer(2, "linear", "weight bias", [("b", 3, 4)], [(None, 5)], activation="identity"),
    )
    norm = tuple(Axis(f"l0.bn.{k}", 0) for k in ("weight", "bias", "running_mean", "running_var"))
    spaces = (
        Space("a", width, (Axis("l0.weight", 0), *norm, Axis("l1.weight", 1)), scalable=True),
        Space("b", 3, (Axis("l1.weight", 0), Axis("l1.bias", 0), Axis("l2.weight", 1, repeat=4))),
    )
    return PermutationSpec(spaces, layers)


def branched() -> PermutationSpec:
    """A residual space, a depthwise and a grouped conv, a norm over a concatenation, a two-part
    linear."""
    a, b = ("a", 4), ("b", 6)
    norm = [f"l4.bn.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
    layers = (
        layer(0, "conv", "weight bias", [(None, 1)], [a], kernel=(3, 3)),
        layer(1, "conv", "weight", [(None, 1)], [a], kernel=(3, 3), groups=4),
        layer(2, "conv", f"weight {NORM}", [a], [a], activation="identity"),
        layer(3, "conv", "weight bias", [a], [b], kernel=(1, 3)),
        layer(4, "norm", NORM, [a, b], [a, b]),
        layer(5, "linear", "weight bias", [a, ("b", 6, 2)], [(None, 3)], activation="identity"),
        layer(6, "linear", "weight bias", [(None, 4), a], [(None, 2)], activation="unheard_of"),
    )
    bn2 = [f"l2.bn.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
    spaces = (
        Space(
            "a",
            4,
            (
                *(
                    Axis(name, 0)
                    for name in ("l0.weight", "l0.bias", "l1.weight", "l2.weight", *bn2)
                ),
                Axis("l2.weight", 1),
                Axis("l3.weight", 1),
                *(Axis(name, 0) for name in norm),
                Axis("l5.weight", 1),
                Axis("l6.weight", 1, offset=4),
            ),
        ),
        Space(
            "b",
            6,
            (
                Axis("l3.weight", 0),
                Axis("l3.bias", 0),
                *(Axis(name, 0, offset=4) for name in norm),
                Axis("l5.weight", 1, offset=4, repeat=2),
            ),
        ),
    )
    return PermutationSpec(spaces, layers)


def grouped() -> PermutationSpec:
    """Grouped convolutions, described by one group: of fixed channels, and of channels two indices
    wide."""
    layers = (
        layer(0, "conv", "weight bias", [(None, 2)], [(None, 6)], kernel=(3, 3), groups=2),
        layer(1, "conv", "weight bias", [(None, 6)], [("x", 3, 2)]),
        layer(2, "conv", "weight", [(None, 2)], [("x", 3)], kernel=(2, 2), groups=3),
        layer(3, "linear", "weight bias", [("x", 3, 4)], [(None, 2)]),
    )
    wide = tuple(Axis(name, 0, repeat=2) for name in ("l1.weight", "l1.bias"))
    axes = (*wide, Axis("l2.weight", 0), Axis("l3.weight", 1, repeat=4))
    return PermutationSpec((Space("x", 3, axes),), layers)


def random_state(spec: PermutationSpec, seed: int) -> State:
    """Random weights for a hand-made spec, positive variances, a batch counter beside each
    norm."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for one in spec.layers:
        inputs = sum(s.size * s.repeat for s in one.inputs)
        outputs = sum(s.size * s.repeat for s in one.outputs)
        shape = (outputs, inputs) if one.kind == "linear" else (outputs, inputs, *one.kernel)
        if one.weight is not None:
            state[one.weight] = torch.randn(shape, generator=generator)
        for field in ("bias", "scale", "shift", "mean", "variance"):
            if (name := getattr(one, field)) is not None:
                state[name] = torch.randn(outputs, generator=generator)
        if one.variance is not None:
            state[one.variance] = state[one.variance].abs() + 0.1
            state[one.variance.replace("running_var", "num_batches_tracked")] = torch.tensor(
                seed + 7
            )
    return state


def permuted(
    spec: PermutationSpec, state: State, seed: int
) -> tuple[dict[str, torch.Tensor], State]:
    """A random permutation per space, and the state it leads to."""
    generator = torch.Generator().manual_seed(seed)
    orders = {space.name: torch.randperm(space.size, generator=generator) for space in spec.spaces}
    moved = dict(state)
    for space in spec.spaces:
        for axis in space.axes:
            tensor = moved[axis.tensor]
            index = torch.arange(tensor.shape[axis.axis])
            width = space.size * axis.repeat
            block = index[axis.offset : axis.offset + width].reshape(space.size, axis.repeat)
            index[axis.offset : axis.offset + width] = block[orders[space.name]].reshape(-1)
            moved[axis.tensor] = tensor.index_select(axis.axis, index)
    return orders, moved


class Samples:
    """What the tests of this folder share: specs by name, and functions of them."""

    specs: ClassVar[dict[str, PermutationSpec]] = {
        "small_cnn": small_cnn(),
        "branched": branched(),
        "grouped": grouped(),
    }
    wider = small_cnn(width=5)
    state = staticmethod(random_state)
    permuted = staticmethod(permuted)

    @staticmethod
    def networks(
        specs: list[PermutationSpec], states: list[State], max_row: int = 4096
    ) -> Networks:
        frame = pd.DataFrame({"run": [f"{i:016x}" for i in range(len(specs))]})
        return Networks.from_states(frame, specs, states, config=TokensConfig(max_row=max_row))

    @staticmethod
    def moved_tokens(spec: PermutationSpec, orders: dict[str, torch.Tensor]) -> np.ndarray:
        """For each token of the permuted network, the token of the original one."""
        plan = layout(spec)
        source = np.arange(plan.tokens)
        for number, space in enumerate(spec.spaces):
            for one in plan.layers:
                here = np.flatnonzero((plan.space == number) & (plan.layer == one.layer.index))
                if len(here):
                    blocks = here.reshape(space.size, -1)
                    source[here] = blocks[orders[space.name].numpy()].reshape(-1)
        return source

    @classmethod
    def inputs(cls, one: Layer) -> list[tuple[str, int]]:
        """The (space, channel) at each index of the whole input: a group's inputs are the channel
        it writes."""
        if one.groups == 1:
            return cls.channels(one.inputs)
        width = sum(s.size * s.repeat for s in one.inputs)
        written = cls.channels(one.outputs)
        leaders = written[:: len(written) // one.groups]
        return [
            place if place[0] != "-" else ("-", group)
            for group, place in enumerate(leaders)
            for _ in range(width)
        ]

    @staticmethod
    def channels(segments: tuple[Segment, ...]) -> list[tuple[str, int]]:
        """The (space, channel) at each index of an axis."""
        return [
            (s.space or "-", i) for s in segments for i in range(s.size) for _ in range(s.repeat)
        ]


@pytest.fixture(scope="session")
def reordered() -> Callable[[str, int], tuple[nn.Module, State, State]]:
    """Makes a small network of a family for images of some size: its module, its state, and the
    same with its hidden channels in another order."""

    def make(family: str, size: int) -> tuple[nn.Module, State, State]:
        module = build(family, width=0.0625, stem="small", image_channels=1, size=size, classes=3)
        state = module.state_dict()
        spec = trace(module, torch.zeros(1, 1, size, size))
        order = random_permutation(spec, torch.Generator().manual_seed(2))
        return module, state, dict(permute(spec, order, state))

    return make


@pytest.fixture(scope="session")
def samples() -> type[Samples]:
    return Samples


@pytest.fixture(params=sorted(Samples.specs))
def spec(request: pytest.FixtureRequest) -> PermutationSpec:
    return Samples.specs[request.param]
