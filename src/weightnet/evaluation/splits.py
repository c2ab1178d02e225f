"""Which networks train a predictor, which tune it and which test it.

The invariant: a run is in one part, whatever the order, the number or the other columns of the
rows, because the part follows from a hash of the run's id. Several networks of one run
(checkpoints of an imported zoo, which share a `group`) are therefore never on both sides. Adding
runs to a zoo moves none of the earlier ones (for `unseen_width` as long as the widths stay).

=======================  =====================================  ================================
split                    test                                     seeds differ in
=======================  =====================================  ================================
``iid``                  a hashed share of the runs               test (disjoint) and validation
``unseen_architecture``  the held-out families                    validation
``unseen_task``          every task but the one trained on        validation
``unseen_width``         each family's widest (narrowest) runs    validation
=======================  =====================================  ================================

Diverged runs are split like all others. Their measured properties may be at chance level or NaN;
NaN is left out by the metrics, never by the split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from weightnet.params import Params
from weightnet.predictors.folds import groups

SPLITS = ("iid", "unseen_architecture", "unseen_task", "unseen_width")
PARTS = ("train", "validation", "test", "unused")
_COLUMNS = ("run", "family", "task", "width")

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class SplitsConfig(Params):
    """How runs are divided.

    Attributes:
        test_fraction: share of the runs that one seed of `iid` tests; seed s tests the s-th share.
        validation_fraction: share of what is not tested that is kept from training.
        train_fraction: share of the training runs that are used; the rest is ``unused`` (learning
            curves). Smaller shares are subsets of larger ones, and test and validation do not
            change.
        held_out_families: the test families of `unseen_architecture`.
        train_task: the task that `unseen_task` trains on.
        width_quantile: share of each family's runs that `unseen_width` trains on, met as nearly
            as the family's distinct widths allow.
        width_direction: whether `unseen_width` tests the wider or the narrower networks.
    """

    test_fraction: Fraction = 0.2
    validation_fraction: Fraction = 0.15
    train_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    held_out_families: Names
    train_task: str
    width_quantile: Fraction = 0.7
    width_direction: Literal["wider", "narrower"] = "wider"


def assign(frame: pd.DataFrame, split: str, *, seed: int, config: SplitsConfig) -> pd.Series:
    """Assign each network to a part.

    Args:
        frame: one row per network with columns ``run`` (str), ``family``, ``task`` and ``width``.
            A column ``split`` (an imported zoo's own division: train, validation or test, missing
            elsewhere) is respected in `iid`. See `groups` for the column ``group``.
        split: one of `SPLITS`.
        seed: which of the repeated divisions, from 0.

    Returns:
        A series of `PARTS` on the index of ``frame``.

    Raises:
        ValueError: if a column, family or task is unknown, or if training, validation or test
            would be empty.
    """
    if split not in SPLITS:
        raise ValueError(
            f"split must be one of {', '.join(SPLITS)}, however: split={split!r}; correct params"
        )
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, however: seed={seed}; correct params")
    runs = _runs(frame)
    parts = pd.Series("train", index=runs.index, dtype=object)

    test = _test_runs(runs, split, seed, config)
    parts[test] = "test"
    validation = pd.Series(False, index=runs.index)
    if split == "iid" and "split" in runs:
        validation = runs["split"] == "validation"
        free = (runs["split"].isna() | ~validation.any()) & (parts == "train")
    else:
        free = parts == "train"
    chosen = runs.index[free]
    validation[chosen] |= _smallest(
        _hashes(chosen, f"validation/{seed}"), config.validation_fraction
    )
    parts[validation & (parts == "train")] = "validation"
    train = runs.index[parts == "train"]
    if config.train_fraction < 1.0 and len(train):
        parts[train[~_smallest(_hashes(train, "train"), config.train_fraction)]] = "unused"

    for part in PARTS[:3]:
        if not (parts == part).any():
            raise ValueError(
                f"split {split} needs at least one run in each of train, validation and test, "
                f"however: {part} is empty with {len(runs)} runs and seed={seed}; enlarge the "
                "zoo or change the splits section of params"
            )
    return pd.Series(
        parts.loc[groups(frame)].to_numpy(dtype=str), index=frame.index, name="part", dtype="str"
    )


def split_hash(
    frame: pd.DataFrame, parts: pd.Series, *, only: Sequence[str] = ("train", "validation", "test")
) -> str:
    """Return 12 hex digits that are equal if and only if the same runs are in the parts named by
    ``only``.

    Results may be compared where the hash of ``only=("test",)`` is the same.
    """
    pairs = sorted(
        {(run, part) for run, part in zip(frame["run"], parts, strict=True) if part in only}
    )
    return hashlib.sha256("\n".join(f"{run} {part}" for run, part in pairs).encode()).hexdigest()[
        :12
    ]


def sizes(
    frame: pd.DataFrame, splits: Iterable[str], seeds: Iterable[int], config: SplitsConfig
) -> pd.DataFrame:
    """Return the networks in each part: split, seed, train, validation, test, unused, hash (of
    the test runs)."""
    rows = []
    seeds = list(seeds)
    for split in splits:
        for seed in seeds:
            parts = assign(frame, split, seed=seed, config=config)
            counts = {part: int((parts == part).sum()) for part in PARTS}
            rows.append(
                {
                    "split": split,
                    "seed": seed,
                    **counts,
                    "hash": split_hash(frame, parts, only=("test",)),
                }
            )
    return pd.DataFrame(rows)


def _runs(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per run, indexed by the run's id and sorted by it."""
    missing = [column for column in _COLUMNS if column not in frame]
    if missing:
        raise ValueError(
            f"the table of networks must have columns {', '.join(_COLUMNS)}, however: "
            f"{', '.join(missing)} missing; rerun tokenize_zoo"
        )
    columns = [*_COLUMNS, *(["split"] if "split" in frame else [])]
    runs = frame[columns].assign(run=groups(frame)).drop_duplicates()
    runs = runs.sort_values("run", kind="stable").set_index("run")
    if runs.index.hasnans or runs[["family", "task"]].isna().any(axis=None):
        raise ValueError(
            "each network must have a run, a family and a task, however: one is missing; rerun "
            "tokenize_zoo"
        )
    if not runs.index.is_unique:
        run = runs.index[runs.index.duplicated()][0]
        raise ValueError(
            f"a run must have one family, task, width and split, however: run={run} has several; "
            "correct the zoo's table"
        )
    if "split" in runs:
        unknown = set(runs["split"].dropna()) - set(PARTS[:3])
        if unknown:
            raise ValueError(
                f"column split must be one of {', '.join(PARTS[:3])} or missing, however: "
                f"split={min(unknown)!r}; correct the imported zoo's table"
            )
    return runs


def _test_runs(runs: pd.DataFrame, split: str, seed: int, config: SplitsConfig) -> pd.Series:
    """Return which runs are tested: bool, indexed by run."""
    if split == "iid":
        given = runs["split"].notna() if "split" in runs else pd.Series(False, index=runs.index)
        test = pd.Series(False, index=runs.index)
        if given.any():
            test |= runs["split"] == "test"
        free = runs.index[~given]
        turned = (_hashes(free, "test") - seed * config.test_fraction) % 1.0
        test[free] = _smallest(turned, config.test_fraction)
        return test
    if split == "unseen_architecture":
        known = sorted(set(runs["family"]))
        unknown = sorted(set(config.held_out_families) - set(known))
        if unknown:
            raise ValueError(
                f"held_out_families must be families of the zoo ({', '.join(known)}), however: "
                f"held_out_families has {', '.join(unknown)}; correct splits.held_out_families"
            )
        if set(config.held_out_families) == set(known):
            raise ValueError(
                "held_out_families must leave a family to train on, however: it names all of "
                f"{', '.join(known)}; correct splits.held_out_families"
            )
        return runs["family"].isin(config.held_out_families)
    if split == "unseen_task":
        tasks = sorted(set(runs["task"]))
        if config.train_task not in tasks or len(tasks) < 2:
            raise ValueError(
                "unseen_task must have its train_task and another task in the zoo, however: "
                f"train_task={config.train_task!r} and the zoo has {', '.join(tasks)}; correct "
                "splits.train_task or the tasks"
            )
        return runs["task"] != config.train_task
    width = pd.to_numeric(runs["width"])
    if not np.isfinite(width.to_numpy(dtype=float)).all():
        raise ValueError(
            "width must be finite, however: a network has none; rerun tokenize_zoo or drop "
            "unseen_width"
        )
    if config.width_direction == "narrower":
        width = -width
    parts = [
        width[members.index] > _cut(width[members.index], config.width_quantile)
        for _, members in runs.groupby("family")
    ]
    return pd.concat(parts).reindex(runs.index)


def _cut(width: pd.Series, quantile: float) -> float:
    """Return the width, among the distinct ones but the largest, below which the share is nearest
    ``quantile``.

    A family with one width has nothing wider: infinity, so that it only trains.
    """
    share = width.value_counts(normalize=True).sort_index().cumsum().iloc[:-1]
    return float((share - quantile).abs().idxmin()) if len(share) else float("inf")


def _hashes(runs: Iterable[str], salt: str) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each run: uniform, and independent between salts."""
    digests = (hashlib.sha256(f"weightnet/{salt}/{run}".encode()).digest()[:8] for run in runs)
    return np.array(
        [(int.from_bytes(digest, "big") >> 11) / 2.0**53 for digest in digests], dtype=np.float64
    )


def _smallest(hashes: NDArray[np.float64], fraction: float) -> NDArray[np.bool_]:
    """Return which hashes are below ``fraction``; in a tiny zoo at least the two smallest (one of
    five or fewer)."""
    least = 2 if len(hashes) > 5 else 1
    chosen = hashes < fraction
    if chosen.sum() < least:
        chosen = np.zeros(len(hashes), dtype=bool)
        chosen[np.argsort(hashes, kind="stable")[:least]] = True
    return chosen
