"""Run S models of one shape as a single module of grouped kernels.

`StackedModule` rewrites a module's torch.fx graph so that every convolution becomes one grouped
convolution over S x channels, every linear layer one batched product, every BatchNorm one over S
x channels. The S models share no value: what one computes, and whether it overflows, cannot reach
another. It is checked against the plain modules, one at a time, in tests/zoo/test_stacked.py.

Layouts: images and feature maps are [B, S * channels, height, width] (channels last in memory,
which is what the CPU's grouped kernels want); after a flatten, [S, B, features]. Every state
tensor of the stack is [S * d0, ...] where the plain one is [d0, ...], so that a view as [S, d0,
...] separates the models. ``by_model``, for GPUs, images and maps are [S * B, channels, height,
width] instead: `weightnet.zoo.batched`.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from weightnet.zoo import fused, grouped
from weightnet.zoo.batched import BatchedConv2d, BatchedFlatten, BatchedMaxPool2d, BatchedNorm2d
from weightnet.zoo.dropout import Dropout, Uniform
from weightnet.zoo.first_layer import FirstLayer

State = dict[str, Tensor]

_POINTWISE = (
    nn.ReLU,
    nn.ReLU6,
    nn.Tanh,
    nn.GELU,
    nn.SiLU,
    nn.Identity,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
)
_POINTWISE_FUNCTIONS = (
    F.relu,
    torch.relu,
    F.adaptive_avg_pool2d,
    F.silu,
    F.gelu,
    operator.add,
    torch.add,
)


class StackedConv2d(nn.Module):
    """S convolutions as one grouped convolution: [B, S * inputs, h, w] -> [B, S * outputs, h',
    w'].

    ``pool`` follows, where there is one: with a first layer it is one kernel.
    """

    def __init__(self, conv: nn.Conv2d, stack: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.repeat(stack, 1, 1, 1))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.repeat(stack))
        self.arguments = (conv.stride, conv.padding, conv.dilation)
        self.groups = conv.groups * stack
        self.same = int(conv.padding[0])
        keeps_size = (
            (conv.stride, conv.dilation) == ((1, 1), (1, 1))
            and conv.padding == (self.same, self.same)
            and conv.kernel_size == (2 * self.same + 1, 2 * self.same + 1)
        )
        self.dense = conv.groups == 1 and conv.dilation == (1, 1)
        self.depthwise = keeps_size and conv.in_channels == conv.out_channels == conv.groups
        self.reads_grey = (
            keeps_size and conv.in_channels == 1 < conv.out_channels and conv.bias is not None
        )
        self.pool: StackedMaxPool2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each model's channels with its own kernels."""
        if fused.is_channels_last(x):
            if self.depthwise and max(x.shape[2:]) <= 2:
                return cast(
                    Tensor,
                    fused.DepthwiseConvolution.apply(x, self.weight, self.bias, self.same),
                )
            readable = x.shape[1] > 1 and x.dtype == torch.float32 and not x.requires_grad
            if self.pool is not None and readable:
                return cast(Tensor, FirstLayer.apply(x, self.weight, self.bias, self.pool.floor))
        if self.dense and grouped.can_read(x):
            stride, padding, _ = self.arguments
            y = grouped.Convolution.apply(x, self.weight, self.bias, stride, padding, self.groups)
        else:
            y = F.conv2d(x, self.weight, self.bias, *self.arguments, self.groups)  # type: ignore[arg-type]
        return y if self.pool is None else self.pool(y)


class StackedLinear(nn.Module):
    """S linear layers as one batched product: [S, B, inputs] -> [S, B, outputs]."""

    def __init__(self, linear: nn.Linear, stack: int) -> None:
        super().__init__()
        self.stack = stack
        self.weight = nn.Parameter(linear.weight.repeat(stack, 1))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.repeat(stack))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply each model's rows by its own matrix."""
        weight = self.weight.view(self.stack, -1, self.weight.shape[1]).transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(self.bias.view(self.stack, 1, -1), x, weight)


class StackedDropout(nn.Module):
    """Dropout with a probability for each model; its masks come from the given generator."""

    def __init__(self, stack: int, by_model: bool) -> None:
        super().__init__()
        self.stack, self.by_model = stack, by_model
        self.kept = torch.ones(stack)  # probabilities
        self.drops = False
        self.numbers: Uniform | torch.Generator | None = None

    def keep(self, probabilities: Tensor) -> None:
        """Keep entries of each model with its probability, [S]."""
        self.kept, self.drops = probabilities, bool((probabilities < 1).any())

    def forward(self, x: Tensor) -> Tensor:
        """Zero each entry that its model does not keep and rescale the rest; identity in eval
        mode."""
        if not self.training or not self.drops:
            return x
        keep = self.kept
        if isinstance(self.numbers, Uniform):
            in_one_pass = fused.is_channels_last(x) and x.dtype == keep.dtype
            if in_one_pass and not self.by_model:
                return cast(Tensor, Dropout.apply(x, self.numbers, keep))
            uniform = self.numbers.rand(x.shape)
            if x.ndim == 4:
                uniform = uniform.contiguous(memory_format=torch.channels_last)
        else:
            uniform = torch.empty_like(x).uniform_(generator=self.numbers)
        if x.ndim == 3 or self.by_model:
            keep = keep.repeat_interleave(len(x) // self.stack).view(-1, *[1] * (x.ndim - 1))
        else:
            keep = keep.repeat_interleave(x.shape[1] // self.stack).view(1, -1, 1, 1)
        return x * (uniform < keep) / keep


class StackedMaxPool2d(nn.Module):
    """Max-pooling, and the ReLU before it if there is one: max-pool(relu(x)), computed as
    relu(max-pool(x)), which passes over fewer values.

    Values and gradients are the same to the bit. So are those of what follows, which depend on
    the layout in memory: torch's own differs where one pixel is left, so that there its ReLU
    stays first.
    """

    def __init__(self, pool: nn.MaxPool2d, rectify: bool = False) -> None:
        super().__init__()
        self.pool, self.rectify = pool, rectify
        self.fused = str(pool) == str(nn.MaxPool2d(2))
        self.floor = 0.0 if rectify else math.nan

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, channels, height', width']."""
        if self.fused and fused.is_channels_last(x):
            return cast(Tensor, fused.MaxPool.apply(x, self.floor))
        pooled: Tensor = self.pool(x)
        if not self.rectify:
            return pooled
        return self.pool(F.relu(x)) if pooled.shape[2:] == (1, 1) else F.relu(pooled)


class StackedAverage(nn.Module):
    """The mean of each map, for maps that a ReLU made.

    Other activations round their gradients differently in another layout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, channels, 1, 1]."""
        if fused.is_channels_last(x) and max(x.shape[2:]) > 1:
            return cast(Tensor, fused.Average.apply(x))
        return F.adaptive_avg_pool2d(x, 1)


class WrittenOver(nn.Module):
    """A ReLU, or an addition, which writes its result over its (first) input.

    Over one pixel it does not: there torch gives a new result another layout in memory, on which
    the kernels that read it depend.
    """

    def __init__(self, layer: nn.ReLU | nn.ReLU6 | None = None) -> None:
        super().__init__()
        self.layer = copy.copy(layer)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """Maps of one shape -> the same."""
        over = max(x.shape[2:]) > 1
        if self.layer is None:
            return x.add_(*others) if over else torch.add(x, *others)
        self.layer.inplace = over
        return cast(Tensor, self.layer(x))


class StackedFlatten(nn.Module):
    """[B, S * channels, height, width] -> [S, B, channels * height * width]."""

    def __init__(self, stack: int) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        """Separate the models."""
        return x.reshape(len(x), self.stack, -1).transpose(0, 1)


class StackedConcatenation(nn.Module):
    """Several [B, S * channels, height, width] -> one, joined model by model."""

    def __init__(self, stack: int) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Join each model's channels."""
        parts = [x.permute(0, 2, 3, 1).unflatten(3, (self.stack, -1)) for x in tensors]
        return torch.cat(parts, dim=4).flatten(3).permute(0, 3, 1, 2)


def _restack(module: fx.GraphModule, stack: int, by_model: bool) -> None:
    """Replace, in place, the calls whose meaning depends on the layout: flatten and
    concatenation."""
    for node in module.graph.nodes:
        if node.op == "call_method":
            raise ValueError(
                f"cannot stack the method {node.target}; use the torch function in the module"
            )
        if node.op != "call_function" or node.target in _POINTWISE_FUNCTIONS:
            continue
        if node.target is torch.flatten:
            layer: nn.Module = BatchedFlatten(stack) if by_model else StackedFlatten(stack)
        elif node.target is torch.cat:
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            if dim != 1:
                raise ValueError(
                    f"a stacked concatenation must join channels (dim 1), however: {dim=}"
                )
            if by_model:
                continue
            layer = StackedConcatenation(stack)
        else:
            raise ValueError(
                f"cannot stack the function {node.target}; add it to weightnet.zoo.stacked"
            )
        module.add_submodule(f"{node.name}_stacked", layer)
        node.op, node.target = "call_module", f"{node.name}_stacked"
        node.args, node.kwargs = (node.args[0],), {}


def _skip(module: fx.GraphModule, node: Any) -> None:
    """Let the readers of a node read what it reads."""
    node.replace_all_uses_with(node.args[0])
    module.graph.erase_node(node)


def _skip_identities(module: fx.GraphModule) -> None:
    """Leave out what does nothing, in place."""
    layers = dict(module.named_modules())
    for node in list(module.graph.nodes):
        if isinstance(layers.get(str(node.target)), nn.Identity):
            _skip(module, node)


def _pool_before_relu(module: fx.GraphModule) -> None:
    """Join every ReLU whose only reader is a max-pooling with it, in place."""
    layers = dict(module.named_modules())
    for relu in list(module.graph.nodes):
        if not isinstance(layers.get(str(relu.target)), nn.ReLU) or len(relu.users) != 1:
            continue
        (pool,) = relu.users
        layer = layers.get(str(pool.target))
        if isinstance(layer, StackedMaxPool2d | BatchedMaxPool2d):
            module.add_submodule(f"{relu.name}_pooled", type(layer)(layer.pool, True))
            pool.target = f"{relu.name}_pooled"
            _skip(module, relu)


def _average_rectified(module: fx.GraphModule) -> None:
    """Let means of rectified maps be `StackedAverage`, in place."""
    layers = dict(module.named_modules())
    for node in module.graph.nodes:
        layer = layers.get(str(node.target))
        if not isinstance(layer, nn.AdaptiveAvgPool2d) or layer.output_size not in (1, (1, 1)):
            continue
        source = node.args[0]
        if isinstance(layers.get(str(source.target)), StackedDropout) and len(source.users) == 1:
            source = source.args[0]
        if isinstance(layers.get(str(source.target)), nn.ReLU | nn.ReLU6 | StackedMaxPool2d):
            module.set_submodule(str(node.target), StackedAverage())


def _pool_first_layers(module: fx.GraphModule) -> None:
    """Let convolutions of images pool their maps, in place, where nobody else reads these."""
    layers = dict(module.named_modules())
    for node in list(module.graph.nodes):
        pool = layers.get(str(node.target))
        if not isinstance(pool, StackedMaxPool2d) or not pool.fused:
            continue
        (source,) = node.args
        conv = layers.get(str(source.target))
        if isinstance(conv, StackedConv2d) and conv.reads_grey and len(source.users) == 1:
            conv.pool = pool
            _skip(module, node)


def _write_over(module: fx.GraphModule) -> None:
    """Let additions and ReLUs write over what they read, where nobody else needs it: neither
    another reader, nor the gradient of the layer that made it."""
    layers = dict(module.named_modules())

    def is_free(node: Any) -> bool:
        maker = layers.get(str(node.target))
        made = isinstance(maker, StackedConv2d | nn.BatchNorm2d) or node.target is operator.add
        return len(node.users) == 1 and (made or str(node.target) in additions)

    additions = set()
    for node in module.graph.nodes:
        layer = layers.get(str(node.target))
        if isinstance(layer, nn.ReLU | nn.ReLU6) and is_free(node.args[0]):
            node.target = f"{node.name}_over"
            module.add_submodule(node.target, WrittenOver(layer))
        elif node.target is operator.add and is_free(node.args[0]):
            node.op, node.target = "call_module", f"{node.name}_over"
            module.add_submodule(node.target, WrittenOver())
            additions.add(node.target)


def _stacked_layer(layer: nn.Module, stack: int, by_model: bool, name: str) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return BatchedConv2d(layer, stack) if by_model else StackedConv2d(layer, stack)
    if isinstance(layer, nn.Linear):
        return StackedLinear(layer, stack)
    if isinstance(layer, nn.BatchNorm2d):
        if by_model:
            return BatchedNorm2d(layer, stack)
        return nn.BatchNorm2d(
            layer.num_features * stack, layer.eps, layer.momentum, dtype=layer.weight.dtype
        )
    if isinstance(layer, nn.Dropout):
        return StackedDropout(stack, by_model)
    if isinstance(layer, nn.MaxPool2d):
        return BatchedMaxPool2d(layer) if by_model else StackedMaxPool2d(layer)
    if isinstance(layer, _POINTWISE):
        layer = copy.deepcopy(layer)
        if hasattr(layer, "inplace"):
            layer.inplace = False  # autograd and shared inputs; costs nothing measurable
        return layer
    raise ValueError(
        f"cannot stack {type(layer).__name__} at {name}; add it to weightnet.zoo.stacked"
    )


_COUNTING = (
    *(StackedLinear, StackedDropout, StackedFlatten, StackedConcatenation),
    *(BatchedConv2d, BatchedNorm2d, BatchedFlatten),
)


def graph_text(module: nn.Module) -> str:
    """The traced forward computation and its layers as text: equal for equal architectures."""
    traced = fx.symbolic_trace(module)
    return "\n".join([traced.code, *(f"{n}: {m}" for n, m in traced.named_modules() if n)])


class StackedModule(nn.Module):
    """S models of ``module``'s shape. `load` fills it from plain state dicts, `states` reads them
    back."""

    def __init__(self, module: nn.Module, stack: int, by_model: bool = False) -> None:
        super().__init__()
        traced = fx.symbolic_trace(copy.deepcopy(module))
        for name, layer in list(traced.named_modules()):
            if name and not list(layer.children()) and not isinstance(layer, nn.Sequential):
                traced.set_submodule(name, _stacked_layer(layer, stack, by_model, name))
        _restack(traced, stack, by_model)
        _skip_identities(traced)
        _pool_before_relu(traced)
        _average_rectified(traced)
        _pool_first_layers(traced)
        _write_over(traced)
        traced.delete_all_unused_submodules()
        traced.recompile()
        self.stack, self.by_model = stack, by_model
        self.module = traced

    def forward(self, images: Tensor) -> Tensor:
        """images [S, B, channels, height, width] -> logits [S, B, C]."""
        x = images.flatten(0, 1) if self.by_model else images.transpose(0, 1).flatten(1, 2)
        return self.module(x.contiguous(memory_format=torch.channels_last))

    def set_dropout(self, probabilities: Tensor, generator: torch.Generator) -> None:
        """Give each model its dropout probability [S]; masks come from the generator."""
        on_cpu = generator.device.type == "cpu"
        numbers = Uniform(generator) if on_cpu else generator
        for layer in self.modules():
            if isinstance(layer, StackedDropout):
                layer.numbers = numbers
                layer.keep(1 - probabilities)

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Become the models of ``rows``, in this order. Parameters become other tensors."""
        count = len(rows)
        for layer in self.modules():
            for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
                if tensor is not None and tensor.is_floating_point():
                    kept = tensor.view(self.stack, -1, *tensor.shape[1:])[rows].flatten(0, 1)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    setattr(layer, name, nn.Parameter(kept) if is_parameter else kept)
            if isinstance(layer, StackedConv2d):
                layer.groups = layer.groups // self.stack * count
            elif isinstance(layer, nn.BatchNorm2d):
                layer.num_features = layer.num_features // self.stack * count
            elif isinstance(layer, StackedDropout):
                layer.keep(layer.kept[rows])
            if isinstance(layer, _COUNTING):
                layer.stack = count
        self.stack = count

    def stacked_state(self) -> State:
        """Views of every float state tensor as [S, d0, ...], by the plain module's names."""
        return {
            name: tensor.detach().view(self.stack, -1, *tensor.shape[1:])
            for name, tensor in self.module.state_dict(keep_vars=True).items()
            if tensor.is_floating_point()
        }

    @torch.no_grad()
    def load(self, states: Sequence[State]) -> None:
        """Copy S plain state dicts into the stack."""
        for name, view in self.stacked_state().items():
            view.copy_(torch.stack([state[name] for state in states]))

    def snapshot(self) -> State:
        """A copy of `stacked_state`."""
        return {name: tensor.clone() for name, tensor in self.stacked_state().items()}

    def states(self) -> list[State]:
        """Copies of the S plain state dicts (floating-point tensors)."""
        stacked = self.stacked_state()
        return [model_state(stacked, row) for row in range(self.stack)]


def stack_on(device: torch.device | str, module: nn.Module, stack: int) -> StackedModule:
    """A stack on a device, in the layout that it computes fastest."""
    device = torch.device(device)
    return StackedModule(module, stack, by_model=device.type != "cpu").to(device)


def are_finite(stacked: State) -> Tensor:
    """Whether each model's state is finite, [S], of tensors [S, d0, ...]."""
    return torch.stack([torch.isfinite(t.flatten(1)).all(1) for t in stacked.values()]).all(0)


def model_state(stacked: State, row: int) -> State:
    """A copy of one model's plain state dict, of tensors [S, d0, ...]."""
    return {name: tensor[row].clone() for name, tensor in stacked.items()}
