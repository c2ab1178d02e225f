"""A first layer computes what convolution, ReLU and max-pooling compute one after another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightnet.zoo.first_layer import FirstLayer
from weightnet.zoo.stacked import StackedConv2d, StackedModule

MODELS, IMAGES = 3, 5


def images(size: int = 8, generator: int = 0) -> Tensor:
    x = torch.randn(IMAGES, MODELS, size, size, generator=torch.Generator().manual_seed(generator))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("floor", [0.0, math.nan])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("channels", [3, 16, 21])
def test_a_first_layer_is_its_parts(channels: int, kernel: int, size: int, floor: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = images(size)
    weight = torch.randn(MODELS * channels, 1, kernel, kernel, generator=generator)
    bias = torch.randn(MODELS * channels, generator=generator)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    mine = FirstLayer.apply(x, *leaves, floor)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = F.conv2d(x.double(), *exact, 1, kernel // 2, 1, MODELS)
    wanted = F.max_pool2d(y if math.isnan(floor) else F.relu(y), 2)
    torch.testing.assert_close(mine.double(), wanted, rtol=1e-5, atol=1e-5)
    assert mine.is_contiguous(memory_format=torch.channels_last)
    slopes = torch.randn(mine.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad(mine, leaves, slopes),
        torch.autograd.grad(wanted, exact, slopes.double()),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


def test_ties_go_to_the_first_pixel() -> None:
    x = images()
    weight = torch.zeros(MODELS * 4, 1, 3, 3, requires_grad=True)
    y = FirstLayer.apply(x, weight, torch.ones(MODELS * 4, requires_grad=True), 0.0)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    first = x[:, :, ::2, ::2].sum((0, 2, 3)).repeat_interleave(4)
    torch.testing.assert_close(gradient[:, 0, 1, 1], first)


def test_nan_and_what_a_relu_zeroes_stay() -> None:
    x = images()
    x[0, 0, 0, 0], x[:, 1] = math.nan, -1.0
    leaves = [torch.ones(MODELS * 4, 1, 1, 1), torch.zeros(MODELS * 4)]
    y = FirstLayer.apply(x, *(leaf.requires_grad_() for leaf in leaves), 0.0)
    assert torch.equal(y.isnan().nonzero(), torch.tensor([[0, c, 0, 0] for c in range(4)]))
    assert torch.equal(y[:, 4:8], torch.zeros(IMAGES, 4, 4, 4))
    (gradient,) = torch.autograd.grad(y[:, 4:8].sum(), leaves[0])
    assert not gradient[4:8].any()


def test_a_stack_pools_its_first_layer_as_its_plain_modules_do() -> None:
    modules = [
        nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Identity(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 2, 3, padding=1),
        )
        for _ in range(MODELS)
    ]
    stack = StackedModule(modules[0], MODELS)
    stack.load([module.state_dict() for module in modules])
    first, *others = [layer for layer in stack.modules() if isinstance(layer, StackedConv2d)]
    assert first.pool is not None
    assert all(layer.pool is None for layer in others)
    x = images().transpose(0, 1).unsqueeze(2)
    wanted = torch.stack([module(batch) for module, batch in zip(modules, x, strict=True)])
    found = stack(x).view(IMAGES, MODELS, 2, 4, 4).transpose(0, 1)
    torch.testing.assert_close(found, wanted)
    slopes = torch.randn(wanted.shape)
    gradients = torch.autograd.grad(found, list(stack.parameters()), slopes)
    plain = torch.autograd.grad(wanted, [p for m in modules for p in m.parameters()], slopes)
    for index, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, torch.cat(plain[index :: len(gradients)]))


def test_images_that_have_a_gradient_get_it() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    stack = StackedModule(module, MODELS)
    stack.load([module.state_dict()] * MODELS)
    x = images().transpose(0, 1).unsqueeze(2).requires_grad_()
    (gradient,) = torch.autograd.grad(stack(x).sum(), x)
    (wanted,) = torch.autograd.grad(sum(module(batch).sum() for batch in x), x)
    torch.testing.assert_close(gradient, wanted)
