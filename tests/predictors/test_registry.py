"""The registry names every predictor and builds it from its section of params.yaml."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from weightnet.predictors import PREDICTORS, build, config_class, entry
from weightnet.predictors.trees import TreeConfig

PROPERTIES = ("test_accuracy", "test_loss")


@pytest.mark.parametrize("name", PREDICTORS)
def test_builds_with_defaults(name: str) -> None:
    if importlib.util.find_spec(entry(name).module) is None:
        pytest.skip(f"{entry(name).module} is not here")
    predictor = build(name, None, PROPERTIES, 1)
    assert (predictor.name, predictor.properties, predictor.seed) == (name, PROPERTIES, 1)
    assert type(predictor.config) is config_class(name)


def test_marks() -> None:
    blind = {name for name, found in PREDICTORS.items() if not found.reads_weights}
    assert blind == {"mean", "family_mean", "hyperparameters"}
    assert [name for name, found in PREDICTORS.items() if found.needs_forward] == [
        "weightnet_probe"
    ]


def test_wrong_names_and_configurations() -> None:
    with pytest.raises(ValueError, match=r"must be one of weightnet, .*gbm.*predictor=forest"):
        build("forest", None, PROPERTIES, 0)
    with pytest.raises(ValueError, match=r"train_predictor\.gbm\.trees is unknown"):
        build("gbm", {"trees": 3}, PROPERTIES, 0)
    with pytest.raises(ValueError, match=r"train_predictor\.stats\.fit\.epochs"):
        build("stats", {"fit": {"epochs": 0}}, PROPERTIES, 0)
    with pytest.raises(ValueError, match="must be MlpConfig, however: it is TreeConfig"):
        build("mlp", TreeConfig(), PROPERTIES, 0)


def test_the_registry_imports_nothing_heavy() -> None:
    code = (
        "import sys, weightnet.predictors; "
        "print(sorted({'torch', 'lightgbm', 'scipy', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
