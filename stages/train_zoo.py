"""Train a family's networks and measure their properties: data/zoo/<family>/."""

import shutil
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from weightnet.command import load_section, reported, require
from weightnet.progress import Progress
from weightnet.zoo.imported import ADOPTED_CODE, CODE, STACKS
from weightnet.zoo.properties import TrainingConfig
from weightnet.zoo.stacks import default_executor, plan_stacks
from weightnet.zoo.store import adopt, is_complete, prune, read_zoo

RECIPES = Path("data/recipes")
ZOO = Path("data/zoo")


def main(
    family: Annotated[str, typer.Argument(help="A family in params.yaml, e.g. cnn.")],
) -> None:
    """Train every recipe of one family, in stacks, and measure the networks' properties on images.

    Reads data/recipes/<family>.parquet and params.yaml (train_zoo), and fills data/zoo/<family>/.
    Stacks that are already there and whole are kept, so an interrupted run continues and a longer
    zoo trains only what is new. Environment: WEIGHTNET_JOBS, WEIGHTNET_DEVICE, WEIGHTNET_EXECUTOR.
    """
    with reported():
        config = load_section(TrainingConfig, "train_zoo")
        recipes = pd.read_parquet(require(RECIPES / f"{family}.parquet", f"generate_zoo@{family}"))
        folder = ZOO / family
        folder.mkdir(parents=True, exist_ok=True)
        if "source" in recipes:
            adopt_imported(family, recipes, folder)
            return
        stacks = plan_stacks(recipes, config.properties, config.measure, folder)
        missing = [stack for stack in stacks if not is_complete(stack.folder)]
        failures = []
        with Progress(
            f"train_zoo {family}", sum(len(s.recipes) for s in missing), "networks"
        ) as progress:
            for stack, error in default_executor()(missing) if missing else ():
                if error is not None:
                    failures.append(f"stack {stack.folder.name}: {type(error).__name__}: {error}")
                progress.advance(len(stack.recipes))
        if failures:
            typer.echo("\n".join(failures), err=True)
            raise SystemExit(1)  # what was trained stays; the next run continues
        pruned = prune(folder, {stack.folder.name for stack in stacks})
        diverged = sum(
            int((stored.networks["diverged_at"] >= 0).sum()) for stored in read_zoo(folder)
        )
        typer.echo(
            f"{family}: trained {len(missing)} stacks, reused {len(stacks) - len(missing)}, "
            f"removed {len(pruned)} stale; "
            f"{diverged} of {len(recipes)} runs diverged (kept and marked)"
        )


def adopt_imported(family: str, recipes: pd.DataFrame, folder: Path) -> None:
    """Fill the folder of an imported family, whose networks are trained and measured already."""
    source = Path(recipes["source"].iat[0])
    names = sorted(recipes["stack"].unique())
    copied, kept = adopt(source / STACKS, folder, names)
    pruned = prune(folder, {*names, ADOPTED_CODE})
    if (source / CODE).is_dir():
        shutil.rmtree(folder / ADOPTED_CODE, ignore_errors=True)
        shutil.copytree(source / CODE, folder / ADOPTED_CODE)
    typer.echo(
        f"{family}: copied {copied} imported stacks, reused {kept}, removed {len(pruned)} stale; "
        f"{len(recipes)} networks"
    )


if __name__ == "__main__":
    typer.run(main)
