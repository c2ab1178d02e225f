"""Train a stack: S runs of one shape at once, each with its own recipe, data and random stream.

A run's initial weights, training images, noisy labels and batch order depend on its recipe alone
(not on its neighbours in the stack); tests/zoo/test_training.py checks a stack against
torch.optim, one run at a time. Runs leave the stack as they end. A run whose loss is no longer
finite leaves it too, marked as diverged, with the last weights seen to give a finite loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightnet.randomness import derive_seed, numpy_generator, torch_generator
from weightnet.tasks import Task
from weightnet.zoo import fused
from weightnet.zoo.stacked import StackedModule, State, model_state

MOMENTUM = 0.9
BETA_SQUARE = 0.999
EPSILON = 1e-8
SNAPSHOT_STEPS = 10

Recipe = Mapping[str, Any]


@dataclass(frozen=True)
class TrainedStack:
    """What training leaves: plain state dicts, and which runs diverged (at which step; -1: none
    did)."""

    states: list[State]
    diverged_at: list[int]


@torch.no_grad()
def initialize(module: nn.Module, recipe: Recipe) -> None:
    """Draw a module's initial weights in place: the recipe's scheme, times its scale; biases 0,
    norms 1."""
    generator = torch_generator(recipe["seed"], "initialize")
    schemes = {
        "kaiming": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu", generator=generator),
        "xavier": lambda w: nn.init.xavier_uniform_(w, generator=generator),
        "orthogonal": lambda w: nn.init.orthogonal_(w, generator=generator),
    }
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            schemes[recipe["initialization"]](layer.weight)
            layer.weight.mul_(recipe["initialization_scale"])
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.BatchNorm2d):
            layer.reset_parameters()


def training_subset(recipe: Recipe, task: Task) -> tuple[Tensor, Tensor]:
    """The run's training images as indices [N] and its labels [N], a part of them replaced at
    random.

    Label noise p gives each image, with probability p, a label drawn uniformly over the C classes.
    """
    generator = numpy_generator(recipe["seed"], "subset")
    indices = np.sort(generator.permutation(len(task.train_labels))[: recipe["train_images"]])
    labels = task.train_labels.numpy()[indices].copy()
    noisy = generator.random(len(labels)) < recipe["label_noise"]
    labels[noisy] = generator.integers(task.classes, size=int(noisy.sum()))
    return torch.from_numpy(indices), torch.from_numpy(labels)


def batch_order(recipe: Recipe) -> Tensor:
    """Positions in the run's training subset, int64 [steps, batch]: a stream of shuffled
    epochs."""
    generator = numpy_generator(recipe["seed"], "batches")
    needed = recipe["steps"] * recipe["batch_size"]
    epochs = -(-needed // recipe["train_images"])
    stream = np.concatenate([generator.permutation(recipe["train_images"]) for _ in range(epochs)])
    return torch.from_numpy(stream[:needed].reshape(recipe["steps"], recipe["batch_size"]))


def shift_order(recipe: Recipe) -> Tensor:
    """Augmentation: how far each image is shifted, int64 [steps, batch, 2], in pixels of -a ..
    a."""
    generator = numpy_generator(recipe["seed"], "shifts")
    reach = recipe["augmentation"]
    size = (recipe["steps"], recipe["batch_size"], 2)
    return torch.from_numpy(generator.integers(-reach, reach, size=size, endpoint=True))


def shift(images: Tensor, offsets: Tensor, reach: int) -> Tensor:
    """Shift each image [B, channels, height, width] by its offsets [B, 2], filling with the
    edge."""
    if reach == 0:
        return images
    height, width = images.shape[-2:]
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = (offsets[:, 0, None] + reach + torch.arange(height))[:, None, :, None]
    columns = (offsets[:, 1, None] + reach + torch.arange(width))[:, None, None, :]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[torch.arange(len(images))[:, None, None, None], channels, rows, columns]


class _Batches:
    """What the runs see, step by step."""

    def __init__(
        self, recipes: list[Recipe], task: Task, images: Tensor, device: torch.device
    ) -> None:
        size = (max(recipe["steps"] for recipe in recipes), len(recipes), recipes[0]["batch_size"])
        self.images, self.device = images, device
        self.rows = torch.arange(len(recipes))
        self.chosen = torch.zeros(size, dtype=torch.int64)
        self.labels = torch.zeros(size, dtype=torch.int64)
        self.offsets = torch.zeros((*size, 2), dtype=torch.int64)
        self.reach = max(recipe["augmentation"] for recipe in recipes)
        for row, recipe in enumerate(recipes):
            indices, labels = training_subset(recipe, task)
            order = batch_order(recipe)
            self.chosen[: len(order), row] = indices[order]
            self.labels[: len(order), row] = labels[order]
            if recipe["augmentation"]:
                self.offsets[: len(order), row] = shift_order(recipe)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images [S, B, channels, height, width], in memory as a stack reads them, and labels [S,
        B]."""
        chosen, labels, offsets = (
            values[step].index_select(0, self.rows)
            for values in (self.chosen, self.labels, self.offsets)
        )
        models, batch = chosen.shape
        channels, height, width = self.images.shape[1:]
        room = torch.empty(
            (batch, height, width, models, channels), dtype=self.images.dtype, device=self.device
        )
        inputs = room.permute(3, 0, 4, 1, 2)
        if self.device.type == "cpu":
            fused.gather(self.images, chosen, offsets, inputs)
        else:
            images = shift(self.images[chosen.flatten()], offsets.flatten(0, 1), self.reach)
            inputs.copy_(images.view(inputs.shape))
        return inputs, labels.to(self.device)

    def keep(self, rows: Tensor) -> None:
        """Drop the runs that are not in ``rows``."""
        self.rows = self.rows[rows]


class _Optimizer:
    """SGD with momentum and AdamW side by side on one [S, parameters] matrix, as torch.optim
    computes them, under a cosine schedule to zero."""

    def __init__(
        self, recipes: list[Recipe], parameters: list[Tensor], device: torch.device
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=parameters[0].dtype, device=device)[:, None]

        adam = [recipe["optimizer"] == "adamw" for recipe in recipes]
        self.adam = torch.tensor(adam, device=device)[:, None]
        rates = column([recipe["learning_rate"] for recipe in recipes])
        decay = [recipe["weight_decay"] for recipe in recipes]
        self.coupled = column([0.0 if a else d for a, d in zip(adam, decay, strict=True)])
        decoupled = column([d if a else 0.0 for a, d in zip(adam, decay, strict=True)])
        self.gain = column([1 - MOMENTUM if a else 1.0 for a in adam])
        steps = [recipe["steps"] for recipe in recipes]
        angles = column([math.pi * t for t in range(max(steps))]).T * column(steps).reciprocal()
        self.rates = rates * 0.5 * (1 + torch.cos(angles))  # [S, steps]
        self.shrinkages = 1 - self.rates * decoupled  # what weight decay leaves
        self.shapes = [p.shape[1:] for p in parameters]
        self.weights = torch.cat([p.detach().flatten(1) for p in parameters], dim=1)
        self.first = torch.zeros_like(self.weights)
        self.second = torch.zeros_like(self.weights)
        self._view()

    def step(self, t: int, gradients: Sequence[Tensor]) -> None:
        """Update ``weights`` by the gradients (each [S * d0, ...]) of step ``t`` (from 0)."""
        gradient = torch.cat([g.reshape(len(self.weights), -1) for g in gradients], dim=1)
        if gradient.device.type != "cpu":
            self.step_plainly(t, gradient)
            return
        weights, first, second, adam, coupled, gain, rates, shrinkages = self._arrays
        fused.update(
            weights,
            gradient,
            (first, second),
            (adam[:, 0], coupled[:, 0], gain[:, 0], shrinkages[:, t], rates[:, t]),
            (MOMENTUM, BETA_SQUARE, 1 - BETA_SQUARE, *self._corrections(t), EPSILON),
        )

    def step_plainly(self, t: int, gradient: Tensor) -> None:
        """What `step` does, in calls of torch; ``gradient`` [S, parameters] is spoilt."""
        rate, shrinkage = (values[:, t : t + 1] for values in (self.rates, self.shrinkages))
        first_sum, second_sum = self._corrections(t)
        gradient.addcmul_(self.weights, self.coupled)
        self.first.mul_(MOMENTUM).addcmul_(gradient, self.gain)
        self.second.mul_(BETA_SQUARE).addcmul_(gradient, gradient, value=1 - BETA_SQUARE)
        root = (self.second / second_sum).sqrt_().add_(EPSILON)
        direction = torch.where(self.adam, self.first / first_sum / root, self.first)
        self.weights.mul_(shrinkage).addcmul_(rate, direction, value=-1)

    def _corrections(self, t: int) -> tuple[float, float]:
        """Of the first and second moment, which start from 0."""
        return 1 - MOMENTUM ** (t + 1), 1 - BETA_SQUARE ** (t + 1)

    def _view(self) -> None:
        """Let ``parts`` be the weights of each parameter, each [S, ...]; and see all as arrays."""
        parts = self.weights.split([math.prod(shape) for shape in self.shapes], dim=1)
        self.parts = [p.view(-1, *shape) for p, shape in zip(parts, self.shapes, strict=True)]
        values = (self.weights, self.first, self.second, self.adam, self.coupled, self.gain)
        if self.weights.device.type == "cpu":
            self._arrays = [v.numpy() for v in (*values, self.rates, self.shrinkages)]

    def keep(self, rows: Tensor) -> None:
        """Drop the models that are not in ``rows``."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])
        self._view()


def train_stack(
    module: nn.Module, recipes: pd.DataFrame, task: Task, device: str = "cpu"
) -> TrainedStack:
    """Train the runs of one shape together.

    Args:
        module: A module of the shape; its weights are drawn anew, and computed in its dtype.
        recipes: S rows of `sample_recipes`, of one stack.
        task: What they learn.
        device: Where to compute.
    """
    rows: list[Recipe] = [
        {str(k): v for k, v in row.items()} for row in recipes.to_dict("records")
    ]
    images = task.train_inputs.to(next(module.parameters()).dtype)
    batches = _Batches(rows, task, images, torch.device(device))
    states: list[State] = []
    for recipe in rows:
        initialize(module, recipe)
        states.append(
            {n: t.clone() for n, t in module.state_dict().items() if t.is_floating_point()}
        )
    diverged_at = [-1] * len(rows)
    dropout = torch_generator("dropout", *(recipe["run"] for recipe in rows))
    alive = list(range(len(rows)))
    stack = _make_stack(module, states, rows, dropout, device)
    views = _parameter_views(stack)
    optimizer = _Optimizer(rows, views, torch.device(device))
    snapshot = stack.snapshot()
    safe = [(snapshot, row) for row in alive]  # the last weights seen to give a finite loss
    last: dict[int, Tensor] = {}  # images of each run
    step = 0
    while alive:
        inputs, targets = batches.at(step)
        logits = stack(inputs)
        losses = (
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            .view(len(alive), -1)
            .mean(1)
        )
        finite = torch.isfinite(losses.detach()).tolist()
        if step % SNAPSHOT_STEPS == 0:
            snapshot = stack.snapshot()
            for row, whole in enumerate(stack.are_finite().tolist()):
                if finite[row] and whole:
                    safe[alive[row]] = snapshot, row
        gradients = torch.autograd.grad(losses.sum(), list(stack.parameters()))
        optimizer.step(step, gradients)
        torch._foreach_copy_(views, optimizer.parts)
        step += 1
        ended = [not finite[row] or rows[i]["steps"] <= step for row, i in enumerate(alive)]
        if not any(ended):
            continue
        for row, i in enumerate(alive):
            if ended[row]:
                source, at = (stack.stacked_state(), row) if finite[row] else safe[i]
                states[i], last[i] = model_state(source, at), inputs[row]
                if not finite[row]:
                    diverged_at[i] = step - 1
        keep = [row for row in range(len(alive)) if not ended[row]]
        alive = [alive[row] for row in keep]
        if alive:
            rows_kept = torch.tensor(keep, device=device)
            batches.keep(torch.tensor(keep))
            optimizer.keep(rows_kept)
            stack.keep(rows_kept)
            views = _parameter_views(stack)
    seen = torch.stack([last[i] for i in range(len(rows))])
    for i, sound in enumerate(_are_sound(stack, states, seen)):
        if diverged_at[i] == -1 and not sound:
            states[i], diverged_at[i] = model_state(*safe[i]), rows[i]["steps"] - 1
    return TrainedStack([{n: t.cpu() for n, t in state.items()} for state in states], diverged_at)


def _make_stack(
    module: nn.Module,
    states: list[State],
    rows: list[Recipe],
    dropout: torch.Generator,
    device: str,
) -> StackedModule:
    stack = StackedModule(module, len(states)).to(device)
    stack.load(states)
    if torch.device(device).type != "cpu":
        dropout = torch.Generator(device).manual_seed(
            derive_seed(int(dropout.initial_seed()), device)
        )
    stack.set_dropout(torch.tensor([row["dropout"] for row in rows], device=device), dropout)
    return stack.train()


def _parameter_views(stack: StackedModule) -> list[Tensor]:
    return [p.detach().view(stack.stack, -1, *p.shape[1:]) for p in stack.parameters()]


@torch.no_grad()
def _are_sound(stack: StackedModule, states: list[State], images: Tensor) -> list[bool]:
    """Whether the logits of each model for its images are finite; ``stack`` is spoilt."""
    stack.keep(torch.zeros(len(states), dtype=torch.int64, device=images.device))
    stack.load(states)
    logits = stack.eval()(images)
    return torch.isfinite(logits).flatten(1).all(1).tolist()
