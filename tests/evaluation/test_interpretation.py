"""Attributions are shares of tokens, follow the neurons, and are others for a random model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from weightnet.evaluation.interpretation import _rank_within, attributions, interpret
from weightnet.predictors import Predictor, build
from weightnet.symmetry import permute, trace
from weightnet.tokens import Networks, token_features
from weightnet.zoo.architectures import build as architecture

SMALL: dict[str, Any] = {"width": 16, "heads": 2, "points": 2}
FIT = {"epochs": 12, "learning_rate": 0.01, "batch_size": 16}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTNET_JOBS", "1")


def make_networks(count: int, seed: int, *, reversed_first: bool = False) -> Networks:
    """CNNs whose property is the logarithm of the scale of their last layer."""
    generator = torch.Generator().manual_seed(seed)
    module = architecture("cnn", width=6, depth=3)
    spec = trace(module, torch.zeros(1, 1, 14, 14))
    order = {space.name: torch.arange(space.size) for space in spec.spaces}
    order[spec.spaces[0].name] = order[spec.spaces[0].name].flip(0)
    states, rows = [], []
    for i in range(count):
        scale = float(torch.randn((), generator=generator))
        state = {
            name: torch.randn(value.shape, generator=generator) * 0.3
            for name, value in module.state_dict().items()
        }
        state["head.weight"] *= np.exp(scale)
        states.append(dict(permute(spec, order, state)) if reversed_first else state)
        rows.append({"run": f"{i:016x}", "family": "cnn", "property.scale": scale})
    frame = pd.DataFrame(rows).assign(task="digits")
    return Networks.from_states(frame, [spec] * count, states)


@pytest.fixture(scope="module")
def fitted() -> Predictor:
    config = {**SMALL, "statistics": False, "fit": FIT}
    return build("weightnet", config, ["scale"], 0).fit(make_networks(96, 1), make_networks(32, 2))


def test_shares_sum_to_one_for_each_network(fitted: Predictor) -> None:
    networks = make_networks(5, 3)
    found = interpret(fitted, networks, other=fitted)
    sums = found.importance.groupby(["run", "property", "model", "view"])["importance"].sum()
    assert len(sums) == 5 * 3 * 2
    np.testing.assert_allclose(sums, 1.0, atol=1e-6)
    assert set(found.importance["position"]) == set((np.arange(8) + 0.5) / 8)


def test_a_randomized_model_gives_another_map_and_the_same_model_the_same(
    fitted: Predictor,
) -> None:
    found = interpret(fitted, make_networks(12, 4), other=fitted).agreement
    correlation = found.groupby("model")["correlation"].mean()
    assert correlation["retrained"] == pytest.approx(1.0)
    assert abs(correlation["randomized"]) < 0.5
    assert found["top_tenth"].between(0.1, 1.0).all()


def test_processes_side_by_side_compute_the_same(
    fitted: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks, threads = make_networks(5, 3), torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker process
    alone = interpret(fitted, networks)
    torch.set_num_threads(threads)
    monkeypatch.setenv("WEIGHTNET_JOBS", "2")
    done: list[int] = []
    for one, other in zip(
        alone, interpret(fitted, networks, advance=lambda: done.append(1)), strict=True
    ):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert len(done) == 2  # the trained and the randomized one


@pytest.mark.parametrize("folds", [1, 2])
def test_shares_are_signed_and_rise_with_the_property(fitted: Predictor, folds: int) -> None:
    if folds > 1:
        config = {**SMALL, "statistics": False, "fit": {**FIT, "folds": folds}}
        fitted = build("weightnet", config, ["scale"], 0)
        fitted.fit(make_networks(96, 1), make_networks(32, 2))
    networks = make_networks(16, 5)
    values = attributions(fitted, networks)[:, 0]
    network = np.repeat(np.arange(16), [plan.tokens for plan in networks.layouts()])
    np.testing.assert_allclose(np.bincount(network, np.abs(values)), 1.0, atol=1e-6)
    raised = np.bincount(network, values)
    assert np.corrcoef(raised, networks.frame["property.scale"])[0, 1] > 0.7


def test_attributions_follow_permuted_neurons(fitted: Predictor) -> None:
    layer = token_features(make_networks(4, 6)).layer
    first = attributions(fitted, make_networks(4, 6))
    moved = attributions(fitted, make_networks(4, 6, reversed_first=True))
    own = first[layer == 0].reshape(4, -1)
    np.testing.assert_allclose(moved[layer == 0].reshape(4, -1), own[:, ::-1], atol=1e-5)
    np.testing.assert_allclose(moved[layer > 0], first[layer > 0], atol=1e-5)


def test_rank_within_a_layer() -> None:
    ranks = _rank_within(np.array([3.0, 1.0, 2.0, 9.0]), np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(ranks, [5 / 6, 1 / 6, 3 / 6, 0.5])


def test_a_predictor_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must read tokens.*however: mean does not"):
        interpret(build("mean", None, ["scale"], 0), make_networks(2, 0))
