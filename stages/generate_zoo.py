"""Draw a family's recipes: data/recipes/<family>.parquet."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ConfigDict

from weightnet.command import conclude, load_section, reported, write_table, writing
from weightnet.durable import sweep
from weightnet.params import Params
from weightnet.zoo.imported import ImportedConfig, read_recipes
from weightnet.zoo.recipes import FamilyConfig, RecipeConfig, sample_recipes

RECIPES = Path("data/recipes")


class AnyFamily(Params):
    """What tells an imported family from one of ours."""

    model_config = ConfigDict(extra="ignore")
    imported: str | None = None


def main(
    family: Annotated[str, typer.Argument(help="A family in params.yaml, e.g. cnn.")],
) -> None:
    """Draw the recipes of one family of networks: one row a training run, each with a hash id.

    The rows of a family that `weightnet import` brought are copied from where it put them. Reads
    params.yaml (generate_zoo) and writes data/recipes/<family>.parquet.
    """
    with reported():
        ranges = load_section(RecipeConfig, "generate_zoo", "ranges")
        section = ("generate_zoo", "families", family)
        if load_section(AnyFamily, *section).imported is not None:
            recipes = read_recipes(family, load_section(ImportedConfig, *section))
        else:
            config = load_section(FamilyConfig, *section)
            recipes = sample_recipes(family, config, ranges)
        path = RECIPES / f"{family}.parquet"
        with writing(path):
            sweep(path.parent, path.name)
            write_table(recipes, path)
        stacks = recipes["stack"].nunique()
        conclude(f"generate_zoo {family}", done=f"{len(recipes)} recipes in {stacks} stacks")


if __name__ == "__main__":
    typer.run(main)
