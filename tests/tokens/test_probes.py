"""Probes: what the layers answer, independently recomputed; equivariance; refusals."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightnet.symmetry import permute, random_permutation, trace
from weightnet.tokens import (
    Networks,
    ProbesConfig,
    probe_responses,
    response_features,
    response_statistics,
    token_features,
)
from weightnet.tokens.probes import VIEWS

CONFIG = ProbesConfig(count=8, seed=3)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 36, 4),
    ).eval()


def test_inputs_are_drawn_from_the_seed_and_hold_noisy_copies() -> None:
    inputs = CONFIG.inputs((3, 6, 6))
    assert inputs.shape == (32, 3, 6, 6) and torch.isfinite(inputs).all()
    assert torch.equal(inputs, CONFIG.inputs((3, 6, 6)))
    assert not torch.equal(inputs, ProbesConfig(count=8, seed=4).inputs((3, 6, 6)))
    steps = (inputs.view(4, 8, -1)[1:] - inputs.view(4, 8, -1)[0]).std(dim=(1, 2))
    torch.testing.assert_close(steps, torch.tensor([0.1, 0.3, 1.0]), rtol=0.1, atol=0)


def test_responses_are_the_outputs_of_layers_behind_their_norms() -> None:
    module = small()
    spec = trace(module, torch.zeros(1, 1, 6, 6))
    inputs = CONFIG.inputs((1, 6, 6))
    found = probe_responses(module, spec, module.state_dict(), inputs)
    with torch.no_grad():
        conv = module[1](module[0](inputs)).mean(dim=(2, 3))
        out = module(inputs)
    np.testing.assert_allclose(found[0], conv.T.numpy(), atol=1e-6)
    np.testing.assert_allclose(found[1], out.T.numpy(), atol=1e-5)


def test_a_permuted_network_answers_the_same() -> None:
    module = small()
    spec = trace(module, torch.zeros(1, 1, 6, 6))
    inputs = CONFIG.inputs((1, 6, 6))
    state = module.state_dict()
    moved = permute(spec, random_permutation(spec, torch.Generator().manual_seed(1)), state)
    answers = [probe_responses(module, spec, one, inputs) for one in (state, moved)]
    assert not np.allclose(answers[0][0], answers[1][0])
    frame = pd.DataFrame({"run": ["a", "b"]})
    networks = Networks.from_states(frame, [spec, spec], [state, moved], responses=answers)
    features = token_features(networks)
    assert features.responses is not None
    names, table = response_statistics(
        features.responses, features.layer_offsets, features.layer_starts
    )
    assert table.shape == (2, len(names)) and np.isfinite(table).all()
    np.testing.assert_allclose(table[0], table[1], rtol=1e-4, atol=1e-4)
    _, tokens = response_features(features.responses)
    half = features.token_offsets[1]
    np.testing.assert_allclose(
        np.sort(tokens[:half], axis=0), np.sort(tokens[half:], axis=0), rtol=1e-4, atol=1e-4
    )


def test_diverged_networks_have_finite_features() -> None:
    broken = np.full((6, 32), np.nan, np.float32)
    broken[3:] = np.inf
    _, tokens = response_features(broken)
    _, table = response_statistics(broken, np.array([0, 3, 6]), np.array([0, 2]))
    assert np.isfinite(tokens).all() and np.isfinite(table).all()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(F.relu(self.shared(x.flatten(1))))


def test_a_layer_that_runs_twice_is_refused() -> None:
    module = Twice()
    spec = trace(module, torch.zeros(1, 1, 3, 3))
    with pytest.raises(ValueError, match="module of its own to be probed"):
        probe_responses(module, spec, module.state_dict(), CONFIG.inputs((1, 3, 3)))


def test_rounding_is_no_dimension_of_the_answers() -> None:
    answers = np.random.default_rng(0).normal(size=(10, VIEWS * 8)).astype(np.float32)
    names, table = response_statistics(answers, np.array([0, 10]), np.array([0, 1]))
    shares = [float(table[0, names.index(f"probe_share{i}")]) for i in range(9)]
    assert min(shares[:7]) > 1e-3
    assert shares[7:] == [0, 0]  # eight answers less their mean: seven directions
