"""The predictors on real tokens: other architectures, diverged weights, permuted copies."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from weightnet.predictors import build
from weightnet.predictors.ranks import mean_tau
from weightnet.symmetry import canonicalize, permute, random_permutation, trace
from weightnet.tokens import Networks

CONFIGS = {
    "gbm": {"candidates": 2, "rounds": 60},
    "norms": {"candidates": 2, "rounds": 60},
    "stats": {"fit": {"epochs": 30, "learning_rate": 3e-3}},
    "mlp": {"size": 100, "fit": {"epochs": 30, "learning_rate": 3e-3}},
}


def make_module(width: int) -> nn.Module:
    convolutions = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def make_networks(
    count: int, seed: int, *, width: int = 3, moved: bool = False, canonical: bool = False
) -> Networks:
    """Networks whose property is the logarithm of the scale of their last layer."""
    spec = trace(make_module(width), torch.zeros(1, 1, 8, 8))
    generator = torch.Generator().manual_seed(seed)
    moves = torch.Generator().manual_seed(seed)
    scales = torch.randn(count, generator=generator)
    states = []
    for scale in scales:
        state = make_module(width).state_dict()
        for name, value in state.items():
            state[name] = torch.randn(value.shape, generator=generator)
        state["6.weight"] = state["6.weight"] * torch.exp(scale)
        if moved:
            state = dict(permute(spec, random_permutation(spec, moves), state))
        states.append(canonicalize(spec, state) if canonical else state)
    frame = pd.DataFrame(
        {
            "run": [f"{seed:08x}{index:08x}" for index in range(count)],
            "family": "cnn",
            "task": "digits",
            "property.scale": scales.double().numpy(),
        }
    )
    return Networks.from_states(frame, [spec] * count, states)


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTNET_DEVICE", "cpu")
    canonical = name == "mlp"  # the others do not see the order of neurons
    parts = [make_networks(count, count, canonical=canonical) for count in (80, 40, 60)]
    predictor = build(name, CONFIGS[name], ("scale",), 0).fit(*parts[:2])
    found = predictor.predict(parts[2])
    if name != "mlp":  # it has to learn a norm from raw weights: hopeless with 80 networks
        assert mean_tau(found.mean, parts[2].frame[["property.scale"]].to_numpy()) > 0.6
    copies = predictor.predict(make_networks(60, 60, moved=True, canonical=canonical))
    close = np.isclose(copies.mean, found.mean, rtol=1e-4, atol=1e-4)
    assert close.all() or (name in ("gbm", "norms") and close.mean() > 0.9)  # trees have steps
    assert np.isfinite(predictor.predict(make_networks(5, 3, width=6)).mean).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_diverged_networks_do_no_harm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTNET_DEVICE", "cpu")
    spec = trace(make_module(3), torch.zeros(1, 1, 8, 8))
    train = make_networks(60, 0)
    states = [train.state(index) for index in range(len(train))]
    for index, value in enumerate((float("nan"), float("inf"), -float("inf"), 1e38)):
        states[index] = {key: torch.full_like(t, value) for key, t in states[index].items()}
    broken = Networks.from_states(train.frame, [spec] * len(train), states)
    predictor = build(name, CONFIGS[name], ("scale",), 0).fit(broken, make_networks(30, 1))
    assert np.isfinite(predictor.predict(broken).mean).all()
