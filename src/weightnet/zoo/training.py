"""Train a stack: S runs of one shape at once, each with its own recipe, data and random stream.

A run's initial weights, training images, noisy labels and batch order depend on its recipe alone
(not on its neighbours in the stack); tests/zoo/test_training.py checks a stack against
torch.optim, one run at a time. Runs leave the stack as they end, on a GPU some together. A run
whose loss is no longer finite leaves it too, marked as diverged, with the last weights seen to
give a finite loss.
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
from weightnet.zoo.stacked import StackedModule, State, are_finite, model_state, stack_on

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
    numbers = torch.arange(max(images.shape), device=images.device)
    rows = (offsets[:, 0, None] + reach + numbers[:height])[:, None, :, None]
    columns = (offsets[:, 1, None] + reach + numbers[:width])[:, None, None, :]
    channels = numbers[: images.shape[1]][None, :, None, None]
    return padded[numbers[: len(images)][:, None, None, None], channels, rows, columns]


class _Batches:
    """What the runs see, step by step."""

    def __init__(
        self, recipes: list[Recipe], task: Task, images: Tensor, device: torch.device
    ) -> None:
        stack, most = len(recipes), max(recipe["train_images"] for recipe in recipes)
        seen = (stack, max(recipe["steps"] for recipe in recipes), recipes[0]["batch_size"])
        indices, labels = (torch.zeros(stack, most, dtype=torch.int64) for _ in range(2))
        positions = torch.zeros(seen, dtype=torch.int32)
        offsets = torch.zeros((*seen, 2), dtype=torch.int16)
        for row, recipe in enumerate(recipes):
            chosen, drawn = training_subset(recipe, task)
            indices[row, : len(chosen)], labels[row, : len(drawn)] = chosen, drawn
            positions[row, : recipe["steps"]] = batch_order(recipe)
            if recipe["augmentation"]:
                offsets[row, : recipe["steps"]] = shift_order(recipe)
        self.images = images.to(device)
        self.indices, self.labels, self.positions, self.offsets = (
            values.to(device) for values in (indices, labels, positions, offsets)
        )

    def at(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        """Images [S, B, channels, height, width], in memory as a stack reads them, and labels [S,
        B]."""
        positions, offsets = (_at(v, step).long() for v in (self.positions, self.offsets))
        chosen, labels = (v.gather(1, positions) for v in (self.indices, self.labels))
        models, batch = chosen.shape
        channels, height, width = self.images.shape[1:]
        if self.images.device.type == "cpu":
            room = torch.empty((batch, height, width, models, channels), dtype=self.images.dtype)
            inputs = room.permute(3, 0, 4, 1, 2)
            fused.gather(self.images, chosen, offsets, inputs)
            return inputs, labels
        rows, columns = (
            (torch.arange(pixels, device=chosen.device) + offset[..., None]).clamp(0, pixels - 1)
            for pixels, offset in zip((height, width), offsets.unbind(2), strict=True)
        )
        where = (chosen[..., None, None], rows[..., None], columns[:, :, None])
        return self.images.permute(0, 2, 3, 1)[where].permute(0, 1, 4, 2, 3), labels

    def keep(self, rows: Tensor) -> None:
        """Drop the runs that are not in ``rows``."""
        for name in ("indices", "labels", "positions", "offsets"):
            setattr(self, name, getattr(self, name)[rows])


def _at(values: Tensor, step: int | Tensor) -> Tensor:
    """[S, steps, ...] -> [S, ...]; a step on a GPU is int64 [1]."""
    return values[:, step] if isinstance(step, int) else values.index_select(1, step).squeeze(1)


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
        corrections = zip(*map(_corrections, range(max(steps))), strict=True)
        self.corrections = [column(list(values)).T for values in corrections]  # [1, steps] each
        self.shapes = [p.shape[1:] for p in parameters]
        self.weights = torch.cat([p.detach().flatten(1) for p in parameters], dim=1)
        self.first = torch.zeros_like(self.weights)
        self.second = torch.zeros_like(self.weights)
        self._view()

    def step(self, t: int | Tensor, gradients: Sequence[Tensor]) -> None:
        """Update ``weights`` by the gradients (each [S * d0, ...]) of step ``t`` (from 0)."""
        gradient = torch.cat([g.reshape(len(self.weights), -1) for g in gradients], dim=1)
        if not isinstance(t, int):
            self.step_plainly(t, gradient)
            return
        weights, first, second, adam, coupled, gain, rates, shrinkages = self._arrays
        fused.update(
            weights,
            gradient,
            (first, second),
            (adam[:, 0], coupled[:, 0], gain[:, 0], shrinkages[:, t], rates[:, t]),
            (MOMENTUM, BETA_SQUARE, 1 - BETA_SQUARE, *_corrections(t), EPSILON),
        )

    def step_plainly(self, t: Tensor, gradient: Tensor) -> None:
        """What `step` does, in calls of torch, with ``t`` on the device, int64 [1]; ``gradient``
        [S, parameters] is spoilt."""
        rate, shrinkage = (values.index_select(1, t) for values in (self.rates, self.shrinkages))
        first_sum, second_sum = (values.index_select(1, t) for values in self.corrections)
        gradient.addcmul_(self.weights, self.coupled)
        self.first.mul_(MOMENTUM).addcmul_(gradient, self.gain)
        self.second.mul_(BETA_SQUARE).addcmul_(gradient, gradient, value=1 - BETA_SQUARE)
        root = (self.second / second_sum).sqrt_().add_(EPSILON)
        direction = torch.where(self.adam, self.first / first_sum / root, self.first)
        self.weights.mul_(shrinkage).addcmul_(rate, direction, value=-1)

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


def _corrections(t: int) -> tuple[float, float]:
    """Of the first and second moment, which start from 0."""
    return 1 - MOMENTUM ** (t + 1), 1 - BETA_SQUARE ** (t + 1)


class _Steps:
    """Steps of the runs in a stack.

    A GPU records one and replays it, since it computes a step sooner than its kernels are launched
    one by one (CUDA graphs, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
    """

    def __init__(
        self,
        stack: StackedModule,
        batches: _Batches,
        optimizer: _Optimizer,
        generator: torch.Generator,
    ) -> None:
        self.stack, self.batches, self.optimizer = stack, batches, optimizer
        self.generator = generator
        self.views = _parameter_views(stack)
        self.device = self.views[0].device
        self.count = torch.zeros(1, dtype=torch.int64, device=self.device)  # of steps taken
        self.is_first, self.is_recorded = True, False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.recorded: tuple[Tensor, Tensor]  # what the graph computes

    def take(self, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The losses [steps, S] before each update, and the images of the last step [S, B,
        channels, height, width]."""
        losses = []
        for step in steps:
            if self.device.type == "cpu":
                found, images = self._compute(step)
            elif self.is_first or self.device.type != "cuda":
                self.is_first = False  # the first prepares what cannot be recorded
                found, images = self._compute(self.count)
            else:
                found, images = self._replay()
            losses.append(found)
            self.count += 1
        return torch.stack(losses), images

    def _compute(self, step: int | Tensor) -> tuple[Tensor, Tensor]:
        images, targets = self.batches.at(step)
        logits = self.stack(images)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses = losses.view(targets.shape).mean(1)
        gradients = torch.autograd.grad(losses.sum(), list(self.stack.parameters()))
        self.optimizer.step(step, gradients)
        torch._foreach_copy_(self.views, self.optimizer.parts)
        return losses.detach(), images

    def _replay(self) -> tuple[Tensor, Tensor]:
        if self.graph is None or not self.is_recorded:
            memory = None if self.graph is None else self.graph.pool()  # of the one it replaces
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=memory):
                self.recorded = self._compute(self.count)
            self.graph, self.is_recorded = graph, True
        self.graph.replay()
        losses, images = self.recorded
        return losses.clone(), images

    def keep(self, rows: list[int]) -> None:
        """Drop the runs that are not in ``rows``."""
        kept = torch.tensor(rows, device=self.device)
        for part in (self.batches, self.optimizer, self.stack):
            part.keep(kept)
        self.views = _parameter_views(self.stack)
        self.is_recorded = False


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
    drawn = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    for recipe in rows:
        initialize(module, recipe)
        states.append({name: tensor.clone() for name, tensor in drawn.items()})
    diverged_at = [-1] * len(rows)
    dropout = _dropout_generator(rows, device)
    stack = _make_stack(module, states, rows, dropout, device)
    optimizer = _Optimizer(rows, _parameter_views(stack), torch.device(device))
    steps = _Steps(stack, batches, optimizer, dropout)
    alive = list(range(len(rows)))  # the run of each row of the stack
    going = set(alive)
    snapshot = stack.snapshot()
    safe = [(snapshot, row) for row in alive]  # the last weights seen to give a finite loss
    last: dict[int, Tensor] = {}  # images of each run
    step = 0
    while going:
        until = _next_look(device, step, [rows[i]["steps"] for i in going])
        snapshot = stack.snapshot() if step % SNAPSHOT_STEPS == 0 else {}
        losses, inputs = steps.take(range(step, until))
        finite = torch.isfinite(losses).T.tolist()
        if snapshot:  # the weights that gave this loss, and the statistics that it left
            kept = {name for name, _ in stack.module.named_parameters()}
            state = stack.stacked_state()
            snapshot |= {name: t.clone() for name, t in state.items() if name not in kept}
            for row, whole in enumerate(are_finite(snapshot).tolist()):
                if finite[row][0] and whole and alive[row] in going:
                    safe[alive[row]] = snapshot, row
        well = [all(found) for found in finite]
        ended = [
            (row, i)
            for row, i in enumerate(alive)
            if i in going and not (well[row] and rows[i]["steps"] > until)
        ]
        state = stack.stacked_state() if ended else {}
        for row, i in ended:
            going.remove(i)
            safe[i] = {name: t[None] for name, t in model_state(*safe[i]).items()}, 0
            states[i] = model_state(state, row) if well[row] else model_state(*safe[i])
            last[i] = inputs[row].clone()
            if not well[row]:
                diverged_at[i] = step + finite[row].index(False)
        step = until
        keep = [row for row, i in enumerate(alive) if i in going]
        if keep and len(keep) < len(alive) and len(keep) <= _going_share(device) * len(alive):
            alive = [alive[row] for row in keep]
            steps.keep(keep)
    seen = torch.stack([last[i] for i in range(len(rows))])
    for i, sound in enumerate(_are_sound(stack, states, seen)):
        if diverged_at[i] == -1 and not sound:
            states[i], diverged_at[i] = model_state(*safe[i]), rows[i]["steps"] - 1
    joined = {name: torch.stack([state[name] for state in states]).cpu() for name in drawn}
    return TrainedStack([model_state(joined, row) for row in range(len(rows))], diverged_at)


def _make_stack(
    module: nn.Module,
    states: list[State],
    rows: list[Recipe],
    dropout: torch.Generator,
    device: str,
) -> StackedModule:
    stack = stack_on(device, module, len(states))
    stack.load(states)
    stack.set_dropout(torch.tensor([row["dropout"] for row in rows], device=device), dropout)
    return stack.train()


def _dropout_generator(rows: list[Recipe], device: str) -> torch.Generator:
    generator = torch_generator("dropout", *(row["run"] for row in rows))
    if torch.device(device).type == "cpu":
        return generator
    seed = derive_seed(int(generator.initial_seed()), torch.device(device).type)
    return torch.Generator(device).manual_seed(seed)


def _next_look(device: str, step: int, ends: list[int]) -> int:
    """Up to which step to compute before losses are looked at, which makes a GPU wait: the first
    step after a snapshot, then all up to the next or to a run's end."""
    rest = step % SNAPSHOT_STEPS
    if rest == 0 or torch.device(device).type == "cpu":
        return step + 1
    return min(step - rest + SNAPSHOT_STEPS, *ends)


def _going_share(device: str) -> float:
    """Ended runs leave a stack when no more than this share of it goes on: leaving costs a GPU as
    much as several steps."""
    return 1.0 if torch.device(device).type == "cpu" else 0.7


def _parameter_views(stack: StackedModule) -> list[Tensor]:
    return [p.detach().view(stack.stack, -1, *p.shape[1:]) for p in stack.parameters()]


@torch.no_grad()
def _are_sound(stack: StackedModule, states: list[State], images: Tensor) -> list[bool]:
    """Whether the logits of each model for its images are finite; ``stack`` is spoilt."""
    stack.keep(torch.zeros(len(states), dtype=torch.int64, device=images.device))
    stack.load(states)
    logits = stack.eval()(images)
    return torch.isfinite(logits).flatten(1).all(1).tolist()
