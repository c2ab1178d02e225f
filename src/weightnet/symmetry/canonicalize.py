"""One representative of all the states that permutations (and scales) make of a network.

**sort** orders the channels of a space by a key that knows no order of any hidden space:

1. the L1 norm of the channel's incoming weights, summed over every layer that produces the space
   (so a space tied by residual additions is ordered jointly), largest first. The sum is taken in
   fixed point, in integers, which makes it exact: it is the same in any order of summation, bit
   for bit. Where scale is canonical the incoming norms are all alike: there the outgoing weights
   are summed.
2. channels that tie, and only those, are told apart by colour refinement (Weisfeiler-Leman): the
   hash of all values on all of the channel's axes, each with the colours of the channels it
   connects, until nothing splits. Channels that still tie are interchangeable (identical or dead
   neurons) and stay in the order given.

Hence ``canonicalize(permute(x))`` equals ``canonicalize(x)`` bit for bit when no two neurons tie.

**align** matches the channels to those of a reference by weight matching (Git Re-Basin, Ainsworth
et al. 2022, https://arxiv.org/abs/2209.04836), started from the sorted state: coordinate descent,
hence a local optimum; it is known to be weak on residual networks, whose large tied space depends
on all the others.

**scale** gives every channel of a scalable space incoming weights and bias (or the scale and shift
of its norm) of mean magnitude ``1 / sqrt(n)``, ``n`` their number, measured at the first layer
that produces the space; layers are taken in forward order, so what a layer reads is canonical
before it is measured. Factors closer to 1 than the tolerance of the type are taken as 1, which
makes the form idempotent bit for bit. Under `rescale` it is invariant up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from weightnet.symmetry.batchnorm import (
    fold_batchnorm,
    fold_batchnorm_into,
    without_batchnorm,
)
from weightnet.symmetry.permute import (
    State,
    along,
    axes_by_tensor,
    check_state,
    divide_inputs,
    has_norm,
    permute_stack_into,
    produced,
    reorder,
    rescale,
    rescale_into,
)
from weightnet.symmetry.spec import Axis, PermutationSpec, Space

Order = Literal["none", "sort", "align"]

_BLOCK = 1 << 21  # elements converted at once
_DEAD = 1e-30  # a smaller sum of magnitudes is not scaled up
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # other types: 1e-2
_SWEEPS = 10


def canonicalize(
    spec: PermutationSpec,
    state: State,
    *,
    order: Order = "sort",
    scale: bool = False,
    fold: bool = False,
    reference: State | None = None,
) -> dict[str, torch.Tensor]:
    """The canonical form of ``state``: the same function, with its channels in a canonical order
    and scale.

    Args:
        order: ``none`` keeps the order, ``sort`` sorts by the key above, ``align`` matches
            ``reference``.
        scale: whether to fix the scale of channels between positively homogeneous units, before
            the order.
        fold: whether to fold each BatchNorm into the layer before it first (`fold_batchnorm`).
        reference: the state to align to, of the same spec; folded and scaled as ``state`` is.

    Raises:
        ValueError: for an unknown order, a missing or needless reference, or a state that does not
            fit.
    """
    form = canonicalize_stack(
        spec,
        {key: tensor[None] for key, tensor in state.items()},
        order=order,
        scale=scale,
        fold=fold,
        reference=reference,
    )
    return {key: tensor[0] for key, tensor in form.items()}


def canonicalize_stack(
    spec: PermutationSpec,
    states: State,
    *,
    order: Order = "sort",
    scale: bool = False,
    fold: bool = False,
    reference: State | None = None,
) -> dict[str, torch.Tensor]:
    """`canonicalize` for a stack of networks of one spec: each tensor [networks, ...]. All are
    brought to the form together, each to the one that it has alone, bit for bit; temporaries are
    some times as large as the largest tensor, so pass many small networks, or a large one.

    ``reference`` is one network, without the leading axis.
    """
    if order not in ("none", "sort", "align"):
        raise ValueError(f"order must be none, sort or align, however: order={order!r}")
    if (order == "align") != (reference is not None):
        fact = "there is none" if reference is None else f"order={order!r}"
        raise ValueError(
            f"a reference must come with order='align' and only with it, however: {fact}"
        )
    found = {key: tensor.detach() for key, tensor in states.items()}
    check_state(spec, found, stack=True)
    if fold:
        fold_batchnorm_into(spec, found)
        reference = None if reference is None else fold_batchnorm(spec, reference)
        spec = without_batchnorm(spec)
    if scale:
        rescale_into(spec, _canonical_scales(spec, found), found)
    if order == "none":
        return found
    permute_stack_into(spec, _sorting_permutations(spec, found, scaled=scale), found)
    if reference is None:
        return found
    check_state(spec, reference)
    if scale:
        alone = {key: tensor[None] for key, tensor in reference.items()}
        scales = _canonical_scales(spec, alone)
        reference = rescale(spec, {name: s[0] for name, s in scales.items()}, reference)
    aligned = [
        aligning_permutation(spec, {key: t[i] for key, t in found.items()}, reference)
        for i in range(len(next(iter(found.values()))))
    ]
    orders = {name: torch.stack([one[name] for one in aligned]) for name in aligned[0]}
    permute_stack_into(spec, orders, found)
    return found


# --- sort ------------------------------------------------------------------------------------


def sorting_permutation(
    spec: PermutationSpec, state: State, *, scaled: bool = False
) -> dict[str, torch.Tensor]:
    """The permutation of every space that sorts it; ``scaled`` says that scales are canonical."""
    check_state(spec, state)
    alone = {key: tensor[None] for key, tensor in state.items()}
    orders = _sorting_permutations(spec, alone, scaled=scaled)
    return {name: order[0] for name, order in orders.items()}


def _sorting_permutations(
    spec: PermutationSpec, states: State, *, scaled: bool
) -> dict[str, torch.Tensor]:
    """`sorting_permutation` for a stack: [networks, size]. Only networks with ties are looked at
    one by one."""
    weights = {layer.weight for layer in spec.layers}
    keys: dict[str, torch.Tensor] = {}
    orders: dict[str, torch.Tensor] = {}
    tied = torch.zeros(1, dtype=torch.bool)
    for space in spec.spaces:
        side = 1 if scaled and space.scalable else 0
        used = [axis for axis in space.axes if axis.axis == side and axis.tensor in weights]
        views = [_stack_rows(states[axis.tensor], axis, space.size) for axis in used or space.axes]
        powers, finite = _powers_above(views)
        unit = powers.amax(1, keepdim=True)  # one for all: channels are compared
        keys[space.name], _ = _magnitudes(views, unit.expand_as(powers), finite=finite)
        falling, orders[space.name] = torch.sort(-keys[space.name], dim=1, stable=True)
        tied = tied | (falling[:, 1:] == falling[:, :-1]).any(1)
    for network in torch.nonzero(tied).flatten().tolist():
        colours = {
            name: torch.unique(-key[network], return_inverse=True)[1] for name, key in keys.items()
        }
        _refine(spec, {key: t[network] for key, t in states.items()}, colours)
        for name, colour in colours.items():
            orders[name][network] = torch.argsort(colour, stable=True)
    return orders


def _stack_rows(tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """The values on each channel of an axis, [networks, size, repeat, before, after]; a view if
    possible."""
    part = tensor.detach().cpu().narrow(axis.axis + 1, axis.offset, size * axis.repeat)
    before = math.prod(tensor.shape[1 : axis.axis + 1])
    after = math.prod(tensor.shape[axis.axis + 2 :])
    return part.reshape(len(tensor), before, size, axis.repeat, after).permute(0, 2, 3, 1, 4)


def _rows(tensor: torch.Tensor, axis: Axis, size: int) -> torch.Tensor:
    """The same of one network, [size, repeat, before, after]."""
    return _stack_rows(tensor[None], axis, size)[0]


def _powers_above(views: list[torch.Tensor]) -> tuple[torch.Tensor, bool]:
    """Per channel the power of two above its magnitudes, float64 [networks, size], 0 if 0 or not
    finite; and whether all values are finite."""
    largest = torch.zeros(views[0].shape[:2], dtype=torch.float64)
    for view in views:
        if view.numel():
            ends = _over_channel(view, torch.amax), -_over_channel(view, torch.amin)
            largest = torch.maximum(largest, torch.maximum(*ends).double())
    powers = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    finite = largest.isfinite()
    return torch.where((largest > 0) & finite, powers, 0.0), bool(finite.all())


def _over_channel(
    view: torch.Tensor, reduce: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
) -> torch.Tensor:
    """Reduce each channel of a view to a number [networks, size]: first over what lies outermost
    in memory, which is many times faster than all at once."""
    inner = view.squeeze(3) if view.shape[3] == 1 else reduce(view, (3,))
    return reduce(inner, (2, 3))


def _magnitudes(
    views: list[torch.Tensor], unit: torch.Tensor, *, finite: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of magnitudes per channel over all views: int64 [networks, size], and the value of one
    step, float64 [networks, size].

    Integers add exactly in any order. What is not finite counts as nothing. Where all is finite,
    2^52 is added to what is below 2^52: this rounds it to the integer in the double's last 52
    bits, and the sum of the bit patterns, which wraps, is rid of what stands above them.
    """
    count = sum(view[0, 0].numel() for view in views)
    bits = min(52, 61 - count.bit_length())  # no overflow, and steps that a double holds
    factor = torch.where(unit > 0, 2.0**bits / unit, 0.0)
    finite = finite and bool(factor.isfinite().all())
    total = torch.zeros(unit.shape, dtype=torch.int64)
    for view in views:
        along_rows = view.shape[3] == 1  # follow the memory: its outermost axis
        outer = 1 if along_rows else 3
        step = max(1, _BLOCK * view.shape[outer] // max(1, view.numel()))
        for start in range(0, view.shape[outer], step):
            block = view.narrow(outer, start, min(step, view.shape[outer] - start))
            rows = slice(start, start + step) if along_rows else slice(None)
            values = block.abs().double().mul_(factor[:, rows, None, None, None])
            if finite:
                whole = values.add_(2.0**52).view(torch.int64)
            else:
                whole = values.nan_to_num_(nan=0.0, posinf=0.0).round_().to(torch.int64)
            total[:, rows] += whole.sum((2, 3, 4))
    if finite:
        total -= count * torch.tensor(0x433 << 52)
    return total, unit / 2.0**bits


def _refine(spec: PermutationSpec, state: State, colours: dict[str, torch.Tensor]) -> None:
    """Split equal colours by what tells channels apart, in place, until a round splits none."""
    axes = axes_by_tensor(spec)
    salts = {space.name: number for number, space in enumerate(spec.spaces)}
    tied = [space for space in spec.spaces if _classes(colours[space.name]) < space.size]
    while tied:
        classes = sum(_classes(colours[space.name]) for space in tied)
        hashes = {space.name: _fingerprints(space, state, axes, colours, salts) for space in tied}
        for name, extra in hashes.items():
            pairs = torch.stack([colours[name], extra])
            colours[name] = torch.unique(pairs, dim=1, return_inverse=True)[1]
        if classes == sum(_classes(colours[space.name]) for space in tied):
            return
        tied = [space for space in tied if _classes(colours[space.name]) < space.size]


def _classes(colour: torch.Tensor) -> int:
    return int(colour.max()) + 1 if len(colour) else 0


def _fingerprints(
    space: Space,
    state: State,
    axes: dict[str, list[tuple[str, int, Axis]]],
    colours: dict[str, torch.Tensor],
    salts: dict[str, int],
) -> torch.Tensor:
    """A hash per tied channel, int64 [size]: of the multiset of its values, each with the fixed
    places and the colours that it has on the other axes."""
    colour = colours[space.name]
    among = torch.nonzero(torch.bincount(colour)[colour] > 1).flatten()
    total = torch.zeros(space.size, dtype=torch.int64)
    for number, axis in enumerate(space.axes):
        tensor = state[axis.tensor].detach().cpu()
        codes = torch.full((1,) * tensor.dim(), number, dtype=torch.int64)
        for place, length in enumerate(tensor.shape):
            if place != axis.axis:
                code = _place_codes(axes[axis.tensor], place, length, colours, salts)
                codes = _mix(codes + along(code, place, codes))
        before = math.prod(tensor.shape[: axis.axis])
        codes = codes.reshape(1, before, -1) + _mix(torch.arange(axis.repeat))[:, None, None]
        codes = _mix(codes)
        view = _rows(tensor, axis, space.size)
        step = max(1, _BLOCK // max(1, view[0].numel()))
        for start in range(0, len(among), step):
            rows = among[start : start + step]
            total[rows] += _mix(_bits(view[rows]) ^ codes).flatten(1).sum(1)
    return total


def _place_codes(
    axes: list[tuple[str, int, Axis]],
    place: int,
    length: int,
    colours: dict[str, torch.Tensor],
    salts: dict[str, int],
) -> torch.Tensor:
    """A code per index of an axis: its place where that is fixed, else its channel's colour."""
    codes = _mix(torch.arange(length))
    for name, size, axis in axes:
        if axis.axis == place:
            salt = _mix(torch.tensor((salts[name] << 32) + axis.offset + 1))
            code = _mix(salt + colours[name])[:, None] + _mix(torch.arange(axis.repeat))
            codes[axis.offset : axis.offset + size * axis.repeat] = _mix(code).flatten()
    return codes


def _bits(values: torch.Tensor) -> torch.Tensor:
    """The bit patterns of the values as int64."""
    if not values.is_floating_point():
        return values.to(torch.int64)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    return values.contiguous().view(width).to(torch.int64)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of int64 (the finalizer of splitmix64, on wrapping signed integers)."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31)) + 0x1E3779B97F4A7C15


# --- align -----------------------------------------------------------------------------------


def aligning_permutation(
    spec: PermutationSpec, state: State, reference: State
) -> dict[str, torch.Tensor]:
    """The permutation that brings ``state`` nearest to ``reference`` in weight space (a local
    optimum).

    Each space in turn takes the assignment of most inner product over all its weights, biases,
    scales and shifts, given the others; running statistics, which are no weights, are left out.
    """
    check_state(spec, reference)
    from scipy.optimize import linear_sum_assignment  # slow to import

    axes = axes_by_tensor(spec)
    statistics = {key for layer in spec.layers for key in (layer.mean, layer.variance)}
    order = {space.name: torch.arange(space.size) for space in spec.spaces}
    for _ in range(_SWEEPS):
        moved = False
        for space in spec.spaces:
            gain = torch.zeros(space.size, space.size, dtype=torch.float64)
            for axis in space.axes:
                if axis.tensor not in statistics:
                    others = [entry for entry in axes[axis.tensor] if entry[2] != axis]
                    ours = _rows(reorder(state[axis.tensor], others, order), axis, space.size)
                    theirs = _rows(reference[axis.tensor], axis, space.size)
                    gain += theirs.flatten(1) @ ours.flatten(1).T
            gain = gain.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            best = torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])
            better = (
                gain.gather(1, best[:, None]).sum()
                - gain.gather(1, order[space.name][:, None]).sum()
            )
            if better > 1e-9 * gain.abs().max():
                order[space.name] = best
                moved = True
        if not moved:
            break
    return order


# --- scale -----------------------------------------------------------------------------------


def _canonical_scales(spec: PermutationSpec, states: State) -> dict[str, torch.Tensor]:
    """The scales, float64 [networks, size], that bring a stack to its canonical scale."""
    open_spaces = {space.name for space in spec.spaces if space.scalable}
    scales: dict[str, torch.Tensor] = {}
    for layer in spec.layers:
        if layer.kind == "norm" or layer.groups > 1:  # they pass on the scale of what they read
            continue
        offset, current = 0, None
        for segment in layer.outputs:
            if segment.space in open_spaces and segment.space not in scales:
                if current is None:  # what it reads is canonical by now
                    current = {
                        **{key: states[key] for key in produced(layer)},
                        **({} if has_norm(layer) else divide_inputs(layer, scales, states)),
                    }
                views = [
                    _stack_rows(tensor, Axis(key, 0, offset, segment.repeat), segment.size)
                    for key, tensor in current.items()
                ]
                scales[segment.space] = _unit_scales(views)
            offset += segment.size * segment.repeat
    return scales


def _unit_scales(views: list[torch.Tensor]) -> torch.Tensor:
    """Factors that bring each channel's mean magnitude to ``1 / sqrt(n)``; 1 for dead channels."""
    count = sum(view[0, 0].numel() for view in views)
    unit, finite = _powers_above(views)
    steps, step = _magnitudes(views, unit, finite=finite)
    magnitude = steps.double() * step
    scale = math.sqrt(count) / magnitude
    near = (scale - 1).abs() <= _TOLERANCE.get(views[0].dtype, 1e-2)
    return torch.where(near | (magnitude < _DEAD), 1.0, scale)
