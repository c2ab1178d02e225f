"""Kill each stage of a tiny pipeline at random moments, run it again, and compare every byte.

    python tests/killing.py DIR [--moments 20] [--seed 0] [--stages train_zoo evaluate ...]

`make torture` does so, and kills `dvc repro` as often; tests/test_interruption.py does a little
of it. What has to hold after each kill (SIGINT, SIGTERM, SIGKILL in turn): no process of the stage
is alive; the next run finishes, keeps every stack that was whole, leaves no temporary file and no
lock, and ends in the bytes of an undisturbed run; and nobody was shown a traceback.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
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


def load(path: Path, name: str) -> ModuleType:
    """Import a file that is in no package."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


smoke = load(ROOT / "tests" / "smoke.py", "weightnet_smoke_of_killing")


def tiny(predictors: Sequence[str] = PREDICTORS) -> dict[str, Any]:
    """The params of the smoke scale, of one family and few predictors with two seeds."""
    params: dict[str, Any] = smoke.read(ROOT / "params.yaml")
    smoke.shrink(params)
    params.update(families=["cnn"], predictors=list(predictors), splits=["iid"])
    params["generate_zoo"]["families"]["cnn"]["runs_per_shape"] = 3
    params["generate_zoo"]["ranges"]["tasks"] = ["digits"]
    params["train_predictor"]["common"]["seeds"] = 2
    params["train_predictor"]["common"]["splits"]["held_out_families"] = ["cnn"]
    for section in params["train_predictor"].values():
        if "fit" in section:
            section["fit"].update(epochs=6, patience=6, checkpoint_epochs=1)
    return params


def launch(folder: Path, command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """Start a command in ``folder``, in a session of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "WEIGHTNET_DEVICE": "cpu"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def command(stage: Stage) -> list[str]:
    """What runs a stage of this working tree."""
    return [sys.executable, str(ROOT / "stages" / f"{stage.name}.py"), *stage.arguments]


def start(folder: Path, stage: Stage, jobs: int, **variables: str) -> subprocess.Popen[str]:
    """Start a stage in ``folder``."""
    variables = {"PYTHONPATH": str(ROOT / "src"), "WEIGHTNET_JOBS": str(jobs), **variables}
    return launch(folder, command(stage), **variables)


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


def torture_stage(folder: Path, stage: Stage, moments: int, chance: random.Random) -> int:
    """Run a stage, and kill it at random moments; return how often something did not hold."""
    began = time.monotonic()
    finish(folder, stage)
    duration = time.monotonic() - began
    expected = content(folder, stage)
    failures = 0
    for how in itertools.islice(itertools.cycle(SIGNALS), moments):
        seconds, fact = chance.uniform(0, duration), "the same bytes"
        try:
            kill_and_repeat(folder, stage, expected, seconds, how)
        except AssertionError as error:
            failures += 1
            fact = f"FAILED: {error}"
        label = " ".join([stage.name, *stage.arguments])
        print(f"{label}: {how.name} after {seconds:.1f} of {duration:.1f} s: {fact}", flush=True)
    return failures


def mend(folder: Path) -> None:
    """Remove DVC's list of locks if it was killed while it wrote it, as `make repro` does."""
    locks = folder / ".dvc/tmp/rwlock"
    if locks.exists():
        try:
            json.loads(locks.read_text())
        except ValueError:
            print("dvc repro: its own list of locks was cut off", flush=True)
            locks.unlink()


def torture_dvc(folder: Path, moments: int, chance: random.Random) -> int:
    """Kill `dvc repro` itself again and again until it has finished, from nothing each time, and
    compare all outputs and dvc.lock; return how often something did not hold."""
    smoke.make_repository(ROOT, folder, tiny(("weightnet", "family_mean")))
    names = ("data", "metrics", "plots", "results", "dvc.lock")
    everything = Stage("dvc repro", (), names)
    repro = [sys.executable, "-m", "dvc", "repro"]

    def compared() -> dict[str, str]:
        found = content(folder, everything)
        return {name: digest for name, digest in found.items() if name != smoke.WRITTEN}

    process = launch(folder, repro, WEIGHTNET_JOBS="2")
    said, errors = process.communicate()
    assert process.returncode == 0, said + errors
    expected, failures, count = compared(), 0, 0
    while count < moments:
        for name in (*names, ".dvc/cache", ".dvc/tmp"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "dvc.lock").unlink()
        subprocess.run(["git", "checkout", "--", smoke.WRITTEN], cwd=folder, check=True)
        while True:
            mend(folder)
            process = launch(folder, repro, WEIGHTNET_JOBS="2")
            how, seconds = SIGNALS[count % len(SIGNALS)], chance.uniform(1, 15)
            try:
                said, errors = process.communicate(timeout=seconds if count < moments else None)
                break
            except subprocess.TimeoutExpired:
                count += 1
            if how == signal.SIGINT:  # as from a terminal: to all
                os.killpg(process.pid, how)
            else:
                process.send_signal(how)
            said, errors = process.communicate()
            expect_alone(process.pid)
            stage = re.findall(r"^Running stage '(.*)'", said, flags=re.MULTILINE)[-1:]
            print(f"dvc repro: {how.name} after {seconds:.1f} s, in {stage}", flush=True)
        same, left = compared() == expected, leftovers(folder)
        if process.returncode or not same or left:
            failures += 1
            print(f"FAILED: exit {process.returncode}, {same=}, {left=}: {said}{errors}")
        else:
            print("dvc repro: the same bytes", flush=True)
    return failures


def check_queue(folder: Path) -> int:
    """Queue two experiments from a dirty tree where `dvc repro` has run, change the tree, and run
    them side by side; return how often something did not hold."""
    dvc = [sys.executable, "-m", "dvc"]
    script = folder / "stages/train_predictor.py"

    def run(*command: str) -> str:
        said, errors = (process := launch(folder, command)).communicate()
        assert process.returncode == 0, said + errors
        return said

    def seen() -> dict[str, str]:
        names = ("data", "metrics", "plots", "results", "stages", "dvc.lock", "params.yaml")
        return {**content(folder, Stage("queue", (), names)), "status": run("git", "status", "-s")}

    run("git", "add", "--all")
    run("git", "-c", "user.name=test", "-c", "user.email=a@b.c", "commit", "-qm", "run")
    original = script.read_text()
    script.write_text(original.replace("seeds, {len", "SNAPSHOT seeds, {len"))
    for name, rate in (("one", 0.002), ("two", 0.003)):
        change = f"train_predictor.weightnet.fit.learning_rate={rate}"
        run(*dvc, "exp", "run", "--queue", "--name", name, "--set-param", change)
    script.write_text(original.replace("seeds, {len", "LIVE seeds, {len"))
    before, failures = seen(), 0
    run(*dvc, "queue", "start", "--jobs", "2")
    deadline = time.monotonic() + 600
    while re.search("Queued|Running", run(*dvc, "queue", "status")):
        assert time.monotonic() < deadline, "the queue did not finish"
        time.sleep(3)
    for name in ("one", "two"):
        log = run(*dvc, "queue", "logs", name)
        facts = {
            "ran the snapshot's code": "SNAPSHOT seeds" in log and "LIVE seeds" not in log,
            "shared upstream results": "Running stage 'tokenize_zoo" not in log,
        }
        failures += list(facts.values()).count(False)
        print(f"queued experiment {name}: {facts}", flush=True)
    same = seen() == before
    print(f"queue: the workspace is as it was: {same}", flush=True)
    return failures + (not same)


def main() -> None:
    """Kill every stage, then dvc; then queue experiments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--moments", type=int, default=20, help="kills of each stage, and of dvc")
    parser.add_argument("--seed", type=int, default=0)
    choices = [*dict.fromkeys(stage.name for stage in STAGES), "dvc"]
    parser.add_argument("--stages", nargs="*", choices=choices, default=choices)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    smoke.write(options.folder / "params.yaml", tiny())
    chance, failures = random.Random(options.seed), 0
    if set(options.stages) - {"dvc"}:
        for stage in STAGES:
            moments = options.moments if stage.name in options.stages else 0
            failures += torture_stage(options.folder, stage, moments, chance)
    if "dvc" in options.stages:
        failures += torture_dvc(options.folder / "repository", options.moments, chance)
        failures += check_queue(options.folder / "repository")
    print(f"{failures} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
