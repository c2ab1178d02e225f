"""Draw a family's recipes: data/recipes/<family>.parquet."""

from pathlib import Path
from typing import Annotated

import typer

from weightnet.command import load_section, reported
from weightnet.zoo.recipes import FamilyConfig, RecipeConfig, sample_recipes

RECIPES = Path("data/recipes")


def main(
    family: Annotated[str, typer.Argument(help="A family in params.yaml, e.g. cnn.")],
) -> None:
    """Draw the recipes of one family of networks: one row a training run, each with a hash id.

    Reads params.yaml (generate_zoo) and writes data/recipes/<family>.parquet.
    """
    with reported():
        ranges = load_section(RecipeConfig, "generate_zoo", "ranges")
        config = load_section(FamilyConfig, "generate_zoo", "families", family)
        recipes = sample_recipes(family, config, ranges)
        RECIPES.mkdir(parents=True, exist_ok=True)
        recipes.to_parquet(RECIPES / f"{family}.parquet", index=False)
        typer.echo(f"{family}: {len(recipes)} recipes in {recipes['stack'].nunique()} stacks")


if __name__ == "__main__":
    typer.run(main)
