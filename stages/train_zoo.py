"""Train a family's networks and measure their properties: data/zoo/<family>/."""

import errno
import shutil
from contextlib import closing
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from weightnet import command
from weightnet.command import (
    CONTINUE,
    FAILURE,
    conclude,
    load_section,
    read_table,
    reported,
    writing,
)
from weightnet.durable import expect_writable, replace_folder, sweep
from weightnet.progress import Progress
from weightnet.zoo.imported import ADOPTED_CODE, CODE, STACKS
from weightnet.zoo.properties import TrainingConfig
from weightnet.zoo.stacks import default_executor, plan_stacks
from weightnet.zoo.store import adopt, is_complete, prune, read_zoo

RECIPES = Path("data/recipes")
ZOO = Path("data/zoo")
EVERYWHERE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
"""Faults of the disk, which every other stack would meet as well."""


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
        path, made_by = RECIPES / f"{family}.parquet", f"generate_zoo@{family}"
        recipes = read_table(path, made_by, command.RECIPES, unique="run")
        if "source" not in recipes:
            command.expect_columns(recipes, path, made_by, command.OWN_RECIPES)
        folder = ZOO / family
        with writing(folder):
            expect_writable(folder)
            sweep(folder)
            if "source" in recipes:
                adopt_imported(family, recipes, folder)
            else:
                train(family, recipes, folder, config)


def train(family: str, recipes: pd.DataFrame, folder: Path, config: TrainingConfig) -> None:
    """Train the stacks that ``folder`` lacks or holds damaged, and remove those out of date."""
    stacks = plan_stacks(recipes, config.properties, config.measure, folder)
    missing = [stack for stack in stacks if not is_complete(stack.folder)]
    for stack in missing:
        if stack.folder.exists():
            typer.echo(f"{stack.folder} is damaged: training it again", err=True)
    failures = []
    with (
        Progress(f"train_zoo {family}", sum(len(s.recipes) for s in missing), "networks") as bar,
        closing(default_executor()(missing)) as done,
    ):
        for stack, error in done if missing else ():
            if isinstance(error, OSError) and error.errno in EVERYWHERE:
                raise error
            if error is not None:
                failures.append(f"stack {stack.folder.name}: {type(error).__name__}: {error}")
            bar.advance(len(stack.recipes))
    if failures:
        kept = len(stacks) - len(failures)
        typer.echo(
            "\n".join(failures)
            + f"\nerror: every stack must be trained, however: {len(failures)} "
            f"failed; the other {kept} are kept: {CONTINUE}",
            err=True,
        )
        raise SystemExit(FAILURE)
    pruned = prune(folder, {stack.folder.name for stack in stacks})
    diverged = sum(int((stored.networks["diverged_at"] >= 0).sum()) for stored in read_zoo(folder))
    conclude(
        f"train_zoo {family}",
        done=f"{len(missing)} stacks",
        reused=f"{len(stacks) - len(missing)} stacks",
        skipped=f"{len(pruned)} stale stacks (removed)",
        bad=f"{diverged} of {len(recipes)} runs, which diverged (kept)",
    )


def adopt_imported(family: str, recipes: pd.DataFrame, folder: Path) -> None:
    """Fill the folder of an imported family, whose networks are trained and measured already."""
    source = Path(recipes["source"].iat[0])
    names = sorted(recipes["stack"].unique())
    copied, kept = adopt(source / STACKS, folder, names)
    pruned = prune(folder, {*names, ADOPTED_CODE})
    if (source / CODE).is_dir():
        with replace_folder(folder / ADOPTED_CODE) as temporary:
            shutil.copytree(source / CODE, temporary, dirs_exist_ok=True)
    conclude(
        f"train_zoo {family}",
        done=f"{copied} imported stacks",
        reused=f"{kept} stacks",
        skipped=f"{len(pruned)} stale stacks (removed)",
    )


if __name__ == "__main__":
    typer.run(main)
