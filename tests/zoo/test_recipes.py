"""Recipes: reproducible, unique, inside their ranges, and stable when the zoo grows."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from weightnet.params import parse, read_params
from weightnet.randomness import numpy_generator
from weightnet.zoo.architectures import build
from weightnet.zoo.recipes import FamilyConfig, RecipeConfig, _log_uniform, sample_recipes

SECTION: dict[str, Any] = read_params(Path(__file__).parents[2] / "params.yaml")["generate_zoo"]
RANGES = parse(RecipeConfig, SECTION["ranges"], "generate_zoo.ranges")


def config(family: str, **changes: Any) -> FamilyConfig:
    section = {**SECTION["families"][family], **changes}
    return parse(FamilyConfig, section, f"generate_zoo.families.{family}")


def draw(family: str, runs: int, **changes: Any) -> pd.DataFrame:
    return sample_recipes(family, config(family, runs=runs, **changes), RANGES)


def test_a_longer_zoo_begins_with_the_shorter_one() -> None:
    longer = draw("cnn", 37)
    for runs in (1, 8, 13, 24):
        shorter = draw("cnn", runs)
        pd.testing.assert_frame_equal(
            shorter, longer.head(runs)[list(shorter.columns)], check_dtype=False
        )


def test_recipes_are_reproducible_and_their_ids_unique() -> None:
    first = draw("cnn", 200)
    pd.testing.assert_frame_equal(first, draw("cnn", 200))
    assert first["run"].is_unique
    assert first["run"].str.fullmatch("[0-9a-f]{16}").all()


def test_draws_are_the_same_on_every_processor() -> None:
    generator = numpy_generator(0, "draws")
    draws = np.array([_log_uniform(generator, 0.005, 0.3) for _ in range(1000)])
    assert hashlib.sha256(draws.tobytes()).hexdigest()[:16] == "99f30e824aa6693d"


def test_another_seed_gives_other_recipes() -> None:
    other = sample_recipes("cnn", config("cnn", runs=8), RANGES.model_copy(update={"seed": 1}))
    assert set(other["run"]).isdisjoint(draw("cnn", 8)["run"])


def test_a_family_does_not_depend_on_the_others() -> None:
    alone = draw("vgg11", 8)
    draw("cnn", 5)
    pd.testing.assert_frame_equal(alone, draw("vgg11", 8))
    assert set(alone["run"]).isdisjoint(draw("vgg16", 8)["run"])


def test_values_stay_inside_their_ranges() -> None:
    recipes = draw("cnn", 160)
    ranges, family = SECTION["ranges"], SECTION["families"]["cnn"]
    for optimizer, rows in recipes.groupby("optimizer"):
        low, high = ranges["learning_rate"][optimizer]
        assert rows["learning_rate"].between(low, high).all()
    for name in ("weight_decay", "dropout", "label_noise"):
        low, high = ranges[name]["range"]
        present = recipes[name][recipes[name] > 0]
        assert present.between(low, high).all()
        assert 0 < len(present) < len(recipes)
    assert recipes["initialization_scale"].between(*ranges["initialization_scale"]).all()
    assert recipes["train_images"].between(*ranges["train_images"]).all()
    assert recipes["steps"].between(*family["steps"]).all()
    assert recipes["train_fraction"].between(0, 1, inclusive="right").all()
    for name in ("optimizer", "initialization", "augmentation", "task"):
        key = {"optimizer": "optimizers", "task": "tasks"}.get(name, name)
        assert set(recipes[name]) == set(ranges[key])
    assert set(recipes["batch_size"]) <= set(family["batch_size"])
    for text in recipes["arguments"].unique():
        drawn = json.loads(text)
        for name, values in family["arguments"].items():
            assert drawn[name] in values


def test_the_runs_of_a_stack_share_a_shape_and_fill_it() -> None:
    recipes = draw("cnn", 40, runs_per_shape=8)
    for _, rows in recipes.groupby("stack"):
        assert len(rows) == 8
        for name in ("task", "arguments", "width", "batch_size"):
            assert rows[name].nunique() == 1


@pytest.mark.parametrize("family", sorted(SECTION["families"]))
def test_every_recipe_of_params_can_be_built(family: str) -> None:
    recipes = draw(family, 4, runs_per_shape=2)
    for text in recipes["arguments"].unique():
        build(family, **json.loads(text))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("runs",), -1, "runs"),
        (("runs",), "8", "runs"),
        (("runs_per_shape",), 0, "runs_per_shape"),
        (("batch_size",), [], "batch_size"),
        (("steps",), [9, 3], "low <= high"),
        (("arguments", "width"), [0], "width"),
        (("arguments", "width"), [], "width"),
        (("colour",), "red", "unknown"),
    ],
)
def test_impossible_families_are_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    section = copy.deepcopy(SECTION["families"]["cnn"])
    inner = section
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        parse(FamilyConfig, section, "generate_zoo.families.cnn")


def test_unknown_architecture_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="does not take these arguments"):
        draw("cnn", 1, arguments={"wings": [2]})
    with pytest.raises(ValueError, match="family must be one of"):
        sample_recipes("lstm", config("cnn", runs=1), RANGES)
