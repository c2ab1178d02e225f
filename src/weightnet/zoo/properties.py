"""Properties of trained networks, measured on images in eval mode, S networks of one shape at a
time.

Every property is measured three times: on all its images, and on two disjoint halves of them
(even and odd positions). The rank agreement of the halves bounds what any predictor can reach:
the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from weightnet.params import Params
from weightnet.randomness import torch_generator
from weightnet.tasks import Task
from weightnet.zoo.stacked import StackedModule
from weightnet.zoo.training import training_subset

BINS = 15
BATCH = 100


class PropertyConfig(Params):
    """On how many images properties are measured, and how strong the perturbations are (pixels: 0
    .. 1)."""

    test_images: int = Field(ge=2)
    perturbed_images: int = Field(ge=2)
    train_images: int = Field(ge=2)
    noise: float = Field(gt=0)
    adversarial: float = Field(gt=0)


class TrainingConfig(Params):
    """The train_zoo section: which properties to measure, and how."""

    properties: list[str] = Field(min_length=1)
    measure: PropertyConfig

    @field_validator("properties")
    @classmethod
    def _known(cls, properties: list[str]) -> list[str]:
        for name in properties:
            if name not in PROPERTIES:
                raise ValueError(
                    f"every property must be one of {', '.join(PROPERTIES)}; {name!r} is not"
                )
        return properties


@dataclass(frozen=True)
class Outputs:
    """Logits [S, N, C] under one condition, with the labels [S, N] they are compared with."""

    logits: Tensor
    labels: Tensor

    def half(self, which: int) -> Outputs:
        """The images at even (0) or odd (1) positions."""
        return Outputs(self.logits[:, which::2], self.labels[:, which::2])

    def correct(self) -> Tensor:
        """Whether each image is classified correctly: [S, N], 0 or 1."""
        return (self.logits.argmax(dim=2) == self.labels).to(torch.float64)


Conditions = Mapping[str, list[Outputs]]
"""Condition -> outputs. `train` has one entry a network (subsets differ in size), the others one
for all."""


def _accuracy(outputs: list[Outputs]) -> Tensor:
    return torch.cat([part.correct().mean(dim=1) for part in outputs])


def test_accuracy(conditions: Conditions) -> Tensor:
    """Fraction of test images classified correctly: [S]."""
    return _accuracy(conditions["test"])


def train_accuracy(conditions: Conditions) -> Tensor:
    """Fraction of the run's own training images classified as they were labelled in training:
    [S]."""
    return _accuracy(conditions["train"])


def generalization_gap(conditions: Conditions) -> Tensor:
    """Training accuracy minus test accuracy: [S]."""
    return train_accuracy(conditions) - test_accuracy(conditions)


def test_loss(conditions: Conditions) -> Tensor:
    """Mean cross-entropy on the test images, in nats: [S]."""
    (outputs,) = conditions["test"]
    logits = outputs.logits.to(torch.float64).flatten(0, 1)
    losses = F.cross_entropy(logits, outputs.labels.flatten(), reduction="none")
    return losses.view(outputs.labels.shape).mean(dim=1)


def noise_accuracy(conditions: Conditions) -> Tensor:
    """Accuracy on test images with Gaussian noise: [S]."""
    return _accuracy(conditions["noise"])


def adversarial_accuracy(conditions: Conditions) -> Tensor:
    """Accuracy on test images moved by FGSM (Goodfellow et al. 2014,
    https://arxiv.org/abs/1412.6572): [S]."""
    return _accuracy(conditions["adversarial"])


def calibration_error(conditions: Conditions) -> Tensor:
    """Expected calibration error over 15 bins of confidence (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599): [S]."""
    (outputs,) = conditions["test"]
    confidence = outputs.logits.to(torch.float64).softmax(dim=2).amax(dim=2)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bins (k / 15, (k + 1) / 15]
    difference = outputs.correct() - confidence
    sums = torch.zeros(len(bins), BINS, dtype=torch.float64).scatter_add_(1, bins, difference)
    return sums.abs().sum(dim=1) / bins.shape[1]


@dataclass(frozen=True)
class Property:
    """A measured property: its function, and the conditions that the function reads."""

    function: Callable[[Conditions], Tensor]
    conditions: tuple[str, ...]


PROPERTIES: dict[str, Property] = {
    "test_accuracy": Property(test_accuracy, ("test",)),
    "train_accuracy": Property(train_accuracy, ("train",)),
    "generalization_gap": Property(generalization_gap, ("train", "test")),
    "test_loss": Property(test_loss, ("test",)),
    "noise_accuracy": Property(noise_accuracy, ("noise",)),
    "adversarial_accuracy": Property(adversarial_accuracy, ("adversarial",)),
    "calibration_error": Property(calibration_error, ("test",)),
}


def measure_properties(
    stack: StackedModule,
    recipes: pd.DataFrame,
    task: Task,
    properties: list[str],
    config: PropertyConfig,
) -> pd.DataFrame:
    """Measure ``properties`` of the S networks in ``stack``.

    Returns one row a network with ``property.<name>``, ``half_a.<name>`` and ``half_b.<name>``
    (float64).
    """
    stack = stack.eval().requires_grad_(False)  # attacks want gradients of images alone
    needed = {condition for name in properties for condition in PROPERTIES[name].conditions}
    measured = {
        condition: _CONDITIONS[condition](stack, recipes, task, config) for condition in needed
    }
    columns: dict[str, Tensor] = {}
    halves = [
        {c: [part.half(k) for part in parts] for c, parts in measured.items()} for k in (0, 1)
    ]
    for prefix, outputs in zip(("property", "half_a", "half_b"), (measured, *halves), strict=True):
        for name in properties:
            columns[f"{prefix}.{name}"] = PROPERTIES[name].function(outputs)
    return pd.DataFrame({name: values.numpy() for name, values in columns.items()})


def _run(stack: StackedModule, images: Tensor) -> Tensor:
    """Logits [S, N, C] of images [N, ...] shown to every network, or [S, N, ...] shown one set to
    each."""
    parts = []
    with torch.no_grad():
        for batch in images.split(BATCH, dim=images.ndim - 4):
            parts.append(
                stack(batch if batch.ndim == 5 else batch.expand(stack.stack, *batch.shape))
            )
    return torch.cat(parts, dim=1).cpu()


def _spread(labels: Tensor, stack: StackedModule) -> Tensor:
    return labels.expand(stack.stack, -1)


def _device(stack: StackedModule) -> torch.device:
    return next(stack.parameters()).device


def _test(
    stack: StackedModule, _: pd.DataFrame, task: Task, config: PropertyConfig
) -> list[Outputs]:
    images = task.normalize(task.test_images[: config.test_images]).to(_device(stack))
    return [Outputs(_run(stack, images), _spread(task.test_labels[: config.test_images], stack))]


def _train(
    stack: StackedModule, recipes: pd.DataFrame, task: Task, config: PropertyConfig
) -> list[Outputs]:
    subsets = [training_subset(row, task) for row in recipes.to_dict("records")]
    sizes = [min(config.train_images, len(labels)) for _, labels in subsets]
    longest = max(sizes)
    # Subsets differ in size: pad by repetition to run them as one stack, then cut.
    padded = torch.stack(
        [
            indices[torch.arange(longest) % n]
            for (indices, _), n in zip(subsets, sizes, strict=True)
        ]
    )
    images = task.train_inputs[padded].to(_device(stack))
    logits = _run(stack, images)
    return [
        Outputs(logits[i : i + 1, :n], labels[None, :n])
        for i, ((_, labels), n) in enumerate(zip(subsets, sizes, strict=True))
    ]


def _perturbed_base(
    task: Task, config: PropertyConfig
) -> tuple[Tensor, Tensor, float, float, float]:
    mean, deviation = task.pixel_statistics
    images = task.normalize(task.test_images[: config.perturbed_images])
    labels = task.test_labels[: config.perturbed_images]
    return images, labels, -mean / deviation, (1 - mean) / deviation, deviation


def _noise(
    stack: StackedModule, _: pd.DataFrame, task: Task, config: PropertyConfig
) -> list[Outputs]:
    images, labels, black, white, deviation = _perturbed_base(task, config)
    noise = torch.randn(images.shape, generator=torch_generator("noise", task.name))
    images = (images + noise * (config.noise / deviation)).clamp(black, white)
    return [Outputs(_run(stack, images.to(_device(stack))), _spread(labels, stack))]


def _adversarial(
    stack: StackedModule, _: pd.DataFrame, task: Task, config: PropertyConfig
) -> list[Outputs]:
    images, labels, black, white, deviation = _perturbed_base(task, config)
    device, reach = _device(stack), config.adversarial / deviation
    parts = []
    for batch, target in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        inputs = batch.to(device).repeat(stack.stack, 1, 1, 1, 1).requires_grad_()
        targets = target.to(device).repeat(stack.stack)
        loss = F.cross_entropy(stack(inputs).flatten(0, 1), targets, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, [inputs])
        parts.append(_run(stack, (inputs.detach() + reach * gradient.sign()).clamp(black, white)))
    return [Outputs(torch.cat(parts, dim=1), _spread(labels, stack))]


_CONDITIONS: dict[
    str, Callable[[StackedModule, pd.DataFrame, Task, PropertyConfig], list[Outputs]]
] = {
    "test": _test,
    "train": _train,
    "noise": _noise,
    "adversarial": _adversarial,
}
