"""Traced modules: round trip, invariance under the spec's own permutations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from weightnet.symmetry import permute, random_permutation, trace
from weightnet.tokens import (
    Networks,
    detokenize,
    layout,
    token_features,
    tokenize,
    weight_statistics,
)


class Plain(nn.Sequential):
    """conv-bn-relu, conv-gelu, pool, flatten, linear."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 6, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 5)),
        )


class Mixed(nn.Module):
    """A residual with a depthwise convolution, then a concatenation with its own norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.expand = nn.Conv2d(4, 8, 1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 4, 1)
        self.grow = nn.Conv2d(4, 3, 3, padding=1)
        self.join = nn.BatchNorm2d(7)
        self.grouped = nn.Conv2d(8, 4, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(7, 8, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.project(torch.relu(self.norm(self.depthwise(torch.relu(self.expand(x))))))
        x = torch.relu(self.join(torch.cat([x, self.grow(x)], dim=1)))
        x = torch.relu(self.grouped(torch.relu(self.wide(x))))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture(params=[Plain, Mixed])
def module(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = request.param()
    for name, buffer in made.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.fill_(11)
    return made.eval()


def test_round_trip_is_exact(module: nn.Module) -> None:
    spec = trace(module, torch.zeros(1, 1, 8, 8))
    state = module.state_dict()
    back = detokenize(spec, tokenize(spec, state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    module.load_state_dict(back)


def test_permuted_networks_have_permuted_tokens(module: nn.Module) -> None:
    spec = trace(module, torch.zeros(1, 1, 8, 8))
    state = module.state_dict()
    moved = permute(spec, random_permutation(spec, torch.Generator().manual_seed(1)), state)
    frame = pd.DataFrame({"run": ["a", "b"]})
    networks = Networks.from_states(frame, [spec, spec], [state, moved])
    features = token_features(networks)
    plan = layout(spec)
    for one in plan.layers:
        a, b = (features.values[one.first + first :][: one.outputs] for first in (0, plan.tokens))
        order = [np.lexsort(values.round(5).T) for values in (a, b)]
        np.testing.assert_allclose(a[order[0]], b[order[1]], rtol=1e-4, atol=1e-5)
    _, statistics = weight_statistics(networks)
    np.testing.assert_allclose(statistics[0], statistics[1], rtol=1e-4, atol=1e-5)
