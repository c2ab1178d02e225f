"""Progress speaks plainly when stderr is no terminal, and rarely."""

from __future__ import annotations

import itertools
import time

import pytest

from weightnet.predictors.progress import show_progress


def test_plain_lines_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count(step=10.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    with show_progress("stats", 4) as show:
        for _ in range(4):
            show({"train/loss": 0.5, "validation/tau": 0.8})
    first = "stats: epoch 2/4, loss 0.5000, validation tau 0.800, 0.10 epochs/s, at most 20 s left"
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == first
    assert len(lines) == 2


def test_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with show_progress("stats", 2) as show:
        show({"train/loss": 0.5, "validation/tau": 0.8})
    assert "validation tau 0.800" in capsys.readouterr().err
