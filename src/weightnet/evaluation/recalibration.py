"""What another draw of calibration networks would have made of conformal intervals.

The share of test networks that an interval covers varies with the test networks and with the
networks that calibrated it: n of them leave the coverage of every later network with a standard
deviation of about sqrt(0.9 * 0.1 / n), 3 points for a hundred (Vovk 2012,
https://arxiv.org/abs/1209.2673, proposition 2a). Test networks alone never show that part, so that
the bootstrap of the coverage resamples both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from weightnet.evaluation import metrics
from weightnet.evaluation.metrics import Floats
from weightnet.evaluation.splits import groups


@dataclass(frozen=True)
class Recalibration:
    """The calibration networks of one split, resampled: R runs, S seeds, 1 + draws columns.

    Attributes:
        weights: how often each draw has each run [R, 1 + draws]; the first column is all ones.
        errors: for a predictor and a property, each run's error in half-widths of its interval,
            [S, R], NaN where it did not calibrate.
    """

    weights: metrics.Counts
    errors: dict[tuple[str, str], Floats]

    @classmethod
    def of(
        cls,
        table: pd.DataFrame,
        networks: pd.DataFrame,
        seeds: Sequence[int],
        draws: int,
        generator: np.random.Generator,
    ) -> Recalibration:
        """Resample the validation rows ``table`` of one split.

        Runs of one ``group`` are drawn together, and within the set of seeds that they calibrate,
        as test runs are. ``networks`` has the runs as its index.
        """
        runs = pd.Index(sorted(set(table["run"])))
        row, seed = runs.get_indexer(table["run"]), pd.Index(seeds).get_indexer(table["seed"])
        used = np.zeros((len(seeds), len(runs)), dtype=bool)
        used[seed, row] = True
        measured, low, high = table[["measured", "low", "high"]].to_numpy(dtype=np.float64).T
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.abs(2 * measured - low - high) / (high - low)
        errors = {}
        for key, at in table.groupby(["predictor", "property"]).indices.items():
            array = np.full((len(seeds), len(runs)), np.nan)
            array[seed[at], row[at]] = error[at]
            errors[key] = array
        _, strata = np.unique(used, axis=1, return_inverse=True)
        _, first, group = np.unique(
            groups(networks.loc[runs].reset_index()), return_index=True, return_inverse=True
        )
        drawn = metrics.draw_weights(strata.reshape(-1)[first], draws, generator)
        return cls(drawn[group.reshape(-1)], errors)

    def factors(self, predictor: str, name: str, seed: int, level: float) -> Floats:
        """By what each draw would multiply the half-widths of a seed's intervals, [1 + draws].

        1 where that cannot be told: a predictor without calibration rows, or infinite intervals.
        """
        factors = np.ones(self.weights.shape[1])
        known = self.errors.get((predictor, name))
        if known is None or not (usable := np.isfinite(known[seed])).any():
            return factors
        order = np.flatnonzero(usable)[np.argsort(known[seed, usable], kind="stable")]
        seen = np.cumsum(self.weights[order], axis=0, dtype=np.float64)
        ranks = np.ceil(np.round((seen[-1] + 1) * level, 9))
        first = (seen < ranks).sum(axis=0)
        reached = np.append(known[seed, order], np.inf)[first]
        factors[1:] = reached[1:]
        return factors
