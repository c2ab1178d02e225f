"""Layers of S models of one shape as a GPU runs them: one batch, of which each model has its part.

Maps are [S * B, channels, height, width], model after model, channels last in memory, so that a
convolution is a product of matrices for each model: patches [B * height' * width', K * K *
inputs] times weights [K * K * inputs, outputs]. Grouped convolutions, which the CPU runs well,
leave most of a GPU idle at these sizes. Every operation has a fixed order of summation: the same
stack gives the same bytes on one kind of GPU; other ones without Triton. Parameters are those of
`weightnet.zoo.stacked`, [S * d0, ...].
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOWHERE = 255  # no pixel of a window gets a gradient


class Convolution(torch.autograd.Function):
    """torch.conv2d of S models, dense and square, as products of patches."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stack: int,
        stride: int,
        padding: int,
    ) -> Tensor:
        """x [S * B, I, h, w], weight [S * O, I, K, K], bias [S * O] -> [S * B, O, h', w']."""
        maps = x.permute(0, 2, 3, 1).contiguous()
        matrix = weight.view(stack, -1, *weight.shape[1:]).permute(0, 3, 4, 2, 1)
        kernel = weight.shape[2]
        size = [(pixels + 2 * padding - kernel) // stride + 1 for pixels in x.shape[2:]]
        y = _convolve(maps, matrix, bias, (kernel, stride, 1, padding, *size))
        ctx.save_for_backward(maps, weight)
        ctx.arguments = (stack, stride, padding)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of x is a convolution of the gradient, spread by the stride, with the
        weights turned around."""
        maps, weight = ctx.saved_tensors
        stack, stride, padding = ctx.arguments
        kernel = weight.shape[2]
        slopes = gradient.permute(0, 2, 3, 1).contiguous()
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[1]:
            sums = _weights_gradient(maps, slopes, stack, kernel, stride, padding)
            sums = sums.unflatten(1, (kernel, kernel, -1)).permute(0, 4, 3, 1, 2)
            to_weight = sums.reshape(weight.shape)
        if ctx.needs_input_grad[2]:
            to_bias = slopes.view(stack, -1, slopes.shape[3]).sum(1).flatten()
        if ctx.needs_input_grad[0]:
            turned = weight.view(stack, -1, *weight.shape[1:]).flip(3, 4).permute(0, 3, 4, 1, 2)
            geometry = (kernel, 1, stride, kernel - 1 - padding, *maps.shape[1:3])
            to_x = _convolve(slopes, turned, None, geometry).permute(0, 3, 1, 2)
        return to_x, to_weight, to_bias, None, None, None


def _kernels(x: Tensor) -> Any:
    """The kernels for maps like x, if there are any."""
    if x.device.type != "cuda" or x.dtype != torch.float32 or not _has_triton():
        return None
    return importlib.import_module("weightnet.zoo.triton_kernels")


@cache
def _has_triton() -> bool:
    """Whether there is Triton, which torch for CUDA brings, and the C compiler and Python headers
    that it needs."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    found = any(shutil.which(compiler) for compiler in compilers) and headers.exists()
    return found and importlib.util.find_spec("triton") is not None


def _convolve(
    maps: Tensor, matrix: Tensor, bias: Tensor | None, geometry: tuple[int, ...]
) -> Tensor:
    """maps [S * B, h, w, I], matrix [S, K, K, I, O], bias [S * O] -> [S * B, h', w', O].

    The geometry is (K, up, down, padding, h', w'): pixel i reads the pixels (i * up + tap -
    padding) / down, where that is a pixel.
    """
    matrix = matrix.flatten(1, 3)
    kernels = _kernels(maps)
    if kernels and kernels.can_convolve(maps.shape[3]):
        result: Tensor = kernels.convolve(maps, matrix.contiguous(), bias, geometry)
        return result
    kernel, up, down, padding, high, wide = geometry
    patches = _patches(maps, kernel, up, down, padding, (high, wide))
    rows = patches.view(len(matrix), -1, matrix.shape[1])
    if bias is None:
        y = torch.bmm(rows, matrix)
    else:
        y = torch.baddbmm(bias.view(len(matrix), 1, -1), rows, matrix)
    return y.view(len(maps), high, wide, -1)


def _weights_gradient(
    maps: Tensor, slopes: Tensor, stack: int, kernel: int, stride: int, padding: int
) -> Tensor:
    """maps [S * B, h, w, I], slopes [S * B, h', w', O] -> [S, K * K * I, O]."""
    kernels = _kernels(maps)
    if kernels and kernels.can_sum(maps.shape[3], kernel):
        result: Tensor = kernels.weights_gradient(maps, slopes, stack, kernel, stride, padding)
        return result
    patches = _patches(maps, kernel, stride, 1, padding, tuple(slopes.shape[1:3]))
    columns = slopes.view(stack, -1, slopes.shape[3])
    return torch.bmm(patches.view(stack, columns.shape[1], -1).transpose(1, 2), columns)


def _patches(
    maps: Tensor, kernel: int, up: int, down: int, padding: int, size: tuple[int, ...]
) -> Tensor:
    """[N, height, width, channels] -> [N, h', w', K, K, channels]."""
    count, height, width, channels = maps.shape
    extents = [(pixels - 1) * up + kernel for pixels in size]
    rooms = [
        max(extent, padding + (pixels - 1) * down + 1)
        for extent, pixels in zip(extents, (height, width), strict=True)
    ]
    room = maps.new_zeros(count, *rooms, channels)
    last, end = padding + (height - 1) * down + 1, padding + (width - 1) * down + 1
    room[:, padding:last:down, padding:end:down] = maps
    windows = room[:, : extents[0], : extents[1]].unfold(1, kernel, up).unfold(2, kernel, up)
    return windows.permute(0, 1, 2, 4, 5, 3).contiguous()


class BatchedConv2d(nn.Module):
    """S convolutions: [S * B, inputs, h, w] -> [S * B, outputs, h', w']."""

    def __init__(self, conv: nn.Conv2d, stack: int) -> None:
        super().__init__()
        self.stack = stack
        self.weight = nn.Parameter(conv.weight.repeat(stack, 1, 1, 1))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.repeat(stack))
        self.arguments = (conv.stride, conv.padding, conv.dilation)
        self.groups = conv.groups
        self.dense = (
            conv.groups == 1
            and conv.dilation == (1, 1)
            and all(len(set(pair)) == 1 for pair in (conv.kernel_size, conv.stride, conv.padding))
            and int(conv.padding[0]) < conv.kernel_size[0]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each model's maps with its own kernels."""
        stride, padding, _ = self.arguments
        if self.dense:
            arguments = (self.stack, int(stride[0]), int(padding[0]))
            return cast(Tensor, Convolution.apply(x, self.weight, self.bias, *arguments))
        joined = _join(x, self.stack)
        groups = self.groups * self.stack
        y = F.conv2d(joined, self.weight, self.bias, *self.arguments, groups)  # type: ignore[arg-type]
        return _separate(y, self.stack)


class BatchedNorm2d(nn.BatchNorm2d):
    """S BatchNorms: [S * B, channels, h, w] -> the same."""

    def __init__(self, norm: nn.BatchNorm2d, stack: int) -> None:
        channels, kind = norm.num_features * stack, norm.weight.dtype
        super().__init__(channels, norm.eps, norm.momentum, dtype=kind)
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel of each model over its own images."""
        return _separate(super().forward(_join(x, self.stack)), self.stack)


def _join(x: Tensor, stack: int) -> Tensor:
    """[S * B, channels, h, w] -> [B, S * channels, h, w], channels last."""
    maps = x.permute(0, 2, 3, 1).unflatten(0, (stack, -1)).permute(1, 2, 3, 0, 4)
    return maps.flatten(3).permute(0, 3, 1, 2)


def _separate(x: Tensor, stack: int) -> Tensor:
    """[B, S * channels, h, w] -> [S * B, channels, h, w], channels last."""
    maps = x.permute(0, 2, 3, 1).unflatten(3, (stack, -1)).permute(3, 0, 1, 2, 4)
    return maps.flatten(0, 1).permute(0, 3, 1, 2)


class MaxPool(torch.autograd.Function):
    """torch.max_pool2d over windows that do not overlap; where the maximum does not exceed
    ``floor``, it becomes the floor and has no gradient (0: a ReLU; NaN: none).

    torch sums the gradient in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, floor: float) -> Tensor:
        """[N, channels, h, w] -> [N, channels, h // size, w // size]."""
        maps = x.permute(0, 2, 3, 1).contiguous()
        if kernels := _kernels(x):
            y, chosen = kernels.pool(maps, size, floor)
        else:
            y, chosen = _pool(maps, size, floor)
        ctx.save_for_backward(chosen)
        ctx.arguments = (size, *x.shape[2:])
        return cast(Tensor, y).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient goes to the first largest pixel of its window."""
        (chosen,) = ctx.saved_tensors
        slopes = gradient.permute(0, 2, 3, 1).contiguous()
        kernels = _kernels(gradient)
        unpool = kernels.unpool if kernels else _unpool
        return unpool(slopes, chosen, *ctx.arguments).permute(0, 3, 1, 2), None, None


def _pool(maps: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor]:
    """As the kernel of this name."""
    high, wide = maps.shape[1] // size, maps.shape[2] // size
    windows = maps[:, : high * size, : wide * size].unflatten(2, (wide, size))
    windows = windows.unflatten(1, (high, size)).transpose(2, 3).flatten(3, 4)
    y, chosen = windows.max(3)
    chosen = torch.where(y <= floor, NOWHERE, chosen).to(torch.uint8)
    return torch.where(y < floor, floor, y), chosen


def _unpool(slopes: Tensor, chosen: Tensor, size: int, height: int, width: int) -> Tensor:
    """As the kernel of this name."""
    taps = torch.arange(size * size, device=slopes.device).view(size, 1, size, 1)
    found = slopes[:, :, None, :, None] * (chosen[:, :, None, :, None] == taps)
    found = found.flatten(3, 4).flatten(1, 2)
    rest = (0, 0, 0, width - found.shape[2], 0, height - found.shape[1])
    return F.pad(found, rest)


class BatchedMaxPool2d(nn.Module):
    """Max-pooling of maps, and a ReLU after it where ``rectify`` says so: the ReLU that stood
    before it, over fewer values."""

    def __init__(self, pool: nn.MaxPool2d, rectify: bool = False) -> None:
        super().__init__()
        self.pool, self.rectify = pool, rectify
        self.floor = 0.0 if rectify else math.nan
        self.size = pool.kernel_size if isinstance(pool.kernel_size, int) else 0
        self.plain = 0 < self.size < 16 and str(pool) == str(nn.MaxPool2d(self.size))

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, h, w] -> [N, channels, h', w']."""
        if self.plain:
            return cast(Tensor, MaxPool.apply(x, self.size, self.floor))
        y: Tensor = self.pool(x)
        return F.relu(y) if self.rectify else y


class BatchedFlatten(nn.Module):
    """[S * B, channels, height, width] -> [S, B, channels * height * width]."""

    def __init__(self, stack: int) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        """Separate the models."""
        return x.flatten(1).unflatten(0, (self.stack, -1))
