"""Shards: exact, deterministic, atomic, streamed in bounded memory, refused when they do not
fit."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import weightnet.tokens.schema as schema
import weightnet.tokens.scratch as scratch
from weightnet.durable import write_digests
from weightnet.symmetry.spec import PermutationSpec
from weightnet.tokens import (
    Networks,
    TokensConfig,
    detokenize,
    iter_tokens,
    read_networks,
    spec_id,
    tokenize,
    write_tokens,
)

CONFIG = TokensConfig(max_row=7, networks_per_shard=4, row_group_rows=50)
COUNT = 10


def zoo(
    samples, family: str = "cnn"
) -> tuple[pd.DataFrame, dict[str, PermutationSpec], dict[str, dict]]:
    """Ten networks of two architectures, in an order that is not that of their runs."""
    specs = [samples.specs["small_cnn"], samples.specs["branched"]]
    ids = [spec_id(spec) for spec in specs]
    runs = [f"{(i * 7919) % 65536:016x}" for i in range(COUNT)]
    frame = pd.DataFrame(
        {
            "run": runs,
            "family": family,
            "task": "digits",
            "width": np.arange(COUNT) + 0.5,
            "spec": [ids[i % 2] for i in range(COUNT)],
            "diverged": [i == 3 for i in range(COUNT)],
            "property.test_accuracy": np.linspace(0, 1, COUNT),
            "property.test_loss": np.where(np.arange(COUNT) == 3, np.nan, 1.0),
            "recipe.optimizer": ["sgd", "adam"] * (COUNT // 2),
            "recipe.nothing": None,
        }
    )
    states = {run: samples.state(specs[i % 2], i) for i, run in enumerate(runs)}
    return frame, dict(zip(ids, specs, strict=True)), states


def tables(frame: pd.DataFrame, specs: dict, states: dict) -> Iterator[tuple[str, pa.Table]]:
    for run, spec in zip(frame["run"], frame["spec"], strict=True):
        yield run, tokenize(specs[spec], states[run], config=CONFIG)


def write(
    samples, directory: Path, shuffled: bool = False, family: str = "cnn"
) -> tuple[pd.DataFrame, dict]:
    frame, specs, states = zoo(samples, family)
    if shuffled:
        frame = frame.sample(frac=1, random_state=1)
    write_tokens(directory, frame, specs, tables(frame, specs, states), config=CONFIG)
    return frame, states


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_networks_come_back_exactly(samples, tmp_path: Path) -> None:
    frame, states = write(samples, tmp_path / "cnn")
    networks = read_networks([tmp_path / "cnn"])
    assert len(networks) == COUNT
    assert networks.frame["run"].tolist() == sorted(frame["run"])
    expected = frame.set_index("run").loc[networks.frame["run"]].reset_index()
    for name in expected:
        if name != "recipe.nothing":
            np.testing.assert_array_equal(networks.frame[name], expected[name])
    for i, run in enumerate(networks.frame["run"]):
        found = networks.state(i)
        assert found.keys() == states[run].keys()
        assert all(torch.equal(found[key], states[run][key]) for key in found)


def test_bytes_do_not_depend_on_the_order_of_arrival(samples, tmp_path: Path) -> None:
    write(samples, tmp_path / "a")
    write(samples, tmp_path / "b", shuffled=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == [
        "digests.json",
        "networks.parquet",
        "specs.parquet",
        "tokens-00000.parquet",
        "tokens-00001.parquet",
        "tokens-00002.parquet",
    ]


def test_files_carry_schema_version_and_sorted_rows(samples, tmp_path: Path) -> None:
    write(samples, tmp_path / "cnn")
    for path in (tmp_path / "cnn").glob("*.parquet"):
        assert pq.read_schema(path).metadata[b"weightnet.version"] == b"1"
    for path in sorted((tmp_path / "cnn").glob("tokens-*")):
        frame = pq.read_table(path, columns=["run", "layer", "index", "chunk"]).to_pandas()
        keys = list(frame.astype({"run": str}).itertuples(index=False, name=None))
        assert keys == sorted(keys)


def test_streaming_holds_a_row_group_and_whole_networks(samples, tmp_path: Path) -> None:
    frame, states = write(samples, tmp_path / "cnn")
    _, specs, _ = zoo(samples)
    spec_of = dict(zip(frame["run"], frame["spec"], strict=True))
    largest = max(tokenize(specs[spec_of[r]], states[r], config=CONFIG).num_rows for r in states)
    seen: list[str] = []
    for batch in iter_tokens(tmp_path / "cnn"):
        assert 0 < batch.num_rows < CONFIG.row_group_rows + largest
        runs = batch.column("run").to_pylist()
        for run in dict.fromkeys(runs):
            first = runs.index(run)
            state = detokenize(specs[spec_of[run]], batch.slice(first, runs.count(run)))
            assert all(torch.equal(state[key], states[run][key]) for key in state)
            seen.append(run)
    assert seen == sorted(states)
    for path in (tmp_path / "cnn").glob("tokens-*"):
        meta = pq.read_metadata(path)
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        assert set(sizes[:-1]) <= {CONFIG.row_group_rows} and sizes[-1] <= CONFIG.row_group_rows


def test_a_network_larger_than_row_groups_streams_whole(samples, tmp_path: Path) -> None:
    frame, specs, states = zoo(samples)
    config = CONFIG.model_copy(update={"row_group_rows": 5})
    write_tokens(tmp_path / "cnn", frame, specs, tables(frame, specs, states), config=config)
    batches = list(iter_tokens(tmp_path / "cnn"))
    assert [len(set(batch.column("run").to_pylist())) for batch in batches] == [1] * COUNT


def test_several_families_read_as_one(samples, tmp_path: Path) -> None:
    write(samples, tmp_path / "a", family="a")
    write(samples, tmp_path / "b", family="b")
    networks = read_networks([tmp_path / "b", tmp_path / "a"])
    assert networks.frame["family"].tolist() == ["b"] * COUNT + ["a"] * COUNT
    chosen = networks.select((networks.frame["family"] == "a").to_numpy()).select([2, 0])
    runs = sorted(zoo(samples)[0]["run"])
    assert chosen.frame["run"].tolist() == [runs[2], runs[0]]
    assert torch.equal(chosen.state(0)["l0.weight"], networks.state(COUNT + 2)["l0.weight"])


def test_selecting_reads_nothing(samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(samples, tmp_path / "cnn")
    networks = read_networks([tmp_path / "cnn"])

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("tokens were read")

    monkeypatch.setattr(pq.ParquetFile, "read", fail)
    assert len(networks.select([1, 2, 3]).select(np.array([True, False, True]))) == 2
    with pytest.raises(ValueError, match="one entry per network"):
        networks.select([True, False])


def test_a_failed_write_leaves_the_old_folder_and_nothing_else(samples, tmp_path: Path) -> None:
    write(samples, tmp_path / "cnn")
    before = contents(tmp_path / "cnn")
    frame, specs, states = zoo(samples)

    def interrupted() -> Iterator[tuple[str, pa.Table]]:
        yield from list(tables(frame, specs, states))[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(tmp_path / "cnn", frame, specs, interrupted(), config=CONFIG)
    assert contents(tmp_path / "cnn") == before
    assert [path.name for path in tmp_path.iterdir()] == ["cnn"]


def test_a_folder_is_replaced_whole(samples, tmp_path: Path) -> None:
    write(samples, tmp_path / "cnn")
    frame, specs, states = zoo(samples)
    few = frame.iloc[:2]
    write_tokens(tmp_path / "cnn", few, specs, tables(few, specs, states), config=CONFIG)
    assert not (tmp_path / "cnn" / "tokens-00001.parquet").exists()
    assert len(read_networks([tmp_path / "cnn"])) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["cnn"]


def test_float16_shards_and_responses(samples, tmp_path: Path) -> None:
    frame, specs, states = zoo(samples)
    config = TokensConfig(dtype="float16")
    made = []
    for run, name in zip(frame["run"], frame["spec"], strict=True):
        outputs = [sum(s.size * s.repeat for s in one.outputs) for one in specs[name].layers]
        responses = {i: np.full((n, 3), i, np.float32) for i, n in enumerate(outputs)}
        made.append((run, tokenize(specs[name], states[run], config=config, responses=responses)))
    write_tokens(tmp_path / "cnn", frame, specs, made, config=config)
    networks = read_networks([tmp_path / "cnn"])
    run = networks.frame["run"].iat[4]
    assert torch.equal(networks.state(4)["l0.weight"], states[run]["l0.weight"].half().float())
    stack = next(networks.stacks())
    answers = stack.responses()
    assert answers is not None
    np.testing.assert_array_equal(answers[0, :, 0], stack.layout.layer)


def _drop(name: str):
    return lambda folder: (folder / name).unlink()


def _truncate(folder: Path) -> None:
    path = folder / "tokens-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])


def _swap(folder: Path) -> None:
    shutil.copy(folder / "tokens-00000.parquet", folder / "tokens-00002.parquet")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (_drop("networks.parquet"), r"networks\.parquet must exist"),
        (_drop("specs.parquet"), r"specs\.parquet must exist"),
        (_drop("digests.json"), r"digests\.json must exist"),
        (_drop("tokens-00001.parquet"), r"tokens-00001\.parquet must exist"),
        (_drop("tokens-00002.parquet"), "must hold the"),
        (_truncate, "must be a Parquet file"),
        (_swap, "must hold the"),
    ],
)
def test_missing_and_broken_files_are_named_with_a_remedy(
    samples, tmp_path: Path, spoil, message: str
) -> None:
    write(samples, tmp_path / "cnn")
    spoil(tmp_path / "cnn")
    with pytest.raises(ValueError, match=message) as caught:
        read_networks([tmp_path / "cnn"])
    if spoil is _truncate:
        with pytest.raises(ValueError, match=message):
            list(iter_tokens(tmp_path / "cnn"))
    assert "dvc repro tokenize_zoo" in str(caught.value)


def test_no_shard_at_all(samples, tmp_path: Path) -> None:
    write(samples, tmp_path / "cnn")
    for path in (tmp_path / "cnn").glob("tokens-*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"tokens-00000\.parquet must exist"):
        list(iter_tokens(tmp_path / "cnn"))


def test_another_schema_version_is_refused(
    samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    write(samples, tmp_path / "cnn")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"version 1, however: it has .* version 2"):
        read_networks([tmp_path / "cnn"])
    with pytest.raises(ValueError, match="tokens version 1, however: it has tokens version 2"):
        list(iter_tokens(tmp_path / "cnn"))


def test_shards_in_another_order_are_noticed(samples, tmp_path: Path) -> None:
    """Equal row counts, other networks: noticed when tokens are read."""
    frame, specs, states = zoo(samples)
    frame["spec"] = frame["spec"].iat[0]
    alike = {run: samples.state(samples.specs["small_cnn"], i) for i, run in enumerate(states)}
    write_tokens(tmp_path / "cnn", frame, specs, tables(frame, specs, alike), config=CONFIG)
    a, b = (tmp_path / "cnn" / f"tokens-0000{i}.parquet" for i in (0, 1))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    write_digests(tmp_path / "cnn")
    networks = read_networks([tmp_path / "cnn"])
    with pytest.raises(ValueError, match="in the order of"):
        networks.state(0)


def test_what_does_not_fit_together_is_refused_before_writing(samples, tmp_path: Path) -> None:
    frame, specs, states = zoo(samples)
    made = list(tables(frame, specs, states))
    run, table = made[0]
    coarse = [(run, tokenize(specs[frame["spec"].iat[0]], states[run]))]
    half = CONFIG.model_copy(update={"dtype": "float16"})
    other = {"0" * 16: next(iter(specs.values()))}
    cases = [
        (frame.drop(columns="task"), specs, made, CONFIG, "missing task"),
        (pd.concat([frame, frame]), specs, made, CONFIG, "more than once"),
        (frame, {}, made, CONFIG, "is missing"),
        (frame.iloc[:0], specs, [], CONFIG, "is empty"),
        (frame.assign(spec="0" * 16), other, made, CONFIG, "another id"),
        (frame, specs, made[1:], CONFIG, "1 have none"),
        (frame, specs, [*made, made[0]], CONFIG, "arrived twice"),
        (frame, specs, [("f" * 16, table)], CONFIG, "not in the table"),
        (frame, specs, coarse, CONFIG, "max_row=7"),
        (frame, specs, made, half, "dtype=float16"),
        (frame.assign(mixed=[1, "a"] * 5), specs, made, CONFIG, "one type"),
    ]
    for networks, known, arriving, config, message in cases:
        with pytest.raises(ValueError, match=message):
            write_tokens(tmp_path / "cnn", networks, known, arriving, config=config)
        assert not list(tmp_path.iterdir())


def test_from_states_equals_reading(samples, tmp_path: Path) -> None:
    frame, specs, states = zoo(samples)
    write(samples, tmp_path / "cnn")
    read = read_networks([tmp_path / "cnn"])
    memory = Networks.from_states(frame, specs, [states[run] for run in frame["run"]])
    order = [frame["run"].tolist().index(run) for run in read.frame["run"]]
    for i, j in enumerate(order):
        assert read.spec(i) == memory.spec(j)
        a, b = read.state(i), memory.state(j)
        assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="as many"):
        Networks.from_states(frame, specs, [])


def test_the_documented_columns_are_those_of_the_files(samples, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "SHARDS.md").read_text(encoding="utf-8")
    assert f"Schema version: **{schema.SCHEMA_VERSION}**" in text
    section = text.split("## tokens-")[1].split("\n## ")[0]
    names = [
        re.findall(r"`(\w+)`", line.split("|")[1]) for line in section.splitlines() if "|" in line
    ]
    documented = [name for row in names for name in row]
    write(samples, tmp_path / "cnn")
    found = pq.read_schema(tmp_path / "cnn" / "tokens-00000.parquet").names
    assert [name for name in documented if name != "response"] == found


def test_tokens_in_a_temporary_file_are_the_same(
    samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, specs, states = zoo(samples)
    write_tokens(tmp_path, frame, specs, tables(frame, specs, states), config=CONFIG)
    held = read_networks([tmp_path])
    expected = [held.table(i) for i in range(COUNT)]
    monkeypatch.setattr(scratch, "LIMIT", 0)
    mapped = read_networks([tmp_path])
    assert all(mapped.table(i).equals(one) for i, one in enumerate(expected))
    for stack, other in zip(held.stacks(), mapped.stacks(), strict=True):
        np.testing.assert_array_equal(stack.scalar("bias"), other.scalar("bias"))
        for one in stack.layout.layers:
            np.testing.assert_array_equal(stack.weight(one), other.weight(one))
