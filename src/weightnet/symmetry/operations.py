"""What parameter-free operations do to the labels of axes, and whether they commute with positive
scaling.

Functions, tensor methods and modules of torch meet in one table by name: ``torch.flatten``,
``x.flatten`` and ``nn.Flatten`` are the operation ``flatten``. An operation gets its arguments
with every tensor as a `Value`, and the concrete result (a tensor of the meta device, so shapes are
known), and labels that result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from weightnet.symmetry.channels import Label, fix, fresh, moves, stiffen, take, tie, tile


@dataclass(eq=False)
class Draft:
    """A `Layer` while its labels are still being tied."""

    name: str
    kind: str
    inputs: Label
    outputs: Label
    weight: str | None = None
    bias: str | None = None
    scale: str | None = None
    shift: str | None = None
    mean: str | None = None
    variance: str | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "identity"
    epsilon: float | None = None


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the traced computation: its shape (meta device), one label per axis, and the
    layers whose output it is, up to operations that are not activations. ``key``: its state-dict
    key, if it has one."""

    tensor: torch.Tensor
    labels: tuple[Label | None, ...]
    pending: tuple[Draft, ...] = field(default=())
    key: str | None = None

    @property
    def labelled(self) -> bool:
        """Whether some axis holds channels that may move."""
        return any(moves(label) for label in self.labels)

    def stiffen(self) -> None:
        for label in self.labels:
            stiffen(label)


Operation = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]


def values_in(tree: Any) -> Iterator[Value]:
    """Every Value inside nested tuples, lists, dicts and slices, in order."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from values_in(item)
    elif isinstance(tree, dict):
        yield from values_in(list(tree.values()))
    elif isinstance(tree, slice):
        yield from values_in((tree.start, tree.stop, tree.step))


def plain(tree: Any) -> Any:
    """A result that depends on no channel: tensors get labels that say so."""
    if isinstance(tree, torch.Tensor):
        return Value(tree, (None,) * tree.dim())
    if isinstance(tree, tuple | list) and any(isinstance(t, torch.Tensor) for t in tree):
        return tuple(plain(item) for item in tree)
    return tree


def tie_axes(a: Label | None, b: Label | None) -> Label | None:
    """Tie two axes of the same length, of which a fixed one (None) fixes the other."""
    if a is None or b is None:
        fix(a)
        fix(b)
        return None
    tie(a, b)
    return a


def _merge_pending(values: Sequence[Value]) -> tuple[Draft, ...]:
    return tuple(dict.fromkeys(draft for value in values for draft in value.pending))


# --- one tensor in, the same axes out --------------------------------------------------------


def _pointwise(homogeneous: bool) -> Operation:
    def operation(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        x = args[0]
        if not isinstance(result, torch.Tensor) or tuple(result.shape) != tuple(x.tensor.shape):
            raise ValueError("it must keep the shape of its first argument")
        if any(value.labelled for value in values_in((args[1:], kwargs))):
            raise ValueError("only its first argument may carry channels")
        if not homogeneous:
            x.stiffen()
        return Value(result, x.labels, x.pending)

    return operation


def activate(name: str, homogeneous: bool) -> Operation:
    """An activation: it also names itself in the layers whose output it is applied to."""
    pointwise = _pointwise(homogeneous)

    def operation(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        value = pointwise(args, kwargs, result)
        for draft in value.pending:
            if draft.activation == "identity":
                draft.activation = name
        return Value(value.tensor, value.labels)

    return operation


def _recast(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Value:
    x = args[0]  # further tensors (type_as, to) give only their dtype and device
    return Value(result, x.labels, x.pending)


def _ordered(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Value:
    """What depends on the order of channels takes their freedom away."""
    for label in args[0].labels:
        fix(label)
    return Value(result, (None,) * result.dim(), args[0].pending)


def _spatial(rank: int | None) -> Operation:
    """Mixes positions along the last ``rank`` axes (None: all behind the second)."""

    def operation(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        x = args[0]
        start = 2 if rank is None else x.tensor.dim() - rank
        for label in x.labels[start:]:
            fix(label)
        labels = x.labels[:start] + (None,) * (x.tensor.dim() - start)
        if isinstance(result, tuple):  # return_indices
            return tuple(Value(part, labels, x.pending) for part in result)
        return Value(result, labels, x.pending)

    return operation


def _stiff(value: Value) -> Value:
    value.stiffen()
    return value


def _pad(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    x, pads = args[0], argument(args, kwargs, 1, "pad", ())
    constant = argument(args, kwargs, 2, "mode", "constant") == "constant"
    zero = constant and not argument(args, kwargs, 3, "value", None)
    labels = list(x.labels)
    if not zero:
        x.stiffen()
    for place in range(len(pads) // 2):
        axis = x.tensor.dim() - 1 - place
        low, high = pads[2 * place : 2 * place + 2]
        label = labels[axis]
        if label is None or (low, high) == (0, 0):
            continue
        if not constant:
            fix(label)
            labels[axis] = None
            continue
        if min(low, high) < 0:
            label = take(label, max(0, -low), x.tensor.shape[axis] - max(0, -high))
        sides = [fresh(side) if side > 0 else () for side in (low, high)]
        labels[axis] = (
            *sides[0],
            *label,
            *sides[1],
        )  # equal constants: any permutation keeps them
    return Value(result, tuple(labels), x.pending)


# --- several tensors -------------------------------------------------------------------------


def _broadcast(values: Sequence[Value], result: torch.Tensor) -> tuple[Label | None, ...]:
    """Tie the axes that an elementwise operation brings together (aligned from the last axis)."""
    labels: list[Label | None] = []
    for axis in range(-result.dim(), 0):
        length = result.shape[axis]
        joined: Label | None = None
        begun = False
        for value in values:
            if value.tensor.dim() < -axis:
                continue
            if value.tensor.shape[axis] == length:
                joined = tie_axes(joined, value.labels[axis]) if begun else value.labels[axis]
                begun = True
            else:
                stiffen(value.labels[axis])  # one channel that spreads over several
        labels.append(joined)
    return tuple(labels)


def _add(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    operands = [*args[:2], *(kwargs[key] for key in ("other", "input") if key in kwargs)]
    tensors = [operand for operand in operands if isinstance(operand, Value)]
    labels = _broadcast(tensors, result)
    if len(tensors) < 2:
        for value in tensors:
            value.stiffen()  # a constant does not scale with the channel
    for axis in range(-result.dim(), 0):
        if any(
            v.tensor.dim() < -axis or v.tensor.shape[axis] != result.shape[axis] for v in tensors
        ):
            stiffen(labels[axis])  # nor does what is spread over the channels
    return Value(result, labels, _merge_pending(tensors))


def _multiply(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    tensors = list(values_in((args, kwargs)))
    labels = _broadcast(tensors, result)
    if sum(value.labelled for value in tensors) > 1:
        for value in tensors:
            value.stiffen()
    return Value(result, labels, _merge_pending(tensors))


def _divide(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    for divisor in values_in((args[1:], kwargs)):
        divisor.stiffen()
    return _multiply(args, kwargs, result)


def _power(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    for value in values_in((args, kwargs)):
        value.stiffen()
    return _multiply(args, kwargs, result)


def _matmul(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    a, b = values_in((args, kwargs))
    if a.tensor.dim() < 2 or b.tensor.dim() < 2:
        raise ValueError("both arguments must be matrices or batches of them")
    tie_axes(a.labels[-1], b.labels[-2])
    for value in (a, b):
        value.stiffen()
    rows = result.new_empty((*result.shape[:-1], 1))
    heads = [Value(v.tensor[..., :1, :1], (*v.labels[:-2], None, None)) for v in (a, b)]
    batch = _broadcast(heads, rows[..., :1, :])[:-2]
    return Value(result, (*batch, a.labels[-2], b.labels[-1]), _merge_pending([a, b]))


def _concatenate(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    tensors = list(args[0] if args else kwargs["tensors"])
    axis = argument(args, kwargs, 1, "dim", kwargs.get("axis", 0)) % result.dim()
    labels = list(tensors[0].labels)
    for place in range(result.dim()):
        if place != axis:
            for value in tensors[1:]:
                labels[place] = tie_axes(labels[place], value.labels[place])
    if any(value.labels[axis] is not None for value in tensors):
        labels[axis] = tuple(
            part
            for value in tensors
            for part in value.labels[axis] or fresh(value.tensor.shape[axis], fixed=True)
        )
    return Value(result, tuple(labels), _merge_pending(tensors))


def _stack(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    tensors = list(args[0] if args else kwargs["tensors"])
    axis = argument(args, kwargs, 1, "dim", 0) % result.dim()
    labels = _broadcast(tensors, tensors[0].tensor)
    return Value(result, (*labels[:axis], None, *labels[axis:]), _merge_pending(tensors))


# --- rearranging axes ------------------------------------------------------------------------


def _reshape(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    """Any change of shape that keeps the order of elements: flatten, view, squeeze ..."""
    x = args[0]
    old, new = list(x.tensor.shape), list(result.shape)
    labels: list[Label | None] = [None] * len(new)
    i = j = 0
    while i < len(old) or j < len(new):
        first, second = i, j
        if i < len(old) and j < len(new):
            left, right = old[i], new[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * old[i], i + 1
                else:
                    right, j = right * new[j], j + 1
        if i == len(old) or j == len(new):  # what is left on the other side has length one
            i, j = len(old), len(new)
        _regroup(x.labels[first:i], old[first:i], labels, new, range(second, j))
    return Value(result, tuple(labels), x.pending)


def _regroup(
    sources: Sequence[Label | None],
    lengths: Sequence[int],
    labels: list[Label | None],
    new: Sequence[int],
    targets: range,
) -> None:
    """Label the new axes ``targets`` that hold the elements of the old axes of these lengths."""
    marked = [place for place, label in enumerate(sources) if label is not None]
    wide = [place for place in marked if lengths[place] > 1]
    if not marked:
        return
    if len(wide) > 1:
        raise ValueError("two axes of channels must not be flattened into one")
    for place in marked:
        if place not in (wide or marked[:1]):
            fix(sources[place])
    place = (wide or marked)[0]
    label = sources[place]
    assert label is not None
    if not moves(label):
        return
    large = [target for target in targets if new[target] > 1]
    if len(large) > 1 and wide:
        raise ValueError("an axis of channels must not be split into several")
    if len(large) <= 1 and len(targets):
        before, after = math.prod(lengths[:place]), math.prod(lengths[place + 1 :])
        labels[(large or list(targets))[0]] = tile(label, before, after)
    else:
        fix(label)


def _expand(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    x = args[0]
    return Value(result, _broadcast([x], result), x.pending)


def _permute(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    x, order = args[0], argument(args, kwargs, 1, "dims", ())
    order = args[1:] if isinstance(order, int) else order
    return Value(result, tuple(x.labels[place] for place in order), x.pending)


def _transpose(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    x = args[0]
    labels = list(x.labels)
    if labels:
        a = argument(args, kwargs, 1, "dim0", 0)
        b = argument(args, kwargs, 2, "dim1", len(labels) - 1)
        labels[a], labels[b] = labels[b], labels[a]
    return Value(result, tuple(labels), x.pending)


def _reduce(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> Value:
    """A sum, mean or extremum over axes, in whatever order: so over channels, too."""
    x, axes = args[0], argument(args, kwargs, 1, "dim", kwargs.get("axis"))
    rank = x.tensor.dim()
    axes = range(rank) if axes is None else [axes] if isinstance(axes, int) else axes
    gone = {axis % rank for axis in axes} or set(range(rank))
    for axis in gone:
        stiffen(x.labels[axis])
    keep = result.dim() == rank
    labels = [None if a in gone else x.labels[a] for a in range(rank) if keep or a not in gone]
    return Value(result, tuple(labels), x.pending)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    x, axis = args[0], argument(args, kwargs, 2, "dim", 0) % args[0].tensor.dim()
    parts, offset = [], 0
    for part in result:
        labels = list(x.labels)
        stop = offset + part.shape[axis]
        label = labels[axis]
        labels[axis] = None if label is None else take(label, offset, stop)
        parts.append(Value(part, tuple(labels), x.pending))
        offset = stop
    return tuple(parts)


def _getitem(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    x, index = args
    if not isinstance(x, Value):
        return x[index]
    index = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(i, int | slice | None | type(...)) for i in index):
        raise ValueError("an index must be made of integers, slices, None and ...")
    missing = x.tensor.dim() - sum(isinstance(i, int | slice) for i in index)
    labels: list[Label | None] = []
    axis = 0
    for i in index if any(i is ... for i in index) else (*index, ...):
        if i is ...:
            labels.extend(x.labels[axis : axis + missing])
            axis += missing
        elif i is None:
            labels.append(None)
        else:
            label, length = x.labels[axis], x.tensor.shape[axis]
            axis += 1
            if isinstance(i, int):
                fix(None if label is None else take(label, i % length, i % length + 1))
                continue
            start, stop, step = i.indices(length)
            if step != 1:
                if moves(label):
                    raise ValueError("a slice of channels must have step 1")
                label = None
            labels.append(None if label is None else take(label, start, max(start, stop)))
    return Value(result, tuple(labels), x.pending)


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        raise ValueError("only the shape, size, rank, dtype and device of a tensor may be read")
    return result


def argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, default: Any
) -> Any:
    """An argument that may come by position or by name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


ACTIVATIONS: dict[str, bool] = {  # name: positively homogeneous
    "relu": True, "leaky_relu": True, "rrelu": True, "abs": True, "relu6": False,
    "hardtanh": False, "hardsigmoid": False, "hardswish": False, "hardshrink": False,
    "softshrink": False, "tanhshrink": False, "tanh": False, "sigmoid": False,
    "logsigmoid": False, "gelu": False, "silu": False, "mish": False, "elu": False, "selu": False,
    "celu": False, "softplus": False, "softsign": False, "threshold": False, "softmax": False,
    "log_softmax": False, "softmin": False,
}  # fmt: skip

_TABLE: dict[Operation, str] = {
    _pointwise(True): "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "stochastic_depth drop_block2d identity neg negative",
    _pointwise(False): "exp log log1p expm1 sqrt rsqrt square reciprocal sin cos normalize "
    "clamp clip clamp_min clamp_max",
    _ordered: "local_response_norm",
    _recast: "contiguous clone detach to float double half bfloat16 type type_as cpu cuda",
    _spatial(1): "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d",
    _spatial(2): "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d",
    _spatial(None): "interpolate upsample",
    _pad: "pad",
    _add: "add iadd sub isub subtract maximum minimum",
    _multiply: "mul imul multiply",
    _divide: "div truediv itruediv divide true_divide",
    _power: "pow ipow",
    _matmul: "matmul bmm mm",
    _concatenate: "cat concat concatenate",
    _stack: "stack",
    _reshape: "flatten view reshape squeeze unsqueeze unflatten view_as reshape_as",
    _expand: "expand expand_as broadcast_to",
    _permute: "permute",
    _transpose: "transpose t",
    _reduce: "mean sum amax amin",
    _split: "chunk split tensor_split",
    _getitem: "getitem",
    _describe: "size dim ndimension numel getattr len is_floating_point is_contiguous eq ne",
}
OPERATIONS: dict[str, Operation] = {
    name: operation for operation, names in _TABLE.items() for name in names.split()
} | {name: activate(name, homogeneous) for name, homogeneous in ACTIVATIONS.items()}

_RENAMED = {
    "ReLU6": "relu6", "LeakyReLU": "leaky_relu", "LogSigmoid": "logsigmoid",
    "LogSoftmax": "log_softmax", "Softmax2d": "softmax", "UpsamplingNearest2d": "upsample",
    "UpsamplingBilinear2d": "upsample", "LocalResponseNorm": "local_response_norm",
    "AlphaDropout": "alpha_dropout", "FeatureAlphaDropout": "feature_alpha_dropout",
}  # fmt: skip
_POOLS = {
    f"{kind}Pool{rank}d": f"{prefix}_pool{rank}d"
    for rank in (1, 2)
    for kind, prefix in (
        ("Max", "max"),
        ("Avg", "avg"),
        ("AdaptiveAvg", "adaptive_avg"),
        ("AdaptiveMax", "adaptive_max"),
    )
}
_PADS = {f"{kind}Pad2d" for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular")}
_SAME = {
    "ReLU", "RReLU", "Hardtanh", "Hardsigmoid", "Hardswish", "Hardshrink", "Softshrink",
    "Tanhshrink", "Tanh", "Sigmoid", "GELU", "SiLU", "Mish", "ELU", "SELU", "CELU", "Softplus",
    "Softsign", "Threshold", "Softmax", "Softmin", "Dropout", "Dropout1d", "Dropout2d",
    "Dropout3d", "Identity", "Flatten", "Unflatten", "Upsample",
}  # fmt: skip


def module_operation(module: torch.nn.Module) -> Operation | None:
    """The operation of a parameter-free module of torch.nn, None if it is not known."""
    name = type(module).__name__
    if name == "ConstantPad2d" and module.value:
        return lambda args, kwargs, result: _stiff(_spatial(2)(args, kwargs, result))
    if name in _PADS:
        return _spatial(2)
    if name in _SAME:
        return OPERATIONS[name.lower()]
    known = _RENAMED.get(name) or _POOLS.get(name)
    return OPERATIONS[known] if known else None


def function_operation(target: Any) -> Operation | None:
    """The operation of a function, or of a tensor method given by name; None if not known."""
    if isinstance(target, str):
        return OPERATIONS.get(target.strip("_"))
    home = (getattr(target, "__module__", None) or "torch").split(".")[0]
    name = getattr(target, "__name__", "").strip("_")
    if home == "torchvision":
        return OPERATIONS[name] if name in ("stochastic_depth", "drop_block2d") else None
    return OPERATIONS.get(name) if home in ("torch", "_operator", "builtins") else None
