"""A network's first layer on the CPU: convolution of a grey image, ReLU and max-pooling at once.

Its feature maps are the largest of a small CNN. Here they are never written: pooled values come
straight from the image, and the gradients of the weights from the pooled gradient, of which each
window has one pixel. Compilers do not find vectors of channels in such loops, so that the
innermost ones are written in LLVM's vectors. Sums run in the order of torch's own kernels for
AVX-512, so that every value is theirs there, bit for bit; elsewhere last digits may differ.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from weightnet.zoo.fused import NOWHERE, Array, kernel, maps_like, pixels
from weightnet.zoo.vectors import CODES, LANES, ZEROS, Vectors


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _pool_window(
    typing: Any,
    size: Any,
    count: Any,
    floor: Any,
    image: Any,
    stride: Any,
    weights: Any,
    biases: Any,
    values: Any,
    codes: Any,
) -> Any:
    """Convolve the four pixels of a window with up to LANES kernels of size x size, and pool them.

    All but size, count and floor are addresses, or bytes from row to row: of the image at the
    window, kernels [size * size, LANES], biases, and what is written, values and codes.
    """
    reach = size.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, count, floor, image, stride, weights, biases, values, codes = arguments
        vectors = Vectors(builder, count)
        rows = [builder.add(image, builder.mul(stride, stride.type(y))) for y in range(reach + 1)]
        seen = [[vectors.spread(row, 4 * x) for x in range(reach + 1)] for row in rows]
        sums = [ZEROS] * 4
        for tap in range(reach * reach):
            weight = vectors.load(weights, 4 * LANES * tap)
            y, x = divmod(tap, reach)
            for at in range(4):
                sums[at] = vectors.fma(seen[y + at // 2][x + at % 2], weight, sums[at])
        bias = vectors.load(biases)
        largest, *others = [builder.fadd(total, bias) for total in sums]
        where = ir.Constant(CODES, [0] * LANES)
        for code, value in enumerate(others, 1):
            is_nan = builder.fcmp_unordered("uno", value, value)
            larger = builder.or_(builder.fcmp_ordered(">", value, largest), is_nan)
            largest = builder.select(larger, value, largest)
            where = builder.select(larger, ir.Constant(CODES, [code] * LANES), where)
        least = vectors.fill(floor)
        nowhere = ir.Constant(CODES, [NOWHERE] * LANES)
        below = builder.fcmp_ordered("<", largest, least)
        flat = builder.fcmp_ordered("<=", largest, least)
        vectors.store(builder.select(below, least, largest), values)
        vectors.store(builder.select(flat, nowhere, where), codes)
        return context.get_dummy_value()

    kinds = (count, floor, image, stride, weights, biases, values, codes)
    return types.void(size, *kinds), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _correlate_row(
    typing: Any,
    size: Any,
    count: Any,
    first: Any,
    image: Any,
    stride: Any,
    gradients: Any,
    codes: Any,
    step: Any,
    width: Any,
    sums: Any,
) -> Any:
    """Add what a row of pixels gives to the gradients of up to LANES kernels and biases.

    ``first`` is the code of the row's first pixel in each window. ``width`` windows have gradients
    and codes, ``step`` floats and bytes apart. Sums [size * size + 1, LANES] are of kernels and
    bias; of kernels a row is summed by itself before it is added. The rest is as `_pool_window`
    has it.
    """
    reach = size.literal_value
    taps = reach * reach

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, count, first, image, stride, gradients, codes, step, width, sums = arguments
        vectors = Vectors(builder, count)
        before = [vectors.load(sums, 4 * LANES * tap) for tap in range(taps + 1)]
        cells = [cgutils.alloca_once_value(builder, ZEROS) for _ in range(taps)]
        cells.append(cgutils.alloca_once_value(builder, before[taps]))
        code = builder.trunc(first, ir.IntType(8))
        wanted = [vectors.fill(builder.add(code, code.type(x))) for x in range(2)]
        with cgutils.for_range(builder, width) as loop:
            moved = builder.mul(loop.index, step)
            gradient = vectors.load(builder.add(gradients, builder.mul(moved, step.type(4))))
            where = vectors.load(builder.add(codes, moved), kind=CODES)
            window = builder.add(image, builder.mul(loop.index, image.type(8)))
            parts = [
                builder.select(builder.icmp_signed("==", where, one), gradient, ZEROS)
                for one in wanted
            ]
            for y in range(reach):
                row = builder.add(window, builder.mul(stride, stride.type(y)))
                seen = [vectors.spread(row, 4 * x) for x in range(reach + 1)]
                for x in range(reach):
                    cell = cells[reach * y + x]
                    total = vectors.fma(seen[x], parts[0], builder.load(cell))
                    builder.store(vectors.fma(seen[x + 1], parts[1], total), cell)
            total = builder.fadd(builder.load(cells[taps]), parts[0])
            builder.store(builder.fadd(total, parts[1]), cells[taps])
        for tap in range(taps + 1):
            total = builder.load(cells[tap])
            if tap < taps:
                total = builder.fadd(before[tap], total)
            vectors.store(total, sums, 4 * LANES * tap)
        return context.get_dummy_value()

    kinds = (count, first, image, stride, gradients, codes, step, width, sums)
    return types.void(size, *kinds), generate


@kernel
def _frame(images: Array, edge: int) -> Array:
    """Images [B, height, width, S] one by one, each in a frame of zeros: [B, S, edge + height +
    edge, edge + width + edge]."""
    batch, height, width, models = images.shape
    out = np.zeros((batch, models, height + 2 * edge, width + 2 * edge), np.float32)
    for b in range(batch):
        for s in range(models):
            for i in range(height):
                for j in range(width):
                    out[b, s, edge + i, edge + j] = images[b, i, j, s]
    return out


@cache
def _kernels(size: int) -> tuple[Any, Any]:
    """The loops over images, models and windows, for kernels of size x size.

    Images are as `_frame` leaves them, maps [B, height // 2, width // 2, S * channels], kernels
    [S, channels, size * size] and biases [S, channels].
    """

    @kernel
    def pool(
        images: Array, weights: Array, biases: Array, floor: Any, values: Array, codes: Array
    ) -> None:
        models, channels, taps = weights.shape
        blocks = -(-channels // LANES)
        packed = np.zeros((models, blocks, taps + 1, LANES), np.float32)
        for s in range(models):
            for c in range(channels):
                packed[s, c // LANES, :taps, c % LANES] = weights[s, c]
                packed[s, c // LANES, taps, c % LANES] = biases[s, c]
        stride = images.strides[2]
        for b in range(len(images)):
            for s in range(models):
                image = images[b, s].ctypes.data
                for block in range(blocks):
                    first = s * channels + block * LANES
                    count = channels - block * LANES
                    at_weights = packed[s, block].ctypes.data
                    at_bias = packed[s, block, taps].ctypes.data
                    for i in range(values.shape[1]):
                        for j in range(values.shape[2]):
                            _pool_window(
                                size,
                                count,
                                floor,
                                image + 2 * i * stride + 8 * j,
                                stride,
                                at_weights,
                                at_bias,
                                values[b, i, j, first:].ctypes.data,
                                codes[b, i, j, first:].ctypes.data,
                            )

    @kernel
    def correlate(
        images: Array, gradients: Array, codes: Array, weights: Array, biases: Array
    ) -> None:
        models, channels, taps = weights.shape
        blocks = -(-channels // LANES)
        sums = np.zeros((models, blocks, taps + 1, LANES), np.float32)
        stride = images.strides[2]
        for b in range(len(images)):
            for s in range(models):
                image = images[b, s].ctypes.data
                for block in range(blocks):
                    first = s * channels + block * LANES
                    for i in range(gradients.shape[1]):
                        for y in range(2):
                            _correlate_row(
                                size,
                                channels - block * LANES,
                                2 * y,
                                image + (2 * i + y) * stride,
                                stride,
                                gradients[b, i, 0, first:].ctypes.data,
                                codes[b, i, 0, first:].ctypes.data,
                                models * channels,
                                gradients.shape[2],
                                sums[s, block].ctypes.data,
                            )
        for s in range(models):
            for c in range(channels):
                weights[s, c] = sums[s, c // LANES, :taps, c % LANES]
                biases[s, c] = sums[s, c // LANES, taps, c % LANES]

    return pool, correlate


class FirstLayer(torch.autograd.Function):
    """Max-pooling, as `fused.MaxPool`, of a convolution of S models' grey images: stride 1,
    padding so that maps are as large as images. Images have no gradient."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, floor: float) -> Tensor:
        """images [B, S, height, width], as `is_channels_last` wants them, weight [S * channels, 1,
        K, K] and bias [S * channels], all of float32 -> [B, S * channels, height // 2, width //
        2]."""
        ctx.images, models = _frame(pixels(images), weight.shape[2] // 2), images.shape[1]
        out = maps_like(images, len(weight), images.shape[2] // 2, images.shape[3] // 2)
        ctx.codes = np.empty(pixels(out).shape, np.uint8)
        ctx.weight = weight.shape
        pool, _ = _kernels(weight.shape[2])
        kernels = weight.detach().view(models, -1, weight.shape[2] * weight.shape[3]).numpy()
        biases = bias.detach().view(models, -1).numpy()
        pool(ctx.images, kernels, biases, np.float32(floor), pixels(out), ctx.codes)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of weight and bias."""
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        models = ctx.images.shape[1]
        weight, bias = gradient.new_empty(ctx.weight), gradient.new_empty(ctx.weight[0])
        _, correlate = _kernels(ctx.weight[2])
        kernels = weight.view(models, -1, math.prod(ctx.weight[2:])).numpy()
        biases = bias.view(models, -1).numpy()
        correlate(ctx.images, pixels(gradient), ctx.codes, kernels, biases)
        return None, weight, bias, None
