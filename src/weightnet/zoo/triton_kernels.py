"""Convolution and pooling on a GPU, for maps of few channels, in Triton (https://triton-lang.org).

The batched products of `weightnet.zoo.batched` write every patch to memory, K * K times the maps;
these kernels gather patches as they multiply. Maps are [N, height, width, channels], contiguous,
float32, N = S * B, model after model. Products run on tensor cores in three parts of each number
("tf32x3"), whose errors are those of float32. Sums have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 128  # of a tile; 64 where it has sums for each of a row of taps
FEW = 3  # input channels, which fill no tile of tensor cores
PROGRAMS = 1024  # that keep a GPU busy
_SIZES = [
    *("pixels", "height", "width", "high", "wide", "up", "stride", "padding", "length", "parts")
]


def convolve(
    maps: Tensor, matrix: Tensor, bias: Tensor | None, geometry: tuple[int, ...]
) -> Tensor:
    """Sums of products of patches and weights.

    Args:
        maps: [S * B, h, w, I].
        matrix: [S, K * K * I, O].
        bias: [S * O].
        geometry: (K, up, down, padding, h', w'): result pixel i reads the pixels (i * up + tap -
            padding) / down, where that is a pixel.
    """
    kernel, up, down, padding, high, wide = geometry
    (stack, _, outputs), (count, height, width, inputs) = matrix.shape, maps.shape
    pixels = count // stack * high * wide
    out = maps.new_empty(count, high, wide, outputs)
    lanes = _tile(outputs, 64)
    grid = (triton.cdiv(pixels, PIXELS), triton.cdiv(outputs, lanes), stack)
    _convolve[grid](
        *(maps, matrix, out, matrix if bias is None else bias),
        *(pixels, height, width, high, wide, inputs, outputs, up, padding),
        *(kernel, down, bias is not None, inputs <= FEW, PIXELS, _tile(inputs, 32), lanes),
    )
    return out


def weights_gradient(
    maps: Tensor, slopes: Tensor, stack: int, kernel: int, stride: int, padding: int
) -> Tensor:
    """maps [S * B, h, w, I], slopes [S * B, h', w', O] -> [S, K * K * I, O]."""
    (_, height, width, inputs), (count, high, wide, outputs) = maps.shape, slopes.shape
    pixels = count // stack * high * wide
    few, lanes = inputs <= FEW, _tile(outputs, 64)
    tile, step = (PIXELS, 1) if few else (PIXELS // 2, _tile(inputs, 32))
    rows, columns = kernel * triton.cdiv(inputs, step), triton.cdiv(outputs, lanes)
    parts = max(1, min(PROGRAMS // (rows * columns * stack), triton.cdiv(pixels, 4 * tile)))
    length = triton.cdiv(triton.cdiv(pixels, parts), tile) * tile
    out = maps.new_empty(parts, stack, kernel * kernel * inputs, outputs)
    _weights_gradient[rows, columns * parts, stack](
        *(maps, slopes, out, pixels, height, width, high, wide, inputs, outputs),
        *(stride, padding, length, parts, kernel, few, tile, step, lanes),
    )
    return out[0] if parts == 1 else out.sum(0)


def can_convolve(inputs: int) -> bool:
    """Whether `convolve` is faster than products of patches."""
    return inputs <= FEW or inputs % 16 == 0


def can_sum(inputs: int, kernel: int) -> bool:
    """Whether `weights_gradient` is, and has sums for a row of taps."""
    return kernel <= 5 if inputs <= FEW else inputs % 16 == 0 and kernel <= 3


def _tile(channels: int, most: int) -> int:
    return max(16, min(most, int(triton.next_power_of_2(channels))))


@triton.jit
def _pixel(row, column, inside, height, width):
    """Where pixels of an image are, and which of them it has."""
    inside = inside & (row >= 0) & (column >= 0) & (row < height) & (column < width)
    return row * width + column, inside


@triton.jit(do_not_specialize=_SIZES)
def _convolve(
    maps,
    matrix,
    out,
    bias,
    pixels,
    height,
    width,
    high,
    wide,
    inputs,
    outputs,
    up,
    padding,
    kernel: tl.constexpr,
    down: tl.constexpr,
    has_bias: tl.constexpr,
    few: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
    block_o: tl.constexpr,
):
    model = tl.program_id(2)
    m = tl.program_id(0) * block_m + tl.arange(0, block_m)
    o = tl.program_id(1) * block_o + tl.arange(0, block_o)
    area = high * wide
    image = model.to(tl.int64) * (pixels // area) + m // area
    row, column = (m % area) // wide * up - padding, m % wide * up - padding
    weights = matrix + model.to(tl.int64) * (kernel * kernel * inputs * outputs) + o
    sums = tl.zeros((block_m, block_o), tl.float32)
    if has_bias:
        sums += tl.load(bias + model * outputs + o, mask=o < outputs, other=0.0)[None, :]
    for tap in range(kernel * kernel):
        r, c, inside = row + tap // kernel, column + tap % kernel, m < pixels
        if down > 1:
            inside = inside & (r % down == 0) & (c % down == 0)
            r, c = r // down, c // down
        place, inside = _pixel(r, c, inside, height, width)
        place = (image * (height * width) + place) * inputs
        if few:
            for channel in range(inputs):
                value = tl.load(maps + place + channel, mask=inside, other=0.0)
                weight = tl.load(
                    weights + (tap * inputs + channel) * outputs, mask=o < outputs, other=0.0
                )
                sums += value[:, None] * weight[None, :]
        else:
            for start in range(0, inputs, block_k):
                channel = start + tl.arange(0, block_k)
                values = tl.load(
                    maps + place[:, None] + channel[None, :],
                    mask=inside[:, None] & (channel < inputs)[None, :],
                    other=0.0,
                )
                factors = tl.load(
                    weights[None, :] + (tap * inputs + channel)[:, None] * outputs,
                    mask=(channel < inputs)[:, None] & (o < outputs)[None, :],
                    other=0.0,
                )
                sums = tl.dot(values, factors, sums, input_precision="tf32x3")
    place = (model.to(tl.int64) * pixels + m)[:, None] * outputs + o[None, :]
    tl.store(out + place, sums, mask=(m < pixels)[:, None] & (o < outputs)[None, :])


@triton.jit
def _add(
    sums,
    maps,
    first,
    row,
    column,
    inside,
    height,
    width,
    inputs,
    channel,
    slope,
    few: tl.constexpr,
):
    """Add the products of one tap's pixels with their gradients."""
    place, inside = _pixel(row, column, inside, height, width)
    place = (first + place) * inputs
    if few:
        values = tl.load(maps + place + channel, mask=inside, other=0.0)
        sums += values[:, None] * slope
    else:
        values = tl.load(
            maps + place[None, :] + channel[:, None],
            mask=inside[None, :] & (channel < inputs)[:, None],
            other=0.0,
        )
        sums = tl.dot(values, slope, sums, input_precision="tf32x3")
    return sums


@triton.jit(do_not_specialize=_SIZES)
def _weights_gradient(
    maps,
    slopes,
    out,
    pixels,
    height,
    width,
    high,
    wide,
    inputs,
    outputs,
    stride,
    padding,
    length,
    parts,
    kernel: tl.constexpr,
    few: tl.constexpr,
    block_m: tl.constexpr,
    block_k: tl.constexpr,
    block_o: tl.constexpr,
):
    model = tl.program_id(2)
    chunks = tl.cdiv(inputs, block_k)
    down, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    part = tl.program_id(1) % parts
    o = tl.program_id(1) // parts * block_o + tl.arange(0, block_o)
    channel = chunk if few else chunk * block_k + tl.arange(0, block_k)
    area = high * wide
    first = model.to(tl.int64) * (pixels // area)
    sums = tl.zeros((block_m if few else block_k, block_o), tl.float32)
    sums_1, sums_2, sums_3, sums_4 = sums, sums, sums, sums
    for begin in range(part * length, min(part * length + length, pixels), block_m):
        m = begin + tl.arange(0, block_m)
        inside = m < pixels
        place = (model.to(tl.int64) * pixels + m)[:, None] * outputs + o[None, :]
        slope = tl.load(slopes + place, mask=inside[:, None] & (o < outputs)[None, :], other=0.0)
        image = (first + m // area) * (height * width)
        r, c = (m % area) // wide * stride - padding + down, m % wide * stride - padding
        sums = _add(sums, maps, image, r, c, inside, height, width, inputs, channel, slope, few)
        if kernel > 1:
            sums_1 = _add(
                sums_1, maps, image, r, c + 1, inside, height, width, inputs, channel, slope, few
            )
        if kernel > 2:
            sums_2 = _add(
                sums_2, maps, image, r, c + 2, inside, height, width, inputs, channel, slope, few
            )
        if kernel > 3:
            sums_3 = _add(
                sums_3, maps, image, r, c + 3, inside, height, width, inputs, channel, slope, few
            )
        if kernel > 4:
            sums_4 = _add(
                sums_4, maps, image, r, c + 4, inside, height, width, inputs, channel, slope, few
            )
    model = part * tl.num_programs(2) + model
    out += model.to(tl.int64) * (kernel * kernel * inputs * outputs)
    out += down * kernel * inputs * outputs
    _store(out, sums, 0, inputs, outputs, channel, o, few)
    if kernel > 1:
        _store(out, sums_1, 1, inputs, outputs, channel, o, few)
    if kernel > 2:
        _store(out, sums_2, 2, inputs, outputs, channel, o, few)
    if kernel > 3:
        _store(out, sums_3, 3, inputs, outputs, channel, o, few)
    if kernel > 4:
        _store(out, sums_4, 4, inputs, outputs, channel, o, few)


@triton.jit
def _store(out, sums, right, inputs, outputs, channel, o, few: tl.constexpr):
    """Write the sums of one tap."""
    out += (right * inputs) * outputs
    if few:
        tl.store(out + channel * outputs + o, tl.sum(sums, axis=0), mask=o < outputs)
    else:
        tl.store(
            out + channel[:, None] * outputs + o[None, :],
            sums,
            mask=(channel < inputs)[:, None] & (o < outputs)[None, :],
        )


def pool(maps: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor]:
    """The maxima of windows of size x size [N, h // size, w // size, channels], and which pixel
    of its window each is, uint8; a maximum that does not exceed ``floor`` becomes it (NaN:
    none), and is no pixel: 255."""
    count, height, width, channels = maps.shape
    out = maps.new_empty(count, height // size, width // size, channels)
    chosen = torch.empty_like(out, dtype=torch.uint8)
    grid = (triton.cdiv(out.numel(), 1024),)
    _pool[grid](maps, out, chosen, out.numel(), height, width, channels, floor, size, 1024)
    return out, chosen


@triton.jit(do_not_specialize=["count", "height", "width"])
def _pool(
    maps,
    out,
    chosen,
    count,
    height,
    width,
    channels,
    floor,
    size: tl.constexpr,
    block: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    wide, high = width // size, height // size
    channel, column = index % channels, index // channels % wide
    row, image = index // channels // wide % high, index // channels // wide // high
    corner = ((image * height + row * size) * width + column * size) * channels + channel
    largest = tl.load(maps + corner, mask=inside, other=0.0)
    where = tl.zeros((block,), tl.uint8)
    for tap in tl.static_range(1, size * size):
        step = (tap // size) * width + tap % size
        value = tl.load(maps + corner + step * channels, mask=inside, other=0.0)
        larger = (value > largest) | (value != value)
        largest = tl.where(larger, value, largest)
        where = tl.where(larger, tap, where).to(tl.uint8)
    where = tl.where(largest <= floor, 255, where).to(tl.uint8)
    largest = tl.where(largest < floor, floor, largest)
    tl.store(out + index, largest, mask=inside)
    tl.store(chosen + index, where, mask=inside)


def unpool(gradient: Tensor, chosen: Tensor, size: int, height: int, width: int) -> Tensor:
    """The gradient of what `pool` read: [N, height, width, channels]."""
    count, _, _, channels = gradient.shape
    out = gradient.new_empty(count, height, width, channels)
    grid = (triton.cdiv(out.numel(), 1024),)
    _unpool[grid](gradient, chosen, out, out.numel(), height, width, channels, size, 1024)
    return out


@triton.jit(do_not_specialize=["count", "height", "width"])
def _unpool(
    gradient,
    chosen,
    out,
    count,
    height,
    width,
    channels,
    size: tl.constexpr,
    block: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    wide, high = width // size, height // size
    channel, c = index % channels, index // channels % width
    r, image = index // channels // width % height, index // channels // width // height
    row, column = r // size, c // size
    inside = (index < count) & (row < high) & (column < wide)
    place = ((image * high + row) * wide + column) * channels + channel
    where = tl.load(chosen + place, mask=inside, other=255)
    value = tl.load(gradient + place, mask=inside, other=0.0)
    tap = r % size * size + c % size
    tl.store(out + index, tl.where(where == tap, value, 0.0), mask=index < count)
