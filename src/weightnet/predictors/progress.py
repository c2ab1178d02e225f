"""Progress of a fit: on a terminal a bar with loss, tau and time left, elsewhere plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[dict[str, float]], None]
"""Called once for each finished epoch with its metrics."""

_SECONDS = 15.0  # between two plain lines


@contextmanager
def show_progress(label: str, epochs: int) -> Iterator[Show]:
    """Yield a function to call after each of at most ``epochs`` epochs; it writes to stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(label, total=epochs, metrics="")
            yield lambda metrics: bar.update(task, advance=1, metrics=_summary(metrics))
        return
    started = latest = time.monotonic()
    done = 0

    def show(metrics: dict[str, float]) -> None:
        nonlocal latest, done
        done += 1
        now = time.monotonic()
        if now - latest >= _SECONDS:
            latest = now
            rate = done / (now - started)
            left = (epochs - done) / rate
            line = f"{label}: epoch {done}/{epochs}, {_summary(metrics)}, {rate:.2f} epochs/s"
            print(f"{line}, at most {left:.0f} s left", file=sys.stderr, flush=True)

    yield show


def _summary(metrics: dict[str, float]) -> str:
    tau = metrics.get("validation/tau", float("nan"))
    return f"loss {metrics['train/loss']:.4f}, validation tau {tau:.3f}"
