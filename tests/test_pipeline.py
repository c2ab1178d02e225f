"""The pipeline end to end at the smoke scale, in a temporary repository, run by `dvc repro`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from weightnet.params import parse
from weightnet.symmetry import trace
from weightnet.tasks import load_task
from weightnet.tokens import TokensConfig, detokenize, tokenize
from weightnet.zoo.architectures import build
from weightnet.zoo.properties import TrainingConfig
from weightnet.zoo.recipes import FamilyConfig, RecipeConfig, sample_recipes
from weightnet.zoo.stacks import plan_stacks
from weightnet.zoo.store import read_zoo

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location(
    "weightnet_smoke", ROOT / "tests" / "smoke.py"
)
assert specification is not None
assert specification.loader is not None
smoke = importlib.util.module_from_spec(specification)
specification.loader.exec_module(smoke)

FAMILIES, PREDICTORS, SPLITS = ["cnn", "resnet18"], ["weightnet", "gbm", "family_mean"], ["iid"]
OUTPUTS, WRITTEN = smoke.OUTPUTS, smoke.WRITTEN


def shell(folder: Path, *command: str, **environment: str) -> str:
    """Run a command in ``folder`` with this Python first on the path; return what it says."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def repro(folder: Path, **environment: str) -> list[str]:
    """Run `dvc repro`; return the stages that ran."""
    said = shell(folder, sys.executable, "-m", "dvc", "repro", **environment)
    return re.findall(r"^Running stage '(.*)'", said, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of the working tree's files with tiny params, two families, run once."""
    folder = tmp_path_factory.mktemp("pipeline") / "weightnet"
    params = smoke.read(ROOT / "params.yaml")
    smoke.shrink(params)
    params.update(families=FAMILIES, predictors=PREDICTORS, splits=SPLITS)
    params["generate_zoo"]["ranges"]["tasks"] = ["fashion"]
    params["train_predictor"]["common"]["splits"]["held_out_families"] = ["resnet18"]
    smoke.make_repository(ROOT, folder, params)
    ran = repro(folder, WEIGHTNET_JOBS="1")
    assert sorted(ran) == sorted(everything())
    return folder


def everything() -> set[str]:
    pairs = {f"train_predictor@{p}-{s}" for p in PREDICTORS for s in SPLITS}
    return set().union(*(of_family(family) for family in FAMILIES)) | pairs | {"evaluate", "plot"}


def of_family(family: str) -> set[str]:
    return {f"{stage}@{family}" for stage in ("generate_zoo", "train_zoo", "tokenize_zoo")}


def test_a_run_leaves_scores_figures_and_a_report(repository: Path) -> None:
    assert json.loads((repository / "metrics" / "summary.json").read_text())
    scores = pd.read_csv(repository / "metrics" / "scores.csv")
    columns = ["predictor", "split", "property", "subset", "metric", "value", "low", "high", "n"]
    assert set(columns) <= set(scores.columns)
    assert set(PREDICTORS) <= set(scores["predictor"])
    assert {"tau", "spearman", "r2", "mae", "coverage"} <= set(scores["metric"])
    pictures = list((repository / "plots").glob("*.png"))
    assert len(pictures) >= 8
    report = (repository / "results" / "results.md").read_text()
    for name in re.findall(r"\.\./plots/([\w.]+)", report):
        assert (repository / "plots" / name).is_file()


def test_the_second_run_does_nothing(repository: Path) -> None:
    lock = (repository / "dvc.lock").read_bytes()
    assert repro(repository) == []
    assert (repository / "dvc.lock").read_bytes() == lock


# Params key -> the stages that must run again when it changes; what follows them is added.
CHANGES: dict[str, tuple[Any, set[str]]] = {
    "generate_zoo.families.cnn.runs": (14, {"generate_zoo@cnn"}),
    "generate_zoo.families.resnet18.steps": ([2, 5], {"generate_zoo@resnet18"}),
    "generate_zoo.families.vgg11.runs": (6, set()),
    "generate_zoo.ranges.seed": (1, {f"generate_zoo@{family}" for family in FAMILIES}),
    "train_zoo.measure.noise": (0.4, {f"train_zoo@{family}" for family in FAMILIES}),
    "tokenize_zoo.canonical.scale": (
        False,
        {*(f"tokenize_zoo@{family}" for family in FAMILIES), "evaluate"},
    ),
    "tokenize_zoo.tokens.max_row": (512, {f"tokenize_zoo@{family}" for family in FAMILIES}),
    "train_predictor.weightnet.width": (24, {f"train_predictor@weightnet-{s}" for s in SPLITS}),
    "train_predictor.gbm.rounds": (6, {f"train_predictor@gbm-{s}" for s in SPLITS}),
    "train_predictor.mlp.hidden": (9, set()),
    "train_predictor.common.seeds": (
        2,
        {*(f"train_predictor@{p}-{s}" for p in PREDICTORS for s in SPLITS), "evaluate"},
    ),
    "evaluate.scores.draws": (11, {"evaluate"}),
    "plot.properties": (["test_accuracy"], {"plot"}),
}

# Prints, for each change, the stages that DVC finds changed and all that follow them.
STALE = """
import json, sys
from pathlib import Path
import networkx
from dvc.repo import Repo
from ruamel.yaml import YAML
yaml, file = YAML(typ="safe", pure=True), Path("params.yaml")
original, found = file.read_text(), {}
try:
    for key, value in json.load(sys.stdin).items():
        params = inner = yaml.load(original)
        *path, last = key.split(".")
        for part in path:
            inner = inner[part]
        inner[last] = value
        with file.open("w") as out:
            yaml.dump(params, out)
        with Repo() as repo:
            changed = set(repo.status())
            graph = repo.index.graph
            first = [stage for stage in graph if stage.addressing in changed]
            after = set().union(*(networkx.ancestors(graph, stage) for stage in first), first)
            found[key] = sorted(stage.addressing for stage in after)
finally:
    file.write_text(original)
print(json.dumps(found))
"""


def test_a_changed_parameter_reruns_what_depends_on_it_and_nothing_else(repository: Path) -> None:
    predictors = {f"train_predictor@{p}-{s}" for p in PREDICTORS for s in SPLITS}

    def with_what_follows(stages: set[str]) -> set[str]:
        found = set(stages)
        for family in FAMILIES:
            chain = [f"{s}_zoo@{family}" for s in ("generate", "train", "tokenize")]
            for i, stage in enumerate(chain):
                if stage in stages:
                    found |= {*chain[i:], *predictors}
        if found & predictors:
            found.add("evaluate")
        return found | {"plot"} if found else found

    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", STALE],
        cwd=repository,
        env={**os.environ, "PATH": path},
        input=json.dumps({key: value for key, (value, _) in CHANGES.items()}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {key: sorted(with_what_follows(first)) for key, (_, first) in CHANGES.items()}
    assert found == expected


def test_a_run_from_nothing_gives_the_same_bytes(repository: Path) -> None:
    lock = repository / "dvc.lock"
    before = lock.read_text()
    lock.unlink()
    for name in (*OUTPUTS, ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(repository / name, ignore_errors=True)
    shell(repository, "git", "checkout", "--", WRITTEN)
    assert set(repro(repository, WEIGHTNET_JOBS="2")) == everything()
    assert lock.read_text() == before


PARAMS: dict[str, Any] = smoke.read(ROOT / "params.yaml")
smoke.shrink(PARAMS)


@pytest.mark.parametrize("family", PARAMS["generate_zoo"]["families"])
def test_every_family_goes_from_recipe_to_tokens_and_back(family: str, tmp_path: Path) -> None:
    section = PARAMS["generate_zoo"]
    ranges = parse(RecipeConfig, section["ranges"], "ranges")
    drawn = {**section["families"][family], "runs": 2, "runs_per_shape": 2}
    recipes = sample_recipes(family, parse(FamilyConfig, drawn, family), ranges)
    config = parse(TrainingConfig, PARAMS["train_zoo"], "train_zoo")
    for stack in plan_stacks(recipes, config.properties, config.measure, tmp_path):
        stack.train()
    (stored,) = read_zoo(tmp_path)
    assert set(stored.networks["run"]) == set(recipes["run"])
    measured = stored.networks.filter(like=".")
    assert measured.shape == (2, 3 * len(config.properties))
    assert bool(measured.notna().all(axis=None))

    arguments = json.loads(recipes["arguments"][0])
    task = load_task(recipes["task"][0])
    spec = trace(build(family, **arguments), torch.zeros(1, task.channels, task.size, task.size))
    state = stored.state(0)
    tokens = TokensConfig()
    back = detokenize(spec, tokenize(spec, state, config=tokens))
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name])
