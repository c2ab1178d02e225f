"""Bad input stops a stage before it writes: one message on standard error, exit code 2."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from weightnet.command import load_section
from weightnet.symmetry import trace
from weightnet.tokens import TokensConfig, spec_id, tokenize, write_tokens
from weightnet.zoo.architectures import build
from weightnet.zoo.properties import PROPERTIES, TrainingConfig

ROOT = Path(__file__).parents[1]
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.py"))
ARGUMENTS = {
    "generate_zoo": ("cnn",),
    "train_zoo": ("cnn",),
    "tokenize_zoo": ("cnn",),
    "train_predictor": ("mean", "iid"),
    "evaluate": (),
    "plot": (),
}


def load(path: Path, name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


smoke = load(ROOT / "tests" / "smoke.py", "weightnet_smoke")
MAINS: dict[str, Callable[..., None]] = {
    stage: load(ROOT / "stages" / f"{stage}.py", f"weightnet_stage_{stage}").main
    for stage in STAGES
}


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Tiny params of the family cnn, in an empty folder; tests change and `write` them."""
    monkeypatch.chdir(tmp_path)
    content = smoke.read(ROOT / "params.yaml")
    smoke.shrink(content)
    content.update(families=["cnn"], predictors=["mean"], splits=["iid"])
    content["train_predictor"]["common"]["splits"]["held_out_families"] = ["cnn"]
    yield content


def change(content: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        content = content[part]
    content[last] = value


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}


def refused(
    capsys: pytest.CaptureFixture[str],
    params: dict[str, Any],
    stage: str,
    *arguments: str,
) -> str:
    """Run a stage that must refuse its input; return its message."""
    smoke.write(Path("params.yaml"), params)
    before = files()
    with pytest.raises(SystemExit) as stopped:
        MAINS[stage](*(arguments or ARGUMENTS[stage]))
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("error: ")
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    assert files() == before
    return message


CNN = "generate_zoo.families.cnn"
MEASURE = "train_zoo.measure"
COMMON = "train_predictor.common"
BAD_PARAMS = [
    ("generate_zoo", f"{CNN}.wings", 2),
    ("generate_zoo", f"{CNN}.runs", -1),
    ("generate_zoo", f"{CNN}.runs", 0),
    ("generate_zoo", f"{CNN}.runs", "8"),
    ("generate_zoo", f"{CNN}.runs", 8.0),
    ("generate_zoo", f"{CNN}.runs", True),
    ("generate_zoo", f"{CNN}.arguments.width", [0]),
    ("generate_zoo", f"{CNN}.arguments.width", [-4]),
    ("generate_zoo", f"{CNN}.arguments.activation", ["square"]),
    ("generate_zoo", f"{CNN}.steps", [5, 2]),
    ("generate_zoo", "generate_zoo.ranges.tasks", ["cats"]),
    ("generate_zoo", "generate_zoo.ranges.tasks", []),
    ("generate_zoo", "generate_zoo.ranges.tasks", "digits"),
    ("generate_zoo", "generate_zoo.ranges.dropout.probability", 2.0),
    ("generate_zoo", "generate_zoo.ranges.label_noise.range", [0.5, 1.5]),
    ("generate_zoo", "generate_zoo.ranges.optimizers", ["lion"]),
    ("train_zoo", "train_zoo.properties", ["beauty"]),
    ("train_zoo", "train_zoo.properties", []),
    ("train_zoo", f"{MEASURE}.test_images", -5),
    ("train_zoo", f"{MEASURE}.noise", "0.3"),
    ("train_zoo", f"{MEASURE}.adversarial", 0),
    ("train_zoo", f"{MEASURE}.blur", 1),
    ("tokenize_zoo", "tokenize_zoo.canonical.order", "shuffle"),
    ("tokenize_zoo", "tokenize_zoo.canonical.scale", "yes"),
    ("tokenize_zoo", "tokenize_zoo.tokens.dtype", "int8"),
    ("tokenize_zoo", "tokenize_zoo.tokens.max_row", 0),
    ("tokenize_zoo", "tokenize_zoo.tokens.colour", "red"),
    ("train_predictor", f"{COMMON}.seeds", 0),
    ("train_predictor", f"{COMMON}.properties", []),
    ("train_predictor", f"{COMMON}.splits.test_fraction", 1.5),
    ("train_predictor", f"{COMMON}.splits.fold", 3),
    ("train_predictor", "train_predictor.mean.depth", 3),
    ("evaluate", "evaluate.scores.draws", 0),
    ("evaluate", "evaluate.scores.level", "high"),
    ("evaluate", "evaluate.audit.copies", 0),
    ("evaluate", "evaluate.audit.colour", 1),
    ("plot", "plot.properties", "test_accuracy"),
    ("plot", "plot.colour", "red"),
]


@pytest.mark.parametrize(("stage", "key", "value"), BAD_PARAMS)
def test_bad_params_are_named_by_their_key(
    stage: str,
    key: str,
    value: Any,
    params: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(params, key, value)
    message = refused(capsys, params, stage)
    assert key.rsplit(".", 1)[-1] in message or str(value) in message


@pytest.mark.parametrize(
    ("predictor", "key", "value"),
    [
        ("weightnet", "width", 0),
        ("weightnet", "width", -8),
        ("weightnet", "fit.epochs", -1),
        ("weightnet", "fit.learning_rate", "fast"),
        ("mlp", "hidden", 0),
        ("gbm", "candidates", 0),
        ("gbm", "leaves", 7),
    ],
)
def test_bad_settings_of_a_predictor_are_named(
    predictor: str,
    key: str,
    value: Any,
    params: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(params, f"train_predictor.{predictor}.{key}", value)
    message = refused(capsys, params, "train_predictor", predictor, "iid")
    assert f"train_predictor.{predictor}.{key}" in message


def test_unknown_names_are_refused_with_the_known_ones(
    params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cnn" in refused(capsys, params, "generate_zoo", "lstm")
    change(params, "generate_zoo.families.lstm", params["generate_zoo"]["families"]["cnn"])
    assert "cnn" in refused(capsys, params, "generate_zoo", "lstm")
    assert "weightnet" in refused(capsys, params, "train_predictor", "oracle", "iid")
    assert "unseen_task" in refused(capsys, params, "train_predictor", "mean", "tomorrow")
    params["predictors"] = ["oracle"]
    assert "weightnet" in refused(capsys, params, "evaluate")


@pytest.mark.parametrize("stage", ["evaluate", "plot"])
@pytest.mark.parametrize("key", ["families", "predictors", "splits"])
@pytest.mark.parametrize("value", [[], "cnn", ["mean", "mean"], [3]])
def test_a_bad_matrix_list_is_refused(
    stage: str, key: str, value: Any, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    params[key] = value
    assert key in refused(capsys, params, stage)


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "generate_zoo"])
def test_a_missing_upstream_output_names_the_stage_that_makes_it(
    stage: str, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "dvc repro" in refused(capsys, params, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_missing_or_broken_params_are_refused(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (None, "[", "7", "{}"):
        if text is not None:
            Path("params.yaml").write_text(text)
        with pytest.raises(SystemExit) as stopped:
            MAINS[stage](*ARGUMENTS[stage])
        assert stopped.value.code == 2
        assert "params" in capsys.readouterr().err


def test_a_number_in_scientific_notation_is_a_number(
    params: dict[str, Any], tmp_path: Path
) -> None:
    smoke.write(Path("params.yaml"), params)
    text = Path("params.yaml").read_text()
    assert "noise: 0.3" in text
    Path("params.yaml").write_text(text.replace("noise: 0.3", "noise: 1e-05"))
    assert load_section(TrainingConfig, "train_zoo").measure.noise == 1e-05


def write_networks(folder: Path, count: int = 12) -> None:
    """Tokens of untrained networks with made-up measurements."""
    module = build("cnn", size=8, width=2, depth=2)
    spec = trace(module, torch.zeros(1, 1, 8, 8))
    config, name = TokensConfig(), spec_id(spec)
    rows = []
    for i in range(count):
        row = {"run": f"run{i:02d}", "family": "cnn", "task": "digits", "width": 2.0}
        row.update(spec=name, diverged=False)
        for prefix in ("property", "half_a", "half_b"):
            row.update({f"{prefix}.{of}": 0.1 * i for of in PROPERTIES})
        rows.append(row)
    tables = [(row["run"], tokenize(spec, module.state_dict(), config=config)) for row in rows]
    write_tokens(folder, pd.DataFrame(rows), {name: spec}, iter(tables), config=config)


def make_upstream() -> None:
    write_networks(Path("data/tokens/cnn"))
    for name in ("predictors", "curves"):
        Path(f"data/{name}/mean-iid").mkdir(parents=True)
    Path("data/predictions").mkdir()
    pd.DataFrame({"run": []}).to_parquet("data/predictions/mean-iid.parquet")


def set_version(path: Path, version: str) -> None:
    table = pq.read_table(path)
    changed = {**table.schema.metadata, b"weightnet.version": version.encode()}
    pq.write_table(table.replace_schema_metadata(changed), path)


@pytest.mark.parametrize("stage", ["evaluate", "plot"])
@pytest.mark.parametrize("shard", ["tokens-00000", "networks", "specs"])
def test_a_shard_of_another_version_is_refused(
    stage: str, shard: str, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_upstream()
    set_version(Path(f"data/tokens/cnn/{shard}.parquet"), "999")
    message = refused(capsys, params, stage)
    assert "version 999" in message
    assert "dvc repro tokenize_zoo" in message


@pytest.mark.parametrize("stage", ["evaluate", "plot", "train_predictor"])
def test_a_stale_sibling_does_not_leak_in(
    stage: str, params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_upstream()
    Path("data/tokens/old").mkdir()
    assert "old" in refused(capsys, params, stage)


def run(stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = ROOT / "stages" / f"{stage}.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "WEIGHTNET_JOBS": "1"}
    environment.update(COLUMNS="200", TERM="dumb")
    return subprocess.run(
        [sys.executable, str(path), *arguments], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("why", ["version", "property", "held_out"])
def test_the_workers_of_train_predictor_are_as_clear(why: str, params: dict[str, Any]) -> None:
    write_networks(Path("data/tokens/cnn"))
    split, expected = "iid", "beauty"
    if why == "version":
        set_version(Path("data/tokens/cnn/tokens-00000.parquet"), "999")
        expected = "version 999"
    elif why == "property":
        params["train_predictor"]["common"]["properties"] = ["beauty"]
    else:
        split, expected = "unseen_architecture", "held_out_families"
        params["train_predictor"]["common"]["splits"]["held_out_families"] = ["lstm"]
    smoke.write(Path("params.yaml"), params)
    before = files()
    done = run("train_predictor", "mean", split)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert files() == before


def test_an_unknown_property_of_the_figures_is_refused(
    params: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_upstream()
    Path("metrics").mkdir()
    for name in ("scores", "audit", "differences", "splits", "importance", "agreement"):
        Path(f"metrics/{name}.csv").write_text("property\ntest_accuracy\n")
    Path("metrics/scores.csv").write_text(
        "predictor,split,property,subset,metric,value,low,high,n\n"
        "mean,iid,test_accuracy,all,tau,0,0,0,3\n"
    )
    params["plot"]["properties"] = ["beauty"]
    assert "beauty" in refused(capsys, params, "plot")


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_itself(stage: str) -> None:
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(MAINS[stage])
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "params.yaml" in result.output
    assert json.dumps(result.output).count("TODO") == 0


def _halve(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(train_images=table["train_images"] + 0.5)


BAD_TABLES: list[tuple[str, Callable[[pd.DataFrame], pd.DataFrame]]] = [
    ("it has no rows", lambda table: table[:0]),
    ("no column stack", lambda table: table.drop(columns="stack")),
    ("column width is not numbers", lambda table: table.assign(width="wide")),
    ("column learning_rate has values", lambda table: table.assign(learning_rate=float("nan"))),
    ("column batch_size has values that are not whole", lambda table: table.assign(batch_size=0)),
    ("column steps has values that are not whole", lambda table: table.assign(steps=-1)),
    ("column train_images has values that are not whole", _halve),
    ("column task is not text", lambda table: table.assign(task=7)),
    ("column run repeats", lambda table: pd.concat([table, table])),
]


@pytest.mark.parametrize(("fact", "spoil"), BAD_TABLES)
def test_spoilt_recipes_cost_no_trained_stack(
    fact: str,
    spoil: Callable[[pd.DataFrame], pd.DataFrame],
    params: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    smoke.write(Path("params.yaml"), params)
    MAINS["generate_zoo"]("cnn")
    stack = Path("data/zoo/cnn/0123456789abcdef")  # stale to any recipes, so it would be pruned
    stack.mkdir(parents=True)
    (stack / "weights.safetensors").write_bytes(b"dear")
    path = Path("data/recipes/cnn.parquet")
    spoil(pd.read_parquet(path)).to_parquet(path, index=False)
    capsys.readouterr()
    assert fact in refused(capsys, params, "train_zoo")


def test_deep_yaml_is_refused(
    params: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del params
    Path("params.yaml").write_text("families: " + "[" * 5000 + "]" * 5000, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        MAINS["generate_zoo"]("cnn")
    assert stopped.value.code == 2
    assert "nested too deeply" in capsys.readouterr().err
