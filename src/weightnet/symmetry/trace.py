"""Read an architecture's symmetry off its module graph.

`trace` walks the torch.fx graph of a module once, on tensors without storage, and labels every
axis of every parameter and activation with the channels that lie on it. Each operation ties the
labels of its operands, so what is still free at the end is a channel space: its channels may be
permuted, on all its axes at once, without changing the network's function. Weights that are used
twice need no care: their axes are tied twice.

What the walk cannot follow is an error that names the operation, the node and the module; nothing
is skipped. Restricted on purpose (fewer symmetries than there are, never wrong ones): a grouped
convolution moves by whole groups; attention moves by whole heads.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.func import functional_call

from weightnet.symmetry.channels import (
    Block,
    Label,
    fix,
    fresh,
    moves,
    resolve,
    stiffen,
    take,
    tie,
)
from weightnet.symmetry.operations import (
    Draft,
    Operation,
    Value,
    activate,
    argument,
    function_operation,
    module_operation,
    plain,
    tie_axes,
    values_in,
)
from weightnet.symmetry.spec import Axis, Layer, PermutationSpec, Segment, Space

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_POINTWISE = (
    *(nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid),
    nn.Softplus,
)
_NORMS = (*_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
_LEAVES = (*_NORMS, nn.Conv2d, nn.Linear, nn.PReLU, nn.MultiheadAttention)
_ADVICE = "write it with the operations that weightnet.symmetry.operations lists"


def trace(module: nn.Module, example_input: torch.Tensor) -> PermutationSpec:
    """The channel spaces and layers of ``module`` as it computes in eval mode on inputs like
    ``example_input``.

    Only the shape of ``example_input`` matters, and no arithmetic is done. The module is left as
    it was.

    Raises:
        ValueError: naming the operation, graph node and module path that cannot be followed.
    """
    modes = {part: part.training for part in module.modules()}
    attributes = set(vars(module))
    module.eval()
    try:
        return _Walk(module, _draw_graph(module)).run(example_input)
    finally:
        for part, mode in modes.items():
            part.training = mode
        for name in set(vars(module)) - attributes:
            delattr(module, name)  # constants that torch.fx leaves behind


class _Tracer(fx.Tracer):
    """Keeps subclasses of known modules whole, unless they compute something else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = any(isinstance(m, leaf) and type(m).forward is leaf.forward for leaf in _LEAVES)
        return known or super().is_leaf_module(m, module_qualified_name)


def _draw_graph(module: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(module)
    except Exception as error:  # whatever the forward of the user's module raises on proxies
        inside = [path for path, _ in tracer.module_stack.values()][-1:]
        where = f"module {inside[0]!r}" if inside else f"the forward of {type(module).__name__}"
        raise ValueError(
            f"the module must be traceable by torch.fx, however: {error} (in {where}); take "
            "branches on values and assignments to parts of tensors out of it"
        ) from error


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def known_shape(module: Any, args: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The shape that a simple module of torch's own gives a float, or None where it has to be run.
    To run one on the meta device would import torch's compiler, which takes a second."""
    if len(args) != 1 or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return None
    kind, shape = type(module), tuple(args[0].shape)
    if 0 in shape:  # whatever is refused is for torch to refuse
        return None
    if kind in _POINTWISE:
        return shape
    if kind is nn.Linear and shape and shape[-1] == module.in_features:
        return (*shape[:-1], module.out_features)
    if len(shape) != 4:
        return None
    if kind is nn.BatchNorm2d and shape[1] == module.num_features:
        return shape
    if kind is nn.Conv2d and shape[1] == module.in_channels:
        return _slid(module, shape, module.out_channels)
    if kind is nn.MaxPool2d and not (module.ceil_mode or module.return_indices):
        return _slid(module, shape, shape[1])
    if kind is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
        return (*shape[:2], 1, 1)
    return None


def _slid(module: Any, shape: tuple[int, ...], channels: int) -> tuple[int, ...] | None:
    """The shape behind a window that slides over images."""
    if isinstance(module.padding, str):
        return None
    sizes = []
    for place in (0, 1):
        size, stride, padding, dilation = (
            value if isinstance(value, int) else value[place]
            for value in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        if type(module) is nn.MaxPool2d and 2 * padding > size:
            return None
        sizes.append((shape[2 + place] + 2 * padding - dilation * (size - 1) - 1) // stride + 1)
    return (shape[0], channels, *sizes) if min(sizes) > 0 else None


class _Walk:
    """One pass over the graph; see the module's docstring."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module = module
        self.graph = graph
        self.drafts: dict[str, Draft] = {}
        self.labels: dict[
            int, list[Label | None]
        ] = {}  # id of a parameter or buffer -> label per axis
        self.order: list[tuple[str, int]] = []  # state-dict keys in order of first use
        self.keys: dict[int, list[str]] = {}
        for key, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor):
                self.keys.setdefault(id(tensor), []).append(key)
        called = [node.target for node in graph.nodes if node.op == "call_module"]
        self.calls = Counter(id(module.get_submodule(str(target))) for target in called)

    def run(self, example_input: torch.Tensor) -> PermutationSpec:
        environment: dict[fx.Node, Any] = {}
        placeholders = 0
        for node in self.graph.nodes:
            if node.op == "placeholder":
                placeholders += 1
                if placeholders > 1 and not node.args:
                    raise ValueError(
                        "the module must take one input, however: forward also wants "
                        f"{node.target!r}; wrap it in a module of one input"
                    )
                value = self._input(example_input) if placeholders == 1 else node.args[0]
            else:
                args = fx.node.map_arg(node.args, lambda n: _settle(environment[n]))
                kwargs = fx.node.map_arg(node.kwargs, lambda n: _settle(environment[n]))
                value = self._follow(node, args, kwargs)
            environment[node] = value
        return self._spec()

    def _input(self, example: torch.Tensor) -> Value:
        """The input, in the type of the parameters, on which nothing moves."""
        types = [p.dtype for p in self.module.parameters() if p.is_floating_point()]
        kept = not types or not example.is_floating_point()
        tensor = torch.empty(
            example.shape, dtype=example.dtype if kept else types[0], device="meta"
        )
        return Value(tensor, (None,) * tensor.dim())

    def _follow(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The value of one node; every failure names it."""
        try:
            if node.op == "output":
                for value in values_in(args):
                    for label in value.labels:
                        fix(label)
                return None
            if node.op == "get_attr":
                return self._attribute(str(node.target))
            if node.op == "call_module":
                return self._call_module(node, args, kwargs)
            return self._call_function(node, args, kwargs)
        except (ValueError, RuntimeError, TypeError, LookupError, AssertionError) as error:
            name = str(getattr(node.target, "__name__", node.target))
            if node.op == "call_module":
                name = type(self.module.get_submodule(name)).__name__
            path = _path(node)
            where = f"module {path!r}" if path else f"{type(self.module).__name__}.forward"
            raise ValueError(
                f"every operation on hidden channels must have a known symmetry, however: {name} "
                f"(node {node.name!r} in {where}): {error}; {_ADVICE}"
            ) from error

    # --- parameters --------------------------------------------------------------------------

    def _parameter(self, tensor: torch.Tensor, *labels: Label | None) -> str:
        """Tie the leading axes of a parameter to ``labels`` (others are fixed); return its key."""
        wanted = [*labels, *(None,) * (tensor.dim() - len(labels))]
        if id(tensor) in self.labels:
            known = self.labels[id(tensor)]
            for place, (old, new) in enumerate(zip(known, wanted, strict=True)):
                known[place] = tie_axes(old, new)
        else:
            keys = self.keys.get(id(tensor))
            if keys is None:
                raise ValueError("its tensors must be parameters or persistent buffers")
            self.labels[id(tensor)] = wanted
            self.order.extend((key, id(tensor)) for key in keys)
            if len(keys) > 1:
                for label in wanted:
                    stiffen(label)
        return self.keys[id(tensor)][0]

    def _attribute(self, path: str) -> Any:
        """A parameter or buffer that the forward uses by itself: any axis may hold channels."""
        owner, _, name = path.rpartition(".")
        tensor = getattr(self.module.get_submodule(owner), name)
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if id(tensor) not in self.keys:
            return plain(_meta(tensor))
        if id(tensor) not in self.labels:
            self._parameter(
                tensor, *(fresh(n, rigid=True) if n > 1 else None for n in tensor.shape)
            )
        labels = self.labels[id(tensor)]
        for label in labels:
            stiffen(label)
        return Value(_meta(tensor), tuple(labels), key=self.keys[id(tensor)][0])

    # --- functions and methods ---------------------------------------------------------------

    def _call_function(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        raw_args, raw_kwargs = _raw(args), _raw(kwargs)
        target = node.target
        if isinstance(target, str):
            result = getattr(raw_args[0], target)(*raw_args[1:], **raw_kwargs)
        else:
            assert callable(target)
            result = target(*raw_args, **raw_kwargs)
        if getattr(target, "__name__", "") == "layer_norm":
            return self._layer_norm_function(args, kwargs, result)
        return _apply(function_operation(target), args, kwargs, result)

    def _layer_norm_function(self, args: Any, kwargs: Any, result: torch.Tensor) -> Value:
        x = args[0] if args else kwargs["input"]
        rank = len(argument(args, kwargs, 1, "normalized_shape", ()))
        affine = [
            argument(args, kwargs, 2, "weight", None),
            argument(args, kwargs, 3, "bias", None),
        ]
        scale, shift = (value.key if value is not None else None for value in affine)
        start = x.tensor.dim() - rank
        labels = list(x.labels)
        for value in filter(None, affine):
            for place, label in enumerate(value.labels):
                labels[start + place] = tie_axes(labels[start + place], label)
        x = Value(x.tensor, tuple(labels), x.pending)
        x.stiffen()
        if scale is None:
            return Value(result, x.labels, x.pending)
        outputs = labels[start] or fresh(x.tensor.shape[start], fixed=True)
        draft = Draft(_owner(scale), "norm", outputs, outputs, scale=scale, shift=shift)
        self.drafts.setdefault(scale, draft)
        return Value(result, x.labels, (self.drafts[scale],))

    # --- modules -----------------------------------------------------------------------------

    def _call_module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        path = str(node.target)
        module = self.module.get_submodule(path)
        tensors = (*module.named_parameters(), *module.named_buffers())
        given = _raw(args)
        shape = None if kwargs else known_shape(module, given)
        if shape is not None:
            result: Any = torch.empty(shape, dtype=given[0].dtype, device="meta")
        else:
            state = {key: _meta(tensor) for key, tensor in tensors}
            result = functional_call(module, state, given, _raw(kwargs))
        handlers: list[tuple[Any, Callable[..., Any]]] = [
            (nn.Conv2d, self._conv),
            (nn.Linear, self._linear),
            (_NORMS, self._norm),
            (nn.PReLU, self._prelu),
            (nn.MultiheadAttention, self._attention),
        ]
        for kinds, handler in handlers:
            if isinstance(module, kinds):
                return handler(node, module, args, kwargs, result)
        operation = module_operation(module)
        if operation is None and any(True for _ in module.parameters()):
            raise ValueError("no rule for the parameters of this module")
        return _apply(operation, args, kwargs, result)

    def _draft(self, tensor: torch.Tensor, draft: Draft) -> Draft:
        """The layer of this weight; the one first made if the module is called again."""
        return self.drafts.setdefault(self.keys[id(tensor)][0], draft)

    def _conv(
        self, node: fx.Node, module: nn.Conv2d, args: Any, kwargs: Any, result: Any
    ) -> Value:
        x = _first(args, kwargs)
        channel = x.tensor.dim() - 3
        inputs = x.labels[channel] or fresh(module.in_channels, fixed=True)
        groups = module.groups
        if groups == 1:
            inside, outputs = inputs, fresh(module.out_channels)
        else:
            moving = Block(groups)
            outputs = ((moving, module.out_channels // groups),)
            inside = fresh(module.in_channels // groups, fixed=True)
            tie(inputs, ((moving, module.in_channels // groups),))
        draft = Draft(
            str(node.target), "conv", inside, outputs,
            kernel=_pair(module.kernel_size), stride=_pair(module.stride), groups=groups,
        )  # fmt: skip
        for place in {channel + 1, channel + 2}:
            fix(x.labels[place])
        return self._matrix(module, draft, x, result, channel)

    def _linear(
        self, node: fx.Node, module: nn.Linear, args: Any, kwargs: Any, result: Any
    ) -> Value:
        x = _first(args, kwargs)
        inputs = x.labels[-1] or fresh(module.in_features, fixed=True)
        draft = Draft(str(node.target), "linear", inputs, fresh(module.out_features))
        return self._matrix(module, draft, x, result, x.tensor.dim() - 1)

    def _matrix(
        self,
        module: nn.Conv2d | nn.Linear,
        draft: Draft,
        x: Value,
        result: torch.Tensor,
        axis: int,
    ) -> Value:
        """What Conv2d and Linear share: a weight [out, in, ...], a bias, one axis of channels."""
        draft.weight = self._parameter(module.weight, draft.outputs, draft.inputs)
        if module.bias is not None:
            draft.bias = self._parameter(module.bias, draft.outputs)
        outputs = draft.outputs
        draft = self._draft(module.weight, draft)
        tie(outputs, draft.outputs)
        others = list(x.labels)
        others[axis] = None
        for label in others:
            if draft.bias is not None:
                stiffen(label)  # the bias does not scale with channels that lie on other axes
        others[axis] = outputs
        return Value(result, tuple(others), (draft,))

    def _norm(self, node: fx.Node, module: Any, args: Any, kwargs: Any, result: Any) -> Value:
        x = _first(args, kwargs)
        batch = isinstance(module, _BATCH_NORMS)
        last = isinstance(module, nn.LayerNorm)
        rank = len(module.normalized_shape) if last else 1
        channel = x.tensor.dim() - rank if last else 1
        labels = list(x.labels)
        outputs = labels[channel] or fresh(x.tensor.shape[channel], fixed=True)
        if isinstance(module, nn.GroupNorm):
            outputs = _cut_into(outputs, module.num_groups)
            labels[channel] = outputs
        folded = self._folds(node, module, x)
        statistics = (module.running_mean, module.running_var) if batch else (None, None)
        exact = statistics[0] is not None  # a running mean is scaled with its input
        if folded is not None:
            exact = module.weight is not None
        if not exact or (module.weight is not None and len(self.keys[id(module.weight)]) > 1):
            x.stiffen()
        draft = folded or Draft(str(node.target), "norm", outputs, outputs)
        over = [outputs, *labels[channel + 1 : channel + rank]]
        tensors = (module.weight, module.bias, *statistics)
        keys = [None if tensor is None else self._parameter(tensor, *over) for tensor in tensors]
        if folded is None and module.weight is not None:
            draft = self._draft(module.weight, draft)
        elif folded is None and statistics[0] is not None:
            draft = self._draft(statistics[0], draft)
        draft.scale, draft.shift, draft.mean, draft.variance = keys
        draft.epsilon = module.eps if statistics[1] is not None else None
        carries = folded is not None or any(key is not None for key in keys)
        return Value(result, tuple(labels), (draft,) if carries else x.pending)

    def _folds(self, node: fx.Node, module: Any, x: Value) -> Draft | None:
        """The conv or linear layer that this norm directly and solely follows."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) > 1:
            return None
        producer = self.module.get_submodule(str(source.target))
        if not isinstance(producer, nn.Conv2d | nn.Linear):
            return None
        if isinstance(module, nn.LayerNorm):
            alone = isinstance(producer, nn.Linear) and len(module.normalized_shape) == 1
        else:
            alone = isinstance(producer, nn.Conv2d) or x.tensor.dim() == 2
        tensors = [producer.weight, producer.bias, module.weight, module.bias]
        shared = any(len(self.keys[id(t)]) > 1 for t in tensors if t is not None)
        once = self.calls[id(producer)] == self.calls[id(module)] == 1
        return (
            self.drafts[self.keys[id(producer.weight)][0]]
            if alone and once and not shared
            else None
        )

    def _prelu(self, node: fx.Node, module: nn.PReLU, args: Any, kwargs: Any, result: Any) -> Any:
        x = _first(args, kwargs)
        label = x.labels[1] if module.num_parameters > 1 else None
        self._parameter(module.weight, label)
        return activate("prelu", True)((x,), {}, result)

    def _attention(
        self, node: fx.Node, module: nn.MultiheadAttention, args: Any, kwargs: Any, result: Any
    ) -> Any:
        if module.in_proj_weight is None or module.bias_k is not None:
            raise ValueError("query, key and value must share their width, without bias_kv")
        if argument(args, kwargs, 4, "need_weights", True) and not kwargs.get(
            "average_attn_weights", True
        ):
            raise ValueError("attention weights must be averaged over heads")
        values = [
            argument(args, kwargs, place, n, None)
            for place, n in enumerate(("query", "key", "value"))
        ]
        width, path = module.embed_dim, str(node.target)
        stream = values[0].labels[-1] or fresh(width, fixed=True)
        for value in values:
            tie_axes(stream, value.labels[-1])
            value.stiffen()
            for label in value.labels[:-1]:
                fix(label)
        heads = ((Block(module.num_heads, rigid=True), width // module.num_heads),)
        into = Draft(f"{path}.in_proj", "linear", stream, heads * 3, activation="attention")
        into.weight = self._parameter(module.in_proj_weight, into.outputs, stream)
        out = Draft(f"{path}.out_proj", "linear", heads, fresh(width))
        out.weight = self._parameter(module.out_proj.weight, out.outputs, heads)
        if module.in_proj_bias is not None:
            into.bias = self._parameter(module.in_proj_bias, into.outputs)
            out.bias = self._parameter(module.out_proj.bias, out.outputs)
        self._draft(module.in_proj_weight, into)
        out = self._draft(module.out_proj.weight, out)
        labels = (*(None,) * (result[0].dim() - 1), out.outputs)
        return (Value(result[0], labels, (out,)), *(plain(extra) for extra in result[1:]))

    # --- the result --------------------------------------------------------------------------

    def _spec(self) -> PermutationSpec:
        axes: dict[Block, list[Axis]] = {}
        for key, tensor in self.order:
            for axis, label in enumerate(self.labels[tensor]):
                offset = 0
                for block, repeat in resolve(label or ()):
                    if not block.fixed:
                        axes.setdefault(block, []).append(Axis(key, axis, offset, repeat))
                    offset += block.size * repeat
        names: dict[Block, str] = {}
        for block, places in axes.items():
            first = places[0]
            name = _owner(first.tensor) + (f"[{first.offset}]" if first.offset else "")
            while name in names.values():
                name += "'"
            names[block] = name
        spaces = tuple(Space(names[b], b.size, tuple(p), not b.rigid) for b, p in axes.items())
        layers = []
        for index, draft in enumerate(self.drafts.values()):
            fields = {f.name: getattr(draft, f.name) for f in dataclasses.fields(draft)}
            for side in ("inputs", "outputs"):
                fields[side] = _segments(fields[side], names)
            layers.append(Layer(index=index, **fields))
        return PermutationSpec(spaces, tuple(layers))


def _segments(label: Label, names: dict[Block, str]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for block, repeat in resolve(label):
        segment = Segment(names.get(block), block.size, repeat)
        if segments and segment.space is None and segments[-1].space is None:
            size = segments[-1].size * segments[-1].repeat + segment.size * segment.repeat
            segments[-1] = Segment(None, size)
        else:
            segments.append(segment)
    return tuple(segments)


def _cut_into(label: Label, groups: int) -> Label:
    """Channels that move only inside their group; groups of one channel move freely."""
    length = sum(block.size * repeat for block, repeat in resolve(label))
    if groups == length:
        return label
    step = length // groups
    for place in range(groups):
        take(label, place * step, (place + 1) * step)
    return resolve(label)


def _apply(operation: Operation | None, args: Any, kwargs: Any, result: Any) -> Any:
    """Label a result; an operation on nothing that moves needs no rule."""
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    values = list(values_in((args, kwargs)))
    if any(value.labelled for value in values):
        if operation is None:
            raise ValueError("no rule for this operation")
        return operation(args, kwargs, result)
    if operation is None or not values:
        return plain(result)
    try:
        return operation(args, kwargs, result)  # keeps track of what the value is an output of
    except (ValueError, AttributeError, TypeError, IndexError, KeyError):
        return plain(result)


def _settle(value: Any) -> Any:
    """Forget labels of axes on which nothing moves any more."""
    if isinstance(value, tuple):
        return (
            tuple(_settle(item) for item in value)
            if any(True for _ in values_in(value))
            else value
        )
    if not isinstance(value, Value):
        return value
    moving = tuple(label if moves(label) else None for label in value.labels)
    return dataclasses.replace(value, labels=moving)


def _raw(tree: Any) -> Any:
    """Arguments with the tensors themselves."""
    if isinstance(tree, Value):
        return tree.tensor
    if not any(True for _ in values_in(tree)):
        return tree
    if isinstance(tree, tuple | list):
        return type(tree)(_raw(item) for item in tree)
    if isinstance(tree, dict):
        return {key: _raw(item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(_raw(tree.start), _raw(tree.stop), _raw(tree.step))
    return tree


def _first(args: Any, kwargs: Any) -> Value:
    value = argument(args, kwargs, 0, "input", None)
    assert isinstance(value, Value)
    return value


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


def _owner(key: str) -> str:
    """The module path of a state-dict key."""
    return key.rpartition(".")[0] or key


def _path(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack)[-1]) if stack else ""
