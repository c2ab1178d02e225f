"""Grouped convolutions compute what torch's compute, each model by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightnet.zoo import grouped
from weightnet.zoo.grouped import Convolution, Pays, pays
from weightnet.zoo.stacked import StackedConcatenation, StackedConv2d

MODELS = 3
pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="kernels are for AVX-512"
)
GEOMETRIES = [
    # size, kernel, stride, padding
    ((4, 4), (3, 3), (1, 1), (1, 1)),
    ((4, 3), (5, 3), (1, 1), (2, 1)),
    ((1, 1), (5, 5), (1, 1), (2, 2)),
    ((2, 1), (3, 3), (1, 1), (1, 1)),
    ((7, 8), (3, 3), (2, 2), (1, 1)),
    ((7, 5), (1, 1), (2, 1), (0, 0)),
    ((6, 6), (1, 1), (1, 1), (0, 0)),
    ((6, 5), (3, 2), (2, 3), (0, 1)),
]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels compute all, though torch's may be faster."""
    monkeypatch.setattr(grouped, "pays", lambda *_: Pays(True, True, True))


def tensors(
    inputs: int, outputs: int, size: tuple[int, int], kernel: tuple[int, int], images: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(inputs * 1000 + outputs)
    x = torch.randn(images, MODELS * inputs, *size, generator=generator)
    weight = torch.randn(MODELS * outputs, inputs, *kernel, generator=generator)
    bias = torch.randn(MODELS * outputs, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    return [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 3), (5, 16), (16, 12), (17, 40), (34, 7)])
@pytest.mark.parametrize("images", [8, 13])
def test_a_convolution_is_torchs(
    inputs: int, outputs: int, images: int, geometry: tuple[Any, ...]
) -> None:
    size, kernel, stride, padding = geometry
    leaves = tensors(inputs, outputs, size, kernel, images)
    mine = Convolution.apply(*leaves, stride, padding, MODELS)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = F.conv2d(*exact, stride, padding, 1, MODELS)
    torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-4)
    assert mine.is_contiguous(memory_format=torch.channels_last)
    slopes = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    for one, other in zip(
        torch.autograd.grad(mine, leaves, slopes),
        torch.autograd.grad(wanted, exact, slopes.double()),
        strict=True,
    ):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ours", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("biased", [False, True])
def test_torch_may_compute_a_part(
    ours: tuple[int, ...], biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = tensors(6, 5, (4, 4), (3, 3), 8)
    leaves = [x, weight, *([bias] if biased else [])]

    def gradients(where: Pays) -> tuple[Tensor, ...]:
        monkeypatch.setattr(grouped, "pays", lambda *_: where)
        y = Convolution.apply(x, weight, bias if biased else None, (1, 1), (1, 1), MODELS)
        return y, *torch.autograd.grad((y * y).sum(), leaves)

    for one, other in zip(
        gradients(Pays(*map(bool, ours))), gradients(Pays(True, True, True)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_only_what_is_wanted_has_a_gradient() -> None:
    x, weight, bias = tensors(6, 5, (4, 4), (3, 3), 8)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    y = Convolution.apply(x, weight, bias, (1, 1), (1, 1), MODELS)
    y.sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_models_do_not_reach_each_other(value: float) -> None:
    leaves = tensors(6, 5, (4, 4), (3, 3), 11)

    def outcome(spoilt: bool) -> list[Tensor]:
        x, weight, bias = [leaf.detach().clone() for leaf in leaves]
        x = x.contiguous(memory_format=torch.channels_last)
        if spoilt:
            x[:, 6:12], weight[5:10] = value, value
        mine = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        y = Convolution.apply(*mine, (1, 1), (1, 1), MODELS)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), mine)]

    for one, other in zip(outcome(False), outcome(True), strict=True):
        dim = 1 if len(one) == 11 else 0  # channels
        before, after = one.chunk(MODELS, dim), other.chunk(MODELS, dim)
        assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
        assert not torch.isfinite(after[1]).all()


def test_a_model_is_the_same_in_any_stack() -> None:
    x, weight, bias = (leaf.detach() for leaf in tensors(6, 20, (4, 4), (3, 3), 11))
    together = Convolution.apply(x, weight, bias, (1, 1), (1, 1), MODELS)
    second = x[:, 6:12].contiguous(memory_format=torch.channels_last)
    alone = Convolution.apply(second, weight[20:40], bias[20:40], (1, 1), (1, 1), 1)
    assert torch.equal(together[:, 20:40], alone)


def test_few_images_are_left_to_torch() -> None:
    layer = StackedConv2d(nn.Conv2d(6, 5, 3, padding=1), MODELS)
    x = tensors(6, 5, (4, 4), (3, 3), 8)[0]
    assert "Convolution" in type(layer(x).grad_fn).__name__
    few = layer(x[:7].contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(few, layer(x)[:7], rtol=1e-5, atol=1e-5)
    assert not grouped.can_read(x[:7]) and not grouped.can_read(x.double())
    assert not grouped.can_read(x.contiguous(memory_format=torch.contiguous_format))


def test_large_maps_of_full_vectors_are_left_to_torch() -> None:
    assert pays((14, 14), (48, 16, 3, 3), (1, 1), 3) == Pays(False, False, False)
    assert pays((14, 14), (36, 12, 3, 3), (1, 1), 3) == Pays(True, True, False)
    assert pays((4, 4), (48, 16, 3, 3), (1, 1), 3) == Pays(True, True, True)
    assert pays((7, 7), (96, 16, 3, 3), (2, 2), 3) == Pays(True, True, True)


def test_joined_maps_have_their_channels_last() -> None:
    parts = [
        torch.randn(8, MODELS * channels, 3, 2).contiguous(memory_format=torch.channels_last)
        for channels in (4, 1, 3)
    ]
    joined = StackedConcatenation(MODELS)(parts)
    for model, maps in enumerate(joined.chunk(MODELS, 1)):
        wanted = torch.cat([part.chunk(MODELS, 1)[model] for part in parts], 1)
        assert torch.equal(maps, wanted)
    assert joined.is_contiguous(memory_format=torch.channels_last)
