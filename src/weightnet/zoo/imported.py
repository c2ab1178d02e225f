"""Zoos of the user's own, as `weightnet import` left them: checked, and in the pipeline's layout.

    data/raw/F/recipes.parquet    one row a network; the hash of its content is among the columns
    data/raw/F/stacks/<key>/      trained stacks (see store.py), with the measured properties
    data/raw/F/code/              the source files of the user's architectures
    data/raw/F/manifest.json      the digest of it all, which params.yaml names too

Nothing here runs code, and no stage reads the folder that was imported.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd

from weightnet.params import Params

FORMAT = 1
RECIPES, STACKS, CODE = "recipes.parquet", "stacks", "code"
ADOPTED_CODE = ".code"  # beside the stacks in data/zoo/F/, where it is not taken for one
HIDDEN = ("stack", "arguments", "architecture", "input", "source", "digest")


class ImportedConfig(Params):
    """A family that was imported: where it lies, and the digest of its content."""

    imported: str
    digest: str


def digest_of(recipes: pd.DataFrame) -> str:
    """The digest of an imported zoo: of its rows, each of which holds the hash of its content."""
    text = recipes.to_json(orient="records", double_precision=15)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, recipes: pd.DataFrame) -> str:
    """Write recipes.parquet and manifest.json into ``folder``; return the digest."""
    recipes.to_parquet(folder / RECIPES, index=False)
    digest = digest_of(recipes)
    text = json.dumps({"format": FORMAT, "digest": digest}, indent=1, sort_keys=True)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return digest


def is_imported(folder: Path) -> bool:
    """Whether ``folder`` is one that `weightnet import` made."""
    try:
        described = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return bool(described["format"] == FORMAT and described["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_recipes(family: str, config: ImportedConfig) -> pd.DataFrame:
    """The recipes of an imported family.

    Raises:
        ValueError: if the folder is missing, or is not what params.yaml names.
    """
    folder = Path(config.imported)
    remedy = f"import it again: `weightnet import DIR --name {family}`"
    if not is_imported(folder):
        raise ValueError(f"{folder} must hold an imported zoo, however: it does not; {remedy}")
    try:
        recipes = pd.read_parquet(folder / RECIPES)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / RECIPES} must be readable, however: {error}; {remedy}"
        ) from None
    if digest_of(recipes) != config.digest:
        raise ValueError(
            f"{folder} must have the digest that params key generate_zoo.families.{family} names, "
            f"however: it differs; {remedy}"
        )
    return recipes
