"""Bring a family's networks to canonical form and write them as tokens: data/tokens/<family>/."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import typer

from weightnet import command
from weightnet.architecture import build_architecture
from weightnet.command import (
    conclude,
    load_section,
    read_table,
    reported,
    require,
    writing,
)
from weightnet.durable import expect_writable, sweep
from weightnet.params import Params
from weightnet.probing import ARCHITECTURE, Prober
from weightnet.progress import Progress
from weightnet.symmetry import PermutationSpec, stack_parts, trace
from weightnet.symmetry.form import CanonicalForm
from weightnet.tokens import ProbesConfig, TokensConfig, spec_id, tokenize_stack, write_tokens
from weightnet.zoo.imported import ADOPTED_CODE, HIDDEN
from weightnet.zoo.store import read_zoo

RECIPES = Path("data/recipes")
ZOO = Path("data/zoo")
TOKENS = Path("data/tokens")


class TokenizeConfig(Params):
    """The tokenize_zoo section."""

    canonical: CanonicalForm
    probes: ProbesConfig
    tokens: TokensConfig


def describe(family: str) -> tuple[pd.DataFrame, dict[str, PermutationSpec]]:
    """One row a network as docs/SHARDS.md asks, and the spec of each architecture, traced."""
    path = RECIPES / f"{family}.parquet"
    recipes = read_table(path, f"generate_zoo@{family}", command.RECIPES, unique="run")
    if "architecture" not in recipes:
        recipes = recipes.assign(architecture=family)
    shapes = recipes["input"] if "input" in recipes else recipes["arguments"].map(image_shape)
    keys = list(zip(recipes["architecture"], recipes["arguments"], shapes, strict=True))
    named = {key: trace_architecture(family, *key) for key in dict.fromkeys(keys)}
    measured = pd.concat([stack.networks for stack in read_zoo(ZOO / family)])
    if set(measured["run"]) != set(recipes["run"]):
        raise ValueError(
            f"{ZOO / family} must hold the runs of {RECIPES / family}.parquet, however: they "
            f"differ; run `dvc repro train_zoo@{family}`"
        )
    keep = ["run", "family", "task", "width", "group", "split"]
    ways = recipes.drop(columns=[*keep, *HIDDEN, "seed"], errors="ignore")
    ways = ways.rename(columns=lambda name: f"recipe.{name.removeprefix('recipe.')}")
    frame = pd.concat([recipes[[name for name in keep if name in recipes]], ways], axis=1)
    identity = {key: spec_id(spec) for key, spec in named.items()}
    frame["spec"] = [identity[key] for key in keys]
    frame[list(ARCHITECTURE)] = keys
    frame = frame.merge(measured, on="run", validate="one_to_one")
    frame["diverged"] = frame.pop("diverged_at") >= 0
    return frame, {spec_id(spec): spec for spec in named.values()}


def image_shape(arguments: str) -> str:
    """The shape of one input of our families, from their arguments, as JSON."""
    values = json.loads(arguments)
    return json.dumps([values["image_channels"], values["size"], values["size"]])


def trace_architecture(
    family: str, architecture: str, arguments: str, shape: str
) -> PermutationSpec:
    """The permutation spec of one architecture, read off its module graph."""
    code = ZOO / family / ADOPTED_CODE
    module = build_architecture(architecture, json.loads(arguments), path=code)
    return trace(module, torch.empty(1, *json.loads(shape), device="meta"))


def main(
    family: Annotated[str, typer.Argument(help="A family in params.yaml, e.g. cnn.")],
) -> None:
    """Bring the networks of one family to canonical form and write them as token shards.

    Reads data/recipes, data/zoo/<family>/ and params.yaml (tokenize_zoo), and replaces
    data/tokens/<family>/ as a whole. The schema is documented in docs/SHARDS.md.
    """
    with reported():
        config = load_section(TokenizeConfig, "tokenize_zoo")
        require(ZOO / family, f"train_zoo@{family}")
        frame, specs = describe(family)
        row_of = {row["run"]: row for row in frame.to_dict("records")}
        prober = Prober(config.probes, ZOO)

        def tables() -> Iterator[tuple[Sequence[str], pa.Table]]:
            with Progress(f"tokenize_zoo {family}", len(frame), "networks") as progress:
                for stack in read_zoo(ZOO / family):
                    for part in stack_parts(stack.weights):
                        runs = stack.networks["run"][part].tolist()
                        spec = specs[row_of[runs[0]]["spec"]]
                        weights = {name: tensor[part] for name, tensor in stack.weights.items()}
                        states = config.canonical.apply_stack(spec, weights)
                        answers = []
                        for i, run in enumerate(runs):
                            state = {name: tensor[i] for name, tensor in states.items()}
                            answers.append(prober.responses(row_of[run], spec, state))
                            progress.advance()
                        found = {
                            layer: np.stack([one[layer] for one in answers if one is not None])
                            for layer in answers[0] or ()
                        }
                        yield (
                            runs,
                            tokenize_stack(
                                spec, states, config=config.tokens, responses=found or None
                            ),
                        )

        with writing(TOKENS / family):
            expect_writable(TOKENS)
            sweep(TOKENS, family)
            write_tokens(TOKENS / family, frame, specs, tables(), config=config.tokens)
        conclude(
            f"tokenize_zoo {family}",
            done=f"{len(frame)} networks of {len(specs)} architectures",
            bad=f"{frame['diverged'].sum()} diverged networks (kept)",
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
