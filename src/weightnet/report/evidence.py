"""What a report is made of, and the questions that its text and captions ask of the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from weightnet.report.names import PROPERTIES, PredictorInfo, arrange
from weightnet.report.tables import bounds

HEADLINE = "test_accuracy"
BASELINES = ("baseline", "published")
RIVALS = (*BASELINES, "floor")


@dataclass(frozen=True)
class Picture:
    """A figure to show: its kind (a key of `CAPTIONS`), its path relative to the report, and what
    it is of."""

    kind: str
    path: str
    predictor: str = ""
    split: str = "iid"
    property: str = HEADLINE


@dataclass(frozen=True)
class Evidence:
    """All that the report is made of.

    Attributes:
        networks: run, family, task, ``property.<name>`` and perhaps ``diverged``.
        scores: predictor, split, property, subset, metric, value, low, high, n.
        predictors: what to say about each predictor.
        differences: predictor, rival, split, property, subset, metric, value, low, high, n.
        sizes: split, seed, train, validation, test, unused, hash.
        audit: predictor, split, family, transformation, property, largest, relative, tau,
        tau_copies, n.
        pictures: the figures, in the order in which those of one kind are shown.
        sections: Markdown to put before "How to reproduce", by title (ablations).
        agreement: run, family, model, property, correlation, top_tenth.
        ablations: ablation, group, predictor, base, changes, split, property, metric, value, low,
        high, difference, difference_low, difference_high, n, hash.
    """

    networks: pd.DataFrame
    scores: pd.DataFrame
    predictors: Sequence[PredictorInfo]
    differences: pd.DataFrame | None = None
    sizes: pd.DataFrame | None = None
    audit: pd.DataFrame | None = None
    pictures: Sequence[Picture] = ()
    sections: Mapping[str, str] = field(default_factory=dict)
    agreement: pd.DataFrame | None = None
    ablations: pd.DataFrame | None = None

    @property
    def splits(self) -> list[str]:
        """The splits that were scored, in order."""
        return list(dict.fromkeys(self.scores["split"]))

    @property
    def properties(self) -> list[str]:
        """The properties that were scored, in their usual order."""
        found = set(self.scores["property"])
        return [p for p in PROPERTIES if p in found] + sorted(found - set(PROPERTIES))

    @property
    def comparable_ablations(self) -> pd.DataFrame:
        """The ablations whose test networks are those of ``sizes``; none if there are none."""
        if self.ablations is None or self.sizes is None:
            return pd.DataFrame(columns=["hash"])
        hashes = {s: " ".join(own["hash"]) for s, own in self.sizes.groupby("split")}
        same = [hashes.get(s) == h for s, h in self.ablations[["split", "hash"]].to_numpy()]
        return self.ablations[np.array(same, dtype=bool)]

    @property
    def ours(self) -> list[PredictorInfo]:
        """This project's own predictors."""
        return [
            one for one in arrange(self.scores["predictor"], self.predictors) if one.kind == "ours"
        ]


def lead(
    evidence: Evidence, predictor: str, split: str, property: str, *, kinds: Sequence[str] = RIVALS
) -> tuple[str, float, float, float] | None:
    """Return the strongest rival on a split and property, and the predictor's lead in tau over it.

    The rival is the one with the highest tau on the very test networks that are compared, which
    can only favour the rival. None where there is no comparison.
    """
    table = evidence.differences
    if table is None or table.empty:
        return None
    infos = arrange(evidence.scores["predictor"], evidence.predictors)
    rivals = [one.name for one in infos if one.kind in kinds]
    taus = (
        tau_by_predictor(evidence.scores, split=split, property=property).reindex(rivals).dropna()
    )
    if taus.empty:
        return None
    rival = str(taus.idxmax())
    row = where(
        table,
        predictor=predictor,
        rival=rival,
        split=split,
        property=property,
        subset="all",
        metric="tau",
    )
    if row.empty:
        return None
    return rival, *bounds(row.set_index("rival"), rival)


def contenders(evidence: Evidence, taus: pd.Series) -> pd.Series:
    """Return the values of ours, the baselines and the floors: no control, no ceiling."""
    infos = arrange(taus.index, evidence.predictors)
    return taus.reindex([one.name for one in infos if one.kind in ("ours", *RIVALS)]).dropna()


def where(table: pd.DataFrame, **keys: str) -> pd.DataFrame:
    """Return the rows whose columns have these values."""
    for column, value in keys.items():
        table = table[table[column] == value]
    return table


def tau_by_predictor(scores: pd.DataFrame, *, split: str, property: str) -> pd.Series:
    """Return tau on all test networks, indexed by predictor."""
    rows = where(scores, split=split, property=property, subset="all", metric="tau")
    return rows.set_index("predictor")["value"]


def enumerate_words(items: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
