"""How well `align` matches networks: plain ones against residual ones.

First, random networks are permuted and noise is added to their weights; a neuron counts as found
if it returns to its place. Then, where the zoo is trained (data/zoo), pairs of networks of one
stack are aligned, folded and scaled: how much of their squared distance is left? The last line is
the smallest share of neurons found at the largest noise.
"""

from __future__ import annotations

import json
from itertools import combinations, islice
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from weightnet.symmetry import canonicalize, permute, random_permutation, trace
from weightnet.symmetry.canonicalize import aligning_permutation, sorting_permutation
from weightnet.zoo.architectures import build
from weightnet.zoo.store import read_zoo

ZOO = Path("data/zoo")
FAMILIES = ("vgg11", "resnet18", "resnet50", "densenet121")
NOISES = (0.1, 1.0, 3.0)  # of a tensor's standard deviation


def main(
    quick: Annotated[bool, typer.Option(help="One copy at an eighth of the width.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, permutations and noise.")] = 0,
) -> None:
    """Print the share of neurons that sorting and alignment bring back to their places."""
    torch.set_num_threads(1)
    width, copies = (0.125, 1) if quick else (0.25, 3)
    table = Table(title=f"neurons found again: sort / align (width {width}, {copies} copies)")
    table.add_column("network")
    for noise in NOISES:
        table.add_column(f"noise {noise}", justify="right")
    worst = 1.0
    for family in FAMILIES:
        shares = [found(family, width, noise, copies, seed) for noise in NOISES]
        table.add_row(family, *(f"{sort:.3f} / {align:.3f}" for sort, align in shares))
        worst = min(worst, shares[-1][1])
    Console().print(table)
    trained = Table(title="trained pairs of the zoo: squared distance left by align")
    for header in ("network", "pairs", "of the distance as it is"):
        trained.add_column(header)
    for folder in sorted(ZOO.glob("[!.]*")):
        left = distances(folder, pairs=4 if quick else 21)
        if left:
            trained.add_row(folder.name, str(len(left)), f"{sum(left) / len(left):.2f}")
    if trained.rows:
        Console().print(trained)
    print(f"{worst:.3f}")


def found(family: str, width: float, noise: float, copies: int, seed: int) -> tuple[float, float]:
    """Shares of neurons that return to their places by sorting alone and by alignment."""
    generator = torch.Generator().manual_seed(seed)
    module = build(family, width=width, stem="small", size=32, classes=10)
    spec = trace(module, torch.zeros(1, 3, 32, 32))
    state = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }
    right = {"sort": 0, "align": 0}
    total = copies * sum(space.size for space in spec.spaces)
    original = sorting_permutation(spec, state)
    reference = permute(spec, original, state)
    for _ in range(copies):
        moved = random_permutation(spec, generator)
        noisy = {
            name: tensor + noise * torch.randn(tensor.shape, generator=generator)
            for name, tensor in permute(spec, moved, state).items()
        }
        order = sorting_permutation(spec, noisy)
        aligned = aligning_permutation(spec, permute(spec, order, noisy), reference)
        for name in order:
            place = moved[name][order[name]]
            right["sort"] += int((place == original[name]).sum())
            right["align"] += int((place[aligned[name]] == original[name]).sum())
    return right["sort"] / total, right["align"] / total


def distances(folder: Path, pairs: int) -> list[float]:
    """Squared distances of canonical weights after alignment, as shares of those before, of pairs
    within each stack of a family that is above chance."""
    family = folder.name
    recipes = pd.read_parquet(ZOO.parent / "recipes" / f"{family}.parquet").set_index("run")
    shares = []
    for stack in islice(read_zoo(folder), 8):
        arguments = json.loads(recipes.loc[stack.networks["run"].iloc[0], "arguments"])
        image = torch.zeros(1, arguments["image_channels"], *[arguments["size"]] * 2)
        spec = trace(build(family, **arguments), image)
        weights = [layer.weight for layer in spec.layers if layer.weight]
        good = [i for i, a in enumerate(stack.networks["property.test_accuracy"]) if a > 0.4]
        for i, j in islice(combinations(good, 2), pairs):
            one, other = stack.state(i), stack.state(j)
            forms = [
                canonicalize(spec, state, order="none", scale=True, fold=True)
                for state in (one, other)
            ]
            forms.append(
                canonicalize(spec, other, order="align", scale=True, fold=True, reference=one)
            )
            before, after = (
                sum(float((forms[0][key] - form[key]).double().square().sum()) for key in weights)
                for form in forms[1:]
            )
            shares.append(after / before)
    return shares


if __name__ == "__main__":
    typer.run(main)
