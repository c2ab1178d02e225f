"""Progress speaks in plain lines, with a rate, where there is no terminal."""

import itertools
import time

import pytest

from weightnet.progress import Progress


def test_plain_lines_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count(step=10.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    with Progress("stats", 4, "epochs") as progress:
        for _ in range(4):
            progress.advance(note="loss 0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[-1].startswith("stats: 4/4 epochs, ")
    assert lines[-1].endswith("0 s left loss 0.5")


def test_nothing_to_do_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("stats", 0, "epochs"):
        pass
    assert capsys.readouterr().err == ""
