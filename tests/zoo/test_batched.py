"""What a GPU runs is what torch computes, on the CPU as well, and with kernels where there are
any."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from weightnet.zoo.batched import Convolution, MaxPool


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "kernel", "stride", "padding"),
    [
        (1, 12, 14, 3, 1, 1),
        (3, 5, 9, 5, 1, 2),
        (6, 12, 7, 5, 1, 2),
        (16, 16, 7, 3, 1, 1),
        (32, 24, 7, 3, 2, 1),
        (8, 70, 7, 1, 2, 0),
        (100, 16, 3, 1, 1, 0),
        (4, 4, 11, 5, 2, 2),
        (1, 5, 9, 7, 2, 3),
    ],
)
def test_convolutions_are_torchs(
    device: str, inputs: int, outputs: int, size: int, kernel: int, stride: int, padding: int
) -> None:
    models, batch = 3, 7
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    x = draw(models * batch, inputs, size, size)
    weight, bias = draw(models * outputs, inputs, kernel, kernel), draw(models * outputs)
    read = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = Convolution.apply(*read, models, stride, padding)
    exact = [tensor.detach().double().requires_grad_() for tensor in read]
    parts = [tensor.unflatten(0, (models, -1)) for tensor in exact]
    plain = torch.cat([F.conv2d(a, w, b, stride, padding) for a, w, b in zip(*parts, strict=True)])
    slope = draw(*y.shape)
    found = [y, *torch.autograd.grad(y, read, slope)]
    wanted = [plain, *torch.autograd.grad(plain, exact, slope.double())]
    for one, other in zip(found, wanted, strict=True):
        largest = float(other.detach().abs().max())
        assert float((one - other).detach().abs().max()) < 3e-6 * largest


@pytest.mark.parametrize(("window", "floor"), [(2, 0.0), (2, math.nan), (3, 0.0)])
@pytest.mark.parametrize("size", [6, 7])
def test_pooling_is_torchs(device: str, window: int, floor: float, size: int) -> None:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(9, 5, size, size, device=device, generator=generator).round(decimals=1)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = math.nan, math.inf
    x.requires_grad_()
    y = MaxPool.apply(x, window, floor)
    plain = F.max_pool2d(F.relu(x) if floor == 0 else x, window)
    slope = torch.randn(y.shape, device=device, generator=generator)
    (found,), (wanted,) = (torch.autograd.grad(z, x, slope) for z in (y, plain))
    assert torch.equal(y.nan_to_num(77), plain.nan_to_num(77))
    assert torch.equal(found, wanted)
