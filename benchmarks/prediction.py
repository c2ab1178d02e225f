"""A thousand networks predicted: reading their tokens, computing features, and the rest.

CNNs of random weights in a few shapes are written as shards, read, and predicted by a WeightNet:
one that was fitted on some of them, or with ``--folder`` a fitted one. Each round reads and
predicts anew; medians over the rounds. The last line is the seconds of a whole prediction.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from weightnet.compute import single_thread
from weightnet.predictors import Predictor
from weightnet.predictors.fitting import FitConfig
from weightnet.predictors.weightnet import WeightNetConfig, WeightNetPredictor, build
from weightnet.symmetry import trace
from weightnet.tokens import read_networks, spec_id, tokenize, write_tokens
from weightnet.zoo.architectures import build as build_module

SHAPES = ((8, 2), (8, 3), (8, 4), (16, 3))  # width, depth


def main(
    quick: Annotated[bool, typer.Option(help="A hundred networks, one round.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    count: Annotated[int, typer.Option(help="Networks.")] = 1000,
    rounds: Annotated[int, typer.Option(help="How often they are predicted.")] = 5,
    folder: Annotated[Path | None, typer.Option(help="A fitted WeightNet.")] = None,
) -> None:
    """Print the seconds of each part of a prediction."""
    single_thread()
    count, rounds = (100, 1) if quick else (count, rounds)
    with tempfile.TemporaryDirectory() as temporary:
        tokens = Path(temporary) / "tokens"
        write(tokens, count, seed)
        found = pd.DataFrame([measure(tokens, folder) for _ in range(rounds)]).median()
    table = Table(title=f"seconds to predict {count:,} small CNNs, one thread")
    for header in found.index:
        table.add_column(header, justify="right")
    table.add_row(*(f"{seconds:.2f}" for seconds in found))
    Console().print(table)
    print(f"{found['together']:.2f}")


def write(folder: Path, count: int, seed: int) -> None:
    """Write the tokens of networks of random weights."""
    generator = torch.Generator().manual_seed(seed)
    modules = [build_module("cnn", width=width, depth=depth) for width, depth in SHAPES]
    specs = [trace(module, torch.zeros(1, 1, 14, 14)) for module in modules]
    names = [spec_id(spec) for spec in specs]
    frame = pd.DataFrame({"run": [f"{number:016x}" for number in range(count)]})
    frame = frame.assign(family="cnn", task="fashion", width=8.0, diverged=False)
    frame["spec"] = [names[number % len(names)] for number in range(count)]
    frame["property.test_accuracy"] = np.linspace(0, 1, count)

    def tables():
        for number, run in enumerate(frame["run"]):
            state = {
                name: 0.2 * torch.randn(tensor.shape, generator=generator)
                for name, tensor in modules[number % len(modules)].state_dict().items()
            }
            yield run, tokenize(specs[number % len(specs)], state)

    write_tokens(folder, frame, dict(zip(names, specs, strict=True)), tables())


def measure(tokens: Path, folder: Path | None) -> dict[str, float]:
    """Seconds of each part, from files to predictions."""
    if folder is None:
        few = read_networks([tokens]).select(np.arange(60))
        config = WeightNetConfig(fit=FitConfig(epochs=1))
        predictor: Predictor = build("weightnet", config, ["test_accuracy"], 0).fit(few, few)
    else:
        predictor = Predictor.load(folder)
    if not isinstance(predictor, WeightNetPredictor):
        raise SystemExit(f"--folder must hold a WeightNet, however: {predictor.name}")
    marks = [time.perf_counter()]
    networks = read_networks([tokens])
    for part in networks.parts:
        _ = part.table  # decoded when it is first looked at
    marks.append(time.perf_counter())
    predictor.reader.rows(networks)
    marks.append(time.perf_counter())
    predictor.predict(networks)
    marks.append(time.perf_counter())
    read, features, rest = (b - a for a, b in itertools.pairwise(marks))
    return {"read": read, "features": features, "predict": rest, "together": marks[-1] - marks[0]}


if __name__ == "__main__":
    typer.run(main)
