"""Splits: a run is in one part, whatever the order of the rows; parts follow from hashes of run
ids."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from weightnet.evaluation.splits import SPLITS, SplitsConfig, assign, sizes, split_hash
from weightnet.params import parse

CONFIG = SplitsConfig(held_out_families=("vgg11",), train_task="digits")


def zoo(count: int = 600) -> pd.DataFrame:
    """A table of networks: 80% cnn of several widths, the rest resnet18 and vgg11 of two."""
    generator = np.random.default_rng(0)
    family = generator.choice(["cnn", "resnet18", "vgg11"], size=count, p=[0.8, 0.1, 0.1])
    wide = np.where(family == "cnn", generator.choice([4, 8, 16, 32], count), 0.0)
    width = np.where(family == "cnn", wide, generator.choice([0.0625, 0.125], count))
    runs = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(count)]
    task = generator.choice(["digits", "fashion"], count)
    return pd.DataFrame({"run": runs, "family": family, "task": task, "width": width})


@pytest.mark.parametrize("split", SPLITS)
def test_parts_follow_the_run_not_the_row(split: str) -> None:
    frame = zoo()
    parts = assign(frame, split, seed=1, config=CONFIG)
    assert set(parts) == {"train", "validation", "test"}
    twice = pd.concat([frame, frame.iloc[::3]]).sample(frac=1.0, random_state=1)
    shuffled = assign(twice, split, seed=1, config=CONFIG)
    assert shuffled.index.equals(twice.index)
    by_run = dict(zip(frame["run"], parts, strict=True))
    assert [by_run[run] for run in twice["run"]] == list(shuffled)


@pytest.mark.parametrize("split", ["iid", "unseen_architecture", "unseen_task"])
def test_more_runs_move_no_earlier_run(split: str) -> None:
    frame = zoo()
    before = assign(frame.iloc[:400], split, seed=0, config=CONFIG)
    after = assign(frame, split, seed=0, config=CONFIG)
    assert after.iloc[:400].equals(before)


def test_iid_seeds_test_disjoint_runs() -> None:
    frame = zoo()
    tested = [assign(frame, "iid", seed=s, config=CONFIG) == "test" for s in range(5)]
    assert (np.sum(tested, axis=0) == 1).all()
    assert all(0.14 < one.mean() < 0.26 for one in tested)
    validation = assign(frame, "iid", seed=0, config=CONFIG) == "validation"
    assert 0.08 < validation.mean() < 0.16


@pytest.mark.parametrize("split", ["unseen_architecture", "unseen_task", "unseen_width"])
def test_seeds_share_the_test_set_and_differ_in_validation(split: str) -> None:
    frame = zoo()
    first, second = (assign(frame, split, seed=s, config=CONFIG) for s in (0, 1))
    assert split_hash(frame, first, only=("test",)) == split_hash(frame, second, only=("test",))
    assert split_hash(frame, first) != split_hash(frame, second)


def test_out_of_distribution_tests_what_training_has_not() -> None:
    frame = zoo()
    parts = assign(frame, "unseen_architecture", seed=0, config=CONFIG)
    assert set(frame.loc[parts == "test", "family"]) == {"vgg11"}
    assert set(frame.loc[parts != "test", "family"]) == {"cnn", "resnet18"}
    parts = assign(frame, "unseen_task", seed=0, config=CONFIG)
    assert set(frame.loc[parts == "test", "task"]) == {"fashion"}
    assert set(frame.loc[parts != "test", "task"]) == {"digits"}
    parts = assign(frame, "unseen_width", seed=0, config=CONFIG)
    for _, rows in frame.groupby("family"):
        seen = rows.loc[parts[rows.index] != "test", "width"].max()
        assert (rows.loc[parts[rows.index] == "test", "width"] > seen).all()
        assert (parts[rows.index] == "test").any()


def test_width_direction_and_a_family_of_one_width() -> None:
    frame = zoo()
    frame.loc[frame["family"] == "vgg11", "width"] = 0.125
    config = CONFIG.model_copy(update={"width_direction": "narrower"})
    parts = assign(frame, "unseen_width", seed=0, config=config)
    cnn = frame[frame["family"] == "cnn"]
    assert set(cnn.loc[parts[cnn.index] == "test", "width"]) == {4}
    assert "test" not in set(parts[frame["family"] == "vgg11"])


def test_train_fraction_nests_and_keeps_test_and_validation() -> None:
    frame = zoo()
    whole = assign(frame, "iid", seed=0, config=CONFIG)
    used = {}
    for fraction in (0.25, 0.5):
        config = CONFIG.model_copy(update={"train_fraction": fraction})
        parts = assign(frame, "iid", seed=0, config=config)
        assert ((parts == "test") == (whole == "test")).all()
        assert ((parts == "validation") == (whole == "validation")).all()
        used[fraction] = set(frame.loc[parts == "train", "run"])
    assert used[0.25] < used[0.5] < set(frame.loc[whole == "train", "run"])


def test_an_imported_split_is_respected() -> None:
    frame = zoo()
    frame["split"] = [None] * 200 + ["test"] * 100 + ["train"] * 300
    parts = assign(frame, "iid", seed=0, config=CONFIG)
    assert set(parts.iloc[200:300]) == {"test"}
    assert set(parts.iloc[300:]) == {"train", "validation"}
    assert set(parts.iloc[:200]) == {"train", "validation", "test"}
    frame.loc[frame.index[300:320], "split"] = "validation"
    parts = assign(frame, "iid", seed=0, config=CONFIG)
    assert set(parts.iloc[300:320]) == {"validation"}
    assert set(parts.iloc[320:]) == {"train"}
    frame["split"] = "holdout"
    with pytest.raises(ValueError, match="split='holdout'"):
        assign(frame, "iid", seed=0, config=CONFIG)


@pytest.mark.parametrize("count", [8, 12, 20])
def test_tiny_zoos_have_no_empty_part(count: int) -> None:
    frame = zoo(count)
    for seed in range(3):
        parts = assign(frame, "iid", seed=seed, config=CONFIG)
        assert {"train", "validation", "test"} <= set(parts)


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("random", {}, "split must be one of"),
        ("unseen_architecture", {"held_out_families": ("vit",)}, "held_out_families has vit"),
        (
            "unseen_architecture",
            {"held_out_families": ("cnn", "resnet18", "vgg11")},
            "must leave a family",
        ),
        ("unseen_task", {"train_task": "imagenet"}, "train_task='imagenet'"),
    ],
)
def test_impossible_splits_are_refused(
    split: str, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assign(zoo(), split, seed=0, config=CONFIG.model_copy(update=change))


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="width missing"):
        assign(zoo().drop(columns="width"), "iid", seed=0, config=CONFIG)
    with pytest.raises(ValueError, match="test is empty"):
        assign(zoo().assign(width=1.0), "unseen_width", seed=0, config=CONFIG)
    frame = zoo()
    frame.loc[1, "run"] = frame.loc[0, "run"]
    with pytest.raises(ValueError, match="has several"):
        assign(frame, "iid", seed=0, config=CONFIG)


def test_config_reads_yaml_lists_and_refuses_bad_values() -> None:
    data = {"held_out_families": ["vgg11"], "train_task": "digits"}
    assert parse(SplitsConfig, data, "splits") == CONFIG
    with pytest.raises(ValueError, match=r"splits\.test_fraction"):
        parse(SplitsConfig, {**data, "test_fraction": 0.0}, "splits")
    with pytest.raises(ValidationError):
        SplitsConfig(held_out_families=(), train_task="digits")


def test_sizes_count_every_network() -> None:
    frame = zoo()
    table = sizes(frame, SPLITS, [0, 1], CONFIG)
    assert list(table.columns[:3]) == ["split", "seed", "train"]
    counted = table[["train", "validation", "test", "unused"]].sum(axis=1)
    assert (counted == len(frame)).all() and len(table) == 8


@pytest.mark.parametrize("split", SPLITS)
def test_checkpoints_of_a_run_share_its_part(split: str) -> None:
    frame = zoo(300)
    plain = assign(frame, split, seed=0, config=CONFIG)
    checkpoints = pd.concat([frame.assign(run=frame["run"] + f"/{i}") for i in range(3)])
    checkpoints["group"] = [run.split("/")[0] for run in checkpoints["run"]]
    parts = assign(checkpoints, split, seed=0, config=CONFIG)
    assert list(parts) == [*plain] * 3
    mixed = pd.concat([frame.iloc[:100], checkpoints.iloc[100:300]])  # ours have no group
    assert list(assign(mixed, split, seed=0, config=CONFIG)) == list(plain)
