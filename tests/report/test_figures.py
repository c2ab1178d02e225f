"""Figures: each draws from small tables, gaps included, and is written byte for byte the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from weightnet.report import figures

Results = Any  # of conftest

DRAW: dict[str, Callable[[Results], Figure]] = {
    "tau": lambda r: figures.tau_with_intervals(r.scores, r.predictors),
    "heatmap": lambda r: figures.heatmap(r.scores, r.predictors),
    "heatmap_properties": lambda r: figures.heatmap(r.scores, r.predictors, columns="property"),
    "heatmap_mae": lambda r: figures.heatmap(r.scores, r.predictors, metric="mae"),
    "predicted": lambda r: figures.predicted_against_measured(
        r.predictions, r.networks, predictor="weightnet", split="unseen_width", scores=r.scores
    ),
    "curves": lambda r: figures.training_curves(r.curves),
    "zoo": lambda r: figures.zoo_distributions(r.networks),
    "importance": lambda r: figures.importance(
        r.importance, r.agreement, property="test_accuracy"
    ),
    "errors": lambda r: figures.error_by_family(r.predictions, r.networks, r.predictors),
    "ceilings": lambda r: figures.ceilings(r.networks, r.scores),
    "invariance": lambda r: figures.invariance(r.audit, r.predictors),
}


@pytest.mark.parametrize("name", DRAW)
def test_every_figure_is_drawn_and_written_the_same_twice(
    name: str, results: Results, tmp_path: Path
) -> None:
    for attempt in ("a", "b"):
        figures.save(DRAW[name](results), tmp_path / attempt / f"{name}.png")
    first, second = ((tmp_path / a / f"{name}.png").read_bytes() for a in ("a", "b"))
    assert first == second and first.startswith(b"\x89PNG")
    assert b"Software" not in first and b"tIME" not in first
    assert [path.name for path in (tmp_path / "a").iterdir()] == [f"{name}.png"]


def test_every_panel_that_has_data_has_labels(results: Results) -> None:
    for name in ("predicted", "curves", "importance", "ceilings"):
        for axes in DRAW[name](results).axes:
            if axes.axison:
                assert axes.get_xlabel(), name


@pytest.mark.parametrize("name", DRAW)
def test_empty_tables_give_a_figure_that_says_so(name: str, results: Results) -> None:
    fields = [f.name for f in dataclasses.fields(results) if f.name != "predictors"]
    empty = dataclasses.replace(results, **{f: getattr(results, f).iloc[:0] for f in fields})
    figure = DRAW[name](empty)
    assert any("no " in text.get_text() for axes in figure.axes for text in axes.texts)


def test_missing_values_leave_gaps(results: Results, tmp_path: Path) -> None:
    scores = results.scores.copy()
    scores.loc[scores["predictor"] == "gbm", ["value", "low", "high"]] = np.nan
    scores = scores[(scores["predictor"] != "mlp") | (scores["split"] == "iid")]
    networks = results.networks.assign(**{"property.test_loss": np.nan})
    predictions = results.predictions.assign(low=-np.inf, high=np.inf)
    for figure in (
        figures.tau_with_intervals(scores, results.predictors),
        figures.heatmap(scores, results.predictors),
        figures.zoo_distributions(networks),
        figures.predicted_against_measured(
            predictions, networks, predictor="weightnet", split="iid", scores=scores
        ),
    ):
        figures.save(figure, tmp_path / "figure.png")


def test_a_network_far_beyond_the_others_does_not_hide_them(results: Results) -> None:
    predictions = results.predictions
    mine = (predictions["predictor"] == "weightnet") & (predictions["split"] == "iid")
    run = predictions.loc[mine, "run"].iloc[0]
    loss = predictions["property"] == "test_loss"
    far = predictions.assign(
        measured=predictions["measured"].where(~(loss & (predictions["run"] == run)), 1e6)
    )
    figure = figures.predicted_against_measured(
        far, results.networks, predictor="weightnet", split="iid"
    )
    (axes,) = (axes for axes in figure.axes if "test loss" in axes.get_xlabel())
    assert axes.get_xlim()[1] < 1e6 / 2
    assert [text.get_text() for text in axes.texts] == ["1 beyond, at the edge"]
    assert all(not other.texts for other in figure.axes if other is not axes)


def test_a_measurement_far_beyond_the_others_does_not_hide_them(results: Results) -> None:
    networks = results.networks.copy()
    usual = figures.ceilings(networks).axes[0]
    names = ["half_a.test_accuracy", "half_b.test_accuracy"]
    networks.loc[networks.index[0], names] = 1000.0
    axes = figures.ceilings(networks).axes[0]
    assert axes.get_xlabel() == "test accuracy, half A" == usual.get_xlabel()
    assert axes.get_xlim()[1] < 50
    assert [text.get_text() for text in axes.texts] == ["1 beyond, at the edge"]
    networks.loc[networks.index[0], names] = np.inf
    assert figures.ceilings(networks).axes[0].get_xlim()[1] < 50


def test_the_users_style_has_no_influence(results: Results, tmp_path: Path) -> None:
    figures.save(DRAW["tau"](results), tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 20}):
        figures.save(DRAW["tau"](results), tmp_path / "styled.png")
    plain, styled = ((tmp_path / f"{n}.png").read_bytes() for n in ("plain", "styled"))
    assert plain == styled
