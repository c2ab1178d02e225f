"""Convolutions of a stack: the kernels of `weightnet.zoo.grouped` against torch's, in turn.

The result, the gradient of what is read and that of the weights, one by one, in float32 with the
channels last, on one thread. An asterisk marks what the kernels compute in a stack (`pays`); the
last line is the least ratio among these.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from weightnet.zoo import grouped
from weightnet.zoo.grouped import Convolution, Pays, pays, triples

# inputs, outputs, size of the maps, kernel, stride
SHAPES = [
    *((width, width, 7, 3, 1) for width in (8, 12, 16, 24, 32)),
    *((width, width, 4, 3, 1) for width in (8, 12, 16, 24, 32)),
    *((16, 16, 2, 3, 1), (16, 16, 1, 5, 1), (24, 24, 14, 5, 1), (16, 16, 14, 3, 1)),
    *((8, 16, 14, 3, 2), (16, 32, 7, 3, 2), (16, 32, 7, 1, 2), (32, 64, 4, 3, 2)),
    *((20, 16, 14, 1, 1), (44, 16, 7, 1, 1), (100, 16, 3, 1, 1), (16, 4, 7, 3, 1)),
    (64, 64, 2, 3, 1),
]
PARTS = ("result", "data", "weights")


def main(
    quick: Annotated[bool, typer.Option(help="Two shapes, one round.")] = False,
    seed: Annotated[int, typer.Option(help="Of images and weights.")] = 0,
    stack: Annotated[int, typer.Option(help="Networks in a stack.")] = 16,
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 32,
    rounds: Annotated[int, typer.Option(help="How often each side computes in turn.")] = 7,
) -> None:
    """Print milliseconds of torch and the ratio, for each part of a convolution."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    table = Table(title=f"convolutions of {stack} networks, batch {batch}: torch's ms, x torch")
    for header in ("shape", "Mflop", *PARTS):
        table.add_column(header, justify="right", no_wrap=True)
    least = math.inf
    for shape in SHAPES[:2] if quick else SHAPES:
        inputs, outputs, size, kernel, stride = shape
        weight = (stack * outputs, inputs, kernel, kernel)
        found = measure(shape, stack, batch, 1 if quick else rounds, generator)
        chosen = pays((size, size), weight, (stride, stride), stack)
        pairs = triples((size,) * 2, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2).of_tap[1]
        cells = []
        for (theirs, ours), ours_chosen in zip(found, chosen, strict=True):
            cells.append(f"{1e3 * theirs:.2f} {theirs / ours:5.2f}{'*' if ours_chosen else ' '}")
            least = min(least, theirs / ours) if ours_chosen else least
        operations = 2 * batch * stack * inputs * outputs * len(pairs) / 1e6
        title = f"{inputs} to {outputs}, {size} x {size}, {kernel} x {kernel}"
        table.add_row(title + (f" / {stride}" if stride > 1 else ""), f"{operations:.1f}", *cells)
    Console(width=120).print(table)
    print(f"{least:.2f}")


def measure(
    shape: tuple[int, ...], stack: int, batch: int, rounds: int, generator: torch.Generator
) -> list[tuple[float, float]]:
    """Seconds of torch and of the kernels, medians, for each of PARTS."""
    inputs, outputs, size, kernel, stride = shape
    x = torch.randn(batch, stack * inputs, size, size, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(stack * outputs, inputs, kernel, kernel, generator=generator)
    steps, padding = (stride, stride), (kernel // 2, kernel // 2)

    def theirs() -> torch.Tensor:
        return F.conv2d(x, weight, None, steps, padding, 1, stack)

    def ours() -> torch.Tensor:
        return Convolution.apply(x, weight, None, steps, padding, stack)

    def gradient(result: torch.Tensor, of: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(result, of, slopes, retain_graph=True)

    chosen = grouped.pays
    grouped.pays = lambda *_: Pays(True, True, True)
    try:
        slopes = torch.randn(theirs().shape, generator=generator)
        slopes = slopes.contiguous(memory_format=torch.channels_last)
        seconds = [in_turn(theirs, ours, rounds)]
        for leaf in (x, weight):
            leaf.requires_grad_()
            seconds.append(in_turn(*(gradient(side(), leaf) for side in (theirs, ours)), rounds))
            leaf.requires_grad_(False)
        return seconds
    finally:
        grouped.pays = chosen


def in_turn(
    theirs: Callable[[], object], ours: Callable[[], object], rounds: int
) -> tuple[float, float]:
    """Seconds a call, medians of rounds of some 20 ms."""
    for side in (theirs, ours):
        side()  # compiled, caches filled
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, found in zip((theirs, ours), seconds, strict=True):
            calls, start = 0, time.perf_counter()
            while calls < 2 or time.perf_counter() - start < 0.02:
                side()
                calls += 1
            found.append((time.perf_counter() - start) / calls)
    return median(seconds[0]), median(seconds[1])


if __name__ == "__main__":
    typer.run(main)
