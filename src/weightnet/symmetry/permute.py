"""Act on weights with the symmetries of a spec: permutations of channels, and positive scales.

A permutation ``p`` of a space puts the old channel ``p[i]`` in place ``i`` on each of the space's
axes. A scale ``s`` multiplies what channel ``i`` carries by ``s[i]``: the layer that produces the
channel is multiplied, the layers that read it are divided. Both leave the network's function
unchanged, up to rounding.

States are mappings from state-dict keys to tensors. A result is a new dict, in which tensors that
nothing moves are the given ones, not copies; beyond the result, no more than one layer is held at
a time. Functions with ``stack`` in their name, and those that say so, act on a stack of networks
of one spec: every tensor, permutation and scale then has a leading axis, the networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from weightnet.symmetry.spec import Axis, Layer, PermutationSpec, Segment

State = Mapping[str, torch.Tensor]
Permutation = Mapping[str, torch.Tensor]
Scales = Mapping[str, torch.Tensor]

_BLOCK = 1 << 22  # weights of a part of a stack


def random_permutation(
    spec: PermutationSpec, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A uniformly random permutation, int64 [size], of every space."""
    return {space.name: torch.randperm(space.size, generator=generator) for space in spec.spaces}


def random_scales(spec: PermutationSpec, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Log-normal scales (median 1, sigma 0.5), float64 [size], of every scalable space."""
    return {
        space.name: torch.randn(space.size, generator=generator, dtype=torch.float64)
        .mul(0.5)
        .exp()
        for space in spec.spaces
        if space.scalable
    }


def inverse(permutation: Permutation) -> dict[str, torch.Tensor]:
    """The permutation that undoes ``permutation``."""
    return {name: torch.argsort(order) for name, order in permutation.items()}


def permute(
    spec: PermutationSpec, permutation: Permutation, state: State
) -> dict[str, torch.Tensor]:
    """The state with the channels of each named space reordered; spaces that are not named stay.

    Raises:
        ValueError: for an unknown space, a value that is no permutation of its size, or a state
            that does not fit the spec.
    """
    sizes = {space.name: space.size for space in spec.spaces}
    for name, order in permutation.items():
        if name not in sizes:
            raise ValueError(
                f"permutation must name spaces of the spec, however: {name!r} is none of them"
            )
        wanted = torch.arange(sizes[name], device=order.device)
        if order.shape != wanted.shape or not torch.equal(order.sort().values, wanted):
            raise ValueError(
                f"permutation[{name!r}] must hold each of 0..{sizes[name] - 1} once, however: it "
                f"has shape {tuple(order.shape)} and does not; make one with random_permutation"
            )
    check_state(spec, state)
    moved = dict(state)
    permute_into(spec, permutation, moved)
    return moved


def permute_into(
    spec: PermutationSpec, permutation: Permutation, state: dict[str, torch.Tensor]
) -> None:
    """`permute` without checks that puts the new tensors in the place of the old ones."""
    for key, axes in axes_by_tensor(spec).items():
        state[key] = reorder(state[key], axes, permutation)


def permute_stack_into(
    spec: PermutationSpec, permutations: Permutation, states: dict[str, torch.Tensor]
) -> None:
    """`permute_into` for a stack: permutations [networks, size]."""
    for key, axes in axes_by_tensor(spec).items():
        states[key] = _reorder_stack(states[key], axes, permutations)


def axes_by_tensor(spec: PermutationSpec) -> dict[str, list[tuple[str, int, Axis]]]:
    """For each tensor its axes that hold channels: (name of the space, its size, axis)."""
    found: dict[str, list[tuple[str, int, Axis]]] = {}
    for space in spec.spaces:
        for axis in space.axes:
            found.setdefault(axis.tensor, []).append((space.name, space.size, axis))
    return found


def stack_parts(states: State) -> Iterator[slice]:
    """A stack of any size as parts to be taken one after another: of many small networks, so that
    each operation has enough to do, or of a single large one."""
    count = len(next(iter(states.values())))
    size = sum(tensor[0].numel() for tensor in states.values())
    step = max(1, _BLOCK // max(1, size))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def check_state(spec: PermutationSpec, state: State, *, stack: bool = False) -> None:
    """Raise ValueError unless every tensor of the spec is there and as long as its channels."""
    for key, axes in axes_by_tensor(spec).items():
        _check_tensor(key, axes, state, int(stack))


def _check_tensor(key: str, axes: list[tuple[str, int, Axis]], state: State, leading: int) -> None:
    if key not in state:
        raise ValueError(
            f"state must hold {key!r} of the spec, however: it is missing; pass a full state dict"
        )
    for name, size, axis in axes:
        shape = tuple(state[key].shape[leading:])
        if axis.axis >= len(shape) or shape[axis.axis] < axis.offset + size * axis.repeat:
            raise ValueError(
                f"state[{key!r}] must hold {size} channels of space {name!r} on axis {axis.axis}, "
                f"however: its shape is {shape}; trace the architecture that the state belongs to"
            )


def reorder(
    tensor: torch.Tensor, axes: list[tuple[str, int, Axis]], permutation: Permutation
) -> torch.Tensor:
    """One tensor with the channels on its axes reordered; the tensor itself if nothing moves."""
    if not any(name in permutation for name, _, _ in axes):
        return tensor
    orders = {name: permutation[name][None] for name, _, _ in axes if name in permutation}
    return _reorder_stack(tensor[None], axes, orders)[0]


def _reorder_stack(
    tensor: torch.Tensor, axes: list[tuple[str, int, Axis]], permutations: Permutation
) -> torch.Tensor:
    for place in sorted({axis.axis for name, _, axis in axes if name in permutations}):
        here = [entry for entry in axes if entry[2].axis == place and entry[0] in permutations]
        shape, at = tensor.shape, place + 1
        # whole channels are moved where all are as wide, which is faster than index by index
        width = here[0][2].repeat if len({axis.repeat for _, _, axis in here}) == 1 else 1
        if shape[at] % width or any(axis.offset % width for _, _, axis in here):
            width = 1
        count = shape[at] // width
        index = permutations[here[0][0]].to(tensor.device)  # where it is all of the axis
        if index.shape[1] != count:
            index = torch.arange(count, device=tensor.device).repeat(len(tensor), 1)
            for name, size, axis in here:
                order, repeat = permutations[name].to(tensor.device), axis.repeat // width
                start = axis.offset // width
                within = start + torch.arange(repeat, device=tensor.device)
                places = order[:, :, None] * repeat + within
                index[:, start : start + size * repeat] = places.flatten(1)
        if len(tensor) == 1:
            wide = tensor.reshape(*shape[:at], -1, width, *shape[at + 1 :])
            tensor = wide.index_select(at, index[0]).view(shape)
        else:
            before, after = math.prod(shape[1:at]), width * math.prod(shape[at + 1 :])
            if tensor.dim() == 2 and width == 1:  # biases and the like
                tensor = tensor.gather(1, index)
                continue
            starts = torch.arange(0, len(tensor) * before * count, count, device=tensor.device)
            rows = starts.view(len(tensor), before, 1) + index[:, None]
            wide = tensor.reshape(len(tensor) * before * count, after)
            tensor = wide.index_select(0, rows.flatten()).view(shape)
    return tensor


def rescale(spec: PermutationSpec, scales: Scales, state: State) -> dict[str, torch.Tensor]:
    """The state in which channel ``i`` of each named space carries ``scales[name][i]`` times as
    much.

    A layer multiplies its output channels: with a norm of its own, by the norm's scale and shift;
    without, by the rows of its weight and its bias. It divides by the scales of its input
    channels. A norm that stands alone passes scales on: its running mean and its shift are
    multiplied. Powers of two are exact.

    Raises:
        ValueError: for a space that is unknown or not scalable, or scales that are not positive
            and finite.
    """
    known = {space.name: space for space in spec.spaces}
    for name, scale in scales.items():
        if name not in known or not known[name].scalable:
            possible = ", ".join(space.name for space in spec.spaces if space.scalable) or "none"
            raise ValueError(
                f"scales must name scalable spaces ({possible}), however: {name!r} is not one"
            )
        if scale.shape != (known[name].size,) or not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError(
                f"scales[{name!r}] must be {known[name].size} positive finite numbers, however: "
                f"shape {tuple(scale.shape)}, values {scale.flatten()[:4].tolist()} ..."
            )
    check_state(spec, state)
    scaled = dict(state)
    rescale_into(spec, scales, scaled)
    return scaled


def rescale_into(spec: PermutationSpec, scales: Scales, state: dict[str, torch.Tensor]) -> None:
    """`rescale` without checks, in place of the old tensors; also for a stack."""
    for layer in spec.layers:
        state.update(_rescale_layer(layer, scales, state))


def _rescale_layer(layer: Layer, scales: Scales, state: State) -> dict[str, torch.Tensor]:
    factor = scale_vector(layer.outputs, scales)
    found = divide_inputs(layer, scales, state)
    if factor is not None:
        for key in produced(layer):
            own = key in found  # a new tensor already: no second copy
            tensor = found[key] if own else state[key]
            scale = along(factor, 0, tensor)
            found[key] = tensor.mul_(scale) if own else tensor * scale
    return found


def produced(layer: Layer) -> list[str]:
    """Keys of the tensors whose axis 0 is multiplied by the scales of the layer's outputs."""
    if layer.kind == "norm":
        keys = [layer.mean, layer.shift]
    elif has_norm(layer):
        keys = [layer.scale, layer.shift]
    else:
        keys = [layer.weight, layer.bias]
    return [key for key in keys if key is not None]


def has_norm(layer: Layer) -> bool:
    """Whether a normalization is part of the layer."""
    return any(key is not None for key in (layer.scale, layer.mean, layer.variance))


def divide_inputs(layer: Layer, scales: Scales, state: State) -> dict[str, torch.Tensor]:
    """The weight of a conv or linear layer divided by the scales of what it reads, if any."""
    if layer.weight is None:
        return {}
    weight = state[layer.weight]
    grouped = layer.groups > 1  # each output row reads channels of its own group
    divisor = scale_vector(layer.outputs if grouped else layer.inputs, scales)
    if divisor is None:
        return {}
    return {layer.weight: weight / along(divisor, 0 if grouped else 1, weight)}


def scale_vector(segments: tuple[Segment, ...], scales: Scales) -> torch.Tensor | None:
    """The scale of each index of an axis, float64; None if none of its spaces is scaled. Also for
    a stack."""
    if not any(segment.space in scales for segment in segments):
        return None
    parts = []
    leading = next(iter(scales.values())).shape[:-1]
    for segment in segments:
        scale = None if segment.space is None else scales.get(segment.space)
        part = (
            torch.ones(*leading, segment.size, dtype=torch.float64)
            if scale is None
            else scale.double().cpu()
        )
        parts.append(part if segment.repeat == 1 else part.repeat_interleave(segment.repeat, -1))
    return torch.cat(parts, dim=-1)


def along(vector: torch.Tensor, axis: int, tensor: torch.Tensor) -> torch.Tensor:
    """The vector in the tensor's type, shaped to act on one of its axes. Also for a stack of
    vectors [networks, size] and of tensors."""
    leading = vector.dim() - 1
    shape = [*vector.shape[:leading], *[1] * (tensor.dim() - leading)]
    shape[leading + axis] = vector.shape[-1]
    return vector.to(tensor).view(shape)
