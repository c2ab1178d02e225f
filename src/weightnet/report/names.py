"""How properties, splits, subsets and predictors are called in tables and figures: one table for
each.

Predictors arrive as data (`PredictorInfo`), so that the report needs none of their code; a name
that is in no table is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

Kind = Literal["ours", "baseline", "published", "floor", "control", "ceiling"]
KINDS: tuple[Kind, ...] = ("ours", "baseline", "published", "floor", "control", "ceiling")
KIND_NAMES: Mapping[str, str] = {
    "ours": "this project",
    "baseline": "baseline",
    "published": "published, where it applies",
    "floor": "floor",
    "control": "control",
    "ceiling": "ceiling",
}
CEILING = "ceiling"


@dataclass(frozen=True)
class PropertyName:
    """A property's name for people, its unit (empty for a share) and its meaning."""

    title: str
    unit: str
    meaning: str

    @property
    def axis(self) -> str:
        """The name with its unit, for an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


PROPERTIES: Mapping[str, PropertyName] = {
    "test_accuracy": PropertyName(
        "test accuracy", "share of images", "share of held-out images classified correctly"
    ),
    "train_accuracy": PropertyName(
        "train accuracy", "share of images", "share of its training images classified correctly"
    ),
    "generalization_gap": PropertyName(
        "generalization gap", "share of images", "train accuracy less test accuracy"
    ),
    "test_loss": PropertyName("test loss", "nats", "mean cross-entropy on held-out images"),
    "noise_accuracy": PropertyName(
        "noise accuracy", "share of images", "accuracy on held-out images with Gaussian noise"
    ),
    "adversarial_accuracy": PropertyName(
        "adversarial accuracy", "share of images", "accuracy on held-out images under FGSM"
    ),
    "calibration_error": PropertyName(
        "calibration error", "share of images", "expected calibration error, 15 bins"
    ),
}

SPLIT_NAMES: Mapping[str, str] = {
    "iid": "in distribution",
    "unseen_architecture": "unseen architecture",
    "unseen_task": "unseen task",
    "unseen_width": "unseen width",
}
SPLIT_MEANINGS: Mapping[str, str] = {
    "iid": "tested on other runs of the same families and tasks",
    "unseen_architecture": "tested on families that training never saw",
    "unseen_task": "trained on the networks of one task, tested on those of another",
    "unseen_width": "trained on each family's narrower networks, tested on its wider ones",
}

METRIC_NAMES: Mapping[str, str] = {
    "tau": "Kendall tau-b",
    "spearman": "Spearman's rho",
    "r2": "R²",
    "mae": "mean absolute error",
    "coverage": "coverage of the 90% interval",
}


@dataclass(frozen=True)
class PredictorInfo:
    """What a table says about a predictor besides its scores."""

    name: str
    kind: Kind
    description: str = ""
    reads_weights: bool = True
    needs_forward: bool = False

    @property
    def label(self) -> str:
        """The name with its marks: ``†`` not from weights, ``‡`` needs a forward pass."""
        marks = ("" if self.reads_weights else " †") + (" ‡" if self.needs_forward else "")
        return self.name + marks


MARKS = "† not from weights · ‡ also runs the network forward, on inputs that are not data"


def read_predictors(table: pd.DataFrame) -> list[PredictorInfo]:
    """Make a table with columns name, kind, description, reads_weights, needs_forward into a list.

    Raises:
        ValueError: if a kind is unknown.
    """
    unknown = sorted(set(table["kind"]) - set(KINDS))
    if unknown:
        raise ValueError(
            f"a predictor's kind must be one of {', '.join(KINDS)}, however: "
            f"kind={unknown[0]!r}; correct the registry of predictors"
        )
    return [
        PredictorInfo(
            str(row["name"]),
            row["kind"],
            str(row["description"]),
            bool(row["reads_weights"]),
            bool(row["needs_forward"]),
        )
        for row in table.to_dict("records")
    ]


def arrange(present: Iterable[str], predictors: Sequence[PredictorInfo]) -> list[PredictorInfo]:
    """Return what is known of the predictors in ``present``: by kind, then in the order given.

    The ceiling is known always; any other unknown name counts as a baseline.
    """
    names = set(present.unique() if isinstance(present, pd.Series | pd.Index) else present)
    known = {one.name: one for one in predictors}
    found = [known[name] for name in known if name in names]
    for name in sorted(names - set(known)):
        if name == CEILING:
            found.append(PredictorInfo(CEILING, "ceiling", "the property on other test images"))
        else:
            found.append(PredictorInfo(name, "baseline"))
    return sorted(found, key=lambda one: KINDS.index(one.kind))


def property_name(name: str) -> PropertyName:
    """Return a property's names; an unknown one's are made from its own."""
    return PROPERTIES.get(name) or PropertyName(name.replace("_", " "), "", "")


def split_name(name: str) -> str:
    """Return a split's name for people."""
    return SPLIT_NAMES.get(name, name.replace("_", " "))
