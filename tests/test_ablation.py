"""Ablations: compared with their base on the same networks, and never at the zoo's expense."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from weightnet.ablation import (
    ABLATIONS,
    COLUMNS,
    Ablation,
    check,
    choose,
    compare,
    keep,
    newest_experiment,
    split_hashes,
)
from weightnet.evaluation.scores import ScoresConfig
from weightnet.params import read_params

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location(
    "weightnet_smoke", ROOT / "tests" / "smoke.py"
)
assert specification is not None
assert specification.loader is not None
smoke = importlib.util.module_from_spec(specification)
specification.loader.exec_module(smoke)

WORSE = Ablation("worse", "parts", ("train_predictor.weightnet.statistics=false",))


def make_networks(count: int = 60) -> pd.DataFrame:
    values = np.random.default_rng(0).uniform(size=count)
    frame = pd.DataFrame({"run": [f"{i:016x}" for i in range(count)]})
    return frame.assign(family="cnn", **{"property.test_accuracy": values})


def make_predictions(noise: float, tested: int = 40) -> pd.DataFrame:
    networks = make_networks()
    tables = []
    for seed in range(2):
        generator = np.random.default_rng(seed + 1)
        own = networks.iloc[seed * 20 : seed * 20 + tested].rename(
            columns={"property.test_accuracy": "measured"}
        )
        predicted = own["measured"] + noise * generator.normal(size=len(own))
        tables.append(
            own.assign(
                predicted=predicted, low=predicted - 1, high=predicted + 1, seed=seed, part="test"
            )
        )
    return pd.concat(tables).assign(property="test_accuracy", task="digits")


def test_a_worse_ablation_has_a_paired_difference_below_zero() -> None:
    base = {"weightnet": make_predictions(0.05)}
    found = {WORSE: make_predictions(0.6)}
    table = compare(found, base, make_networks(), ScoresConfig(draws=200), "iid")
    assert tuple(table.columns) == COLUMNS
    tau = table[table["metric"] == "tau"].set_index("ablation")
    row, unchanged = tau.loc["worse"], tau.loc["base"]
    assert row["difference"] == pytest.approx(row["value"] - unchanged["value"])
    assert row["difference_low"] < row["difference"] < row["difference_high"] < 0
    assert np.isnan(unchanged["difference"]) and row["n"] == 60
    assert row["hash"] == split_hashes(base["weightnet"]) == unchanged["hash"]


def test_a_mismatched_split_is_refused() -> None:
    base = {"weightnet": make_predictions(0.05)}
    found = {WORSE: make_predictions(0.05, tested=39)}
    with pytest.raises(ValueError, match=r"worse must test the networks.*run `weightnet ablate"):
        compare(found, base, make_networks(), ScoresConfig(draws=20), "iid")


def test_every_ablation_changes_a_known_parameter_and_no_zoo() -> None:
    params = read_params(ROOT / "params.yaml")
    check(ABLATIONS, params)
    assert len({one.name for one in ABLATIONS}) == len(ABLATIONS)
    with pytest.raises(ValueError, match=r"no zoo model is retrained.*generate_zoo\.ranges\.seed"):
        check([Ablation("x", "x", ("generate_zoo.ranges.seed=1",))], params)
    with pytest.raises(ValueError, match=r"weightnet\.wings is not there"):
        check([Ablation("x", "x", ("train_predictor.weightnet.wings=2",))], params)


def test_ablations_are_chosen_by_name_or_group() -> None:
    assert choose([]) == list(ABLATIONS)
    assert [one.name for one in choose(["no-statistics"])] == ["no-statistics"]
    assert {one.group for one in choose(["parts", "size"])} == {"parts", "size"}
    with pytest.raises(ValueError, match="however: wings"):
        choose(["wings"])


def shell(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "WEIGHTNET_JOBS": "1"}
    variables["PYTHONPATH"] = str(folder / "src")
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def test_ablations_run_as_experiments(tmp_path: Path) -> None:
    """In a temporary repository with one tiny family."""
    folder = tmp_path / "weightnet"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    kept = (".dvc", "src", "stages", "dvc.yaml", ".gitignore", ".dvcignore")
    for name in listed.stdout.split("\0"):
        if name.split("/")[0] in kept and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    params: dict[str, Any] = smoke.read(ROOT / "params.yaml")
    smoke.shrink(params)
    params.update(families=["cnn"], predictors=["weightnet"])
    smoke.write(folder / "params.yaml", params)
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (
        ("git", "init", "--quiet"),
        ("git", "config", "user.name", "test"),
        ("git", "config", "user.email", "test@example.org"),
        ("git", "add", "--all"),
        ("git", *who, "commit", "--quiet", "--message=test"),
    ):
        assert shell(folder, *command).returncode == 0
    ablate = (sys.executable, "-m", "weightnet", "ablate")
    refused = shell(folder, *ablate, "no-statistics")
    assert refused.returncode == 2 and "dvc repro" in refused.stderr
    assert "Traceback" not in refused.stderr

    stage = "train_predictor@weightnet-iid"
    made = shell(folder, sys.executable, "-m", "dvc", "repro", stage)
    assert made.returncode == 0, made.stderr
    for command in (("git", "add", "--all"), ("git", "commit", "--quiet", "--message=run")):
        assert shell(folder, *command).returncode == 0
    before = (folder / "params.yaml").read_text()
    done = shell(folder, *ablate, "no-statistics", "canonical-none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ablations" in done.stdout
    assert "train_zoo" not in done.stdout + done.stderr
    table = pd.read_csv(folder / "metrics" / "ablations.csv")
    assert set(table["ablation"]) == {"base", "no-statistics", "canonical-none"}
    assert table["hash"].nunique() == 1
    own = table[(table["ablation"] == "no-statistics") & (table["metric"] == "mae")]
    assert (own["difference"] != 0).any()
    assert (folder / "params.yaml").read_text() == before


def test_ablations_from_elsewhere_stay_while_their_base_does() -> None:
    networks, config = make_networks(), ScoresConfig(draws=20)
    base, worse = make_predictions(0.1), make_predictions(0.5)
    earlier = compare({WORSE: worse}, {"weightnet": base}, networks, config, "iid")
    alone = compare({}, {"weightnet": base}, networks, config, "iid")
    assert set(alone["ablation"]) == {"base"}
    kept = keep(earlier, alone)
    pd.testing.assert_frame_equal(kept, earlier, check_dtype=False)
    changed = compare({}, {"weightnet": make_predictions(0.2)}, networks, config, "iid")
    assert set(keep(earlier, changed)["ablation"]) == {"base"}
    pd.testing.assert_frame_equal(keep(earlier, earlier), earlier)


def test_tables_that_are_kept_stand_in_their_groups() -> None:
    names = ["base", "no-messages", "raw-tokens", "canonical-none"]
    columns = {"base": "weightnet", "split": "iid", "property": "gap", "metric": "tau"}
    earlier = pd.DataFrame({"ablation": names, "value": 0.5, "hash": "a"}).assign(**columns)
    now = earlier[earlier["ablation"] != "raw-tokens"]
    expected = ["base", "canonical-none", "no-messages", "raw-tokens"]
    place = {one.name: number for number, one in enumerate(ABLATIONS, 1)}
    expected.sort(key=lambda name: place.get(name, 0))
    assert keep(earlier, now)["ablation"].tolist() == expected


def test_an_experiment_that_ran_twice_is_read_as_it_ran_last(tmp_path: Path) -> None:
    def git(*arguments: str, date: str = "2026-01-01T00:00:00Z") -> str:
        keys = ("NAME", "EMAIL")
        who = {f"GIT_{role}_{key}": "a" for role in ("AUTHOR", "COMMITTER") for key in keys}
        env = {**os.environ, **who, "GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date}
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    assert newest_experiment("ablation-x", tmp_path) is None
    commits = []
    for base, year in (("b" * 38, 2025), ("a" * 38, 2026)):
        date = f"{year}-01-01T00:00:00Z"
        git("commit", "-q", "--allow-empty", "-m", str(year), date=date)
        commits.append(git("rev-parse", "HEAD").strip())
        git("update-ref", f"refs/exps/aa/{base}/ablation-x", "HEAD")
    git("update-ref", "refs/exps/aa/bb/ablation-xx", "HEAD")
    assert newest_experiment("ablation-x", tmp_path) == commits[1]
