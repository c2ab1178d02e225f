"""Killed, a stage leaves nothing half done, and the next run ends in the same bytes: a little of
what `make torture` does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location(
    "weightnet_killing", ROOT / "tests" / "killing.py"
)
assert specification is not None
assert specification.loader is not None
killing = sys.modules["weightnet_killing"] = importlib.util.module_from_spec(specification)
specification.loader.exec_module(killing)
TRAIN_ZOO, TRAIN_PREDICTOR = killing.STAGES[1], killing.STAGES[3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the stages up to the first predictor have run."""
    folder = tmp_path_factory.mktemp("interruption")
    killing.smoke.write(folder / "params.yaml", killing.tiny(["weightnet"]))
    for stage in killing.STAGES[:4]:
        killing.finish(folder, stage, jobs=1)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "work"))


def wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"{pattern} never came"
        time.sleep(0.01)


def test_a_killed_zoo_keeps_its_stacks_and_its_lock_is_taken_over(folder: Path) -> None:
    expected = killing.content(folder, TRAIN_ZOO)
    shutil.rmtree(folder / "data/zoo")
    process = killing.start(folder, TRAIN_ZOO, jobs=1)
    wait_for(folder, "data/zoo/cnn/[!.]*/manifest.json")
    killing.kill(process, signal.SIGKILL)
    kept = killing.whole_stacks(folder, TRAIN_ZOO)
    said = killing.finish(folder, TRAIN_ZOO, jobs=1)
    assert f"process {process.pid}, started " in said
    assert "ended without finishing it; taking over" in said
    assert f"reused {len(kept)} stacks" in said
    assert killing.whole_stacks(folder, TRAIN_ZOO).items() >= kept.items()
    assert killing.content(folder, TRAIN_ZOO) == expected
    assert not killing.leftovers(folder)


def test_a_terminated_fit_continues_from_its_checkpoint(folder: Path) -> None:
    expected = killing.content(folder, TRAIN_PREDICTOR)
    for name in ("predictors", "predictions", "curves"):
        shutil.rmtree(folder / "data" / name)
    process = killing.start(folder, TRAIN_PREDICTOR, jobs=1)
    wait_for(folder, "data/checkpoints/weightnet-iid/seed0/[!.]*")
    said = killing.kill(process, signal.SIGTERM)
    assert process.returncode == 143
    assert "interrupted; run the same command again to continue" in said
    assert "reused checkpoints of 1 seeds" in killing.finish(folder, TRAIN_PREDICTOR, jobs=1)
    assert killing.content(folder, TRAIN_PREDICTOR) == expected
    assert not killing.leftovers(folder)


def test_a_stage_ends_with_the_dvc_that_started_it(folder: Path) -> None:
    shutil.rmtree(folder / "data/zoo")
    # as dvc does: it starts the stage and waits; here it is killed without a chance to clean up
    code = f"import subprocess; subprocess.run({killing.command(TRAIN_ZOO)!r})"
    variables = {"PYTHONPATH": str(ROOT / "src"), "DVC_STAGE": "train_zoo@cnn"}
    parent = killing.launch(folder, [sys.executable, "-c", code], WEIGHTNET_JOBS="2", **variables)
    wait_for(folder, "data/zoo/cnn/[!.]*/manifest.json")
    os.kill(parent.pid, signal.SIGKILL)
    _, errors = parent.communicate(timeout=60)
    killing.expect_alone(parent.pid)
    assert "Traceback" not in errors
    assert not list((folder / "data/.locks").glob("*"))
    killing.finish(folder, TRAIN_ZOO, jobs=1)


def test_a_stage_ends_whose_dvc_was_killed_while_python_started(folder: Path) -> None:
    shutil.rmtree(folder / "data/zoo")
    # the stage is started, and DVC killed, before it can know who its parent was
    slow = ["sh", "-c", 'sleep 1; exec "$@"', "sh", *killing.command(TRAIN_ZOO)]
    code = f"import subprocess, time; subprocess.Popen({slow!r}); time.sleep(0.3)"
    variables = {"PYTHONPATH": str(ROOT / "src"), "DVC_STAGE": "train_zoo@cnn"}
    parent = killing.launch(folder, [sys.executable, "-c", code], WEIGHTNET_JOBS="1", **variables)
    _, errors = parent.communicate(timeout=60)
    assert "interrupted; run the same command again to continue" in errors
    assert not (folder / "data/zoo").exists()


def test_a_stage_waits_for_an_owner_whose_dvc_was_killed(folder: Path) -> None:
    expected = killing.content(folder, TRAIN_ZOO)
    shutil.rmtree(folder / "data/zoo")
    code = f"import subprocess; subprocess.run({killing.command(TRAIN_ZOO)!r})"
    variables = {"PYTHONPATH": str(ROOT / "src"), "DVC_STAGE": "train_zoo@cnn"}
    parent = killing.launch(folder, [sys.executable, "-c", code], WEIGHTNET_JOBS="1", **variables)
    wait_for(folder, "data/zoo/cnn")
    owner = json.loads((folder / "data/.locks/data-zoo-cnn.json").read_text())["process"]
    os.kill(owner, signal.SIGSTOP)  # it is slow to end
    os.kill(parent.pid, signal.SIGKILL)
    successor = killing.start(folder, TRAIN_ZOO, jobs=1)
    time.sleep(15)  # it has come to the lock
    os.kill(owner, signal.SIGCONT)
    _, errors = successor.communicate(timeout=60)
    assert successor.returncode == 0, errors
    parent.communicate(timeout=60)
    assert killing.content(folder, TRAIN_ZOO) == expected


def test_a_stage_does_not_fight_a_living_one(folder: Path) -> None:
    shutil.rmtree(folder / "data/zoo")
    first = killing.start(folder, TRAIN_ZOO, jobs=1)
    wait_for(folder, "data/.locks/*.json")
    wait_for(folder, "data/zoo/cnn")
    second = killing.start(folder, TRAIN_ZOO, jobs=1)
    _, errors = second.communicate()
    said, _ = first.communicate()
    assert first.returncode == 0, said
    if second.returncode == 0:
        pytest.skip("the first had finished before the second began")
    assert second.returncode == 2
    assert "data/zoo/cnn must have one writer at a time, however: process" in errors
    assert f"{first.pid}" in errors


def test_a_number_given_again_is_not_the_owner(folder: Path) -> None:
    lock = folder / "data/.locks/data-zoo-cnn.json"
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(json.dumps({"process": os.getpid(), "started": "1", "since": "long ago"}))
    said = killing.finish(folder, TRAIN_ZOO, jobs=1)
    assert f"process {os.getpid()}, started long ago, ended without finishing it" in said
    assert not lock.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_falls_into_a_destructor_is_not_lost(number: int, code: int) -> None:
    """Python drops what a destructor raises, an interrupt as well."""
    program = f"""
import os, signal, time
from weightnet.command import reported

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background

class Trap:
    def __del__(self):
        os.kill(os.getpid(), {int(number)})

with reported():
    trap = Trap()
    del trap
    time.sleep(20)
    print("went on")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code
    assert done.stderr.splitlines() == ["interrupted; run the same command again to continue"]
    assert done.stdout == ""
