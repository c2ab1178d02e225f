"""Canonicalize and tokenize small networks in bulk: MB of weights a second.

Stacks of networks with random weights are taken the way tokenize_zoo takes them, without probes:
as one large stack, which is part by part made canonical and tokenized, and as stacks of 16. The
floor is a copy of the weights in memory: they are read, brought into order and written once.
Rates are medians over the rounds. The last line is the rate of both for a small CNN, in MB/s.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from weightnet.symmetry import PermutationSpec, stack_parts, trace
from weightnet.symmetry.form import CanonicalForm
from weightnet.tokens import tokenize_stack
from weightnet.zoo.architectures import build

WANTED = 200  # MB/s
COPIED = 1 << 27  # bytes
SMALL = {"stem": "small", "image_channels": 1, "classes": 10, "size": 14}
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "cnn, width 8, depth 3": ("cnn", {"width": 8, "depth": 3}, 4096),
    "cnn, width 16, depth 3": ("cnn", {"width": 16, "depth": 3, "batchnorm": True}, 1024),
    "cnn, width 32, depth 6, 5 x 5": ("cnn", {"width": 32, "depth": 6, "kernel": 5}, 128),
    "resnet18, width 1/8": ("resnet18", {**SMALL, "width": 0.125}, 64),
    "mobilenet_v2, width 1/4": ("mobilenet_v2", {**SMALL, "width": 0.25}, 64),
}

State = dict[str, torch.Tensor]


def main(
    quick: Annotated[bool, typer.Option(help="An eighth of the networks, one round.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    rounds: Annotated[int, typer.Option(help="How often each step is timed.")] = 5,
) -> None:
    """Print how fast weights become tokens."""
    torch.set_num_threads(1)
    table = Table(title=f"weights to tokens, float32, one core, MB/s (at least: {WANTED})")
    for header in ("networks", "kB each", "ms each", "canonicalize", "tokenize", "both", "by 16"):
        table.add_column(header, justify="left" if header == "networks" else "right", no_wrap=True)
    table.add_column("copy", justify="right")
    table.add_column("of the floor", justify="right")
    rates = {}
    for title, (family, arguments, count) in NETWORKS.items():
        number = max(2, count // 8) if quick else count
        spec, states = draw(family, arguments, number, seed)
        megabytes = size(states) / 1e6
        canonical, tokens, few, copy = measure(spec, states, 1 if quick else rounds)
        rates[title] = megabytes / (canonical + tokens)
        table.add_row(
            title,
            f"{1e3 * megabytes / number:.1f}",
            f"{1e3 * (canonical + tokens) / number:.2f}",
            *(f"{megabytes / seconds:.1f}" for seconds in (canonical, tokens)),
            f"{rates[title]:.1f}",
            f"{megabytes / few:.1f}",
            f"{megabytes / copy:.0f}",
            f"{copy / (canonical + tokens):.2%}",
        )
    Console(width=max(Console().width, 120)).print(table)
    print(f"{rates['cnn, width 16, depth 3']:.1f}")


def draw(
    family: str, arguments: dict[str, Any], count: int, seed: int
) -> tuple[PermutationSpec, State]:
    """The spec of an architecture, and a stack of so many networks of random weights."""
    module = build(family, **arguments)
    spec = trace(module.eval(), torch.zeros(1, 1, 14, 14))
    generator = torch.Generator().manual_seed(seed)
    floats = {n: t for n, t in module.state_dict().items() if t.is_floating_point()}
    states = {
        name: torch.rand(count, *tensor.shape, generator=generator) + 0.1
        if name.endswith("running_var")
        else torch.randn(count, *tensor.shape, generator=generator)
        for name, tensor in floats.items()
    }
    return spec, states


def measure(
    spec: PermutationSpec, states: State, rounds: int
) -> tuple[float, float, float, float]:
    """Seconds for all networks to be brought to canonical form, to be tokenized, to go through
    both in stacks of 16, and to be copied."""
    form = CanonicalForm(order="sort", scale=True)
    count = len(next(iter(states.values())))
    parts = [cut(states, part) for part in stack_parts(states)]
    sixteens = [cut(states, slice(i, i + 16)) for i in range(0, count, 16)]
    tokenize_stack(spec, form.apply_stack(spec, cut(states, slice(0, 2))))  # once per spec
    seconds: tuple[list[float], ...] = ([], [], [], [])
    for _ in range(rounds):
        canonical = tokens = few = 0.0
        for part in parts:
            seconds_form, states_form = timed(lambda part=part: form.apply_stack(spec, part))
            canonical += seconds_form
            tokens += timed(lambda states_form=states_form: tokenize_stack(spec, states_form))[0]
        for part in sixteens:
            few += timed(lambda part=part: tokenize_stack(spec, form.apply_stack(spec, part)))[0]
        found = (canonical, tokens, few, size(states) / copy_rate())
        for times, value in zip(seconds, found, strict=True):
            times.append(value)
    canonical, tokens, few, copy = map(statistics.median, seconds)
    return canonical, tokens, few, copy


def cut(states: State, part: slice) -> State:
    """A part of a stack."""
    return {name: tensor[part] for name, tensor in states.items()}


def copy_rate() -> float:
    """Bytes a second that are copied in memory, beyond the caches: the best of several."""
    block = torch.zeros(COPIED // 4)
    target = torch.empty_like(block)
    return COPIED / min(timed(lambda: target.copy_(block))[0] for _ in range(5))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = function()
    return max(time.perf_counter() - start, math.ulp(1.0)), result


def size(state: State) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


if __name__ == "__main__":
    typer.run(main)
