"""Dropout on the CPU: torch's random numbers, and one pass over the maps each way.

Random numbers are drawn channel by channel, maps lie in memory pixel by pixel. Of sixteen pixels
of a channel, the comparisons with its probability become the bits of a word, so that words of
neighbouring channels are read as a vector for each pixel. Values are those of the calls of torch
that the kernels stand for, bit for bit: tests/zoo/test_fused.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from weightnet.zoo.fused import Array, is_channels_last, kernel, pixels

BITS = 16  # of a word: pixels


class Dropout(torch.autograd.Function):
    """x * (uniform < keep) / keep of S models' maps of float32, as `is_channels_last` wants them;
    uniform is drawn as [B, S * channels, height, width], keep is [S]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Uniform, keep: Tensor) -> Tensor:
        """[B, S * channels, height, width] -> the same."""
        out = torch.empty_like(x)
        area = x.shape[2] * x.shape[3]
        ctx.words = np.empty((len(x), -(-area // BITS), x.shape[1]), np.uint16)
        ctx.keep = np.repeat(keep.numpy(), x.shape[1] // len(keep))
        numbers.drop(_flat(x), ctx.keep, _flat(out), ctx.words)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """gradient / keep * (uniform < keep), in the gradient's own layout."""
        if not is_channels_last(gradient):
            bits = np.unpackbits(ctx.words.view(np.uint8), axis=2, bitorder="little")
            batch, channels, height, width = gradient.shape
            planes = bits.reshape(batch, -1, channels, BITS).swapaxes(1, 2)
            kept = planes.reshape(batch, channels, -1)[:, :, : height * width]
            mask = torch.from_numpy(kept).reshape(gradient.shape)
            return gradient / torch.from_numpy(ctx.keep)[:, None, None] * mask, None, None
        out = torch.empty_like(gradient)
        _undrop(_flat(gradient), ctx.words, ctx.keep, _flat(out))
        return out, None, None


def _flat(x: Tensor) -> Array:
    """[B, height * width, channels], the same memory."""
    array = pixels(x)
    return array.reshape(len(array), -1, array.shape[3])


class Uniform:
    """What torch.rand would draw from a generator of the CPU."""

    def __init__(self, generator: torch.Generator) -> None:
        state = generator.get_state()
        left, words = state[8:12].numpy().view(np.int32), state[24:5016].numpy().view(np.uint64)
        self._block = words.astype(np.uint32)  # of the Mersenne Twister
        self._drawn = 625 - int(left[0])

    def rand(self, size: torch.Size) -> Tensor:
        """Numbers in [0, 1), float32."""
        out = torch.empty(size)
        self._drawn = _twist(self._block, self._drawn, out.view(-1).numpy())
        return out

    def drop(self, x: Array, keep: Array, out: Array, words: Array) -> None:
        """Write x / keep where a number is below keep [channels], 0 elsewhere, and which these
        are.

        Maps are [B, pixels, channels], and so are the bits of words [B, pixels / BITS, channels];
        numbers are drawn as [B, channels, pixels].
        """
        self._drawn = _drop(self._block, self._drawn, x, keep, out, words)


@kernel
def _mix(word: Any, following: Any, other: Any) -> Any:
    one = np.uint32(1)
    word = (word & np.uint32(0x80000000)) | (following & np.uint32(0x7FFFFFFF))
    return other ^ (word >> one) ^ ((np.uint32(0) - (word & one)) & np.uint32(0x9908B0DF))


@kernel
def _twist(block: Array, drawn: int, out: Array) -> int:
    """Fill ``out`` as Matsumoto and Nishimura (1998) do, and tell how many of the last block's
    624 words are drawn; https://doi.org/10.1145/272991.272995."""
    done = 0
    while done < len(out):
        if drawn == 624:
            for start, end, other in ((0, 227, 397), (227, 454, -227), (454, 623, -227)):
                for i in range(start, end):  # none of which reads what another one writes
                    block[i] = _mix(block[i], block[i + 1], block[i + other])
            block[623] = _mix(block[623], block[0], block[396])
            drawn = 0
        count = min(624 - drawn, len(out) - done)
        words, numbers = block[drawn : drawn + count], out[done : done + count]
        for i in range(count):
            word = words[i]
            word ^= word >> np.uint32(11)
            word ^= (word << np.uint32(7)) & np.uint32(0x9D2C5680)
            word ^= (word << np.uint32(15)) & np.uint32(0xEFC60000)
            word ^= word >> np.uint32(18)
            numbers[i] = np.float32(np.int32(word & np.uint32(0xFFFFFF))) * np.float32(2**-24)
        drawn += count
        done += count
    return drawn


@intrinsic  # type: ignore[untyped-decorator]
def _below(typing: Any, address: Any, bound: Any) -> Any:
    """Which of the BITS floats at an address are below a bound, as bits of a word."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place, value = arguments
        kind = ir.VectorType(value.type, BITS)
        index = ir.IntType(32)
        numbers = builder.load(builder.inttoptr(place, kind.as_pointer()), align=4)
        one = builder.insert_element(kind(ir.Undefined), value, index(0))
        everywhere = ir.Constant(ir.VectorType(index, BITS), [0] * BITS)
        bounds = builder.shuffle_vector(one, kind(ir.Undefined), everywhere)
        return builder.bitcast(builder.fcmp_ordered("<", numbers, bounds), ir.IntType(BITS))

    return types.uint16(address, bound), generate


@kernel
def _drop(block: Array, drawn: int, x: Array, keep: Array, out: Array, words: Array) -> int:
    batch, area, channels = x.shape
    numbers = np.zeros(channels * area + BITS, np.float32)  # the last word reads further
    for b in range(batch):
        drawn = _twist(block, drawn, numbers[: channels * area])
        for part in range(words.shape[1]):
            first = part * BITS
            word = words[b, part]
            for c in range(channels):
                word[c] = _below(numbers[c * area + first :].ctypes.data, keep[c])
            for i in range(min(BITS, area - first)):
                for c in range(channels):
                    kept = np.float32((word[c] >> np.uint16(i)) & np.uint16(1))
                    out[b, first + i, c] = x[b, first + i, c] * kept / keep[c]
    return drawn


@kernel
def _undrop(gradient: Array, words: Array, keep: Array, out: Array) -> None:
    batch, area, channels = gradient.shape
    for b in range(batch):
        for part in range(words.shape[1]):
            first = part * BITS
            word = words[b, part]
            for i in range(min(BITS, area - first)):
                for c in range(channels):
                    kept = np.float32((word[c] >> np.uint16(i)) & np.uint16(1))
                    out[b, first + i, c] = gradient[b, first + i, c] / keep[c] * kept
