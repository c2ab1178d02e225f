"""Stacks on disk are whole or absent."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightnet.zoo.store import is_complete, prune, read_stack, read_zoo, write_stack

NETWORKS = pd.DataFrame({"run": ["a", "b"], "property.test_loss": [0.5, float("nan")]})
STATES = [{"weight": torch.full((3, 2), float(i)), "bias": torch.arange(3.0)} for i in range(2)]
FILES = ("weights.safetensors", "networks.parquet", "manifest.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cnn" / "0123"
    write_stack(folder, NETWORKS, STATES)
    return folder


def test_a_stack_returns_what_was_written(folder: Path) -> None:
    assert is_complete(folder)
    stored = read_stack(folder)
    pd.testing.assert_frame_equal(stored.networks, NETWORKS, check_dtype=False)
    for i, state in enumerate(STATES):
        assert all(torch.equal(stored.state(i)[name], state[name]) for name in state)


def test_the_same_stack_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "0123"
    write_stack(again, NETWORKS, STATES)
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    assert [path.name for path in again.parent.iterdir()] == ["0123"]  # no leftovers


@pytest.mark.parametrize("name", FILES)
def test_a_stack_without_one_of_its_files_is_not_complete(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert not is_complete(folder)
    with pytest.raises(ValueError, match="must be a whole stack"):
        read_stack(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["halved", "flipped", "emptied"])
def test_a_damaged_stack_is_not_complete(folder: Path, name: str, how: str) -> None:
    content = (folder / name).read_bytes()
    half = len(content) // 2
    damaged = {
        "halved": content[:half],
        "flipped": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "emptied": b"",
    }[how]
    (folder / name).write_bytes(damaged)
    assert not is_complete(folder)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stack_damaged_anywhere_is_not_complete(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "0123"
        write_stack(folder, NETWORKS, STATES)
        path = folder / data.draw(st.sampled_from(FILES))
        whole = bytearray(path.read_bytes())
        where = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            del whole[where:]
        else:
            whole[where] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
        assert not is_complete(folder)


@pytest.mark.parametrize("text", ["[]", "null", "{}", "7"])
def test_a_manifest_of_another_kind_is_not_complete(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    assert not is_complete(folder)


def test_an_interrupted_write_leaves_the_old_stack(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_parquet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_stack(folder, NETWORKS.iloc[::-1], STATES[::-1])
    monkeypatch.undo()
    assert is_complete(folder)
    assert list(read_stack(folder).networks["run"]) == ["a", "b"]
    assert len(list(read_zoo(folder.parent))) == 1  # what the interruption left is not read


def test_writing_replaces_a_damaged_stack(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"")
    (folder / "stray").write_text("")
    write_stack(folder, NETWORKS, STATES)
    assert is_complete(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


def test_prune_keeps_only_what_is_named(folder: Path) -> None:
    shutil.copytree(folder, folder.with_name("4567"))
    (folder.parent / ".89ab.1").mkdir()
    (folder.parent / "stray").write_text("")
    assert prune(folder.parent, {"0123"}) == [".89ab.1", "4567", "stray"]
    assert [path.name for path in folder.parent.iterdir()] == ["0123"]
    assert is_complete(folder)


def test_a_zoo_is_read_in_the_order_of_its_keys(folder: Path) -> None:
    write_stack(folder.with_name("0001"), NETWORKS.assign(run=["c", "d"]), STATES)
    assert [list(s.networks["run"]) for s in read_zoo(folder.parent)] == [["c", "d"], ["a", "b"]]


def test_an_empty_zoo_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trained stacks"):
        read_zoo(tmp_path)
