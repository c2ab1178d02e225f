"""A stack computes what its plain modules compute, one at a time, for every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from weightnet.zoo import fused, stacked
from weightnet.zoo.architectures import FAMILIES, build
from weightnet.zoo.stacked import StackedModule

MODELS, IMAGES = 3, 4
SMALL = {"image_channels": 1, "classes": 10, "size": 8}


def arguments(family: str) -> dict[str, Any]:
    if family == "cnn":
        return {**SMALL, "width": 5, "depth": 4, "residual": True, "batchnorm": True}
    return {**SMALL, "width": 1 / 16, "stem": "small"}


def plain_modules(family: str, **changes: Any) -> list[nn.Module]:
    """Modules with weights and BatchNorm statistics of their own, in float64."""
    modules = []
    for seed in range(MODELS):
        torch.manual_seed(seed)
        module = build(family, **{**arguments(family), **changes}).double()
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        modules.append(module)
    return modules


def stack_of(modules: list[nn.Module], by_model: bool = False) -> StackedModule:
    stack = StackedModule(modules[0], len(modules), by_model)
    stack.load([module.state_dict() for module in modules])
    return stack


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(MODELS, IMAGES, 1, 8, 8, generator=generator, dtype=torch.float64)


def without_dropout(modules: list[nn.Module]) -> list[nn.Module]:
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    return modules


layouts = pytest.mark.parametrize("by_model", [False, True])


@layouts
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_stack_equals_its_plain_modules(family: str, mode: str, by_model: bool) -> None:
    modules = without_dropout(plain_modules(family))
    stack = stack_of(modules, by_model)
    for module in [stack, *modules]:
        module.train(mode == "train")
    x = images().requires_grad_()
    together = stack(x)
    alone = torch.stack([module(batch) for module, batch in zip(modules, x, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-8)
    slopes = torch.autograd.grad(together.square().sum(), [x, *stack.parameters()])
    plain = (dict(module.named_parameters()) for module in modules)
    names = [name for name, _ in stack.module.named_parameters()]
    stacked_plain = [[parameters[name] for name in names] for parameters in plain]
    flat = [tensor for parameters in stacked_plain for tensor in parameters]
    x_slope, *others = torch.autograd.grad(alone.square().sum(), [x, *flat])
    torch.testing.assert_close(slopes[0], x_slope, rtol=1e-5, atol=1e-7)
    for i, slope in enumerate(slopes[1:]):
        torch.testing.assert_close(
            slope.view(MODELS, -1, *slope.shape[1:]),
            torch.stack(others[i :: len(names)]),
            rtol=1e-5,
            atol=1e-7,
        )
    for state, module in zip(stack.states(), modules, strict=True):  # BatchNorm's statistics too
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, module.state_dict()[name], rtol=1e-6, atol=1e-8)


@layouts
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_states_return_what_was_loaded(family: str, by_model: bool) -> None:
    modules = plain_modules(family)
    for state, module in zip(stack_of(modules, by_model).states(), modules, strict=True):
        plain = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
        assert set(state) == set(plain)
        assert all(torch.equal(state[name], plain[name]) for name in plain)


@layouts
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_stack_that_drops_models_is_a_stack_of_the_others(family: str, by_model: bool) -> None:
    modules = without_dropout(plain_modules(family))
    stack, others = (stack_of(m, by_model) for m in (modules, [modules[0], modules[2]]))
    stack.keep(torch.tensor([0, 2]))
    x = images()[[0, 2]]
    assert torch.equal(stack(x), others(x))
    gradients = (torch.autograd.grad(s(x).sum(), list(s.parameters())) for s in (stack, others))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    for one, other in zip(stack.states(), others.states(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


@layouts
def test_a_model_that_overflows_does_not_reach_its_neighbours(by_model: bool) -> None:
    modules = plain_modules("cnn", batchnorm=False)
    with torch.no_grad():
        next(modules[1].parameters()).fill_(float("inf"))
    x = images()
    together = stack_of(modules, by_model).eval()(x)
    assert not bool(torch.isfinite(together[1]).all())
    for i in (0, 2):
        torch.testing.assert_close(together[i], modules[i].eval()(x[i]))


@layouts
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_each_model_has_its_own_dropout(by_model: bool, kind: torch.dtype) -> None:
    modules = [module.to(kind) for module in plain_modules("cnn", batchnorm=False, dropout=0.5)]
    stack, x = stack_of(modules, by_model), images().to(kind)
    probabilities = torch.tensor([0.0, 0.2, 0.9])
    stack.set_dropout(probabilities, torch.Generator().manual_seed(1))
    first, second = stack.train()(x), stack(x)
    assert torch.equal(first[0], second[0])  # probability 0 draws nothing
    assert not torch.equal(first[1], second[1])
    calm = modules[0].eval()(x[0])
    torch.testing.assert_close(first[0], calm)
    stack.set_dropout(probabilities, torch.Generator().manual_seed(1))
    assert torch.equal(stack(x), first)  # the generator alone decides
    evaluated = stack.eval()(x)
    alone = torch.stack([module.eval()(batch) for module, batch in zip(modules, x, strict=True)])
    torch.testing.assert_close(evaluated, alone)


@pytest.mark.parametrize("shape", [(20, 4 * 3000), (20, 4 * 30, 10, 10)])
def test_dropout_keeps_the_expectation_at_each_model_probability(shape: tuple[int, ...]) -> None:
    from weightnet.zoo.stacked import StackedDropout

    layer = StackedDropout(4, by_model=False)
    layer.keep(torch.tensor([1.0, 0.8, 0.5, 0.2]))
    layer.numbers = torch.Generator().manual_seed(0)
    x = torch.ones(4, 20, 3000) if len(shape) == 2 else torch.ones(shape)
    y = layer.train()(x)
    models = y if y.ndim == 3 else y.unflatten(1, (4, -1)).transpose(0, 1)
    for values, kept in zip(models, layer.kept.tolist(), strict=True):
        assert abs(float((values != 0).double().mean()) - kept) < 0.02
        assert abs(float(values.mean()) - 1) < 0.05


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(6)])
@pytest.mark.parametrize(
    "before", [nn.ReLU(), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Tanh()]
)
def test_kernels_and_rewriting_change_no_bit(
    pool: nn.MaxPool2d, before: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), before, pool, nn.Conv2d(4, 2, 3, padding=1))
    results = []
    for changed in (True, False):
        if not changed:
            monkeypatch.setattr(stacked, "_pool_before_relu", lambda module: None)
            monkeypatch.setattr(stacked, "_write_over", lambda module: None)
            monkeypatch.setattr(fused, "is_channels_last", lambda x: False)
        stack = StackedModule(module, MODELS)
        relus = [layer for layer in stack.modules() if isinstance(layer, nn.ReLU)]
        assert bool(relus) is (not changed and not isinstance(before, nn.Tanh))
        stack.load([module.state_dict()] * MODELS)
        y = stack(images().float())
        results.append([y, *torch.autograd.grad(y.square().sum(), list(stack.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_batched_layers_are_torchs(pool: nn.MaxPool2d, stride: int) -> None:
    convs = (nn.Conv2d(2, 4, 5, stride, 2), nn.Conv2d(4, 3, 1, stride), nn.Conv2d(2, 4, 3, stride))
    for conv in convs[:2], convs[2:]:
        modules = [nn.Sequential(*conv, nn.ReLU(), pool).double() for _ in range(MODELS)]
        x = torch.randn(MODELS, IMAGES, 2, 11, 10, dtype=torch.float64).round(decimals=1)
        x.requires_grad_()
        stack = stack_of(modules, by_model=True)
        together = stack(x).unflatten(0, (MODELS, IMAGES))
        alone = torch.stack([modules[0](batch) for batch in x])
        torch.testing.assert_close(together, alone)
        slope, plain = (torch.autograd.grad(y.square().sum(), x)[0] for y in (together, alone))
        torch.testing.assert_close(slope, plain)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_writing_over_keeps_the_layout(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("resnet18", width=1 / 32, stem="small", image_channels=1, classes=10, size=8)
    x = torch.randn(MODELS, IMAGES, 1, 4 * size, 4 * size)
    results = []
    for changed in (True, False):
        if not changed:
            monkeypatch.setattr(stacked, "_write_over", lambda module: None)
        stack = StackedModule(module, MODELS)
        stack.load([module.state_dict()] * MODELS)
        y = stack(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(stack.parameters()))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_what_is_read_twice_is_not_written_over() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.relu, self.last = nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)
            self.head = nn.Linear(4 * 8 * 8, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(self.conv(x))
            return self.head(torch.flatten(self.relu(self.last(self.relu(y)) + y), 1))

    modules = [Twice().double() for _ in range(MODELS)]
    stack, x = stack_of(modules), images()
    alone = torch.stack([module(batch) for module, batch in zip(modules, x, strict=True)])
    torch.testing.assert_close(stack(x), alone)
    over = [layer for layer in stack.modules() if isinstance(layer, stacked.WrittenOver)]
    assert len(over) == 2  # the last addition and the last ReLU


def test_what_cannot_be_stacked_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.PReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    with pytest.raises(ValueError, match="cannot stack PReLU at layer"):
        StackedModule(Odd(), 2)
