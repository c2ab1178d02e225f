"""Progress that speaks in a terminal and in a log: a bar with time left, or plain lines with
rates."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LOG_SECONDS = 15.0


class Progress:
    """Counts ``total`` units of work; ``note`` shows what is worth watching (a loss)."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self.note = 0, ""
        self.started = self.logged = time.monotonic()
        console = Console(stderr=True)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.drawn = console.is_terminal

    def __enter__(self) -> Progress:
        self.bar.start()
        self.row = self.bar.add_task(self.title, total=self.total, note="")
        return self

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more units as done."""
        self.done += count
        self.note = note or self.note
        self.bar.update(self.row, completed=self.done, note=self.note)
        now = time.monotonic()
        if not self.drawn and (now - self.logged > LOG_SECONDS or self.done >= self.total):
            self.logged = now
            elapsed = now - self.started
            left = elapsed / self.done * (self.total - self.done) if self.done else 0.0
            print(
                f"{self.title}: {self.done}/{self.total} {self.unit}, "
                f"{self.done / elapsed:.2f}/s, {left:.0f} s left {self.note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def finish(self) -> None:
        """Say that nothing is left, whatever was counted (a fit that stopped early)."""
        self.bar.update(self.row, completed=self.total)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()
