"""Score tables: seeds are averaged, runs are resampled, differences are paired, bad tables
refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from weightnet.evaluation import metrics
from weightnet.evaluation.scores import CEILING, Evaluation, ScoresConfig, scores, summary

CONFIG = ScoresConfig(draws=200)


def networks(count: int = 120) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    accuracy = generator.uniform(0.05, 0.95, count)
    frame = pd.DataFrame(
        {
            "run": [f"{i:016x}" for i in range(count)],
            "family": generator.choice(["cnn", "vgg11"], count, p=[0.7, 0.3]),
            "property.test_accuracy": accuracy,
            "property.test_loss": np.where(accuracy < 0.1, np.nan, 2 - 2 * accuracy),
        }
    )
    for half in ("half_a", "half_b"):
        noise = generator.normal(size=(2, count)) * 0.05
        frame[f"{half}.test_accuracy"] = accuracy + noise[0]
        frame[f"{half}.test_loss"] = frame["property.test_loss"] + noise[1]
    return frame


def predict(frame: pd.DataFrame) -> pd.DataFrame:
    """Predictions of two predictors and a constant: iid with disjoint tests, and unseen_task."""
    generator = np.random.default_rng(1)
    rows = []
    for predictor, noise in (("weightnet", 0.1), ("gbm", 0.2), ("mean", None)):
        for split in ("unseen_task", "iid"):
            for seed in range(3):
                part = (
                    frame.iloc[seed * 30 : seed * 30 + 30] if split == "iid" else frame.iloc[:50]
                )
                for name in ("test_loss", "test_accuracy"):
                    measured = part[f"property.{name}"].to_numpy()
                    predicted = np.nan_to_num(measured)
                    predicted = predicted + generator.normal(size=len(part)) * (noise or 0)
                    predicted = predicted if noise else np.full(len(part), 0.5)
                    rows.append(
                        pd.DataFrame(
                            {
                                "predictor": predictor,
                                "split": split,
                                "seed": seed,
                                "run": part["run"],
                                "part": "test",
                                "property": name,
                                "measured": measured,
                                "predicted": predicted,
                                "low": predicted - 0.15,
                                "high": predicted + 0.15,
                            }
                        )
                    )
    return pd.concat(rows, ignore_index=True)


def find(table: pd.DataFrame, **keys: str) -> pd.Series:
    for column, value in keys.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


@pytest.fixture(scope="module")
def zoo() -> pd.DataFrame:
    return networks()


@pytest.fixture(scope="module")
def predictions(zoo: pd.DataFrame) -> pd.DataFrame:
    return predict(zoo)


@pytest.fixture(scope="module")
def table(zoo: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    return scores(predictions, zoo, CONFIG)


@pytest.mark.parametrize("split", ["iid", "unseen_task"])
@pytest.mark.parametrize("name", ["test_accuracy", "test_loss"])
def test_tau_is_the_mean_over_seeds_of_scipys(
    table: pd.DataFrame, predictions: pd.DataFrame, split: str, name: str
) -> None:
    rows = predictions[predictions["measured"].notna()]
    rows = rows[
        (rows["predictor"] == "gbm") & (rows["split"] == split) & (rows["property"] == name)
    ]
    taus = [kendalltau(g["measured"], g["predicted"]).statistic for _, g in rows.groupby("seed")]
    key = {"predictor": "gbm", "split": split, "property": name, "subset": "all"}
    found = find(table, **key, metric="tau")
    assert found["value"] == pytest.approx(np.mean(taus), abs=1e-6)
    assert found["low"] < found["value"] < found["high"]
    assert found["n"] == rows["run"].nunique()


def test_within_family_is_the_mean_of_the_families(table: pd.DataFrame) -> None:
    key = {"predictor": "gbm", "split": "iid", "property": "test_accuracy", "metric": "tau"}
    each = [find(table, **key, subset=family)["value"] for family in ("cnn", "vgg11")]
    assert find(table, **key, subset="within_family")["value"] == pytest.approx(
        np.mean(each), 1e-5
    )


def test_above_chance_leaves_out_collapsed_networks(
    table: pd.DataFrame, zoo: pd.DataFrame
) -> None:
    key = {"predictor": "gbm", "split": "iid", "property": "test_accuracy", "metric": "tau"}
    above = (zoo["property.test_accuracy"].iloc[:90] > 0.15).sum()
    assert find(table, **key, subset="above_chance")["n"] == above
    assert find(table, **key, subset="all")["n"] == 90


def test_a_constant_has_tau_zero_and_the_ceiling_is_high(table: pd.DataFrame) -> None:
    key = {"split": "iid", "property": "test_accuracy", "subset": "all", "metric": "tau"}
    constant = find(table, predictor="mean", **key)
    assert (constant["value"], constant["low"], constant["high"]) == (0.0, 0.0, 0.0)
    assert find(table, predictor=CEILING, **key)["value"] > 0.8
    assert table.loc[table["predictor"] == CEILING, "metric"].ne("coverage").all()


def test_tables_do_not_depend_on_the_order_of_rows(
    zoo: pd.DataFrame, predictions: pd.DataFrame, table: pd.DataFrame
) -> None:
    again = scores(predictions.sample(frac=1.0, random_state=3), zoo, CONFIG)
    pd.testing.assert_frame_equal(table, again)


def test_resamples_draw_runs_not_rows(zoo: pd.DataFrame, predictions: pd.DataFrame) -> None:
    """Repeating the same predictions for three seeds is no more evidence than one seed."""
    one = predictions[(predictions["split"] == "unseen_task") & (predictions["seed"] == 0)]
    three = pd.concat([one.assign(seed=s) for s in range(3)])
    pd.testing.assert_frame_equal(scores(one, zoo, CONFIG), scores(three, zoo, CONFIG))


def test_differences_are_paired(zoo: pd.DataFrame, predictions: pd.DataFrame) -> None:
    evaluation = Evaluation(predictions, zoo, CONFIG)
    found = evaluation.differences(["weightnet"])
    assert set(found["rival"]) == {"gbm", "mean"}
    key = {"split": "iid", "property": "test_accuracy", "subset": "all", "metric": "tau"}
    row = find(found, rival="gbm", **key)
    own, rival = (
        evaluation.draws(p, "iid", "test_accuracy", "all", "tau")[0] for p in ("weightnet", "gbm")
    )
    assert row["value"] == pytest.approx(own[0] - rival[0], abs=1e-6)
    assert (row["low"], row["high"]) == pytest.approx(
        metrics.interval((own - rival)[1:]), abs=1e-6
    )
    same = evaluation.differences(["gbm"], rivals=["gbm", "mean"])
    assert set(same["rival"]) == {"mean"}
    with pytest.raises(ValueError, match="nobody"):
        evaluation.differences(["nobody"])


def test_a_predictor_that_covers_fewer_networks_is_compared_on_those(
    zoo: pd.DataFrame, predictions: pd.DataFrame
) -> None:
    cnn = set(zoo.loc[zoo["family"] == "cnn", "run"])
    fewer = predictions[(predictions["predictor"] != "gbm") | predictions["run"].isin(cnn)]
    evaluation = Evaluation(fewer, zoo, CONFIG)
    row = find(
        evaluation.differences(["weightnet"], rivals=["gbm"], subsets=["all"]),
        split="iid",
        property="test_accuracy",
    )
    whole = Evaluation(fewer[fewer["run"].isin(cnn)], zoo, CONFIG)
    own, rival = (
        whole.draws(p, "iid", "test_accuracy", "all", "tau")[0] for p in ("weightnet", "gbm")
    )
    assert row["n"] == len(cnn & set(zoo["run"].iloc[:90]))
    assert row["value"] == pytest.approx(own[0] - rival[0], abs=1e-6)


def test_summary_holds_few_plain_numbers(table: pd.DataFrame) -> None:
    found = summary(table, baselines=["gbm"])
    cell = found["iid"]["test_accuracy"]
    assert cell["weightnet"] > cell["best_baseline"] > 0.5
    assert 0.5 < cell["weightnet_coverage"] <= 1.0
    assert "mean" not in cell and json.loads(json.dumps(found)) == found


def test_bad_tables_are_refused(zoo: pd.DataFrame, predictions: pd.DataFrame) -> None:
    def refuses(message: str, table: pd.DataFrame, frame: pd.DataFrame = zoo) -> None:
        with pytest.raises(ValueError, match=message):
            Evaluation(table, frame, CONFIG)

    refuses("low missing", predictions.drop(columns="low"))
    refuses("is repeated", pd.concat([predictions, predictions.iloc[:1]]))
    refuses("must be finite", predictions.assign(predicted=np.nan))
    refuses("stale", predictions, zoo.assign(**{"property.test_accuracy": 0.5}))
    refuses("zoo's runs", predictions, zoo.iloc[10:])
    refuses("there are none", predictions.assign(part="calibration"))
    refuses("may be named", predictions.assign(predictor=CEILING))


def test_checkpoints_of_a_run_are_resampled_together(zoo: pd.DataFrame) -> None:
    def copies(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.concat([frame.assign(run=frame["run"] + f"/{i}") for i in range(4)])

    predictions = predict(zoo)
    one = find(scores(predictions, zoo, CONFIG), **KEY)
    grouped = copies(zoo)
    grouped["group"] = [run.split("/")[0] for run in grouped["run"]]
    many = find(scores(copies(predictions), grouped, CONFIG), **KEY)
    assert many["n"] == 4 * one["n"]
    assert many["high"] - many["low"] == pytest.approx(one["high"] - one["low"], rel=0.3)
    careless = find(scores(copies(predictions), copies(zoo), CONFIG), **KEY)
    assert careless["high"] - careless["low"] < 0.7 * (one["high"] - one["low"])


KEY = {
    "predictor": "gbm",
    "split": "iid",
    "property": "test_accuracy",
    "subset": "all",
    "metric": "mae",
}


def test_the_interval_of_coverage_knows_calibration_and_test_networks() -> None:
    calibration, tested = 100, 300
    generator = np.random.default_rng(5)
    measured = generator.normal(size=calibration + tested)
    frame = pd.DataFrame(
        {
            "run": [f"{i:016x}" for i in range(len(measured))],
            "family": "cnn",
            "property.test_loss": measured,
        }
    )
    reach = np.sort(np.abs(measured[:calibration]))[round(0.9 * (calibration + 1)) - 1]
    predicted = frame.assign(
        predictor="mean",
        split="iid",
        seed=0,
        part=np.where(np.arange(len(frame)) < calibration, "calibration", "test"),
        property="test_loss",
        measured=measured,
        predicted=0.0,
        low=-reach,
        high=reach,
    )

    def drawn(table: pd.DataFrame) -> np.ndarray:
        config = ScoresConfig(draws=1000)
        return Evaluation(table, frame, config).draws(
            "mean", "iid", "test_loss", "all", "coverage"
        )[0]

    both, alone = drawn(predicted), drawn(predicted[predicted["part"] == "test"])
    assert both[0] == alone[0] == np.mean(np.abs(measured[calibration:]) <= reach)
    for values, variance in ((both, 0.09 / calibration + 0.09 / tested), (alone, 0.09 / tested)):
        assert np.std(values[1:]) == pytest.approx(variance**0.5, rel=0.3)
    endless = predicted.assign(low=-np.inf, high=np.inf)
    np.testing.assert_array_equal(drawn(endless), 1.0)
