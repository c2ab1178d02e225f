"""Canonical forms where neurons tie or die, alignment, and errors."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn
from torch.func import functional_call

from weightnet.symmetry import (
    PermutationSpec,
    canonicalize,
    canonicalize_stack,
    permute,
    random_permutation,
    random_scales,
    rescale,
    trace,
)

State = dict[str, torch.Tensor]
Order = Literal["none", "sort", "align"]


@pytest.fixture
def network() -> tuple[nn.Module, PermutationSpec, State]:
    torch.manual_seed(3)
    module = nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(54, 7), nn.ReLU(), nn.Linear(7, 3)),
    )
    module = module.double().eval()
    image = torch.zeros(1, 2, 7, 7)
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    return module, trace(module, image), state


def equal(a: State, b: State) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def same_function(module: nn.Module, a: State, b: State) -> bool:
    image = torch.randn(4, 2, 7, 7, dtype=torch.float64, generator=generator(9))
    with torch.no_grad():
        first, second = (functional_call(module, state, (image,)) for state in (a, b))
    return torch.allclose(first, second, rtol=1e-9, atol=1e-12)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", [False, True])
def test_identical_and_dead_neurons(
    network: tuple[nn.Module, PermutationSpec, State], scale: bool
) -> None:
    module, spec, state = network
    for key in ("3.weight", "3.bias"):
        state[key][2:4] = 0.0  # dead, but their outgoing weights differ
        state[key][5] = state[key][1]  # twins
    state["6.weight"][:, 45:54] = state["6.weight"][:, 9:18]  # in and out: interchangeable
    state["0.weight"][:] = 0.0  # all tie; told apart by their norms
    state["1.weight"][:] = torch.arange(8) / 8
    form = canonicalize(spec, state, scale=scale)
    assert same_function(module, state, form)
    assert equal(canonicalize(spec, form, scale=scale), form)
    for seed in range(5):
        permuted = permute(spec, random_permutation(spec, generator(seed)), state)
        assert equal(canonicalize(spec, permuted, scale=scale), form)


def test_all_zero_and_not_finite(network: tuple[nn.Module, PermutationSpec, State]) -> None:
    _, spec, state = network
    zero = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    assert equal(canonicalize(spec, zero, scale=True), zero)
    state["3.weight"][0, 0, 0, 0] = float("nan")
    state["0.weight"][1] = float("inf")
    form = canonicalize(spec, state, scale=True)
    assert torch.equal(form["3.weight"].isnan().sum(), state["3.weight"].isnan().sum())


def test_order_is_by_incoming_norm(network: tuple[nn.Module, PermutationSpec, State]) -> None:
    _, spec, state = network
    norms = canonicalize(spec, state)["6.weight"].abs().sum(1)
    assert torch.equal(norms, norms.sort(descending=True).values)


def test_canonical_scale(network: tuple[nn.Module, PermutationSpec, State]) -> None:
    module, spec, state = network
    form = canonicalize(spec, state, order="none", scale=True)
    assert same_function(module, state, form)
    magnitude = form["3.weight"].abs().sum((1, 2, 3)) + form["3.bias"].abs()
    torch.testing.assert_close(magnitude, torch.full_like(magnitude, 73**0.5))
    assert torch.equal(form["0.weight"], state["0.weight"])  # scaled behind it, on the norm
    torch.testing.assert_close(form["1.weight"], torch.full_like(form["1.weight"], 2**0.5))


def test_powers_of_two_are_exact(network: tuple[nn.Module, PermutationSpec, State]) -> None:
    _, spec, state = network
    scales = {
        name: torch.exp2(scale.log2().round())
        for name, scale in random_scales(spec, generator(0)).items()
    }
    scaled = rescale(spec, scales, state)
    assert equal(canonicalize(spec, scaled, scale=True), canonicalize(spec, state, scale=True))


@pytest.mark.parametrize("scale", [False, True])
def test_align_finds_the_permutation(
    network: tuple[nn.Module, PermutationSpec, State], scale: bool
) -> None:
    _, spec, reference = network
    order = random_permutation(spec, generator(1))
    moved = permute(spec, order, reference)
    noisy = {k: t + 1e-3 * torch.randn(t.shape, generator=generator(2)) for k, t in moved.items()}
    found = canonicalize(spec, noisy, order="align", scale=scale, reference=reference)
    again = canonicalize(spec, found, order="align", scale=scale, reference=reference)
    assert equal(again, found)
    if not scale:
        assert max((found[k] - reference[k]).abs().max() for k in found) < 0.01


def test_errors(network: tuple[nn.Module, PermutationSpec, State]) -> None:
    _, spec, state = network
    with pytest.raises(ValueError, match="order must be none, sort or align"):
        canonicalize(spec, state, order="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a reference must come"):
        canonicalize(spec, state, order="align")
    with pytest.raises(ValueError, match="a reference must come"):
        canonicalize(spec, state, reference=state)
    with pytest.raises(ValueError, match=r"must hold '6\.weight'"):
        canonicalize(spec, {k: t for k, t in state.items() if k != "6.weight"})
    with pytest.raises(ValueError, match=r"must hold 7 channels of space '6' on axis 1"):
        canonicalize(spec, {**state, "8.weight": torch.zeros(3, 5)})
    with pytest.raises(ValueError, match=r"each of 0\.\.6 once"):
        permute(spec, {"6": torch.zeros(7, dtype=torch.long)}, state)
    with pytest.raises(ValueError, match="none of them"):
        permute(spec, {"nothing": torch.arange(3)}, state)
    with pytest.raises(ValueError, match="positive finite"):
        rescale(spec, {"6": torch.zeros(7)}, state)
    with pytest.raises(ValueError, match="scalable"):
        rescale(spec, {"nothing": torch.ones(7)}, state)
    with pytest.raises(ValueError, match="must be one of"):
        spec.space("nothing")


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("order", ["none", "sort", "align"])
def test_a_stack_is_what_its_networks_are_alone(
    network: tuple[nn.Module, PermutationSpec, State], order: Order, fold: bool
) -> None:
    _, spec, state = network
    states = [
        {key: t + torch.rand(t.shape, generator=generator(i)) for key, t in state.items()}
        if i
        else state
        for i in range(4)
    ]
    states[1]["3.weight"][2:4] = states[1]["3.bias"][2:4] = 0.0  # dead neurons
    states[2]["0.weight"][1] = float("inf")
    states[2]["3.weight"][0, 0, 0, 0] = float("nan")
    reference = states[3] if order == "align" else None
    alone = [
        canonicalize(spec, one, order=order, scale=True, fold=fold, reference=reference)
        for one in states
    ]
    stack = {key: torch.stack([one[key] for one in states]) for key in state}
    form = canonicalize_stack(spec, stack, order=order, scale=True, fold=fold, reference=reference)
    for key, tensor in form.items():
        expected = torch.stack([one[key] for one in alone])
        assert torch.equal(tensor.nan_to_num(7.0), expected.nan_to_num(7.0))
