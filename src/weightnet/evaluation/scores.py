"""Scores of every predictor on every split, and paired differences, with intervals over runs.

A predictor's value is its metric within each seed's test networks, averaged over the seeds. A
bootstrap resample draws runs, not rows: a run tested in several seeds gets the same count in each
(otherwise three seeds on the same networks would look like three times the evidence), checkpoints
of one training run (column ``group``) are drawn together, and all predictors see the same
resamples, so that a difference between two is paired. Runs are drawn within the set of seeds that
test them, which keeps each seed's size. The coverage of intervals also depends on the networks
that calibrated them, and these are resampled too, where the predictions have rows of the part
``validation``.

Subsets: ``all``; ``above_chance``: networks whose measured test accuracy exceeds chance by a
margin (collapsed networks are trivial to tell apart and inflate R2); each family;
``within_family``: the mean over families of the metric inside each, which knowing the family does
not help.

The row ``ceiling`` compares each property measured on one half of the test images with the same
property on the other half. No predictor can rank networks much better than the measurements agree
with themselves; as each half has half the images, the ceiling of the full measurement is somewhat
higher than this.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field

from weightnet.evaluation import metrics, recalibration
from weightnet.evaluation.metrics import METRICS, Counts, Floats
from weightnet.evaluation.splits import SPLITS
from weightnet.params import Params
from weightnet.predictors.calibration import LEVEL
from weightnet.predictors.folds import groups

CEILING = "ceiling"
SUBSETS = ("all", "within_family", "above_chance")
PREDICTION_COLUMNS = (
    "predictor",
    "split",
    "seed",
    "run",
    "property",
    "measured",
    "predicted",
    "low",
    "high",
)
_VALUES = ("measured", "predicted", "low", "high")


class ScoresConfig(Params):
    """How predictions are scored.

    Attributes:
        draws: bootstrap resamples.
        level: level of the intervals over runs.
        seed: seed of the resamples.
        classes: classes of the tasks; chance is 1 / classes.
        chance_margin: by how much test accuracy exceeds chance in ``above_chance``.
        min_networks: a subset of fewer test networks is not scored (``all`` always is): its tau
            would be noise.
    """

    draws: Annotated[int, Field(ge=10)] = 1000
    level: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    seed: Annotated[int, Field(ge=0)] = 0
    classes: Annotated[int, Field(ge=2)] = 10
    chance_margin: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    min_networks: Annotated[int, Field(ge=3)] = 8


@dataclass(frozen=True)
class _SplitTable:
    """The predictions of one part of a split, on R runs (rows) and S seeds.

    ``values[predictor][property]`` is [S, R, 4] in the order of `_VALUES`, NaN where the
    predictor gave nothing.
    """

    runs: pd.Index
    families: NDArray[np.str_]
    above_chance: NDArray[np.bool_] | None
    strata: NDArray[np.int64]
    groups: NDArray[np.int64]
    values: dict[str, dict[str, Floats]]


class Evaluation:
    """Test predictions of all predictors, resampled once; each resampled metric is computed when
    first asked for.

    Args:
        predictions: rows with `PREDICTION_COLUMNS`, in any order; where there is a column
            ``part``, "test" is scored, and "calibration" tells how the intervals would vary. A
            predictor that does not accept a network leaves its row out (n shows it).
        networks: one row per network: ``run``, ``family``, ``property.<name>`` and, for the
            ceiling, ``half_a.<name>`` and ``half_b.<name>``; perhaps ``group``.

    Raises:
        ValueError: if a column is missing, a prediction is repeated, not finite or for an unknown
            run, or if the measurements in ``predictions`` are not those in ``networks`` (stale
            predictions).
    """

    def __init__(
        self, predictions: pd.DataFrame, networks: pd.DataFrame, config: ScoresConfig
    ) -> None:
        self.config = config
        table = _checked(predictions, networks)
        tested, calibrated = (table[table["part"] == part] for part in ("test", "calibration"))
        order = [
            column.removeprefix("property.")
            for column in networks
            if column.startswith("property.")
        ]
        present = set(tested["property"])
        self.properties = [name for name in order if name in present]
        self.predictors = sorted(set(tested["predictor"]))
        found = set(tested["split"])
        self.splits = [s for s in SPLITS if s in found] + sorted(found - set(SPLITS))
        index = networks.set_index("run")
        self._tables: dict[str, _SplitTable] = {}
        self._calibration: dict[str, _SplitTable] = {}
        for split in self.splits:
            seeds = sorted(set(tested.loc[tested["split"] == split, "seed"]))
            for rows, tables in ((tested, self._tables), (calibrated, self._calibration)):
                own = rows[(rows["split"] == split) & rows["seed"].isin(seeds)]
                tables[split] = _tabulate(own, seeds, index, self.properties, config)
        self._factors: dict[tuple[str, str, str, int], Floats] = {}
        self._weights: dict[tuple[str, str], Counts] = {}
        self._draws: dict[tuple[str, ...], tuple[Floats, int]] = {}

    def families(self, split: str) -> list[str]:
        """Return the families with enough test networks in a split."""
        names, counts = np.unique(self._tables[split].families, return_counts=True)
        return [
            str(n)
            for n, count in zip(names, counts, strict=True)
            if count >= self.config.min_networks
        ]

    def draws(
        self,
        predictor: str,
        split: str,
        property: str,
        subset: str,
        metric: str,
        *,
        common: str = "",
    ) -> tuple[Floats, int]:
        """Return the metric and its resamples, [1 + draws], and the number of networks behind it.

        ``common`` names a predictor: only networks that it predicted too are used.
        """
        key = (predictor, split, property, subset, metric, common)
        if key not in self._draws:
            self._draws[key] = self._compute(*key)
        return self._draws[key]

    def scores(self, advance: Callable[[], object] = lambda: None) -> pd.DataFrame:
        """Return predictor, split, property, subset, metric, value, low, high, n: every score, in
        a stable order. ``advance`` is called when a predictor, or the ceiling, is done on a
        split."""
        rows = []
        for split in self.splits:
            table = self._tables[split]
            subsets = [*SUBSETS, *self.families(split)]
            for predictor in [*(p for p in self.predictors if p in table.values), CEILING]:
                for name in table.values.get(predictor, {}):
                    for subset in subsets:
                        for metric in METRICS:
                            values, n = self.draws(predictor, split, name, subset, metric)
                            if self._worth(subset, n, values):
                                key = {"predictor": predictor, "split": split, "property": name}
                                rows.append(
                                    {
                                        **key,
                                        "subset": subset,
                                        "metric": metric,
                                        **self._row(values, n),
                                    }
                                )
                advance()
        columns = [
            "predictor",
            "split",
            "property",
            "subset",
            "metric",
            "value",
            "low",
            "high",
            "n",
        ]
        return pd.DataFrame(rows, columns=columns)

    def differences(
        self,
        predictors: Iterable[str],
        *,
        rivals: Iterable[str] | None = None,
        subsets: Sequence[str] = SUBSETS,
        measures: Sequence[str] = ("tau",),
    ) -> pd.DataFrame:
        """Return predictor less rival with paired intervals: predictor, rival, split, property,
        subset, metric, value, low, high, n. An interval above 0 says that the predictor is better
        (below 0 for mae)."""
        ours = list(predictors)
        others = [p for p in self.predictors if p not in ours] if rivals is None else list(rivals)
        unknown = sorted({*ours, *others} - set(self.predictors))
        if unknown:
            raise ValueError(
                f"predictors must have predictions ({', '.join(self.predictors)}), however: "
                f"{', '.join(unknown)} has none; run train_predictor for it"
            )
        rows = []
        for split in self.splits:
            known = self._tables[split].values
            pairs = [(a, b) for a in ours for b in others if a != b and a in known and b in known]
            for a, b in pairs:
                for name in (p for p in self.properties if p in known[a] and p in known[b]):
                    for subset in subsets:
                        for metric in measures:
                            values, n = self._difference(a, b, split, name, subset, metric)
                            if self._worth(subset, n, values):
                                key = {
                                    "predictor": a,
                                    "rival": b,
                                    "split": split,
                                    "property": name,
                                }
                                rows.append(
                                    {
                                        **key,
                                        "subset": subset,
                                        "metric": metric,
                                        **self._row(values, n),
                                    }
                                )
        columns = [
            "predictor",
            "rival",
            "split",
            "property",
            "subset",
            "metric",
            "value",
            "low",
            "high",
            "n",
        ]
        return pd.DataFrame(rows, columns=columns)

    def _difference(
        self, a: str, b: str, split: str, name: str, subset: str, metric: str
    ) -> tuple[Floats, int]:
        values = self._tables[split].values
        covered = [np.isfinite(values[p][name][..., 1]) for p in (a, b)]
        if np.array_equal(covered[0], covered[1]):
            (left, n), (right, _) = (self.draws(p, split, name, subset, metric) for p in (a, b))
        else:
            left, n = self.draws(a, split, name, subset, metric, common=b)
            right, _ = self.draws(b, split, name, subset, metric, common=a)
        return left - right, n

    def _worth(self, subset: str, n: int, values: Floats) -> bool:
        """Return whether a score is worth a row: ``all`` always is, others if large enough."""
        enough = n >= (1 if subset == "all" else self.config.min_networks)
        return enough and not bool(np.isnan(values).all())

    def _row(self, values: Floats, n: int) -> dict[str, float | int]:
        low, high = metrics.interval(values[1:], self.config.level)
        return {
            "value": round(float(values[0]), 6),
            "low": round(low, 6),
            "high": round(high, 6),
            "n": n,
        }

    def _compute(
        self, predictor: str, split: str, name: str, subset: str, metric: str, common: str
    ) -> tuple[Floats, int]:
        if subset == "within_family":
            parts = [
                self.draws(predictor, split, name, family, metric, common=common)
                for family in self.families(split)
            ]
            total = sum(n for _, n in parts)
            return _mean([values for values, _ in parts], 1 + self.config.draws), total
        table = self._tables[split]
        members = self._members(split, subset)
        values = table.values[predictor][name][:, members]
        usable = np.asarray(np.isfinite(values[..., :2]).all(axis=-1))
        if metric == "coverage":
            usable &= ~np.isnan(values[..., 2:]).any(axis=-1)
        if common:
            usable &= np.isfinite(table.values[common][name][:, members, 1])
        weights = self._resampled(table, members, split, subset)
        seeds = []
        for seed, (value, mask) in enumerate(zip(values, usable, strict=True)):
            if mask.any():
                measured, predicted, low, high = value[mask].T
                chosen = weights if mask.all() else weights[mask]
                if metric == "coverage":
                    factors = self._recalibrated(predictor, split, name, seed)
                    low, high = recalibration.widened(low, high, factors)
                    seeds.append(metrics.coverage(measured, low, high, chosen))
                else:
                    seeds.append(_FUNCTIONS[metric](measured, predicted, chosen))
        return _mean(seeds, 1 + self.config.draws), int(usable.any(axis=0).sum())

    def _members(self, split: str, subset: str) -> NDArray[np.intp]:
        """Return the rows of a split's table that are in a subset."""
        table = self._tables[split]
        if subset == "all":
            return np.arange(len(table.runs))
        if subset == "above_chance":
            above = table.above_chance
            return np.flatnonzero(above) if above is not None else np.arange(0)
        return np.flatnonzero(table.families == subset)

    def _recalibrated(self, predictor: str, split: str, name: str, seed: int) -> Floats:
        """Return by what each resample of a seed's calibration networks multiplies its intervals,
        [1 + draws]; 1 where these networks are not known."""
        key = predictor, split, name, seed
        if key not in self._factors:
            table = self._calibration[split]
            values = table.values.get(predictor, {}).get(name)
            if values is None:
                return np.ones(1 + self.config.draws)
            weights = self._resampled(table, np.arange(len(table.runs)), split, "calibration")
            measured, low, high = values[seed][:, [0, 2, 3]].T
            self._factors[key] = recalibration.factors(measured, low, high, weights, LEVEL)
        return self._factors[key]

    def _resampled(
        self, table: _SplitTable, members: NDArray[np.intp], split: str, subset: str
    ) -> Counts:
        """Return how often each resample has each of the ``members`` of a table."""
        key = (split, subset)
        if key not in self._weights:
            generator = np.random.default_rng(
                [self.config.seed, zlib.crc32("/".join(key).encode())]
            )
            _, first, group = np.unique(
                table.groups[members], return_index=True, return_inverse=True
            )
            strata = table.strata[members][first]
            drawn = metrics.draw_weights(strata, self.config.draws, generator)
            self._weights[key] = drawn[group.reshape(-1)]
        return self._weights[key]


_FUNCTIONS = {
    "tau": metrics.tau,
    "spearman": metrics.spearman,
    "r2": metrics.r2,
    "mae": metrics.mae,
}


def scores(
    predictions: pd.DataFrame, networks: pd.DataFrame, config: ScoresConfig
) -> pd.DataFrame:
    """Score all predictors: `Evaluation.scores` in one call."""
    return Evaluation(predictions, networks, config).scores()


def summary(
    scores: pd.DataFrame,
    *,
    ours: Sequence[str] = ("weightnet", "weightnet_probe"),
    baselines: Sequence[str] = ("gbm", "stats", "mlp"),
    properties: Sequence[str] = ("test_accuracy", "generalization_gap"),
) -> dict[str, Any]:
    """Return the few figures that `dvc metrics diff` shows: tau of ours and of the best baseline
    by split and property, and the coverage of our intervals. Plain nested dictionaries of
    numbers; what was not scored is absent."""
    result: dict[str, Any] = {}
    rows = scores[(scores["subset"] == "all") & scores["property"].isin(properties)]
    for (split, name), group in rows.groupby(["split", "property"], sort=False):
        taus = group[group["metric"] == "tau"].set_index("predictor")["value"].dropna()
        cell = {
            predictor: round(float(taus[predictor]), 4) for predictor in ours if predictor in taus
        }
        rivals = taus[[b for b in baselines if b in taus]]
        if len(rivals):
            cell["best_baseline"] = round(float(rivals.max()), 4)
        covered = group[group["metric"] == "coverage"].set_index("predictor")["value"]
        cell.update({f"{p}_coverage": round(float(covered[p]), 4) for p in ours if p in covered})
        result.setdefault(str(split), {})[str(name)] = cell
    return result


def _checked(predictions: pd.DataFrame, networks: pd.DataFrame) -> pd.DataFrame:
    missing = [column for column in PREDICTION_COLUMNS if column not in predictions]
    if missing:
        raise ValueError(
            f"predictions must have columns {', '.join(PREDICTION_COLUMNS)}, however: "
            f"{', '.join(missing)} missing; rerun train_predictor"
        )
    table = predictions if "part" in predictions else predictions.assign(part="test")
    table = table[table["part"].isin(("test", "calibration"))]
    if not (table["part"] == "test").any():
        raise ValueError(
            "predictions must have test rows, however: there are none; rerun train_predictor"
        )
    if CEILING in set(table["predictor"]):
        raise ValueError(f"no predictor may be named {CEILING}, however: one is; rename it")
    if networks["run"].duplicated().any():
        raise ValueError(
            "the table of networks must have one row per run, however: a run is repeated; rerun "
            "tokenize_zoo"
        )
    keys = ["predictor", "split", "seed", "run", "property"]
    if table.duplicated(keys).any():
        row = table.loc[table.duplicated(keys), keys].iloc[0].to_dict()
        raise ValueError(
            f"a prediction must occur once, however: {row} is repeated; rerun train_predictor"
        )
    bad = table["measured"].notna() & ~np.isfinite(table["predicted"].to_numpy(dtype=float))
    if bad.any():
        row = table.loc[bad, keys].iloc[0].to_dict()
        raise ValueError(
            f"a prediction must be finite, however: {int(bad.sum())} are not, such as {row}; "
            "leave out the networks that a predictor does not accept"
        )
    unknown = set(table["run"]) - set(networks["run"])
    if unknown:
        raise ValueError(
            f"predictions must be of the zoo's runs, however: run={min(unknown)} is not; rerun "
            "train_predictor"
        )
    measured = networks.set_index("run")
    for name, group in table.groupby("property"):
        column = f"property.{name}"
        if column not in measured:
            raise ValueError(
                f"property {name} must be measured in the zoo, however: {column} is missing; "
                "rerun tokenize_zoo"
            )
        truth = measured.loc[group["run"], column].to_numpy(dtype=float)
        if not np.allclose(
            truth, group["measured"].to_numpy(dtype=float), rtol=1e-6, atol=1e-9, equal_nan=True
        ):
            raise ValueError(
                f"measurements in predictions must be the zoo's, however: {name} differs; the "
                "predictions are stale, rerun train_predictor"
            )
    return table


def _tabulate(
    table: pd.DataFrame,
    seeds: Sequence[int],
    networks: pd.DataFrame,
    properties: Sequence[str],
    config: ScoresConfig,
) -> _SplitTable:
    """Arrange the predictions of one part of a split in arrays, and add the ceiling on the same
    networks."""
    runs = pd.Index(sorted(set(table["run"])))
    row = runs.get_indexer(table["run"])
    seed = pd.Index(seeds).get_indexer(table["seed"])
    values: dict[str, dict[str, Floats]] = {}
    tested = np.zeros((len(seeds), len(runs)), dtype=bool)
    tested[seed, row] = True
    numbers = table[list(_VALUES)].to_numpy(dtype=np.float64)
    for (predictor, name), at in table.groupby(["predictor", "property"]).indices.items():
        array = np.full((len(seeds), len(runs), len(_VALUES)), np.nan)
        array[seed[at], row[at]] = numbers[at]
        values.setdefault(predictor, {})[name] = array
    values = {
        p: {name: named[name] for name in properties if name in named}
        for p, named in values.items()
    }
    own = networks.loc[runs]
    for name in properties:
        if f"half_a.{name}" in own and f"half_b.{name}" in own:
            array = np.full((len(seeds), len(runs), len(_VALUES)), np.nan)
            array[..., 0] = np.where(
                tested, own[f"half_a.{name}"].to_numpy(dtype=np.float64), np.nan
            )
            array[..., 1] = np.where(
                tested, own[f"half_b.{name}"].to_numpy(dtype=np.float64), np.nan
            )
            values.setdefault(CEILING, {})[name] = array
    above = None
    if "property.test_accuracy" in own:
        accuracy = own["property.test_accuracy"].to_numpy(dtype=np.float64)
        above = accuracy > 1.0 / config.classes + config.chance_margin
    _, strata = np.unique(tested, axis=1, return_inverse=True)
    families = own["family"].to_numpy(dtype=str)
    group = pd.factorize(groups(own.reset_index()))[0]
    return _SplitTable(runs, families, above, strata.reshape(-1), group, values)


def _mean(parts: Sequence[Floats], length: int) -> Floats:
    """Return the mean of the defined values, [K, length] -> [length]; NaN where none is."""
    if not parts:
        return np.full(length, np.nan)
    stacked = np.stack(parts)
    defined = np.isfinite(stacked)
    count = defined.sum(axis=0)
    return np.where(
        count > 0, np.where(defined, stacked, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan
    )
