"""Tables and report: numbers as they are, losses in plain words, nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
import pytest

from weightnet.report.captions import CAPTIONS
from weightnet.report.evidence import Evidence, Picture, lead
from weightnet.report.names import PROPERTIES, PredictorInfo, arrange, read_predictors
from weightnet.report.tables import (
    headline_table,
    inject,
    number,
    score_table,
    verdict,
    with_interval,
)
from weightnet.report.text import write_report

Results = Any  # of conftest


@pytest.fixture
def evidence(results: Results) -> Evidence:
    pictures = [Picture(kind, f"../plots/{kind}.png", predictor="weightnet") for kind in CAPTIONS]
    return Evidence(
        results.networks,
        results.scores,
        results.predictors,
        results.differences,
        results.sizes,
        results.audit,
        pictures,
        {"Notes": "None were made."},
        results.agreement,
        make_ablations("0123456789ab"),
    )


def make_ablations(split_hash: str) -> pd.DataFrame:
    row = {"group": "parts", "predictor": "weightnet", "base": "weightnet", "split": "iid"}
    row |= {"property": "test_accuracy", "metric": "tau", "value": 0.5, "low": 0.4, "high": 0.6}
    row |= {"n": 30, "hash": " ".join([split_hash] * 3)}
    lead = {"difference": -0.1, "difference_low": -0.2, "difference_high": -0.05}
    return pd.DataFrame(
        [
            {**row, "ablation": "base", "changes": ""},
            {**row, **lead, "ablation": "no-messages", "changes": "messages=false"},
        ]
    )


def test_numbers() -> None:
    assert [number(v) for v in (0.8124, -0.05, 1.0, 0.0, -0.0001)] == [
        ".812",
        "\N{MINUS SIGN}.050",
        "1.000",
        ".000",
        ".000",
    ]
    assert number(float("nan")) == "-"
    assert with_interval(0.5, 0.4, 0.6) == ".500 [.400, .600]"
    assert with_interval(0.5, float("nan"), 0.6) == ".500"
    assert [verdict(0.1, 0.2), verdict(-0.2, -0.1), verdict(-0.1, 0.1)] == ["better", "worse", ""]


def test_the_best_contender_is_bold_and_marks_are_explained(results: Results) -> None:
    table = headline_table(results.scores, results.predictors)
    lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if "|" in line}
    assert lines["weightnet_probe ‡"].count("**") == 8
    assert all("**" not in line for name, line in lines.items() if name != "weightnet_probe ‡")
    assert "mean †" in lines and "† not from weights" in table
    assert len({line.count("|") for line in lines.values()}) == 1


def test_smaller_errors_are_better(results: Results) -> None:
    table = score_table(results.scores, results.predictors, metric="mae", property="test_loss")
    assert "**" in next(
        line for line in table.splitlines() if line.startswith("| weightnet_probe")
    )
    assert score_table(results.scores.iloc[:0], results.predictors) == "Nothing was scored here."


def test_inject_replaces_what_is_between_the_markers() -> None:
    text = "a\n<!-- headline:start -->\nold\n<!-- headline:end -->\nb"
    once = inject(text, "| new |")
    assert once == "a\n<!-- headline:start -->\n| new |\n<!-- headline:end -->\nb"
    assert inject(once, "| new |") == once
    for wrong in ("nothing", text + text, "<!-- headline:end --><!-- headline:start -->"):
        with pytest.raises(ValueError, match="once each"):
            inject(wrong, "t")


def test_predictors_from_a_table(results: Results) -> None:
    table = pd.DataFrame([dataclasses.asdict(one) for one in results.predictors])
    assert read_predictors(table) == list(results.predictors)
    with pytest.raises(ValueError, match="kind='hero'"):
        read_predictors(table.assign(kind="hero"))
    names = [
        one.name for one in arrange(["ceiling", "mean", "new", "weightnet"], results.predictors)
    ]
    assert names == ["weightnet", "new", "mean", "ceiling"]


def test_the_report_shows_every_figure_and_property(evidence: Evidence) -> None:
    report = write_report(evidence)
    for kind in CAPTIONS:
        assert report.count(f"(../plots/{kind}.png)") == 1
    for name in PROPERTIES.values():
        assert name.title in report
    assert "None were made." in report and report.index("Notes") < report.index("reproduce")
    assert "| no-messages | weightnet | `messages=false` | .500 [.400, .600] |" in report
    assert "a randomized model gives another map" in report
    assert "nan" not in report.replace("finance", "") and report.endswith("\n")
    assert write_report(evidence) == report


def test_a_lead_is_that_over_the_best_rival(evidence: Evidence) -> None:
    found = lead(evidence, "weightnet", "iid", "test_accuracy")
    assert found is not None
    table = evidence.scores
    table = table[(table["split"] == "iid") & (table["property"] == "test_accuracy")]
    table = table[(table["subset"] == "all") & (table["metric"] == "tau")]
    tau = table.set_index("predictor")["value"]
    rivals = tau[["mlp", "gbm", "mean", "hyperparameters"]]
    assert found[0] == rivals.idxmax()
    assert found[1] == pytest.approx(tau["weightnet"] - rivals.max(), abs=2e-6)


def test_the_report_says_where_it_loses(evidence: Evidence, results: Results) -> None:
    swap = {"mlp": "ours", "weightnet": "baseline", "weightnet_probe": "baseline"}
    predictors = [
        dataclasses.replace(one, kind=swap.get(one.name, one.kind)) for one in results.predictors
    ]
    table = evidence.differences
    assert table is not None
    turned = table[table["rival"] == "mlp"].copy()
    turned = turned.rename(columns={"predictor": "rival", "rival": "predictor"})
    low, high = -turned["high"], -turned["low"]
    turned = turned.assign(value=-turned["value"], low=low, high=high)
    losing = dataclasses.replace(evidence, predictors=predictors, differences=turned)
    report = write_report(losing)
    assert "**worse** than the strongest rival, `weightnet_probe`" in report
    assert "is better in 0, worse in 28" in report and "It **loses** on" in report
    undecided = turned.assign(low=-0.1, high=0.1)
    report = write_report(dataclasses.replace(losing, differences=undecided))
    assert "cannot be told apart" in report and "No difference can be shown on" in report


def test_a_report_from_little(evidence: Evidence) -> None:
    """A tiny zoo: no tau, no intervals, no audit, predictors that nobody described."""
    keep = evidence.scores["metric"] == "mae"
    bare = Evidence(evidence.networks, evidence.scores[keep], [])
    assert "## The zoo" in write_report(bare)
    ours = [PredictorInfo("weightnet", "ours")]
    assert "Invariance" not in write_report(dataclasses.replace(evidence, audit=None))
    assert "weightnet" in write_report(Evidence(evidence.networks, evidence.scores[keep], ours))
    with pytest.raises(ValueError, match="needs scores"):
        write_report(dataclasses.replace(evidence, scores=evidence.scores.iloc[:0]))


def test_ablations_of_another_split_are_refused(evidence: Evidence) -> None:
    other = dataclasses.replace(evidence, ablations=make_ablations("ffffffffffff"))
    report = write_report(other)
    assert "**Refused:** 2 rows" in report and "no-messages" not in report


def test_ablations_of_an_earlier_training_are_told(evidence: Evidence) -> None:
    told = "`weightnet` .500 then"
    assert told in write_report(evidence)
    table = make_ablations("0123456789ab")
    scores = evidence.scores.set_index(["predictor", "split", "property", "subset", "metric"])
    now = scores.loc[("weightnet", "iid", "test_accuracy", "all", "tau"), "value"]
    same = dataclasses.replace(evidence, ablations=table.assign(value=float(now)))
    assert told not in write_report(same)
    assert "earlier run" not in write_report(same)
