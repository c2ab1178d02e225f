"""The permutation spec: which axes of which tensors carry the same hidden channels.

A *channel space* is a set of tied axes: permuting its channels on every one of them at once leaves
the network's function unchanged (Hecht-Nielsen 1990; Ainsworth et al. 2022,
https://arxiv.org/abs/2209.04836). A spec is plain data: it is serializable, printable, and knows
nothing of modules or tensors.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Axis:
    """Where a space's channels lie on one axis of one parameter or buffer.

    Channel ``i`` occupies the indices ``offset + i * repeat`` to ``offset + (i + 1) * repeat -
    1``: ``repeat`` is H x W after a flatten of channels x space, ``offset`` is non-zero behind a
    concatenation.
    """

    tensor: str
    axis: int
    offset: int = 0
    repeat: int = 1


@dataclass(frozen=True)
class Space:
    """A set of tied axes. ``scalable`` says that each channel may be scaled by any positive
    factor, because every unit between its producers and consumers is positively homogeneous
    (ReLU-like)."""

    name: str
    size: int
    axes: tuple[Axis, ...]
    scalable: bool = False


@dataclass(frozen=True)
class Segment:
    """A run of consecutive channels of a layer's input or output: ``size`` channels of ``space``,
    each ``repeat`` indices wide. ``space`` is None where the channels are fixed (image channels,
    classes)."""

    space: str | None
    size: int
    repeat: int = 1


@dataclass(frozen=True)
class Layer:
    """One parametrized layer, in forward order. Keys name state-dict tensors; absent ones are
    None.

    ``kind`` is conv, linear or norm (a normalization that no single conv or linear feeds directly;
    one that does belong to a conv or linear is folded into that layer's fields ``scale`` ..
    ``variance``). ``activation`` is what is applied to the layer's output before the next
    parametrized layer (identity, relu, relu6, tanh, gelu, silu, hardswish ...). ``inputs`` covers
    axis 1 of the weight and ``outputs`` covers axis 0; the sizes x repeats of each sum to the
    length of that axis. A norm's ``inputs`` are its ``outputs``. ``epsilon`` is what a BatchNorm
    adds to its running variance.

    A grouped conv (``groups`` > 1, depthwise included) moves by whole groups: its axis 1, the
    inputs inside one group, is fixed (``Segment(None, ...)``), and the channels that it reads
    belong to the space of ``outputs``: output index ``o`` reads the group ``o // (out / groups)``
    of its input.
    """

    index: int
    name: str
    kind: str
    weight: str | None
    bias: str | None
    scale: str | None
    shift: str | None
    mean: str | None
    variance: str | None
    kernel: tuple[int, int]
    stride: tuple[int, int]
    groups: int
    activation: str
    inputs: tuple[Segment, ...]
    outputs: tuple[Segment, ...]
    epsilon: float | None = None


@dataclass(frozen=True)
class PermutationSpec:
    """Channel spaces and layers of one architecture."""

    spaces: tuple[Space, ...]
    layers: tuple[Layer, ...]

    def space(self, name: str) -> Space:
        """The space called ``name``; ValueError if there is none."""
        for space in self.spaces:
            if space.name == name:
                return space
        known = ", ".join(space.name for space in self.spaces)
        raise ValueError(f"space must be one of {known}, however: {name!r}; read spec.spaces")

    def random(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A uniformly random permutation of every space (see `random_permutation`)."""
        from weightnet.symmetry.permute import random_permutation

        return random_permutation(self, generator)

    def to_json(self) -> str:
        """The spec as one line of JSON; `from_json` restores an equal spec."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PermutationSpec:
        """Restore a spec written by `to_json`."""
        data = json.loads(text)
        spaces = tuple(
            Space(s["name"], s["size"], tuple(Axis(**a) for a in s["axes"]), s["scalable"])
            for s in data["spaces"]
        )
        return cls(spaces, tuple(_layer(fields) for fields in data["layers"]))


def _layer(fields: dict[str, Any]) -> Layer:
    segments = {key: tuple(Segment(**s) for s in fields[key]) for key in ("inputs", "outputs")}
    pairs = {key: tuple(fields[key]) for key in ("kernel", "stride")}
    return Layer(**{**fields, **segments, **pairs})
