"""Learned probes: the best networks agree on them, copies answer alike, and nobody votes for
himself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from weightnet.predictors import Predictor, build
from weightnet.predictors.learned_probes import (
    COLUMNS,
    NOISE,
    LearnedProbes,
    LearnedProbesConfig,
    _chances,
    _compare,
    _smooth,
    _standardized,
)
from weightnet.symmetry import permute, random_permutation, trace
from weightnet.tokens import Networks, ProbesConfig, network_outputs, probe_responses

SHAPE = [1, 6, 6]
CLASSES = 3


def make_module() -> nn.Module:
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES)
    return nn.Sequential(*layers).eval()


def make_networks(count: int, *, seed: int, moved: bool = False) -> Networks:
    """Noisy copies of one network: the less noise, the more accurate they are called."""
    torch.manual_seed(0)
    module, rows, states, responses = make_module(), [], [], []
    best = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    spec = trace(module, torch.zeros(1, *SHAPE))
    generator = torch.Generator().manual_seed(seed)
    moves = torch.Generator().manual_seed(seed + 1)
    for _ in range(count):
        noise = float(torch.rand((), generator=generator))
        state = {
            name: tensor + 0.3 * noise * torch.randn(tensor.shape, generator=generator)
            for name, tensor in best.items()
        }
        if moved:
            state = dict(permute(spec, random_permutation(spec, moves), state))
        states.append(state)
        inputs = ProbesConfig(count=4).inputs(SHAPE)
        responses.append(probe_responses(module, spec, state, inputs))
        rows.append({"run": f"{seed}-{len(rows)}", "property.test_accuracy": 1 - noise})
    frame = pd.DataFrame(rows).assign(family="plain", task="any", input=json.dumps(SHAPE))
    networks = Networks.from_states(frame, [spec] * count, states, responses=responses)
    return networks.runnable(lambda _: module)


def accuracy(networks: Networks) -> np.ndarray:
    return networks.frame["property.test_accuracy"].to_numpy()


@pytest.fixture(scope="module")
def probes() -> LearnedProbes:
    learned = LearnedProbes(LearnedProbesConfig(per_class=4, steps=60), seed=0)
    networks = make_networks(40, seed=1)
    learned.fit(networks, accuracy(networks))
    return learned


def test_the_best_networks_see_the_wanted_classes(probes: LearnedProbes) -> None:
    (one,) = probes.sets
    clean = torch.from_numpy(one.images[: 4 * CLASSES])
    wanted = torch.arange(len(clean)) % CLASSES
    unseen = make_networks(12, seed=3)
    best = int(np.argmax(accuracy(unseen)))
    answered = network_outputs(unseen.module(best), unseen.state(best), clean)
    right = (answered.argmax(1) == wanted).float().mean()
    assert right > 0.7  # a third by chance; some are shown half of another class
    assert np.isclose(one.chances.sum(axis=1), len(one.members)).all()


def test_agreement_grows_with_accuracy(probes: LearnedProbes) -> None:
    networks = make_networks(30, seed=5)
    found = probes.features(networks)
    assert len(found.names) == len(NOISE) * len(COLUMNS)
    order = np.corrcoef(found.values[:, 0], accuracy(networks))[0, 1]
    assert order > 0.6


def test_permuted_networks_answer_alike(probes: LearnedProbes) -> None:
    plain, moved = (make_networks(5, seed=7, moved=moved) for moved in (False, True))
    np.testing.assert_allclose(
        probes.features(plain).values, probes.features(moved).values, atol=1e-5
    )


def test_a_member_of_the_consensus_has_no_vote_for_itself(probes: LearnedProbes) -> None:
    (one,) = probes.sets
    generator = np.random.default_rng(0)
    logits = generator.normal(size=one.logits.shape)
    joined = replace(
        one,
        chances=one.chances + _chances(logits),
        logits=one.logits + _standardized(logits),
        members=(*one.members, "new"),
    )
    np.testing.assert_allclose(_compare(logits, joined, "new"), _compare(logits, one, "new"))


def test_networks_of_other_inputs_or_outputs_have_no_answers(probes: LearnedProbes) -> None:
    networks = make_networks(2, seed=9)
    networks.frame["input"] = json.dumps([1, 5, 5])
    assert np.isnan(probes.features(networks).values).all()


def test_networks_of_another_task_have_no_answers(probes: LearnedProbes) -> None:
    networks = make_networks(3, seed=9)
    known = probes.features(networks).values
    networks.frame["task"] = ["any", "another", ""]  # the last is not declared
    np.testing.assert_array_equal(probes.features(networks).values[[0, 2]], known[[0, 2]])
    assert np.isnan(probes.features(networks).values[1]).all()


def test_too_few_networks_have_no_probes() -> None:
    learned = LearnedProbes(LearnedProbesConfig(per_class=1, steps=1), seed=0)
    networks = make_networks(4, seed=1)
    learned.fit(networks, accuracy(networks))
    assert learned.sets == []
    assert np.isnan(learned.features(networks).values).all()


def test_the_predictor_keeps_them(tmp_path: Path) -> None:
    config = {
        **{"width": 16, "heads": 2, "points": 2, "trees": 1, "fit": {"epochs": 1}},
        "learned_probes": {"per_class": 2, "steps": 20},
    }
    train, validation, test = (make_networks(n, seed=n) for n in (60, 20, 12))
    predictor = build("weightnet_probe", config, ["test_accuracy"], 0).fit(train, validation)
    predictor.save(tmp_path / "saved")
    again = Predictor.load(tmp_path / "saved").predict(test).mean
    assert np.array_equal(again, predictor.predict(test).mean)
    unknown = make_networks(12, seed=12)
    unknown.frame["input"] = json.dumps([1, 5, 5])  # only the fixed probes' answers are read
    told, untold = predictor.predict(test), predictor.predict(unknown)
    assert np.isfinite(untold.mean).all()
    assert np.all(untold.high - untold.low > told.high - told.low)  # and less is known


def test_who_reads_weights_alone_may_not_run_networks() -> None:
    with pytest.raises(ValueError, match="only weights are read"):
        build("weightnet", {"learned_probes": {"per_class": 1}}, ["test_accuracy"], 0)
    tokens = replace(make_networks(2, seed=1), modules=None)
    with pytest.raises(ValueError, match="must come with their modules"):
        tokens.module(0)
    learned = LearnedProbes(LearnedProbesConfig(per_class=1), seed=0)
    with pytest.raises(ValueError, match=r"call networks\.runnable"):
        learned.features(tokens)


def test_probes_are_drawn_for_inputs_of_any_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ([5], [3, 7], [2, 6, 4], [1, 3, 4, 5]):
        drawn = _smooth(3, shape, generator)
        assert drawn.shape == (3, *shape)
        if len(shape) > 1:  # a row of independent values is drawn as it is
            np.testing.assert_allclose(drawn.flatten(1).std(1), 1, atol=1e-3)
