"""Zoo training: stacks of networks against the same recipes trained one at a time.

The rivals are the usual loop of plain PyTorch on tensors in memory, and the same with a
DataLoader. All sides train the same recipes, drawn from the ranges of params.yaml, in one process
with one thread, in turn; the rates and ratios are medians over the rounds. CNNs are of one shape,
and of several, as params.yaml draws them.

With ``--machine`` each side has the whole machine, in processes of their own: stacks one process
per core with one thread each, which is how the stage runs; the rivals one process with torch's
threads, and plain PyTorch also with one thread, since small networks are often slower with more:
the faster of the two counts.

On a GPU a stack is larger, runs are longer, everything lies on it, and the rivals train a part of
the recipes, whose time is scaled by steps. They do not look at the loss there, which would be
waiting.

The operations are those of convolutions and linear layers, a backward pass counted as two forward
ones; the machine's rate is that of large float32 matrix products, measured in each round. The last
line is the smallest ratio to plain PyTorch.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from weightnet.command import load_section, reported
from weightnet.compute import default_device, default_jobs
from weightnet.tasks import Task, load_task
from weightnet.zoo.architectures import build
from weightnet.zoo.recipes import FamilyConfig, RecipeConfig, sample_recipes
from weightnet.zoo.training import (
    MOMENTUM,
    Recipe,
    batch_order,
    initialize,
    shift,
    shift_order,
    train_stack,
    training_subset,
)

Rival = Callable[[nn.Module, Recipe, Task, Tensor, torch.device], None]
HEADERS = (
    *("stacked", "plain", "DataLoader", "x plain", "x DataLoader"),
    *("GFLOP/s", "of product rate", "plain: of it"),
)
MACHINE_HEADERS = ("stacked", "plain", "one thread", "DataLoader", "x plain", "x DataLoader")
DRAWN = 8  # shapes of the CNNs that are drawn
GPU_STACK = 16  # times as many networks in a stack on a GPU
GPU_STEPS = 4  # times as long runs on a GPU: about as long as those of params.yaml
GPU_WANTED = 50
GPU_RIVALS = 4  # networks of a stack that a rival trains on a GPU
SIZE = 1024  # of the matrices whose product tells the machine's rate


@dataclass(frozen=True)
class Case:
    """Networks to train: family, task, networks in a stack, the longest run's steps, arguments to
    draw each shape from, the ratio wanted, and how many shapes, a stack of each."""

    family: str
    task: str
    stack: int
    steps: int
    arguments: dict[str, list[Any]]
    wanted: float
    shapes: int = 1

    @property
    def title(self) -> str:
        """The shapes in words."""
        size, widths = load_task(self.task).size, self.arguments["width"]
        shape = f"width {widths[0]:g}" if len(widths) == 1 else f"{self.shapes} shapes drawn"
        return f"{self.family} {size} x {size}, {shape}"


def cases(width: int, depth: int, device: torch.device) -> list[Case]:
    """The shapes that are measured."""
    cnn = {"width": [width], "depth": [depth]}
    drawn = load_section(FamilyConfig, "generate_zoo", "families", "cnn").arguments
    small: dict[str, list[Any]] = {"stem": ["small"]}
    found = [
        Case("cnn", "fashion", 16, 160, cnn, 4),
        Case("cnn", "digits", 16, 240, cnn, 8),
        Case("cnn", "fashion", 16, 80, drawn, 4, DRAWN),
        Case("cnn", "digits", 16, 120, drawn, 8, DRAWN),
        Case("resnet18", "fashion", 7, 160, {**small, "width": [0.0625]}, 3),
        Case("resnet18", "fashion", 7, 160, {**small, "width": [0.125]}, 3),
        Case("mobilenet_v2", "fashion", 7, 160, {**small, "width": [0.125]}, 3),
        Case("mobilenet_v2", "fashion", 7, 160, {**small, "width": [0.25]}, 3),
    ]
    if device.type == "cpu":
        return found
    return [
        replace(
            case,
            stack=GPU_STACK * case.stack,
            steps=GPU_STEPS * case.steps,
            wanted=GPU_WANTED if case.family == "cnn" else case.wanted,
        )
        for case in found
    ]


def main(
    quick: Annotated[bool, typer.Option(help="One short round.")] = False,
    seed: Annotated[int, typer.Option(help="Of the recipes.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often each side trains.")] = 3,
    stack: Annotated[int, typer.Option(help="Networks in a stack [16; large 7; GPU x 16].")] = 0,
    width: Annotated[int, typer.Option(help="Channels of the CNN.")] = 16,
    depth: Annotated[int, typer.Option(help="Blocks of the CNN.")] = 3,
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 64,
    only: Annotated[str, typer.Option(help="Only this family.")] = "",
    machine: Annotated[bool, typer.Option(help="All cores instead of one.")] = False,
) -> None:
    """Print networks per minute of stacks, of plain PyTorch and of a DataLoader loop."""
    torch.set_num_threads(1)
    device = default_device()
    where = f"{os.cpu_count()} cores" if machine else "one thread"
    table = Table(title=f"networks a minute, {device.type}, {where}, batch {batch}")
    table.add_column("networks", no_wrap=True)
    for header in ("stack", *(MACHINE_HEADERS if machine else HEADERS)):
        table.add_column(header, justify="right")
    least = math.inf
    with reported():
        ranges = load_section(RecipeConfig, "generate_zoo", "ranges")
        chosen = [case for case in cases(width, depth, device) if only in ("", case.family)]
        if not chosen:
            raise ValueError(f"--only must be a measured family, however: it is {only}")
        for case in chosen:
            count = (stack or case.stack) if not quick else 4
            longest = max(4, case.steps // 10) if quick else case.steps
            turns = 1 if quick else rounds
            cells, ratio = (measure_machine if machine else measure)(
                case, ranges, seed, turns, count, longest, batch
            )
            table.add_row(case.title, str(count), *cells)
            least = min(least, ratio)
    Console(width=max(Console().width, 150)).print(table)
    print("in brackets: at least; the rivals' optimizers are torch.optim's, as they come")
    print(f"{least:.2f}")


@dataclass(frozen=True)
class Measurement:
    """Seconds of each side by round, the product rate by round, and what was trained."""

    seconds: dict[str, list[float]]
    product_rate: list[float]
    networks: int
    operations: float

    def rate(self, side: str) -> float:
        """Networks a minute."""
        return 60 * self.networks / statistics.median(self.seconds[side])

    def ratio(self, side: str) -> float:
        """How many times faster stacks are."""
        pairs = zip(self.seconds[side], self.seconds["stacked"], strict=True)
        return statistics.median(rival / ours for rival, ours in pairs)

    def share(self, side: str) -> float:
        """The share of the product rate that a side reaches."""
        pairs = zip(self.seconds[side], self.product_rate, strict=True)
        return statistics.median(self.operations / seconds / rate for seconds, rate in pairs)

    def cells(self, wanted: float) -> list[str]:
        """The row of the table behind the title."""
        rates = [f"{self.rate(side):.1f}" for side in ("stacked", "plain", "DataLoader")]
        done = self.operations / statistics.median(self.seconds["stacked"]) / 1e9
        return [
            *rates,
            f"{self.ratio('plain'):.2f} ({wanted:g})",
            f"{self.ratio('DataLoader'):.2f}",
            f"{done:.1f}",
            f"{self.share('stacked'):.1%}",
            f"{self.share('plain'):.1%}",
        ]


def measure(
    case: Case, ranges: RecipeConfig, seed: int, rounds: int, stack: int, steps: int, batch: int
) -> tuple[list[str], float]:
    """Train the stacks of a case by every side in turn, after a warm-up of each: the row of the
    table, and the ratio to plain PyTorch."""
    recipes = sample(case, ranges, seed, stack, steps, batch)
    task, device = load_task(case.task), default_device()
    few = recipes if device.type == "cpu" else spaced(recipes, GPU_RIVALS)
    trained = {"stacked": recipes, "plain": few, "DataLoader": few}
    sides = {name: trainer(name, case, rows) for name, rows in trained.items()}
    scales = {name: recipes["steps"].sum() / rows["steps"].sum() for name, rows in trained.items()}
    for side in sides.values():
        side(2)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    rates = []
    for turn in range(rounds):
        rates.append(product_rate(device))
        for name in rotated(list(sides), turn):
            start = time.perf_counter()
            sides[name](None)
            seconds[name].append(scales[name] * (time.perf_counter() - start))
    total = sum(
        3.0 * forward_operations(new_module(case, rows), task) * batch * float(rows["steps"].sum())
        for rows in stacks(recipes)
    )
    found = Measurement(seconds, rates, len(recipes), total)
    return found.cells(case.wanted), found.ratio("plain")


def measure_machine(
    case: Case, ranges: RecipeConfig, seed: int, rounds: int, stack: int, steps: int, batch: int
) -> tuple[list[str], float]:
    """As `measure`, all cores for each side in turn; stacks of other recipes on further cores."""
    samples = [
        sample(case, ranges, seed + core, stack, steps, batch) for core in range(default_jobs())
    ]
    sides = {
        "stacked": [("stacked", 1, case, recipes) for recipes in samples],
        "plain": [("plain", 0, case, samples[0])],
        "one thread": [("plain", 1, case, samples[0])],
        "DataLoader": [("DataLoader", 0, case, samples[0])],
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in rotated(list(sides), turn):
            jobs = sides[name]
            with multiprocessing.get_context("spawn").Pool(len(jobs)) as pool:
                taken = pool.starmap(train_apart, jobs, chunksize=1)
            rates[name].append(60 * len(samples[0]) * len(jobs) / max(taken))
    median = {name: statistics.median(found) for name, found in rates.items()}
    faster = max(("plain", "one thread"), key=lambda name: median[name])
    ratio, loaded = (
        statistics.median(np.divide(rates["stacked"], rates[name]))
        for name in (faster, "DataLoader")
    )
    cells = [f"{median[name]:.1f}" for name in sides]
    return [*cells, f"{ratio:.2f} ({case.wanted:g})", f"{loaded:.2f}"], float(ratio)


def train_apart(name: str, threads: int, case: Case, recipes: pd.DataFrame) -> float:
    """Seconds of a side in this process, with so many threads (0: as many as torch likes)."""
    if threads:
        torch.set_num_threads(threads)
    side = trainer(name, case, recipes)
    side(2)
    start = time.perf_counter()
    side(None)
    return time.perf_counter() - start


def spaced(recipes: pd.DataFrame, count: int) -> pd.DataFrame:
    """About so many recipes of each stack, of long and short runs."""
    parts = [rows.sort_values("steps") for rows in stacks(recipes)]
    return pd.concat(
        [rows.iloc[(len(rows) // count) // 2 :: max(1, len(rows) // count)] for rows in parts]
    )


def rotated(names: list[str], turn: int) -> list[str]:
    """The names, another one first in each turn."""
    first = turn % len(names)
    return names[first:] + names[:first]


def sample(
    case: Case, ranges: RecipeConfig, seed: int, stack: int, steps: int, batch: int
) -> pd.DataFrame:
    """The recipes of a stack of each shape."""
    config = FamilyConfig(
        runs=stack * case.shapes,
        runs_per_shape=stack,
        batch_size=[batch],
        steps=[max(1, steps // 4), steps],
        arguments=case.arguments,
        ranges={"tasks": [case.task], "seed": seed},
    )
    return sample_recipes(case.family, config, ranges)


def stacks(recipes: pd.DataFrame) -> list[pd.DataFrame]:
    """The recipes of each stack, which has one shape."""
    return [rows for _, rows in recipes.groupby("stack", sort=False)]


def new_module(case: Case, recipes: pd.DataFrame) -> nn.Module:
    """A module of the recipes' shape, which is one."""
    return build(case.family, **json.loads(recipes["arguments"].iat[0]))


def trainer(name: str, case: Case, recipes: pd.DataFrame) -> Callable[[int | None], None]:
    """What trains the recipes as side ``name`` does; or a few, given a number of steps."""
    task, device = load_task(case.task), default_device()

    def stacked(steps: int | None) -> None:
        for rows in stacks(recipes):
            few = rows if steps is None else rows.head(2).assign(steps=steps)
            train_stack(new_module(case, rows), few, task, str(device))
        wait(device)

    if name == "stacked":
        return stacked
    images = task.train_inputs.to(device)
    train: Rival = {"plain": train_plain, "DataLoader": train_loaded}[name]

    def each(steps: int | None) -> None:
        for rows in stacks(recipes):
            few = rows if steps is None else rows.head(1).assign(steps=steps)
            for row in few.to_dict("records"):
                recipe = {str(key): value for key, value in row.items()}
                train(new_module(case, rows), recipe, task, images, device)
        wait(device)

    return each


def train_plain(
    module: nn.Module, recipe: Recipe, task: Task, images: Tensor, device: torch.device
) -> None:
    """One run on tensors in memory, the device's: what train_stack computes for it."""
    indices, labels = (values.to(device) for values in training_subset(recipe, task))
    order = batch_order(recipe).to(device)
    shifts = shift_order(recipe).to(device) if recipe["augmentation"] else None

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step, positions in enumerate(order):
            batch = images[indices[positions]]
            if shifts is not None:
                batch = shift(batch, shifts[step], recipe["augmentation"])
            yield batch, labels[positions]

    train_on(batches(), module, recipe, device)


def train_loaded(
    module: nn.Module, recipe: Recipe, task: Task, images: Tensor, device: torch.device
) -> None:
    """One run with a DataLoader that shuffles and collates, as most people write it."""
    indices, labels = training_subset(recipe, task)
    generator = torch.Generator().manual_seed(recipe["seed"])
    loader = DataLoader(
        TensorDataset(task.train_inputs[indices], labels),
        batch_size=min(recipe["batch_size"], len(labels)),
        shuffle=True,
        drop_last=True,
        generator=generator,
    )
    shifts = shift_order(recipe)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        stream = chain.from_iterable(repeat(loader))
        for offsets, (batch, targets) in zip(shifts, stream, strict=False):
            yield shift(batch, offsets[: len(batch)], recipe["augmentation"]), targets

    train_on(batches(), module, recipe, device)


def train_on(
    batches: Iterator[tuple[Tensor, Tensor]],
    module: nn.Module,
    recipe: Recipe,
    device: torch.device,
) -> None:
    """The loop that both rivals share: torch.optim under a cosine schedule, stopped at the first
    loss that is not finite (on a GPU: never)."""
    initialize(module, recipe)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = recipe["dropout"]
    module.to(device).train()
    rate, decay = recipe["learning_rate"], recipe["weight_decay"]
    optimizer: torch.optim.Optimizer
    if recipe["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(module.parameters(), rate, MOMENTUM, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=decay)
    for step, (images, labels) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
        loss = F.cross_entropy(module(images.to(device)), labels.to(device))
        if device.type == "cpu" and not bool(torch.isfinite(loss)):
            return
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def forward_operations(module: nn.Module, task: Task) -> float:
    """Multiplications and additions of convolutions and linear layers, for one image."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module.eval()(task.normalize(task.train_images[:1]))
    return float(counter.get_total_flops())


def product_rate(device: torch.device) -> float:
    """Operations a second of large float32 matrix products, the best of several."""
    one, other = (torch.randn(SIZE, SIZE, device=device) for _ in range(2))
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        one @ other
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * SIZE**3 / best


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
