"""Peak memory of every stage on zoos of 1,000, 5,000 and 20,000 small networks.

Recipes are drawn and their stacks planned (training then holds one stack in a process, whatever
the zoo's size). Random weights are written as token shards the way tokenize_zoo does, stack after
stack, then streamed (`iter_tokens`), read as WeightNet reads them (`TokenReader`: features and
messages of every token, standardized) and fitted for one epoch without trees, every tenth network
held out. Random predictions of two properties by two predictors, three seeds, are scored as
evaluate does.

Each step runs in a process of its own; the peak is what it holds beyond a process that has
imported the package: all its pages, and in brackets its own alone, without those of mapped files,
which the system drops or writes out when it needs the room. The last line is the peak of a fit's
own pages at the largest size over the smallest.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import typer
from rich.console import Console
from rich.table import Table

from weightnet.command import load_section
from weightnet.compute import single_thread
from weightnet.evaluation.scores import ScoresConfig, scores
from weightnet.predictors.fitting import FitConfig
from weightnet.predictors.weightnet import TokenReader, WeightNetConfig
from weightnet.predictors.weightnet import build as build_predictor
from weightnet.symmetry import PermutationSpec, trace
from weightnet.symmetry.form import CanonicalForm
from weightnet.tokens import (
    iter_tokens,
    read_networks,
    spec_id,
    tokenize,
    write_tokens,
)
from weightnet.zoo.architectures import build
from weightnet.zoo.properties import TrainingConfig
from weightnet.zoo.recipes import FamilyConfig, RecipeConfig, sample_recipes
from weightnet.zoo.stacks import plan_stacks

SIZES = (1_000, 5_000, 20_000)
CONFIG = WeightNetConfig(trees=0, fit=FitConfig(epochs=1))
STACK = 16  # networks that are drawn together
Shape = tuple[int, int]  # width, depth
Step = Callable[[Path, int, int, Shape], None]


def main(
    quick: Annotated[bool, typer.Option(help="100, 200 and 400 networks.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    width: Annotated[int, typer.Option(help="Channels of the CNN.")] = 8,
    depth: Annotated[int, typer.Option(help="Blocks of the CNN.")] = 2,
) -> None:
    """Print how memory grows with the number of networks."""
    sizes = (100, 200, 400) if quick else SIZES
    shape = width, depth
    table = Table(
        title=f"peak memory (own pages), MB, and seconds: CNNs of width {width}, depth {depth}"
    )
    for header in ("networks", "shards", "plan", "tokenize", "stream", "read", "fit", "score"):
        table.add_column(header, justify="right")
    peaks = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in sizes:
            folder = Path(temporary) / str(count)
            steps = (plan, write, stream, read, fit, score)
            found = [apart(step, folder, count, seed, shape) for step in steps]
            stored = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            cells = [f"{peak:.0f} ({own:.0f}), {time:.1f} s" for peak, own, time in found]
            table.add_row(f"{count:,}", f"{stored:.1f} MB", *cells)
            peaks.append(found[steps.index(fit)][1])
    Console(width=max(Console().width, 140)).print(table)
    print(f"{peaks[-1] / max(peaks[0], 1):.2f}")


def plan(folder: Path, count: int, seed: int, shape: Shape) -> None:
    """Draw recipes, and plan the stacks to train."""
    ranges = load_section(RecipeConfig, "generate_zoo", "ranges")
    family = FamilyConfig(
        runs=count,
        runs_per_shape=STACK,
        batch_size=[32],
        steps=[150, 900],
        arguments={"width": [shape[0]], "depth": [shape[1]]},
    )
    recipes = sample_recipes("cnn", family, ranges)
    config = load_section(TrainingConfig, "train_zoo")
    stacks = plan_stacks(recipes, config.properties, config.measure, folder)
    if sum(len(stack.recipes) for stack in stacks) != count:
        raise ValueError(f"{count} runs must be planned, however: {len(stacks)} stacks")


def write(folder: Path, count: int, seed: int, shape: Shape) -> None:
    """Draw networks stack by stack, and write their tokens."""
    spec, module = architecture(shape)
    name, form = spec_id(spec), CanonicalForm(order="sort", scale=True)
    runs = [f"{number:016x}" for number in range(count)]
    frame = pd.DataFrame({"run": runs, "family": "cnn", "task": "fashion", "width": 8.0})
    frame["spec"], frame["diverged"] = name, False
    frame["property.test_accuracy"] = np.linspace(0, 1, count)
    generator = torch.Generator().manual_seed(seed)

    def tables() -> Iterator[tuple[str, pa.Table]]:
        for first in range(0, count, STACK):
            stacked = {
                key: torch.randn(STACK, *tensor.shape, generator=generator)
                for key, tensor in module.state_dict().items()
            }
            for place, run in enumerate(runs[first : first + STACK]):
                state = {key: tensor[place] for key, tensor in stacked.items()}
                yield run, tokenize(spec, form.apply(spec, state))

    write_tokens(folder, frame, {name: spec}, tables())


def stream(folder: Path, count: int, seed: int, shape: Shape) -> None:
    """Look at every token once, in order."""
    seen = sum(int((table.column("index").to_numpy() == 0).sum()) for table in iter_tokens(folder))
    layers = shape[1] + 1
    if seen != count * layers:
        raise ValueError(f"{count * layers} layers must be streamed, however: {seen} were")


def read(folder: Path, count: int, seed: int, shape: Shape) -> None:
    """Read all networks as the fit does."""
    networks, reader = read_networks([folder]), TokenReader(CONFIG, responses=False)
    reader.prepare(networks)
    found = reader.batches(networks, training=False).count
    if found != count:
        raise ValueError(f"{count} networks must be read, however: {found} are")


def fit(folder: Path, count: int, seed: int, shape: Shape) -> None:
    """Fit WeightNet for an epoch."""
    networks = read_networks([folder])
    held_out = np.arange(count) % 10 == 0
    predictor = build_predictor("weightnet", CONFIG, ["test_accuracy"], seed)
    predictor.fit(networks.select(~held_out), networks.select(held_out))


def score(folder: Path, count: int, seed: int, shape: Shape) -> None:
    """Score predictions of a fifth of the networks in each seed."""
    generator, properties = np.random.default_rng(seed), ("test_accuracy", "generalization_gap")
    runs = np.array([f"{number:016x}" for number in range(count)])
    networks = pd.DataFrame({"run": runs, "family": "cnn"})
    for name in properties:
        for prefix in ("property", "half_a", "half_b"):
            networks[f"{prefix}.{name}"] = generator.random(count)
    parts = []
    for predictor, name, fit_seed in product(("weightnet", "gbm"), properties, range(3)):
        rows = np.arange(fit_seed, count, 5)
        part = pd.DataFrame({"run": runs[rows], "predicted": generator.random(len(rows))})
        part["measured"] = networks[f"property.{name}"].to_numpy()[rows]
        part["low"], part["high"] = part["predicted"] - 0.3, part["predicted"] + 0.3
        parts.append(
            part.assign(
                predictor=predictor, split="iid", seed=fit_seed, property=name, part="test"
            )
        )
    found = scores(pd.concat(parts, ignore_index=True), networks, ScoresConfig())
    if not found["value"].notna().any():
        raise ValueError("scores must be numbers, however: none is")


def architecture(shape: Shape) -> tuple[PermutationSpec, torch.nn.Module]:
    """A small CNN and its spec."""
    module = build("cnn", width=shape[0], depth=shape[1])
    return trace(module, torch.zeros(1, 1, 14, 14)), module


def apart(
    step: Step,
    folder: Path,
    count: int,
    seed: int,
    shape: Shape,
) -> tuple[float, float, float]:
    """The peaks of memory of a step in a new process beyond its start, in MB, and its seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=report, args=(theirs, step, folder, count, seed, shape))
    process.start()
    theirs.close()
    try:
        found: tuple[float, float, float] = ours.recv()
    except EOFError:
        raise SystemExit(f"{step.__name__} of {count} networks failed; see above") from None
    finally:
        process.join()
    return found


def report(
    pipe: Connection,
    step: Step,
    folder: Path,
    count: int,
    seed: int,
    shape: Shape,
) -> None:
    """Run a step and send its peaks of memory in MB and its seconds."""
    single_thread()
    architecture(shape)  # what is loaded once is not counted
    with suppress(OSError):  # where it is not allowed, an earlier peak counts
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before, own, start = memory("VmRSS"), memory("RssAnon"), time.perf_counter()
    ended, most = threading.Event(), [own]

    def watch() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        step(folder, count, seed, shape)
    finally:
        ended.set()
        watcher.join()
    pipe.send((memory("VmHWM") - before, most[0] - own, time.perf_counter() - start))


def memory(field: str) -> float:
    """A line of Linux' account of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    typer.run(main)
