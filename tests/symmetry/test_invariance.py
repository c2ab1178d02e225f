"""The function that a network computes does not change, whatever symmetry acts on its weights."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.func import functional_call

from weightnet.symmetry import (
    PermutationSpec,
    canonicalize,
    fold_batchnorm,
    inverse,
    permute,
    random_permutation,
    random_scales,
    rescale,
    trace,
)

State = Mapping[str, torch.Tensor]


def error(module: nn.Module, state: State, image: torch.Tensor) -> float:
    """Largest change of the outputs, relative to the largest output."""
    with torch.no_grad():
        before, after = module(image), functional_call(module, dict(state), (image,))
    assert before.std() > 0
    return float((after - before).abs().max() / before.abs().max())


def equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def copy(module: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def test_permutation_keeps_the_function(module: nn.Module, image: torch.Tensor) -> None:
    spec, state = trace(module, image), copy(module)
    permuted = permute(spec, random_permutation(spec, generator()), state)
    assert not equal(permuted, state)
    assert error(module, permuted, image) < 1e-9
    assert equal(state, module.state_dict())


def test_scales_keep_the_function(module: nn.Module, image: torch.Tensor) -> None:
    spec, state = trace(module, image), copy(module)
    scales = random_scales(spec, generator())
    assert set(scales) == {space.name for space in spec.spaces if space.scalable}
    assert error(module, rescale(spec, scales, state), image) < 1e-9
    assert equal(state, module.state_dict())


def test_inverse_restores(module: nn.Module, image: torch.Tensor) -> None:
    spec, state = trace(module, image), module.state_dict()
    order = spec.random(generator())
    assert equal(permute(spec, inverse(order), permute(spec, order, state)), state)
    scales = {
        name: torch.exp2(scale.log2().round())
        for name, scale in random_scales(spec, generator()).items()
    }
    back = {name: 1 / scale for name, scale in scales.items()}
    assert equal(rescale(spec, back, rescale(spec, scales, state)), state)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_canonical_form(
    module: nn.Module, image: torch.Tensor, scale: bool, dtype: torch.dtype
) -> None:
    module, image = module.to(dtype), image.to(dtype)
    spec, state = trace(module, image), copy(module)
    form = canonicalize(spec, state, scale=scale)
    assert equal(state, module.state_dict())
    assert error(module, form, image) < (1e-9 if dtype == torch.float64 else 2e-4)
    assert equal(canonicalize(spec, form, scale=scale), form)
    for seed in range(3):
        permuted = permute(spec, spec.random(generator(seed)), state)
        assert equal(canonicalize(spec, permuted, scale=scale), form)


def test_folded_batchnorm(module: nn.Module, image: torch.Tensor) -> None:
    """The norms that follow a layer say nothing any more, and the function is the same."""
    spec, state = trace(module, image), copy(module)
    folded = fold_batchnorm(spec, state)
    assert equal(state, module.state_dict())
    assert error(module, folded, image) < 1e-9
    assert equal(fold_batchnorm(spec, folded), folded)
    for layer in spec.layers:
        if layer.kind != "norm" and layer.mean and layer.scale:
            assert torch.all(folded[layer.scale] == 1) and torch.all(folded[layer.mean] == 0)
    for scale in (False, True):
        form = canonicalize(spec, state, scale=scale, fold=True)
        assert error(module, form, image) < 1e-9
        assert equal(canonicalize(spec, form, scale=scale, fold=True), form)
        permuted = permute(spec, spec.random(generator()), state)
        assert equal(canonicalize(spec, permuted, scale=scale, fold=True), form)


def test_canonical_scale_forgets_scales(module: nn.Module, image: torch.Tensor) -> None:
    spec, state = trace(module, image), module.state_dict()
    form = canonicalize(spec, state, scale=True)
    scaled = rescale(spec, random_scales(spec, generator()), state)
    again = canonicalize(spec, scaled, scale=True)
    for key, tensor in form.items():
        torch.testing.assert_close(again[key], tensor, rtol=1e-7, atol=1e-9)


def test_state_of_the_module_is_the_state_of_the_form(
    module: nn.Module, image: torch.Tensor
) -> None:
    spec = trace(module, image)
    module.load_state_dict(canonicalize(spec, module.state_dict()))


def test_spec_survives_json(module: nn.Module, image: torch.Tensor) -> None:
    spec = trace(module, image)
    assert PermutationSpec.from_json(spec.to_json()) == spec


def test_full_size(resnet18: nn.Module, image: torch.Tensor) -> None:
    """torchvision's own size; benchmarks/full_size.py has larger ones."""
    spec, state = trace(resnet18, image), resnet18.state_dict()
    permuted = permute(spec, spec.random(generator()), state)
    form = canonicalize(spec, state, scale=True)
    assert error(resnet18, permuted, image) < 1e-9
    assert error(resnet18, form, image) < 1e-9
    assert equal(canonicalize(spec, permuted, scale=True), form)
