"""Measured properties agree with plain PyTorch and with values computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from weightnet.tasks import load_task
from weightnet.zoo import properties as rooms
from weightnet.zoo.architectures import build
from weightnet.zoo.properties import PROPERTIES, Outputs, PropertyConfig, measure_properties
from weightnet.zoo.stacked import StackedModule
from weightnet.zoo.training import training_subset

CONFIG = PropertyConfig(
    test_images=300, perturbed_images=60, train_images=50, noise=0.3, adversarial=0.1
)
TASK = load_task("digits")
RECIPES = pd.DataFrame(
    [
        {"run": "a", "seed": 1, "train_images": 64, "label_noise": 0.0},
        {"run": "b", "seed": 2, "train_images": 30, "label_noise": 0.5},
    ]
)


def modules() -> list[torch.nn.Module]:
    built = []
    for seed in range(len(RECIPES)):
        torch.manual_seed(seed)
        built.append(build("cnn", size=8, width=4, depth=2, batchnorm=True).eval())
        with torch.no_grad():
            built[-1].get_submodule("head").weight.mul_(8)
    return built


def measure(names: list[str], config: PropertyConfig = CONFIG) -> pd.DataFrame:
    plain = modules()
    stack = StackedModule(plain[0], len(plain))
    stack.load([module.state_dict() for module in plain])
    return measure_properties(stack, RECIPES, TASK, names, config)


@pytest.fixture(scope="module")
def measured() -> pd.DataFrame:
    return measure(list(PROPERTIES))


def accuracy(module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return float((module(images).argmax(1) == labels).double().mean())


def test_accuracies_and_loss_agree_with_plain_modules(measured: pd.DataFrame) -> None:
    images, labels = TASK.normalize(TASK.test_images[:300]), TASK.test_labels[:300]
    for i, module in enumerate(modules()):
        row = measured.iloc[i]
        assert row["property.test_accuracy"] == pytest.approx(accuracy(module, images, labels))
        with torch.no_grad():
            loss = float(F.cross_entropy(module(images), labels))
        assert row["property.test_loss"] == pytest.approx(loss, rel=1e-5)
        recipe: dict[str, Any] = {str(k): v for k, v in RECIPES.iloc[i].items()}
        indices, given = (part[:50] for part in training_subset(recipe, TASK))
        train = accuracy(module, TASK.normalize(TASK.train_images[indices]), given)
        assert row["property.train_accuracy"] == pytest.approx(train)
        gap = row["property.train_accuracy"] - row["property.test_accuracy"]
        assert row["property.generalization_gap"] == pytest.approx(gap)


def test_adversarial_accuracy_is_plain_fgsm(measured: pd.DataFrame) -> None:
    mean, deviation = TASK.pixel_statistics
    pixels = TASK.test_images[:60].float() / 255
    labels = TASK.test_labels[:60]
    for i, module in enumerate(modules()):
        x = pixels.clone().requires_grad_()
        F.cross_entropy(module((x - mean) / deviation), labels).backward()
        assert x.grad is not None
        moved = (pixels + CONFIG.adversarial * x.grad.sign()).clamp(0, 1)
        expected = accuracy(module, (moved - mean) / deviation, labels)
        # A gradient of 0 may have either sign after rounding: one image of leeway.
        assert abs(measured["property.adversarial_accuracy"][i] - expected) <= 1 / 60 + 1e-9


def test_perturbations_do_harm_and_noise_is_the_same_each_time() -> None:
    names = ["noise_accuracy", "adversarial_accuracy"]
    first, second = measure(names), measure(names)
    pd.testing.assert_frame_equal(first, second)
    gentle = CONFIG.model_copy(update={"noise": 1e-9, "adversarial": 1e-9})
    clean = measure(["noise_accuracy", "adversarial_accuracy"], gentle)
    plain = measure(["test_accuracy"], CONFIG.model_copy(update={"test_images": 60}))
    for name in names:
        np.testing.assert_allclose(clean[f"property.{name}"], plain["property.test_accuracy"])


def test_halves_are_disjoint_and_average_to_the_whole() -> None:
    whole = Outputs(torch.arange(20.0).view(1, 10, 2), torch.arange(10)[None])
    a, b = whole.half(0), whole.half(1)
    assert set(a.labels[0].tolist()).isdisjoint(b.labels[0].tolist())
    assert sorted([*a.labels[0].tolist(), *b.labels[0].tolist()]) == list(range(10))
    assert torch.equal(a.logits[0], whole.logits[0, ::2])


def test_half_properties_average_to_the_property(measured: pd.DataFrame) -> None:
    for name in ("test_accuracy", "test_loss", "noise_accuracy", "adversarial_accuracy"):
        halves = (measured[f"half_a.{name}"] + measured[f"half_b.{name}"]) / 2
        np.testing.assert_allclose(halves, measured[f"property.{name}"], rtol=1e-9)
    assert not np.array_equal(measured["half_a.test_loss"], measured["half_b.test_loss"])


def outputs(confidence: list[float], correct: list[bool]) -> dict[str, list[Outputs]]:
    """Two-class outputs of one network with the given confidence in class 0."""
    p = torch.tensor(confidence, dtype=torch.float64)
    logits = torch.stack([p.log(), (1 - p).log()], dim=1)[None]
    labels = torch.tensor([[0 if right else 1 for right in correct]])
    return {"test": [Outputs(logits, labels)]}


def test_calibration_error_by_hand() -> None:
    # One bin (.6, .667] with mean confidence .63 and accuracy .5; one (.933, 1] with .97 and 1.
    found = rooms.calibration_error(outputs([0.62, 0.64, 0.96, 0.98], [True, False, True, True]))
    expected = 0.5 * abs(0.5 - 0.63) + 0.5 * abs(1 - 0.97)
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_the_extremes() -> None:
    sure = {"test": [Outputs(torch.tensor([[[900.0, 0.0]] * 4]), torch.tensor([[0, 0, 1, 1]]))]}
    assert float(rooms.calibration_error(sure)) == pytest.approx(0.5)
    right = {"test": [Outputs(torch.tensor([[[900.0, 0.0]] * 4]), torch.zeros(1, 4).long())]}
    assert float(rooms.calibration_error(right)) == pytest.approx(0.0)


def test_only_what_is_asked_for_is_measured() -> None:
    assert list(measure(["test_loss"])) == [
        "property.test_loss",
        "half_a.test_loss",
        "half_b.test_loss",
    ]


def test_an_attack_computes_no_gradients_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []

    def noted(loss: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        wanted.append(loss.grad_fn)
        return gradient(loss, inputs)

    gradient = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", noted)
    measure(["adversarial_accuracy"])
    nodes, leaves = list(wanted), set()
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is not None:
                nodes.append(node)
                if hasattr(node, "variable"):
                    leaves.add(tuple(node.variable.shape[2:]))
    assert wanted and leaves == {(1, 8, 8)}
