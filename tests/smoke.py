"""The smoke scale: every family and every predictor, in numbers as small as they go.

`make smoke` applies it to the params.yaml of a clone (python tests/smoke.py params.yaml), and
tests/test_pipeline.py to that of a temporary repository. It is idempotent.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

OUTPUTS = ("data", "metrics", "plots", "results")
WRITTEN = "metrics/ablations.csv"  # by `weightnet ablate`, not by a stage
FIT = {"epochs": 2, "patience": 2}
TREES = {"candidates": 1, "rounds": 5, "patience": 2}


def shrink(params: dict[str, Any]) -> None:
    """Make all numbers of params.yaml tiny, in place; its families and predictors stay.

    One split is left: with four, starting Python for each of their stages would be all the time.
    """
    params["splits"] = ["iid"]
    for name, family in params["generate_zoo"]["families"].items():
        runs = 12 if name == "cnn" else 4
        family.update(runs=runs, runs_per_shape=runs // 2, batch_size=[16], steps=[2, 4])
        family["arguments"]["width"] = [4, 6] if name == "cnn" else [0.0625]
    params["generate_zoo"]["ranges"]["train_images"] = [60, 100]
    params["train_zoo"]["measure"].update(test_images=40, perturbed_images=20, train_images=20)
    train = params["train_predictor"]
    train["common"]["seeds"] = 1
    for section in train.values():
        if "fit" in section:
            section["fit"].update(FIT)
        if "candidates" in section:
            section.update(TREES)
    for name in ("weightnet", "weightnet_probe"):
        train[name].update(width=16, heads=2, blocks=1, points=2)
    params["tokenize_zoo"]["probes"]["count"] = 8
    train["weightnet_probe"]["learned_probes"] = {"per_class": 1, "steps": 3}
    train["mlp"].update(size=256, hidden=8)
    train["stats"].update(hidden=8)
    params["evaluate"]["scores"].update(draws=10, min_networks=4)
    params["evaluate"]["audit"] = {"networks_per_family": 1, "copies": 1}


def read(path: Path) -> dict[str, Any]:
    """The whole of a params.yaml, as YAML 1.2."""
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


def write(path: Path, params: dict[str, Any]) -> None:
    """Write a params.yaml."""
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(params, file)


def make_repository(root: Path, folder: Path, params: dict[str, Any]) -> None:
    """Commit the files of the working tree ``root``, without results and with other params, in a
    repository of their own."""

    def git(where: Path, *words: str) -> str:
        who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        done = subprocess.run(("git", *who, *words), cwd=where, check=True, capture_output=True)
        return done.stdout.decode()

    for name in filter(None, git(root, "ls-files", "-co", "--exclude-standard", "-z").split("\0")):
        made = name.split("/")[0] in (*OUTPUTS, "dvc.lock") and name != WRITTEN
        if not made and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    write(folder / "params.yaml", params)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=test")


if __name__ == "__main__":
    file = Path(sys.argv[1])
    content = read(file)
    shrink(content)
    write(file, content)
