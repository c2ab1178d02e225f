"""Convolutions of S models with few channels each, on processors with AVX-512.

A convolution is a set of triples: a pixel of the result, a pixel it reads, and the tap of the
kernel between them. Its result, the gradient of what it reads and that of its weights are three
sums of products over the same set, so that neither padding nor strides cost an operation. Images
share a triple: eight of them are summed at once, in registers (of the weights' gradient, input
channels), with the channels of a model's result as lanes of a vector. torch's kernels keep the
machine busier where channels fill vectors of sixteen and maps are large: `pays` says where these
here do.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from weightnet.zoo.fused import Array, is_channels_last, kernel, maps_like, pixels
from weightnet.zoo.vectors import LANES, Vectors

IMAGES = 8  # summed at once
PIXELS = 64  # of images whose products are added in registers, for the gradient of weights
_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"  # elsewhere registers are too few


class Triples(NamedTuple):
    """Which pixels of the result read which pixels through which taps: those of a pixel of the
    result, of a pixel that is read, or of a tap, lie between two ``starts``."""

    height: int  # of the result
    width: int
    taps: Tensor  # that read any pixel, row by row; below, these are counted
    of_result: tuple[Array, Array]  # starts; pixel read, tap
    of_read: tuple[Array, Array]  # starts; pixel of the result, tap
    of_tap: tuple[Array, Array]  # starts; pixel read, pixel of the result


@cache
def triples(
    size: tuple[int, ...], taps: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> Triples:
    """The triples of a convolution of maps of a size; each argument is of rows and columns."""
    height, width = (
        (n + 2 * pad - k) // step + 1
        for n, k, step, pad in zip(size, taps, stride, padding, strict=True)
    )
    row, column, y, x = np.indices((height, width, *taps)).reshape(4, -1)
    down, right = row * stride[0] + y - padding[0], column * stride[1] + x - padding[1]
    inside = (down >= 0) & (down < size[0]) & (right >= 0) & (right < size[1])
    used, tap = np.unique((y * taps[1] + x)[inside], return_inverse=True)
    found = np.stack([(row * width + column)[inside], (down * size[1] + right)[inside], tap])

    def by(kind: int, count: int, *others: int) -> tuple[Array, Array]:
        ordered = found[:, np.argsort(found[kind], kind="stable")]
        starts = np.searchsorted(ordered[kind], np.arange(count + 1))
        return starts, np.ascontiguousarray(ordered[list(others)].T)

    of_result, of_read = by(0, height * width, 1, 2), by(1, size[0] * size[1], 0, 2)
    of_tap = by(2, len(used), 1, 0)
    return Triples(height, width, torch.from_numpy(used), of_result, of_read, of_tap)


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _sum_pixel(
    typing: Any,
    width: Any,
    count: Any,
    pairs: Any,
    number: Any,
    image: Any,
    stride: Any,
    step: Any,
    depth: Any,
    weights: Any,
    tap: Any,
    row: Any,
    biases: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """Write a pixel of IMAGES maps: biases, and what ``number`` pairs (pixel, tap) add.

    Up to ``width`` vectors of ``count`` channels are written. All but width, count, number and
    depth are addresses or bytes: of the first image that is read, from image to image and pixel to
    pixel, weights, from tap to tap and channel to channel of ``depth``.
    """
    vectors = range(width.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, count, pairs, number, image, stride, step, depth, *rest = arguments
        weights, tap, row, biases, out, out_stride = rest
        lanes = [Vectors(builder, builder.sub(count, count.type(LANES * v))) for v in vectors]
        first = [lanes[v].load(biases, 4 * LANES * v) for v in vectors]
        cells = [
            [cgutils.alloca_once_value(builder, first[v]) for v in vectors] for _ in range(IMAGES)
        ]
        with cgutils.for_range(builder, number) as loop:
            pair = builder.add(pairs, builder.mul(loop.index, pairs.type(16)))
            seen = builder.add(image, builder.mul(lanes[0].integer(pair, 0), step))
            images = [
                builder.add(seen, builder.mul(stride, stride.type(b))) for b in range(IMAGES)
            ]
            first_row = builder.add(weights, builder.mul(lanes[0].integer(pair, 8), tap))
            with cgutils.for_range(builder, depth) as channel:
                at = builder.add(first_row, builder.mul(channel.index, row))
                loaded = [lanes[v].load(at, 4 * LANES * v) for v in vectors]
                moved = builder.mul(channel.index, stride.type(4))
                for b in range(IMAGES):
                    value = lanes[0].spread(builder.add(images[b], moved), 0)
                    for v in vectors:
                        cell = cells[b][v]
                        total = lanes[v].fma(value, loaded[v], builder.load(cell))
                        builder.store(total, cell)
        for b in range(IMAGES):
            at = builder.add(out, builder.mul(out_stride, stride.type(b)))
            for v in vectors:
                lanes[v].store(builder.load(cells[b][v]), at, 4 * LANES * v)
        return context.get_dummy_value()

    kinds = (count, pairs, number, image, stride, step, depth, weights, tap, row, biases, out)
    return types.void(width, *kinds, out_stride), generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def _sum_tap(
    typing: Any,
    rows: Any,
    count: Any,
    pairs: Any,
    number: Any,
    images: Any,
    image: Any,
    stride: Any,
    step: Any,
    gradient: Any,
    gradient_stride: Any,
    gradient_step: Any,
    sums: Any,
    row: Any,
) -> Any:
    """Add what ``number`` pairs (pixel read, pixel of the result) of ``images`` give to the
    gradient of a tap, of ``rows`` input channels and up to LANES others, ``count``.

    The rest are addresses, or bytes: from image to image, pixel to pixel and row to row.
    """
    channels = range(rows.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, count, pairs, number, images, image, stride, step, *rest = arguments
        gradient, gradient_stride, gradient_step, sums, row = rest
        vectors = Vectors(builder, count)
        places = [builder.add(sums, builder.mul(row, row.type(c))) for c in channels]
        cells = [cgutils.alloca_once_value(builder, vectors.load(place)) for place in places]
        with cgutils.for_range(builder, images) as outer:
            from_image = builder.add(image, builder.mul(outer.index, stride))
            slopes = builder.add(gradient, builder.mul(outer.index, gradient_stride))
            with cgutils.for_range(builder, number) as loop:
                pair = builder.add(pairs, builder.mul(loop.index, pairs.type(16)))
                seen = builder.add(from_image, builder.mul(vectors.integer(pair, 0), step))
                moved = builder.mul(vectors.integer(pair, 8), gradient_step)
                slope = vectors.load(builder.add(slopes, moved))
                for c in channels:
                    value = vectors.spread(seen, 4 * c)
                    builder.store(vectors.fma(value, slope, builder.load(cells[c])), cells[c])
        for place, cell in zip(places, cells, strict=True):
            vectors.store(builder.load(cell), place)
        return context.get_dummy_value()

    kinds = (count, pairs, number, images, image, stride, step)
    return types.void(rows, *kinds, gradient, gradient_stride, gradient_step, sums, row), generate


@cache
def _sum_pixels(width: int) -> Any:
    """The loops around `_sum_pixel`. Maps are [B, pixels, S * channels], weights [S, taps, depth,
    channels], biases [S, channels]."""

    @kernel  # type: ignore[untyped-decorator]
    def loops(
        maps: Array, weights: Array, biases: Array, starts: Array, pairs: Array, out: Array
    ) -> None:
        models, _, depth, channels = weights.shape
        for begin in range(0, len(maps), IMAGES):
            first = min(begin, len(maps) - IMAGES)  # the last ones may be computed twice
            for s in range(models):
                image = maps[first, 0, s * depth :].ctypes.data
                for c in range(0, channels, LANES * width):
                    at_weights = weights[s, 0, 0, c:].ctypes.data
                    at_biases = biases[s, c:].ctypes.data
                    for pixel in range(out.shape[1]):
                        _sum_pixel(
                            width,
                            channels - c,
                            pairs[starts[pixel] :].ctypes.data,
                            starts[pixel + 1] - starts[pixel],
                            image,
                            maps.strides[0],
                            maps.strides[1],
                            depth,
                            at_weights,
                            weights.strides[1],
                            weights.strides[2],
                            at_biases,
                            out[first, pixel, s * channels + c :].ctypes.data,
                            out.strides[0],
                        )

    return loops


@cache
def _sum_taps(rows: int) -> Any:
    """The loops around `_sum_tap`, as `_sum_pixels` has them, for the input channels from
    ``begin`` to ``end``; ``sums`` [S, taps, depth, channels] is added to."""

    @kernel  # type: ignore[untyped-decorator]
    def loops(
        maps: Array,
        gradients: Array,
        starts: Array,
        pairs: Array,
        sums: Array,
        begin: int,
        end: int,
    ) -> None:
        models, taps, depth, channels = sums.shape
        together = max(1, PIXELS // maps.shape[1])
        for b in range(0, len(maps), together):
            for s in range(models):
                image = maps[b, 0, s * depth :].ctypes.data
                for c in range(0, channels, LANES):
                    gradient = gradients[b, 0, s * channels + c :].ctypes.data
                    for tap in range(taps):
                        for row in range(begin, end, rows):
                            _sum_tap(
                                rows,
                                channels - c,
                                pairs[starts[tap] :].ctypes.data,
                                starts[tap + 1] - starts[tap],
                                min(together, len(maps) - b),
                                image + 4 * row,
                                maps.strides[0],
                                maps.strides[1],
                                gradient,
                                gradients.strides[0],
                                gradients.strides[1],
                                sums[s, tap, row, c:].ctypes.data,
                                sums.strides[2],
                            )

    return loops


def _flat(x: Tensor) -> Array:
    """[B, pixels, channels], the same memory."""
    return pixels(x).reshape(len(x), -1, x.shape[1])


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, pairs: tuple[Array, Array], out: Tensor
) -> None:
    """Write to ``out`` what its pixels sum over x, of weights [S, taps, depth, channels]."""
    models, channels = len(weight), weight.shape[3]
    biases = torch.zeros(models, channels) if bias is None else bias.detach().view(models, -1)
    loops = _sum_pixels(1 if channels <= LANES else 2)
    loops(_flat(x), weight.contiguous().numpy(), biases.numpy(), *pairs, _flat(out))


def _correlate(x: Tensor, gradient: Tensor, pairs: tuple[Array, Array], sums: Tensor) -> None:
    """Add the gradients of weights to ``sums`` [S, taps, depth, channels]."""
    depth = sums.shape[2]
    blocks = -(-depth // LANES)
    rows = -(-depth // blocks)
    whole = depth - blocks * (rows - 1)  # of blocks; the others have one row less
    arrays = (_flat(x), _flat(gradient), *pairs, sums.numpy())
    _sum_taps(rows)(*arrays, 0, whole * rows)
    if whole < blocks:
        _sum_taps(rows - 1)(*arrays, whole * rows, depth)


class Pays(NamedTuple):
    """Where the kernels here are faster than torch's."""

    result: bool
    data: bool  # the gradient of what is read
    weights: bool  # their gradient


def pays(
    size: tuple[int, ...], weight: tuple[int, ...], stride: tuple[int, ...], models: int
) -> Pays:
    """What was measured (docs/PERFORMANCE.md) for maps of a size and a weight [S * outputs,
    inputs, K, K']: over few pixels, where a pixel reads few others, and where channels would leave
    torch's vectors empty."""

    def fill(channels: int) -> bool:
        return channels <= LANES // 2 or channels % LANES == 0

    area, outputs, inputs = math.prod(size), weight[0] // models, weight[1]
    few = max(stride) > 1 or tuple(weight[2:]) == (1, 1)
    small = area <= 16 or (area <= 64 and few)
    data = small or few or not fill(inputs)
    return Pays(small or not fill(outputs), data, small and inputs > 3)


def can_read(x: Tensor) -> bool:
    """Whether `Convolution` takes x [B, channels, height, width]."""
    enough = x.dtype == torch.float32 and len(x) >= IMAGES
    return enough and _WIDE and is_channels_last(x)


class Convolution(torch.autograd.Function):
    """torch.conv2d with S groups, of x as `can_read` wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        """x [B, S * inputs, height, width], weight [S * outputs, inputs, K, K'], bias [S *
        outputs]; stride, padding, S -> [B, S * outputs, height', width']."""
        ctx.save_for_backward(x, weight)
        ctx.arguments = rest
        stride, padding, models = rest
        if not pays(x.shape[2:], weight.shape, stride, models).result:
            return torch.conv2d(x, weight, bias, stride, padding, 1, models)
        found = triples(x.shape[2:], weight.shape[2:], stride, padding)
        out = maps_like(x, len(weight), found.height, found.width)
        weights = _used(_split(weight, models), found.taps)
        _convolve(x, weights.permute(0, 3, 2, 1), bias, found.of_result, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of x, weight and bias, where they are wanted."""
        x, weight = ctx.saved_tensors
        stride, padding, models = ctx.arguments
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        wants_data, wants_weights, wants_bias = ctx.needs_input_grad[:3]
        where = pays(x.shape[2:], weight.shape, stride, models)
        to_x = to_weight = to_bias = None
        theirs = [
            wants_data and not where.data,
            wants_weights and not where.weights,
            wants_bias and not where.weights,
        ]
        if any(theirs):
            to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
                *(gradient, x, weight, [len(weight)], stride, padding, [1, 1], False, [0, 0]),
                *(models, theirs),
            )
        split = _split(weight, models)
        found = triples(x.shape[2:], weight.shape[2:], stride, padding)
        if wants_data and where.data:
            to_x = torch.empty_like(x)
            weights = _used(split, found.taps)
            _convolve(gradient, weights.permute(0, 3, 1, 2), None, found.of_read, to_x)
        if wants_weights and where.weights:
            sums = torch.zeros(models, len(found.taps), *split.shape[2:0:-1])
            _correlate(x, gradient, found.of_tap, sums)
            to_weight = sums.permute(0, 3, 2, 1)
            if len(found.taps) < split.shape[3]:
                to_weight = torch.zeros_like(split).index_copy_(3, found.taps, to_weight)
            to_weight = to_weight.reshape(weight.shape)
        if wants_bias and where.weights:
            to_bias = gradient.sum((0, 2, 3))
        return to_x, to_weight, to_bias, None, None, None


def _split(weight: Tensor, models: int) -> Tensor:
    """[S * outputs, inputs, K, K'] -> [S, outputs, inputs, taps]."""
    return weight.detach().view(models, -1, weight.shape[1], math.prod(weight.shape[2:]))


def _used(split: Tensor, taps: Tensor) -> Tensor:
    """The weights [S, outputs, inputs, taps] of some taps."""
    return split if len(taps) == split.shape[3] else split[..., taps]
