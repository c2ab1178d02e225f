"""dvc.yaml keeps its contract with the code: names, dependencies, params, lock."""

from __future__ import annotations

import ast
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML

from weightnet.params import read_params
from weightnet.predictors import PREDICTORS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"


def read(name: str) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load((ROOT / name).read_text(encoding="utf-8"))


DVC, PARAMS = read("dvc.yaml"), read_params(ROOT / "params.yaml")
STAGES: dict[str, dict[str, Any]] = DVC["stages"]


def items(stage: dict[str, Any]) -> list[dict[str, str]]:
    """The matrix items of a stage; one empty item if it has no matrix."""
    matrix = stage.get("matrix", {})
    values = [PARAMS[text.removeprefix("${").removesuffix("}")] for text in matrix.values()]
    return [dict(zip(matrix, item, strict=True)) for item in product(*values)]


def fill(text: str, item: dict[str, str]) -> str:
    for name, value in item.items():
        text = text.replace(f"${{item.{name}}}", value)
    return text


# The import closure is read off the source, without importing it. Imports inside functions count:
# what a stage can reach, it depends on. The registry of predictors imports by a computed name,
# which this table spells out; a stage that only reads the registry (plot) imports nothing by it.
READS_REGISTRY_ONLY = ("plot",)
BY_NAME = {"weightnet.predictors.registry": sorted({e.module for e in PREDICTORS.values()})}


@cache
def module_path(name: str) -> Path | None:
    """The file of a first-party module or package; None if there is none."""
    base = SOURCE.joinpath(*name.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


@cache
def imports(path: Path) -> frozenset[str]:
    """The first-party modules that a file imports at run time, their packages included."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports must be absolute"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    modules = {name for name in found if name.split(".")[0] == "weightnet" and module_path(name)}
    parents = {name.rsplit(".", depth)[0] for name in modules for depth in range(name.count("."))}
    return frozenset(modules | parents | {"weightnet"} if modules else modules)


def closure(script: Path) -> set[str]:
    """Repository paths of all first-party files that running ``script`` may import."""
    reached: set[str] = set()
    waiting = list(imports(script))
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        path = module_path(name)
        assert path is not None
        waiting += imports(path)
        if script.stem not in READS_REGISTRY_ONLY:
            waiting += BY_NAME.get(name, ())
        waiting += [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
    paths = {module_path(name) for name in reached}
    return {str(path.relative_to(ROOT)) for path in paths if path is not None}


def test_stage_script_and_params_section_share_a_name() -> None:
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")}
    assert set(STAGES) == scripts
    sections = set(PARAMS) - {"families", "predictors", "splits"}
    assert sections == scripts
    for name, stage in STAGES.items():
        assert f"python stages/{name}.py" in stage["cmd"]
        assert stage["cmd"].startswith("PYTHONPATH=src ")
        assert stage["desc"]


def test_no_script_shadows_the_standard_library() -> None:
    assert {path.stem for path in (ROOT / "stages").iterdir()}.isdisjoint(sys.stdlib_module_names)


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_imports_is_among_its_dependencies(name: str) -> None:
    deps = STAGES[name]["deps"]
    needed = closure(ROOT / "stages" / f"{name}.py")
    missing = [
        path
        for path in sorted(needed)
        if not any(path == dep or path.startswith(f"{dep}/") for dep in deps)
    ]
    assert not missing
    assert f"stages/{name}.py" in deps


@pytest.mark.parametrize("name", STAGES)
def test_no_code_dependency_is_superfluous(name: str) -> None:
    needed = closure(ROOT / "stages" / f"{name}.py") | {f"stages/{name}.py"}
    code = [dep for dep in STAGES[name]["deps"] if dep.startswith(("src/", "stages/"))]
    assert all(
        any(path == dep or path.startswith(f"{dep}/") for path in needed) for dep in code
    ), [d for d in code if not any(p == d or p.startswith(f"{d}/") for p in needed)]
    assert all((ROOT / dep).exists() for dep in code)


@pytest.mark.parametrize("name", STAGES)
def test_declared_params_exist(name: str) -> None:
    for item in items(STAGES[name]):
        for key in STAGES[name]["params"]:
            value: Any = PARAMS
            for part in fill(key, item).split("."):
                assert part in value, f"{name}: params key {fill(key, item)}"
                value = value[part]


def test_the_matrix_names_are_known() -> None:
    from weightnet.evaluation.splits import SPLITS
    from weightnet.zoo.architectures import FAMILIES

    imported = {
        n for n, family in PARAMS["generate_zoo"]["families"].items() if "imported" in family
    }
    assert set(PARAMS["families"]) <= set(FAMILIES) | imported
    assert set(PARAMS["predictors"]) <= set(PREDICTORS)
    assert set(PARAMS["splits"]) <= set(SPLITS)
    held_out = PARAMS["train_predictor"]["common"]["splits"]["held_out_families"]
    assert set(held_out) < set(PARAMS["families"])


def stage_names() -> set[str]:
    names = set()
    for name, stage in STAGES.items():
        for item in items(stage):
            names.add(f"{name}@{'-'.join(item.values())}" if item else name)
    return names


def test_the_lock_file_agrees_with_the_stages() -> None:
    if not (ROOT / "dvc.lock").exists():
        pytest.skip("no dvc.lock yet")
    lock = read("dvc.lock")["stages"]
    assert set(lock) == stage_names()
    for name, stage in STAGES.items():
        for item in items(stage):
            locked = lock[f"{name}@{'-'.join(item.values())}" if item else name]
            assert locked["cmd"] == fill(stage["cmd"], item)
            deps = {fill(dep, item) for dep in stage["deps"]}
            assert {dep["path"] for dep in locked["deps"]} == deps


def test_the_headline_of_the_readme_follows_from_the_scores() -> None:
    readme, scores = ROOT / "README.md", ROOT / "metrics" / "scores.csv"
    if not (readme.exists() and scores.exists()):
        pytest.skip("no README.md or no metrics/scores.csv yet")
    from weightnet.report.names import PredictorInfo
    from weightnet.report.tables import headline_table

    table = pd.read_csv(scores)
    infos = [
        PredictorInfo(
            name,
            kind=entry.kind,
            description=entry.description,
            reads_weights=entry.reads_weights,
            needs_forward=entry.needs_forward,
        )
        for name, entry in ((name, PREDICTORS[name]) for name in PARAMS["predictors"])
    ]
    text = readme.read_text(encoding="utf-8")
    block = text.split("<!-- headline:start -->")[1].split("<!-- headline:end -->")[0]
    assert block.strip() == headline_table(table, infos).strip()


def test_pins_have_no_addresses_and_no_hashes() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin and "://" not in pin and "--" not in pin for pin in pins)
    assert {"torch==2.13.0", "torchvision==0.28.0"} <= set(pins)
