"""Split-conformal intervals: the rank by hand, and coverage on data of unequal spread."""

from __future__ import annotations

import numpy as np
import pytest

from weightnet.predictors.calibration import conformal_factors


def test_takes_the_finite_sample_rank() -> None:
    measured = np.arange(1.0, 20.0)[:, None]  # n = 19: k = ceil(20 * 0.9) = 18
    zeros, ones = np.zeros_like(measured), np.ones_like(measured)
    assert conformal_factors(measured, zeros, ones).tolist() == [18.0]
    assert conformal_factors(measured, zeros, 2 * ones).tolist() == [9.0]


@pytest.mark.parametrize(("known", "finite"), [(8, False), (9, True), (0, False)])
def test_needs_nine_networks_for_ninety_percent(known: int, finite: bool) -> None:
    measured = np.full((12, 1), np.nan)
    measured[:known] = 1.0
    factors = conformal_factors(measured, np.zeros((12, 1)), np.ones((12, 1)))
    assert np.isfinite(factors).all() == finite


def test_covers_at_the_level() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(200):
        spread = rng.uniform(0.1, 5, size=(300, 2))
        noise = rng.standard_t(3, size=(300, 2)) * spread
        factors = conformal_factors(noise[:100], np.zeros((100, 2)), spread[:100])
        inside.append(np.abs(noise[100:]) <= factors * spread[100:])
    assert abs(np.mean(inside) - 0.9) < 0.01


def test_rejects_an_impossible_level() -> None:
    with pytest.raises(ValueError, match="level=1"):
        conformal_factors(np.ones((1, 1)), np.ones((1, 1)), np.ones((1, 1)), level=1)
