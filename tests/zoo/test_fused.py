"""Each kernel computes what the calls of torch that it stands for compute."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from weightnet.zoo import fused
from weightnet.zoo.dropout import Dropout, Uniform
from weightnet.zoo.training import shift

SIZES = [(8, 8), (5, 7), (3, 2), (2, 2)]
DTYPES = [torch.float32, torch.float64]


def maps(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Feature maps with ties, zeros of both signs, infinities and NaN, channels last."""
    generator = torch.Generator().manual_seed(height)
    x = torch.randn(6, 10, height, width, generator=generator, dtype=dtype).mul(2).round() / 2
    for value in (-0.0, math.inf, -math.inf, math.nan):
        x[torch.rand(x.shape, generator=generator) < 0.05] = value
    return x.contiguous(memory_format=torch.channels_last)


def assert_same(
    one: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
    x: Tensor,
    layout: torch.memory_format = torch.channels_last,
) -> None:
    """Compare values, gradients and their layouts in memory, bit for bit."""
    results = []
    for function in (one, other):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        slopes = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
        slopes[:, ::3] = -0.0
        (gradient,) = torch.autograd.grad(y, leaf, slopes.contiguous(memory_format=layout))
        results.append([y.detach(), gradient])
    for mine, wanted in zip(*results, strict=True):
        if max(wanted.shape[2:]) > 1:  # one pixel has no layout
            assert mine.stride() == wanted.stride()
        bits = {torch.float32: torch.int32, torch.float64: torch.int64}[x.dtype]
        is_number = ~torch.isnan(wanted)
        assert torch.equal(torch.isnan(mine), ~is_number)
        assert torch.equal(mine.view(bits)[is_number], wanted.view(bits)[is_number])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_pooling_is_torchs(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = maps(*size, dtype)
    assert fused.is_channels_last(x)
    for floor, after in ((0.0, F.relu), (math.nan, torch.clone)):
        assert_same(
            lambda leaf, floor=floor: fused.MaxPool.apply(leaf, floor),
            lambda leaf, after=after: after(F.max_pool2d(leaf, 2)),
            x,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_of_maps_is_torchs(dtype: torch.dtype) -> None:
    leaf = torch.nan_to_num(maps(3, 5, dtype), posinf=2, neginf=-2).requires_grad_()
    mine, wanted = fused.Average.apply(leaf), F.adaptive_avg_pool2d(leaf, 1)
    assert torch.equal(mine, wanted)
    slopes = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    gradients = [torch.autograd.grad(y, leaf, slopes)[0] for y in (mine, wanted)]
    assert torch.equal(*gradients)
    assert gradients[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [*SIZES, (4, 4)])
def test_dropout_is_torchs(size: tuple[int, int], layout: torch.memory_format) -> None:
    x = maps(*size)
    keep = torch.linspace(0.1, 1, 5)  # of models with two channels each
    column = keep.repeat_interleave(2).view(1, -1, 1, 1)
    uniform = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    assert_same(
        lambda leaf: Dropout.apply(leaf, Uniform(torch.Generator().manual_seed(2)), keep),
        lambda leaf: leaf * (uniform < column) / column,
        x,
        layout,
    )


def test_random_numbers_are_torchs() -> None:
    mine, wanted = (torch.Generator().manual_seed(2**40 + 7) for _ in range(2))
    for generator in (mine, wanted):  # from the middle of a block
        torch.rand(100, generator=generator)
    numbers = Uniform(mine)
    for size in ([5], [623], [1], [624], [1000], [3, 7, 11], [1247], [1]):
        assert torch.equal(numbers.rand(torch.Size(size)), torch.rand(size, generator=wanted))


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 1), (3, 4)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_depthwise_convolution_is_torchs(kernel: int, size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 10, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(10, 1, kernel, kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(10, generator=generator, dtype=torch.float64)
    leaves = [
        x.contiguous(memory_format=torch.channels_last).requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
    ]
    mine = fused.DepthwiseConvolution.apply(*leaves, kernel // 2)
    wanted = F.conv2d(*leaves, 1, kernel // 2, 1, 10)
    assert torch.equal(mine, wanted)
    slopes = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(mine, leaves, slopes),
        torch.autograd.grad(wanted, leaves, slopes),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_gathered_images_are_shifted(channels: int) -> None:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(20, channels, 6, 5, generator=generator)
    indices = torch.randint(20, (2, 9), generator=generator)
    offsets = torch.randint(-2, 3, (2, 9, 2), generator=generator)
    out = torch.empty(9, 6, 5, 2, channels).permute(3, 0, 4, 1, 2)
    fused.gather(images, indices, offsets, out)
    for model in range(2):
        assert torch.equal(out[model], shift(images[indices[model]], offsets[model], 2))
