"""Full-size networks: trace, canonicalize and tokenize torchvision's own models.

Checks that a permuted copy computes the same and has the same canonical form, bit for bit. The
last line is the time to canonicalize and tokenize a ResNet-50, in seconds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.func import functional_call

from weightnet.symmetry import PermutationSpec, State, canonicalize, permute, trace
from weightnet.tokens import tokenize
from weightnet.zoo.architectures import build

BUDGETS = {"resnet50": (1.0, 8.0, 3.0), "vgg16": (1.0, 40.0, 3.0)}  # seconds, seconds, x memory
IMAGE = (1, 3, 64, 64)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Measurement:
    """Seconds, and peak memory beyond what was held before, as a multiple of the checkpoint."""

    family: str
    parameters: int
    spec_seconds: float
    form_seconds: float
    memory: float


def main(
    quick: Annotated[bool, typer.Option(help="ResNet-50 only: under a minute.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, permutation and image.")] = 0,
) -> None:
    """Time the symmetries of full-size networks on one core."""
    torch.set_num_threads(1)
    families = ["resnet50"] if quick else list(BUDGETS)
    found = [measure(family, seed) for family in families]
    table = Table(title="full-size networks, float32, one core (in brackets: at most)")
    for header in (
        "network",
        "parameters",
        "spec",
        "canonicalize + tokenize",
        "memory / checkpoint",
    ):
        table.add_column(header, justify="left" if header == "network" else "right")
    for one in found:
        most = BUDGETS[one.family]
        table.add_row(
            one.family,
            f"{one.parameters / 1e6:.1f} M",
            f"{one.spec_seconds:.2f} s ({most[0]:g})",
            f"{one.form_seconds:.2f} s ({most[1]:g})",
            f"{one.memory:.2f} ({most[2]:g})",
        )
    Console().print(table)
    print("a permuted copy computes the same and has the same canonical form, bit for bit")
    print(f"{found[0].form_seconds:.2f}")


def measure(family: str, seed: int) -> Measurement:
    """Time one family, then check what was timed."""
    module = random_module(family, seed)
    spec, spec_seconds, _ = timed(lambda: trace(module, torch.empty(IMAGE, device="meta")))
    state = module.state_dict()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    _, form_seconds, extra = timed(lambda: tokenize(spec, canonicalize(spec, state, scale=True)))
    check(family, module, spec, state, seed)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Measurement(family, parameters, spec_seconds, form_seconds, extra / size)


def random_module(family: str, seed: int) -> nn.Module:
    """torchvision's own module in eval mode with random weights and statistics."""
    with torch.device("meta"):
        module = build(family)
    module = module.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.dim() > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("running_var", "weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, 0.1, generator=generator)
    return module


def timed(function: Callable[[], Result]) -> tuple[Result, float, int]:
    """The result, the seconds it took, and the peak of memory beyond the start, in bytes."""
    gc.collect()
    with suppress(OSError):  # where it is not allowed, an earlier peak counts
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    before, start = memory("VmRSS"), time.perf_counter()
    result = function()
    return result, time.perf_counter() - start, memory("VmHWM") - before


def memory(field: str) -> int:
    """A line of Linux' account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def check(family: str, module: nn.Module, spec: PermutationSpec, state: State, seed: int) -> None:
    """Stop unless a permuted copy and the canonical form compute what the network computes, and
    have one canonical form."""
    generator = torch.Generator().manual_seed(seed)
    copy = permute(spec, spec.random(generator), state)
    image = torch.randn(IMAGE, generator=generator)
    with torch.no_grad():
        expected = module(image)
        form = canonicalize(spec, state, scale=True)
        for name, weights in (("permuted copy", copy), ("canonical form", form)):
            error = (functional_call(module, dict(weights), (image,)) - expected).abs().max()
            if not error <= 1e-3 * expected.abs().max():
                raise SystemExit(f"{family}: the outputs of its {name} must not change: {error}")
    other = canonicalize(spec, copy, scale=True)
    if not all(torch.equal(form[key], other[key]) for key in form):
        raise SystemExit(f"{family}: canonical forms of permuted copies must be equal")


if __name__ == "__main__":
    typer.run(main)
