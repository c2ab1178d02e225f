"""Whatever stands in params.yaml, a section is either valid or refused by the key's full path."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightnet.evaluation.scores import ScoresConfig
from weightnet.params import Params, parse, read_params
from weightnet.predictors import PREDICTORS, config_class
from weightnet.symmetry.form import CanonicalForm
from weightnet.tokens import ProbesConfig, TokensConfig
from weightnet.zoo.properties import TrainingConfig
from weightnet.zoo.recipes import RecipeConfig

PARAMS = read_params(Path(__file__).parents[1] / "params.yaml")
SECTIONS: list[tuple[str, type[Params]]] = [
    ("generate_zoo.ranges", RecipeConfig),
    ("train_zoo", TrainingConfig),
    ("tokenize_zoo.canonical", CanonicalForm),
    ("tokenize_zoo.probes", ProbesConfig),
    ("tokenize_zoo.tokens", TokensConfig),
    ("evaluate.scores", ScoresConfig),
    *((f"train_predictor.{name}", config_class(name)) for name in sorted(PREDICTORS)),
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


def section(where: str) -> Any:
    found: Any = PARAMS
    for key in where.split("."):
        found = found.get(key, {})
    return found


def checked(model: type[Params], data: Any, where: str) -> None:
    """Parse; an error must name the section in every line, and what is valid must go round."""
    try:
        parsed = parse(model, data, where)
    except ValueError as error:
        assert type(error) is ValueError
        assert f"params key {where}" in str(error)
    else:
        assert model.model_validate(parsed.model_dump()) == parsed


@pytest.mark.parametrize(("where", "model"), SECTIONS)
@settings(max_examples=15, deadline=None)
@given(junk=JUNK)
def test_any_value_of_a_section(where: str, model: type[Params], junk: Any) -> None:
    checked(model, junk, where)


@pytest.mark.parametrize(("where", "model"), SECTIONS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_value_of_a_key(where: str, model: type[Params], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([*sorted(model.model_fields), "wings", ""]))
    checked(model, {**section(where), key: data.draw(JUNK)}, where)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60) | st.text(alphabet="a:{}[]&*!|>-,'\"#% \n\t1.", max_size=40))
def test_any_content_of_the_file(content: bytes | str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            assert isinstance(read_params(path), dict)
        except ValueError as error:
            assert type(error) is ValueError
            assert "params.yaml must be" in str(error)
