"""Trees read by NumPy predict what LightGBM predicts."""

from __future__ import annotations

import lightgbm
import numpy as np
import pytest

from weightnet.predictors.forest import Forest


@pytest.mark.parametrize("settings", [{}, {"use_missing": False}, {"zero_as_missing": True}])
@pytest.mark.parametrize("rounds", [1, 60])
def test_predictions_are_lightgbm_s(settings: dict[str, bool], rounds: int) -> None:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 7))
    rows[generator.random(rows.shape) < 0.1] = np.nan
    rows[generator.random(rows.shape) < 0.1] = 0.0
    rows[generator.random(rows.shape) < 0.05] = 1e-36
    targets = np.nansum(rows[:, :3] ** 2, axis=1) + generator.normal(size=400)
    data = lightgbm.Dataset(rows, targets)
    fixed = {"verbosity": -1, "num_threads": 1, "min_data_in_leaf": 3, **settings}
    model = lightgbm.train(fixed, data, rounds)
    forest = Forest(model.model_to_string())
    expected = model.predict(rows, num_threads=1)
    assert forest.predict(rows).tobytes() == expected.tobytes()
    assert Forest(forest.text).predict(rows[:1]).tobytes() == expected[:1].tobytes()


def test_a_single_leaf_and_other_models() -> None:
    rows = np.arange(6.0)[:, None]
    stump = lightgbm.train({"verbosity": -1}, lightgbm.Dataset(rows, rows[:, 0]), 2)
    np.testing.assert_array_equal(
        Forest(stump.model_to_string()).predict(rows), stump.predict(rows)
    )
    with pytest.raises(ValueError, match="plain regression"):
        Forest(stump.model_to_string().replace("=regression", "=poisson"))
