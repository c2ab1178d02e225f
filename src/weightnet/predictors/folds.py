"""Parts of the training networks, each of which one member of an ensemble never sees.

What a member estimates for its own part is an estimate of new networks, so that all training
networks calibrate the intervals (cross-conformal prediction, Vovk 2015,
https://arxiv.org/abs/1208.0806; CV+, Barber et al. 2021, https://arxiv.org/abs/1905.02928), not
only the few validation networks that stopped the training.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from weightnet.predictors.scaling import Array
from weightnet.randomness import numpy_generator

Fold = NDArray[np.bool_]
"""Which of the training networks a member is fitted without [B]."""


def groups(frame: pd.DataFrame) -> pd.Series:
    """Return what must not be divided: the column ``group`` (the training run that several
    checkpoints, each with a ``run`` of its own, came from) where there is one, else ``run``."""
    return frame["group"].fillna(frame["run"]) if "group" in frame else frame["run"]


def cut_folds(frame: pd.DataFrame, targets: Array, count: int, *, seed: int) -> list[Fold]:
    """Say what each member of an ensemble is fitted without: the first without nothing, and, if
    ``count`` is above 1, one without each of ``count`` parts of nearly equal size, at random, of
    the networks of ``frame`` [B rows], with ``targets`` [B, P], NaN where missing.

    There is the first only where networks are so few that some property would be measured on none
    of those that a member is fitted on.
    """
    names, group = np.unique(groups(frame).to_numpy(dtype=str), return_inverse=True)
    count = min(count, len(names))
    part = numpy_generator(seed, "folds").permutation(len(names))[group] % count
    folds = [part == member for member in range(count)]
    known = np.isfinite(targets)
    nothing = np.zeros(len(frame), dtype=bool)
    if count == 1 or not all(known[~fold].any(axis=0).all() for fold in folds):
        return [nothing]
    return [nothing, *folds]
