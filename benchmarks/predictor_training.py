"""WeightNet: networks a second in training and prediction, and the time that loading takes.

Networks of random weights are read once (features of every token; a zoo is read once per fit) and
go through WeightNet at its default size, in batches as the fit makes them. A training step is
loading (picking the tokens of a batch), forward, backward and update; prediction sees all tokens.
Tokens are packed, so that padding is only in the small matrix of layers: *empty* is the share of
its rows, *wasted* the share of a step's operations (of matrix products, as torch counts them)
that a batch needs beyond those of its networks one by one. The last line is the share of a
training step that loading takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from weightnet.compute import default_device, single_thread
from weightnet.predictors.fitting import Batches, gaussian_nll
from weightnet.predictors.weightnet import TokenReader, WeightNetConfig
from weightnet.symmetry import trace
from weightnet.tokens import Networks
from weightnet.zoo.architectures import build

PROPERTIES = 7
SMALL = {"stem": "small", "image_channels": 1, "classes": 10, "size": 14}
SIZES: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "cnn, width 8, depth 3": (("cnn", {"width": 8, "depth": 3}),),
    "cnn, width 32, depth 6": (("cnn", {"width": 32, "depth": 6}),),
    "cnn, many shapes": tuple(
        ("cnn", {"width": width, "depth": depth})
        for width in (4, 8, 16, 32)
        for depth in (2, 4, 6)
    ),
    "resnet18, width 1/8": (("resnet18", {**SMALL, "width": 0.125}),),
    "cnn and resnet18": (
        *(("cnn", {"width": 16, "depth": depth}) for depth in (2, 3, 4, 5, 6)),
        ("resnet18", {**SMALL, "width": 0.125}),
    ),
}


@dataclass(frozen=True)
class Measurement:
    """Seconds of each part by step, and what a step holds."""

    networks: int
    tokens: float
    read: float
    load: list[float]
    compute: list[float]
    predict: float
    empty: float
    wasted: float

    @property
    def share(self) -> float:
        """Of a training step that loads tokens."""
        load, compute = sum(self.load), sum(self.compute)
        return load / (load + compute)


def main(
    quick: Annotated[bool, typer.Option(help="Two batches of each size.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    batches: Annotated[int, typer.Option(help="Training steps of each size.")] = 24,
) -> None:
    """Print WeightNet's throughput on networks of several sizes."""
    single_thread()
    config = WeightNetConfig(trees=0)
    device = default_device()
    table = Table(
        title=f"WeightNet, width {config.width}, batches of {config.fit.batch_size}, "
        f"{device.type}, one thread: networks a second"
    )
    table.add_column("networks")
    for header in ("tokens each", "read once", "train", "predict", "loading", "empty", "wasted"):
        table.add_column(header, justify="right")
    shares = []
    for title, shapes in SIZES.items():
        steps = 2 if quick else batches
        found = measure(shapes, config, steps, device, seed)
        step = statistics.median(
            load + compute for load, compute in zip(found.load, found.compute, strict=True)
        )
        table.add_row(
            title,
            f"{found.tokens:.0f}",
            f"{found.networks / found.read:.0f}",
            f"{config.fit.batch_size / step:.0f}",
            f"{found.networks / found.predict:.0f}",
            f"{found.share:.1%}",
            f"{found.empty:.1%}",
            f"{found.wasted:.1%}",
        )
        shares.append(found.share)
    Console(width=max(Console().width, 100)).print(table)
    print(
        "loading: share of a training step (at most 5%); wasted: of its operations (at most 20%)"
    )
    print(f"{max(shares):.3f}")


def measure(
    shapes: Sequence[tuple[str, dict[str, Any]]],
    config: WeightNetConfig,
    steps: int,
    device: torch.device,
    seed: int,
) -> Measurement:
    """Read networks of these shapes, train on batches of them, and predict them."""
    size = config.fit.batch_size
    networks = draw(shapes, 4 * size, seed)
    reader = TokenReader(config, responses=False)
    read, _ = timed(lambda: reader.prepare(networks))
    torch.manual_seed(seed)
    module = reader.module(PROPERTIES).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), config.fit.learning_rate)
    data = reader.batches(networks, training=True)
    targets = torch.randn(len(networks), PROPERTIES)
    load, compute, empty = [], [], []
    for step in range(steps + 1):
        chosen = torch.randperm(len(networks))[:size]
        start = time.perf_counter()
        batch = data.collate(chosen).to(device)
        loaded = time.perf_counter()
        loss = gaussian_nll(*module(batch), targets[chosen].to(device), config.fit.beta)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.fit.gradient_clip)
        optimizer.step()
        wait(device)
        ended = time.perf_counter()
        if step:  # the first one warms up
            load.append(loaded - start)
            compute.append(ended - loaded)
            empty.append(1 - len(batch.place) / (batch.depth * size))
    wasted = 1 - sum(operations(module, data, one[None]) for one in chosen) / operations(
        module, data, chosen
    )
    predict, _ = timed(lambda: run(module.eval(), reader, networks, config, device))
    tokens = sum(plan.tokens for plan in networks.layouts()) / len(networks)
    return Measurement(
        len(networks), tokens, read, load, compute, predict, statistics.mean(empty), wasted
    )


def operations(module: torch.nn.Module, data: Batches, chosen: torch.Tensor) -> int:
    """Of a forward pass over the chosen networks; a backward pass has twice as many."""
    device = next(module.parameters()).device
    with FlopCounterMode(display=False) as counter:
        module(data.collate(chosen).to(device))
    return counter.get_total_flops()


def run(
    module: torch.nn.Module,
    reader: TokenReader,
    networks: Networks,
    config: WeightNetConfig,
    device: torch.device,
) -> None:
    """Predict all networks, whose tokens are read already."""
    data: Batches = reader.batches(networks, training=False)
    with torch.inference_mode():
        for chosen in data.cut(torch.arange(len(networks)), config.fit):
            module(data.collate(chosen).to(device))
    wait(device)


def draw(shapes: Sequence[tuple[str, dict[str, Any]]], count: int, seed: int) -> Networks:
    """So many networks of random weights, the shapes in turn."""
    generator = torch.Generator().manual_seed(seed)
    modules = [build(family, **arguments) for family, arguments in shapes]
    specs = [trace(module, torch.zeros(1, 1, 14, 14)) for module in modules]
    states = []
    for number in range(count):
        floats = modules[number % len(modules)].state_dict()
        states.append(
            {
                name: torch.rand(tensor.shape, generator=generator) + 0.5
                if tensor.dim() == 1
                else torch.randn(tensor.shape, generator=generator)
                for name, tensor in floats.items()
                if tensor.is_floating_point()
            }
        )
    frame = pd.DataFrame({"run": [str(number) for number in range(count)]})
    frame["family"], frame["task"], frame["width"], frame["diverged"] = "cnn", "", 1.0, False
    return Networks.from_states(frame, [specs[i % len(specs)] for i in range(count)], states)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def wait(device: torch.device) -> None:
    """Until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)
