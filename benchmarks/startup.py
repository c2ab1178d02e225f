"""Start-up: the whole process of `weightnet --help`, and of `weightnet predict` on a small CNN.

What a user would write instead is a process that imports torch and pandas and reads the
checkpoint, without predicting anything: below it no prediction can come. All sides are run in turn
and must succeed; prediction must give the same text each time. Medians; processor time beside wall
time, for a busy machine. The last line is the time to predict over the rival's.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from weightnet.estimator import REFERENCE
from weightnet.zoo.architectures import build

WANTED = {"--help": 0.5, "predict": 5.0}  # seconds
RIVAL = "import sys, pandas, torch; from safetensors.torch import load_file as f; f(sys.argv[1])"


def main(
    quick: Annotated[bool, typer.Option(help="Three rounds.")] = False,
    seed: Annotated[int, typer.Option(help="Of the network's weights.")] = 0,
) -> None:
    """Print how long commands take from start to end."""
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "network.safetensors")
        save_file(build("cnn", width=8, depth=3).state_dict(), file)
        predict = [file, "--architecture", "cnn", "--predictor", str(REFERENCE), "--json"]
        predict += ["--architecture-args", '{"width": 8, "depth": 3}']
        commands = {
            "--help": ["-m", "weightnet", "--help"],
            "predict": ["-m", "weightnet", "predict", *predict],
            "import and read": ["-c", RIVAL, file],
        }
        walls: dict[str, list[float]] = {name: [] for name in commands}
        loads: dict[str, list[float]] = {name: [] for name in commands}
        said = set()
        for _ in range(3 if quick else 9):
            for name, arguments in commands.items():
                wall, load, text = run(arguments)
                walls[name].append(wall)
                loads[name].append(load)
                if name == "predict":
                    said.add(text)
    if len(said) != 1:
        raise SystemExit("predictions must be the same each time, however: they differ")
    table = Table(title="whole processes, seconds: medians (least to most)")
    for header in ("command", "seconds", "of a processor", "at most"):
        table.add_column(header, justify="left" if header == "command" else "right")
    for name, times in walls.items():
        middle, load = statistics.median(times), statistics.median(loads[name])
        seconds = f"{middle:.2f} ({min(times):.2f} to {max(times):.2f})"
        table.add_row(name, seconds, f"{load:.2f}", f"{WANTED.get(name, '')}")
    Console(width=max(Console().width, 100)).print(table)
    ratio = statistics.median(walls["predict"]) / statistics.median(walls["import and read"])
    print(f"{ratio:.2f}")


def run(arguments: list[str]) -> tuple[float, float, str]:
    """Seconds, seconds of processor time, and what a Python process printed."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{arguments[:3]} must succeed, however: {done.stderr}")
    load = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, load, done.stdout


if __name__ == "__main__":
    typer.run(main)
