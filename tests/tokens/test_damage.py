"""A damaged shard is refused in words, or it is read as it was: it never ends in an error of
another library, and never in other tokens."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightnet.durable import write_digests
from weightnet.symmetry import trace
from weightnet.tokens import (
    TokensConfig,
    iter_tokens,
    read_networks,
    spec_id,
    tokenize,
    write_tokens,
)
from weightnet.zoo.architectures import build


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "cnn"
    module = build("cnn", size=8, width=2, depth=2)
    spec = trace(module, torch.zeros(1, 1, 8, 8))
    config, name = TokensConfig(), spec_id(spec)
    row = {"family": "cnn", "task": "digits", "width": 2.0, "spec": name, "diverged": False}
    frame = pd.DataFrame([{"run": run, **row} for run in "ab"])
    tables = [(run, tokenize(spec, module.state_dict(), config=config)) for run in "ab"]
    write_tokens(folder, frame, {name: spec}, iter(tables), config=config)
    return folder


@pytest.mark.parametrize("name", ["networks", "specs", "tokens-00000"])
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_file_damaged_anywhere(written: Path, name: str, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(written, Path(place) / "cnn"))
        path = folder / f"{name}.parquet"
        whole = bytearray(path.read_bytes())
        where = data.draw(st.integers(0, len(whole) - 1))
        cut = data.draw(st.booleans())
        if cut:
            del whole[where:]
        else:
            whole[where] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
        try:
            networks = read_networks([folder])
            for part in networks.parts:
                assert part.table.num_rows
            for _ in iter_tokens(folder):
                pass
        except ValueError as error:
            assert type(error) is ValueError
            assert str(folder) in str(error)
            assert "dvc repro tokenize_zoo" in str(error)
        else:
            assert not cut


@pytest.mark.parametrize("part", ["pages", "footer"])
@pytest.mark.parametrize("name", ["networks", "specs", "tokens-00000"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_never_read(
    written: Path, name: str, part: str, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(written, Path(place) / "cnn"))
        path = folder / f"{name}.parquet"
        whole = bytearray(path.read_bytes())
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        first, last = (0, footer - 1) if part == "pages" else (footer, len(whole) - 1)
        whole[data.draw(st.integers(first, last))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=r"dvc repro tokenize_zoo"):
            _ = read_networks([folder]).parts[0].table


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_digests_are_refused(written: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(written, Path(place) / "cnn"))
        path = folder / "digests.json"
        whole = bytearray(path.read_bytes())
        where = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            del whole[: where + 1]
        else:
            whole[where] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
        with pytest.raises(ValueError, match="dvc repro tokenize_zoo"):
            _ = read_networks([folder]).parts[0].table


@pytest.mark.parametrize("column", ["run", "layer", "weight", "bias"])
def test_a_column_of_another_name(written: Path, tmp_path: Path, column: str) -> None:
    folder = Path(shutil.copytree(written, tmp_path / "cnn"))
    path = folder / "tokens-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(column.encode(), b"x" + column[1:].encode()))
    write_digests(folder)
    with pytest.raises(ValueError, match=f"missing {column}; run `dvc repro tokenize_zoo`"):
        for _ in iter_tokens(folder):
            pass
    with pytest.raises(ValueError, match="run `dvc repro tokenize_zoo`"):
        _ = read_networks([folder]).parts[0].table
