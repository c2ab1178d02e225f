"""Kill each stage of a tiny pipeline at random moments, run it again, and compare every byte.

    python tests/killing.py DIR [--moments 20] [--seed 0] [--stages train_zoo evaluate ...]

`make torture` does so, and tests/test_interruption.py a little of it. What has to hold after each
kill (SIGINT, SIGTERM, SIGKILL in turn): no process of the stage is alive; the next run finishes,
keeps every stack that was whole, leaves no temporary file and no lock, and ends in the bytes of an
undisturbed run; and nobody was shown a traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GONE_WITHIN = 10.0  # seconds after a stage's end in which its workers must have ended


@dataclass(frozen=True)
class Stage:
    """A stage with its arguments, and what it writes."""

    name: str
    arguments: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


PREDICTORS = ("weightnet", "gbm", "family_mean")
STAGES = (
    Stage("generate_zoo", ("cnn",), ("data/recipes/cnn.parquet",)),
    Stage("train_zoo", ("cnn",), ("data/zoo/cnn",)),
    Stage("tokenize_zoo", ("cnn",), ("data/tokens/cnn",)),
    *(
        Stage(
            "train_predictor",
            (name, "iid"),
            (
                f"data/predictors/{name}-iid",
                f"data/predictions/{name}-iid.parquet",
                f"data/curves/{name}-iid",
            ),
        )
        for name in PREDICTORS
    ),
    Stage("evaluate", (), ("metrics",)),
    Stage("plot", (), ("plots", "results")),
)


def tiny(root: Path = ROOT) -> dict[str, Any]:
    """The params of the smoke scale, of one family and three predictors with two seeds."""
    place = root / "tests" / "smoke.py"
    specification = importlib.util.spec_from_file_location("weightnet_smoke", place)
    assert specification is not None
    assert specification.loader is not None
    smoke = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(smoke)
    params: dict[str, Any] = smoke.read(root / "params.yaml")
    smoke.shrink(params)
    params.update(families=["cnn"], predictors=list(PREDICTORS), splits=["iid"])
    params["generate_zoo"]["families"]["cnn"]["runs_per_shape"] = 3
    params["generate_zoo"]["ranges"]["tasks"] = ["digits"]
    params["train_predictor"]["common"]["seeds"] = 2
    params["train_predictor"]["common"]["splits"]["held_out_families"] = ["cnn"]
    for section in params["train_predictor"].values():
        if "fit" in section:
            section["fit"].update(epochs=6, patience=6, checkpoint_epochs=1)
    return params


def start(folder: Path, stage: Stage, jobs: int) -> subprocess.Popen[str]:
    """Start a stage in ``folder``, in a session of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "WEIGHTNET_JOBS": str(jobs)}
    environment.update(OMP_NUM_THREADS="1", WEIGHTNET_DEVICE="cpu")
    return subprocess.Popen(
        [sys.executable, str(ROOT / "stages" / f"{stage.name}.py"), *stage.arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(folder: Path, stage: Stage, jobs: int = 2) -> str:
    """Run a stage to its end; return what it said."""
    process = start(folder, stage, jobs)
    said, errors = process.communicate()
    assert process.returncode == 0, f"{stage}: {said}{errors}"
    assert "Traceback" not in errors, errors
    return said + errors


def kill(process: subprocess.Popen[str], how: signal.Signals) -> str:
    """Send a signal to the stage's own process; return what was said until all of it had ended."""
    process.send_signal(how)
    said, errors = process.communicate(timeout=60)  # workers hold the other ends as well
    expect_alone(process.pid)
    ended_early = process.returncode == 0
    expected = {-how, 128 + how} if how != signal.SIGINT else {-how, 128 + how, 1}
    assert ended_early or process.returncode in expected, (process.returncode, errors)
    imports = "Traceback" in errors and errors.rstrip().endswith("KeyboardInterrupt")
    assert "Traceback" not in errors or imports, errors
    return said + errors


def expect_alone(session: int) -> None:
    """Check that no process of a session is left, or wait a little until none is."""
    deadline = time.monotonic() + GONE_WITHIN
    while left := processes(session):
        assert time.monotonic() < deadline, f"processes outlive their stage: {left}"
        time.sleep(0.1)


def processes(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def content(folder: Path, stage: Stage) -> dict[str, str]:
    """The digest of every file that a stage wrote."""
    files = [
        path
        for name in stage.outputs
        for path in [folder / name, *(folder / name).rglob("*")]
        if path.is_file()
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }


def leftovers(folder: Path) -> list[str]:
    """Temporary files, locks and checkpoints that no finished run leaves."""
    found = [*folder.rglob(".*.partial"), *folder.rglob(".*.old")]
    found += [*(folder / "data/.locks").glob("*"), *(folder / "data/checkpoints").glob("*")]
    return [str(path.relative_to(folder)) for path in found]


def whole_stacks(folder: Path, stage: Stage) -> dict[str, int]:
    """When each stack that is there was written."""
    if stage.name != "train_zoo":
        return {}
    found = (folder / "data/zoo").glob("*/[!.]*/manifest.json")
    return {str(path): path.stat().st_mtime_ns for path in found}


def kill_and_repeat(
    folder: Path, stage: Stage, expected: dict[str, str], seconds: float, how: signal.Signals
) -> None:
    """Kill a stage after some seconds, run it again, and check all that has to hold."""
    for name in stage.outputs:
        shutil.rmtree(folder / name, ignore_errors=True)
        if (folder / name).is_file():
            (folder / name).unlink()
    process = start(folder, stage, jobs=2)
    time.sleep(seconds)
    kill(process, how)
    kept = whole_stacks(folder, stage)
    finish(folder, stage)
    assert content(folder, stage) == expected, "the bytes differ from an undisturbed run's"
    assert whole_stacks(folder, stage).items() >= kept.items(), "a whole stack was trained again"
    assert not leftovers(folder), leftovers(folder)


def main() -> None:
    """Kill every stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=20, help="kills of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", default=sorted({stage.name for stage in STAGES}))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    from ruamel.yaml import YAML

    with (options.folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(tiny(), file)
    chance = random.Random(options.seed)
    failures = 0
    for stage in STAGES:
        began = time.monotonic()
        finish(options.folder, stage)
        duration = time.monotonic() - began
        expected = content(options.folder, stage)
        for moment in range(options.moments if stage.name in options.stages else 0):
            seconds, how = chance.uniform(0, duration), SIGNALS[moment % len(SIGNALS)]
            label = " ".join([stage.name, *stage.arguments])
            try:
                kill_and_repeat(options.folder, stage, expected, seconds, how)
                fact = "the same bytes"
            except AssertionError as error:
                failures += 1
                fact = f"FAILED: {error}"
            print(
                f"{label}: {how.name} after {seconds:.1f} of {duration:.1f} s: {fact}", flush=True
            )
    print(f"{failures} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
