"""Kernels for the CPU that do in one pass over memory what torch does in several.

Small networks spend more time on moving their feature maps than on convolving them. The kernels
are compiled by Numba when they are first called, and kept in its cache on disk. Each computes the
same operations in the same order as the calls of torch that it stands for, so that its values are
theirs, bit for bit: tests/zoo/test_fused.py compares them, infinities and NaN included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from numba.extending import intrinsic
from torch import Tensor

Array = np.ndarray[Any, Any]
kernel = njit(cache=True, nogil=True, error_model="numpy")

NOWHERE = 4  # no pixel of the window gets a gradient


def is_channels_last(x: Tensor) -> bool:
    """Whether [B, channels, height, width] lies on the CPU with its channels innermost."""
    return (
        x.device.type == "cpu"
        and x.ndim == 4
        and x.is_floating_point()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def pixels(x: Tensor) -> Array:
    """[B, height, width, channels], the same memory."""
    array: Array = x.detach().numpy()
    return array.transpose(0, 2, 3, 1)


def maps_like(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Room for maps of other channels and size, [B, channels, height, width], channels last."""
    size = (len(x), channels, height, width)
    return torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)


@intrinsic
def _fma(typing: Any, one: Any, other: Any, summand: Any) -> Any:
    """one * other + summand, rounded once, as torch.addcmul does."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return one(one, one, one), generate


class MaxPool(torch.autograd.Function):
    """Max-pooling over windows of 2 x 2, of x as `is_channels_last` wants it; where the maximum
    does not exceed ``floor``, it becomes the floor and has no gradient (0: a ReLU; NaN: none)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, floor: float) -> Tensor:
        """[B, channels, height, width] -> [B, channels, height // 2, width // 2]."""
        out = maps_like(x, x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
        ctx.chosen = np.empty(pixels(out).shape, np.uint8)
        ctx.size = x.shape[2:]
        _pool(pixels(x), pixels(x).dtype.type(floor), pixels(out), ctx.chosen)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient goes to the first largest pixel of its window."""
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        out = maps_like(gradient, gradient.shape[1], *ctx.size)
        _unpool(pixels(gradient), ctx.chosen, pixels(out))
        return out, None


@kernel
def _pool(x: Array, floor: Any, out: Array, chosen: Array) -> None:
    batch, height, width, channels = out.shape
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    largest = x[b, 2 * i, 2 * j, c]
                    where = np.uint8(0)
                    value = x[b, 2 * i, 2 * j + 1, c]
                    larger = (value > largest) | (value != value)
                    largest = value if larger else largest
                    where = np.uint8(1) if larger else where
                    value = x[b, 2 * i + 1, 2 * j, c]
                    larger = (value > largest) | (value != value)
                    largest = value if larger else largest
                    where = np.uint8(2) if larger else where
                    value = x[b, 2 * i + 1, 2 * j + 1, c]
                    larger = (value > largest) | (value != value)
                    largest = value if larger else largest
                    where = np.uint8(3) if larger else where
                    out[b, i, j, c] = floor if largest < floor else largest
                    chosen[b, i, j, c] = np.uint8(NOWHERE) if largest <= floor else where


@kernel
def _unpool(gradient: Array, chosen: Array, out: Array) -> None:
    batch, height, width, channels = gradient.shape
    zero = gradient.dtype.type(0)
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                for c in range(channels):
                    value = gradient[b, i, j, c] + zero  # as torch adds it to a zero
                    where = chosen[b, i, j, c]
                    out[b, 2 * i, 2 * j, c] = value if where == 0 else zero
                    out[b, 2 * i, 2 * j + 1, c] = value if where == 1 else zero
                    out[b, 2 * i + 1, 2 * j, c] = value if where == 2 else zero
                    out[b, 2 * i + 1, 2 * j + 1, c] = value if where == 3 else zero
            out[b, 2 * i, 2 * width :] = zero
            out[b, 2 * i + 1, 2 * width :] = zero
        out[b, 2 * height :] = zero


class Average(torch.autograd.Function):
    """The mean over all pixels, whose gradient lies in memory as the maps do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """[B, channels, height, width] -> [B, channels, 1, 1]."""
        ctx.size = x.shape
        return torch.nn.functional.adaptive_avg_pool2d(x, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """An equal part for each pixel."""
        part = gradient / (ctx.size[2] * ctx.size[3])
        return part.expand(ctx.size).contiguous(memory_format=torch.channels_last)


class DepthwiseConvolution(torch.autograd.Function):
    """torch.conv2d with a kernel for each channel, stride 1 and the same padding on all sides, of
    x as `is_channels_last` wants it, which is as large before as after.

    Over one or four pixels, torch's gradient of the weights takes most of a network's time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        """x [B, channels, height, width], weight [channels, 1, K, K] -> as x."""
        ctx.save_for_backward(x, weight)
        ctx.arguments = ([len(weight)] if bias is not None else None, padding)
        return torch.conv2d(x, weight, bias, 1, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """torch's, but for the weights."""
        x, weight = ctx.saved_tensors
        bias, padding = ctx.arguments
        steps = ([1, 1], [padding, padding], [1, 1], False, [0, 0])  # not transposed
        wanted = [ctx.needs_input_grad[0], False, bias is not None]
        to_x, _, to_bias = torch.ops.aten.convolution_backward(
            gradient, x, weight, bias, *steps, len(weight), wanted
        )
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        sums = torch.zeros(weight.shape[2:] + weight.shape[:1], dtype=x.dtype)
        _correlate(pixels(x), pixels(gradient), padding, sums.numpy())
        return to_x, sums.permute(2, 0, 1)[:, None].contiguous(), to_bias, None


@kernel
def _correlate(x: Array, gradient: Array, padding: int, out: Array) -> None:
    batch, height, width, channels = x.shape
    row = np.empty(channels, x.dtype)
    for b in range(batch):
        for i in range(height):
            for k in range(max(0, padding - i), min(out.shape[0], height + padding - i)):
                for m in range(out.shape[1]):
                    row[:] = x.dtype.type(0)
                    for j in range(max(0, padding - m), min(width, width + padding - m)):
                        for c in range(channels):
                            value = x[b, i + k - padding, j + m - padding, c]
                            row[c] = _fma(value, gradient[b, i, j, c], row[c])
                    for c in range(channels):
                        out[k, m, c] += row[c]


def gather(images: Tensor, indices: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write images [N, channels, height, width] number ``indices`` [S, B] to ``out`` [S, B,
    channels, height, width], each shifted by its offsets [S, B, 2], filling with the edge."""
    _gather(images.numpy(), indices.numpy(), offsets.numpy(), out.numpy())


@kernel
def _gather(images: Array, indices: Array, offsets: Array, out: Array) -> None:
    models, batch, channels, height, width = out.shape
    columns = np.empty(width, np.int64)
    for b in range(batch):
        for s in range(models):
            down, right = offsets[s, b]
            for j in range(width):
                columns[j] = min(max(j + right, 0), width - 1)
            for c in range(channels):
                image = images[indices[s, b], c]
                for i in range(height):
                    row = image[min(max(i + down, 0), height - 1)]
                    for j in range(width):
                        out[s, b, c, i, j] = row[columns[j]]


def update(
    weights: Array,
    gradient: Tensor,
    moments: tuple[Array, Array],
    rows: tuple[Array, ...],
    scalars: tuple[float, ...],
) -> None:
    """A step of S optimizers on [S, parameters], in place; see `weightnet.zoo.training`.

    Args:
        weights: Updated.
        gradient: Of the loss; spoilt.
        moments: First and second moment, updated (the second for AdamW alone).
        rows: [S] each: AdamW or SGD, coupled decay, gain, shrinkage of weights, learning rate.
        scalars: Decay of the first moment, of the second, one less the latter, corrections of
            both, epsilon.
    """
    kind = weights.dtype.type
    keep_first, keep_second, take_second, *rest = (kind(value) for value in scalars)
    adam, coupled, gain, shrinkage, rate = rows
    arrays = (weights, gradient.numpy(), *moments)
    correct_first, correct_second, epsilon = rest
    _moments(*arrays, adam, coupled, gain, keep_first, keep_second, take_second, correct_second)
    for row in np.flatnonzero(adam):
        gradient[row].sqrt_()  # torch's, which is not NumPy's to the last digit
    _move(*arrays[:3], adam, shrinkage, rate, correct_first, epsilon)


@kernel
def _moments(
    weights: Array,
    gradient: Array,
    first: Array,
    second: Array,
    adam: Array,
    coupled: Array,
    gain: Array,
    keep_first: Any,
    keep_second: Any,
    take_second: Any,
    correct_second: Any,
) -> None:
    for s in range(len(weights)):
        for i in range(weights.shape[1]):
            slope = _fma(weights[s, i], coupled[s], gradient[s, i])
            first[s, i] = _fma(slope, gain[s], first[s, i] * keep_first)
            if adam[s]:
                square = _fma(take_second * slope, slope, second[s, i] * keep_second)
                second[s, i] = square
                gradient[s, i] = square / correct_second


@kernel
def _move(
    weights: Array,
    root: Array,
    first: Array,
    adam: Array,
    shrinkage: Array,
    rate: Array,
    correct_first: Any,
    epsilon: Any,
) -> None:
    for s in range(len(weights)):
        for i in range(weights.shape[1]):
            step = first[s, i]
            if adam[s]:
                step = step / correct_first / (root[s, i] + epsilon)
            weights[s, i] = _fma(-rate[s], step, weights[s, i] * shrinkage[s])
