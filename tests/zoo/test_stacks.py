"""A stack's folder is named after all that determines its networks; the same stack gives the same
bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from weightnet.zoo import stacks
from weightnet.zoo.properties import PROPERTIES, PropertyConfig
from weightnet.zoo.stacks import plan_stacks, run_local


def modules_of(module: ModuleType) -> set[str]:
    """The modules of the zoo whose parts a module uses."""
    named = [getattr(value, "__module__", None) or "" for value in vars(module).values()]
    named += [value.__name__ for value in vars(module).values() if isinstance(value, ModuleType)]
    return {name for name in named if name.startswith("weightnet.zoo.")}


def test_all_code_that_trains_and_measures_names_the_folder() -> None:
    named = {module.__name__ for module in stacks.MODULES}
    assert "weightnet.zoo.first_layer" in named
    for name in named:
        assert modules_of(sys.modules[name]) <= named
    files = {path.stem for path in stacks.CODE}
    assert {name.rpartition(".")[2] for name in named} | {"triton_kernels"} == files


def test_a_stack_gives_the_same_bytes(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTNET_DEVICE", device)
    monkeypatch.setenv("WEIGHTNET_JOBS", "1")
    row = {
        **{"family": "cnn", "task": "digits", "stack": "s", "optimizer": "sgd", "batch_size": 16},
        **{"learning_rate": 0.05, "weight_decay": 0.0, "dropout": 0.3, "label_noise": 0.0},
        **{"augmentation": 1, "train_images": 600, "initialization_scale": 1.0},
        "initialization": "kaiming",
        "arguments": '{"size": 8, "width": 6, "depth": 3, "batchnorm": true}',
    }
    rows = pd.DataFrame(
        [{**row, "run": f"run{n}", "seed": n, "steps": 80 + 7 * n} for n in range(3)]
    )
    measure = PropertyConfig(
        test_images=200, perturbed_images=100, train_images=50, noise=0.3, adversarial=0.1
    )
    written = []
    for name in ("one", "other"):
        (stack,) = plan_stacks(rows, list(PROPERTIES), measure, tmp_path / name)
        assert [error for _, error in run_local([stack])] == [None]
        files = sorted(path for path in stack.folder.iterdir() if path.suffix != ".json")
        written.append({path.name: path.read_bytes() for path in files})
        networks = pd.read_parquet(stack.folder / "networks.parquet")
        assert networks["property.test_accuracy"].max() > 0.2
    assert written[0] == written[1]
