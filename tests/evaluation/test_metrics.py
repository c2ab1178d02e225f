"""Weighted metrics equal the plain ones on repeated rows; intervals cover; degenerate input is
defined."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import r2_score

from weightnet.evaluation import metrics

ONE = np.ones((5, 1), dtype=np.float32)


def sample(
    count: int, ties: bool, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    measured = generator.normal(size=count)
    predicted = measured + generator.normal(size=count)
    return (measured.round(1), predicted.round(1)) if ties else (measured, predicted)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [7, 60])
def test_every_resample_equals_the_plain_metric_on_repeated_rows(count: int, ties: bool) -> None:
    measured, predicted = sample(count, ties)
    weights = metrics.draw_weights(np.zeros(count), 25, np.random.default_rng(1))
    low, high = predicted - 1.05, predicted + 1.05
    found = {
        "tau": metrics.tau(measured, predicted, weights),
        "spearman": metrics.spearman(measured, predicted, weights),
        "r2": metrics.r2(measured, predicted, weights),
        "mae": metrics.mae(measured, predicted, weights),
        "coverage": metrics.coverage(measured, low, high, weights),
    }
    for column in range(weights.shape[1]):
        rows = np.repeat(np.arange(count), weights[:, column].astype(int))
        x, y = measured[rows], predicted[rows]
        plain = {
            "tau": kendalltau(x, y).statistic,
            "spearman": spearmanr(x, y).statistic,
            "r2": r2_score(x, y),
            "mae": np.abs(x - y).mean(),
            "coverage": np.mean(np.abs(x - y) <= 1.05),
        }
        for name, value in plain.items():
            assert found[name][column] == pytest.approx(value, abs=1e-9), (name, column)


def test_values_by_hand() -> None:
    measured, predicted = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 4.0, 4.0]
    # 10 pairs: 8 concordant, 1 discordant, 1 tied in the prediction
    assert metrics.tau(measured, predicted, ONE)[0] == pytest.approx(7 / np.sqrt(10 * 9))
    assert metrics.r2(measured, predicted, ONE)[0] == pytest.approx(1 - 3 / 10)
    assert metrics.mae(measured, predicted, ONE)[0] == pytest.approx(3 / 5)
    low, high = np.array(predicted) - 0.5, np.array(predicted) + 0.5
    assert metrics.coverage(measured, low, high, ONE)[0] == pytest.approx(2 / 5)


def test_constants() -> None:
    varied, constant = np.arange(5.0), np.full(5, 0.3)
    for rank in (metrics.tau, metrics.spearman):
        assert rank(varied, constant, ONE)[0] == 0.0
        assert np.isnan(rank(constant, varied, ONE)[0])
    assert np.isnan(metrics.r2(constant, varied, ONE)[0])
    assert metrics.r2(varied, np.full(5, 2.0), ONE)[0] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="must be finite"):
        metrics.tau(varied, np.full(5, np.nan), ONE)


def test_linearized_resamples_of_large_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, predicted = sample(800, ties=True)
    weights = metrics.draw_weights(np.zeros(800), 200, np.random.default_rng(2))
    exact = metrics.tau(measured, predicted, weights)
    monkeypatch.setattr(metrics, "EXACT_PAIRS", 100)
    quick = metrics.tau(measured, predicted, weights)
    assert quick[0] == exact[0]
    assert np.abs(quick - exact).max() < 0.01
    assert metrics.interval(quick[1:]) == pytest.approx(metrics.interval(exact[1:]), abs=0.003)


def test_strata_keep_their_size() -> None:
    strata = np.repeat([0, 1, 2], [3, 10, 20])
    weights = metrics.draw_weights(strata, 40, np.random.default_rng(0))
    assert weights.shape == (33, 41) and (weights[:, 0] == 1).all()
    for code, size in enumerate([3, 10, 20]):
        assert (weights[strata == code].sum(axis=0) == size).all()


def test_intervals_cover_the_true_tau() -> None:
    """A 95% interval from 60 networks holds the population's tau in about 95 of 100 samples."""
    rho = 0.8
    truth = 2 / np.pi * np.arcsin(rho)  # Kendall's tau of a bivariate normal
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        measured = generator.normal(size=60)
        predicted = rho * measured + np.sqrt(1 - rho**2) * generator.normal(size=60)
        weights = metrics.draw_weights(np.zeros(60), 300, generator)
        low, high = metrics.interval(metrics.tau(measured, predicted, weights)[1:])
        hits += low <= truth <= high
    assert 88 <= hits <= 100


def test_interval_of_mostly_degenerate_resamples_is_undefined() -> None:
    assert np.isnan(metrics.interval(np.array([np.nan, np.nan, 0.5]))).all()
    assert metrics.interval(np.linspace(0, 1, 101), 0.9) == pytest.approx((0.05, 0.95))
