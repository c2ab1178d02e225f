"""A stack is trained as torch.optim would train its runs one at a time."""

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightnet.tasks import load_task
from weightnet.zoo import training
from weightnet.zoo.architectures import build
from weightnet.zoo.training import (
    MOMENTUM,
    _Optimizer,
    batch_order,
    initialize,
    shift,
    shift_order,
    train_stack,
    training_subset,
)

next_look = training._next_look


def recipe(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "run": f"run{number}",
        "optimizer": ("sgd", "adamw")[number % 2],
        "learning_rate": 0.002 / (number + 1),
        "weight_decay": 0.01 * number,
        "dropout": 0.0,
        "label_noise": 0.2 * number,
        "augmentation": number % 2,
        "train_images": 60 + 7 * number,
        "steps": 2 + number,
        "batch_size": 16,
        "initialization": ("kaiming", "xavier", "orthogonal")[number % 3],
        "initialization_scale": 1.0 + 0.1 * number,
        "seed": 100 + number,
    }
    return {**row, **changes}


def train_plainly(module: nn.Module, row: dict[str, Any]) -> nn.Module:
    """The reference: one run, torch.optim, nothing shared."""
    task = load_task("digits")
    images = task.normalize(task.train_images).to(next(module.parameters()).dtype)
    initialize(module, row)
    indices, labels = training_subset(row, task)
    order, shifts = batch_order(row), shift_order(row)
    optimizer: torch.optim.Optimizer
    if row["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(
            module.parameters(),
            row["learning_rate"],
            MOMENTUM,
            weight_decay=row["weight_decay"],
        )
    else:
        optimizer = torch.optim.AdamW(
            module.parameters(), row["learning_rate"], weight_decay=row["weight_decay"]
        )
    module.train()
    for step in range(row["steps"]):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / row["steps"]))
            group["lr"] = row["learning_rate"] * cosine
        batch = shift(images[indices[order[step]]], shifts[step], row["augmentation"])
        optimizer.zero_grad()
        F.cross_entropy(module(batch), labels[order[step]]).backward()
        optimizer.step()
    return module


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("cnn", {"size": 8, "width": 5, "depth": 3, "residual": True, "batchnorm": True}),
    "strided": ("cnn", {"size": 8, "width": 4, "depth": 2, "downsample": "stride"}),
    "resnet18": ("resnet18", {"size": 8, "width": 1 / 32}),
    "densenet121": ("densenet121", {"size": 8, "width": 1 / 32}),
    "mobilenet_v2": ("mobilenet_v2", {"size": 8, "width": 1 / 8, "dropout": 0.0}),
    "vgg11": ("vgg11", {"size": 8, "width": 1 / 32, "dropout": 0.0}),
}


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stack_trains_like_its_runs_alone(shape: str, device: str) -> None:
    family, arguments = SHAPES[shape]
    if family != "cnn":
        arguments = {**arguments, "stem": "small", "image_channels": 1, "classes": 10}
    rows = [recipe(number) for number in range(3)]
    task = load_task("digits")
    # In float64, because a deep BatchNorm network amplifies rounding a thousandfold each step.
    trained = train_stack(build(family, **arguments).double(), pd.DataFrame(rows), task, device)
    assert trained.diverged_at == [-1, -1, -1]
    for row, state in zip(rows, trained.states, strict=True):
        plain = train_plainly(build(family, **arguments).double(), row).state_dict()
        assert set(state) == {n for n, t in plain.items() if t.is_floating_point()}
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_looking_and_leaving_later_changes_nothing(
    device: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [recipe(number, steps=2 + 7 * number) for number in range(6)]
    rows[2]["learning_rate"], rows[5]["learning_rate"] = 1e30, 1e14
    table, task = pd.DataFrame(rows), load_task("digits")
    module = build("cnn", size=8, width=4, depth=2, batchnorm=True).double()
    at_once = train_stack(module, table, task)
    monkeypatch.setattr(training, "_going_share", lambda device: share)
    monkeypatch.setattr(training, "_next_look", lambda _, *rest: next_look("cuda", *rest))
    later = train_stack(module, table, task, device)
    assert at_once.diverged_at == later.diverged_at
    assert later.diverged_at[2] >= 0
    for one, other in zip(at_once.states, later.states, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=1e-8)


def test_a_fused_step_is_torchs() -> None:
    rows = [recipe(number) for number in range(3)]
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 3, 50, generator=generator).unbind()
    fast, plain = (_Optimizer(rows, [start.clone()], torch.device("cpu")) for _ in range(2))
    for step, gradient in enumerate(gradients):
        fast.step(step, [gradient])
        plain.step_plainly(torch.tensor([step]), gradient.clone())
        for name in ("weights", "first"):
            torch.testing.assert_close(
                getattr(fast, name), getattr(plain, name), rtol=1e-6, atol=1e-7
            )


def test_a_diverging_run_is_marked_and_leaves_its_neighbours_alone() -> None:
    calm = recipe(0)
    wild = recipe(2, learning_rate=1e30, steps=12)
    arguments = {"size": 8, "width": 4, "depth": 2}
    task = load_task("digits")
    both = train_stack(build("cnn", **arguments), pd.DataFrame([wild, calm]), task)
    assert both.diverged_at[0] >= 0
    assert both.diverged_at[1] == -1
    assert all(bool(torch.isfinite(t).all()) for state in both.states for t in state.values())
    alone = train_plainly(build("cnn", **arguments), calm).state_dict()
    for name, tensor in both.states[1].items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)


def test_a_run_whose_last_step_overflows_keeps_the_weights_before() -> None:
    calm, wild = recipe(0), recipe(2, learning_rate=1e30, steps=1)
    arguments = {"size": 8, "width": 4, "depth": 2}
    task = load_task("digits")
    both = train_stack(build("cnn", **arguments), pd.DataFrame([wild, calm]), task)
    assert both.diverged_at == [0, -1]
    start = build("cnn", **arguments)
    initialize(start, wild)
    for name, tensor in start.state_dict().items():
        assert torch.equal(both.states[0][name], tensor)


def test_the_same_stack_gives_the_same_bytes() -> None:
    rows = pd.DataFrame([recipe(number, dropout=0.3) for number in range(2)])
    first, second = (
        train_stack(build("cnn", size=8, width=4, depth=2), rows, load_task("digits"))
        for _ in range(2)
    )
    for one, other in zip(first.states, second.states, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_label_noise_replaces_the_stated_fraction() -> None:
    task = load_task("fashion")
    indices, labels = training_subset(recipe(0, train_images=20000, label_noise=0.5), task)
    changed = (labels != task.train_labels[indices]).double().mean()
    assert abs(changed - 0.5 * 0.9) < 0.02  # a tenth of the random labels are right by chance


def test_shift_moves_images_by_whole_pixels() -> None:
    images = torch.arange(2 * 9.0).view(2, 1, 3, 3)
    moved = shift(images, torch.tensor([[0, 0], [1, -1]]), 1)
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, 0, :2, 1:], images[1, 0, 1:, :2])
