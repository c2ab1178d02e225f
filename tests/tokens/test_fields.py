"""Random fields along the weights: against running such networks on a torus, and unchanged by
permutation."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from weightnet.symmetry import trace
from weightnet.tokens import (
    Networks,
    ProbesConfig,
    response_features,
    response_statistics,
    token_features,
    token_fields,
)
from weightnet.tokens.fields import COLUMNS, FIELDS, SIDE


def fields(
    module: nn.Module, *states: dict[str, Tensor], size: int = SIDE
) -> tuple[Networks, np.ndarray]:
    spec = trace(module, torch.zeros(1, 1, size, size))
    frame = pd.DataFrame({"run": [str(i) for i in range(len(states))]})
    networks = Networks.from_states(frame, [spec] * len(states), list(states))
    return networks, token_fields(networks)


def convolution(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, padding_mode="circular")


def body() -> list[nn.Module]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert values is not None
        nn.init.uniform_(values, 0.5, 1.5)
    norm.momentum = None  # what it is told in training is what it has seen
    return [convolution(1, 6), norm, nn.ReLU(), convolution(6, 5, 5), nn.Tanh()]


HEADS = {
    "flattened": [nn.Flatten(), nn.Linear(5 * SIDE**2, 3)],
    "averaged": [
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
        nn.GELU(),
        nn.Linear(4, 3),
    ],
}


HALF = SIDE // 2


def settled(module: nn.Module) -> Tensor:
    """The fields that enter; the running statistics of ``module`` become those of clean ones."""
    inputs = ProbesConfig(count=FIELDS).inputs((1, SIDE, SIDE))
    module.train()
    module(inputs[:FIELDS].repeat(1000, 1, 1, 1))  # many, since it corrects the variance for few
    module.eval()
    return inputs


@pytest.mark.parametrize("head", HEADS)
def test_fields_are_what_a_network_on_a_torus_answers(head: str) -> None:
    module = nn.Sequential(*body(), *HEADS[head])
    _, found = fields(module, module.state_dict())
    inputs = settled(module)
    moved = [inputs.roll((-y, -x), (2, 3)) for y in range(HALF) for x in range(SIDE)]
    with torch.no_grad():
        first = module[:2](inputs)[:, :, :HALF].mean(dim=(2, 3)).T
        second = module[:4](inputs)[:, :, :HALF].mean(dim=(2, 3)).T
        outputs = torch.stack([module(one) for one in moved]).mean(dim=0).T
    assert found.shape[1] == COLUMNS == len(inputs)
    np.testing.assert_allclose(found[:6], first, atol=1e-5)
    np.testing.assert_allclose(found[6:11], second, atol=1e-5)
    np.testing.assert_allclose(found[-3:], outputs, atol=1e-5)


class Dense(nn.Module):
    """Norms that stand alone, before a concatenation and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = convolution(1, 6), convolution(6, 5)
        self.one, self.other = (nn.BatchNorm2d(n, momentum=None) for n in (6, 11))
        self.head = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv(torch.relu(self.one(x)))], dim=1)
        x = torch.relu(self.other(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_norm_changes_its_channels_for_those_alone_who_read_it() -> None:
    torch.manual_seed(0)
    module = Dense()
    _, found = fields(module, module.state_dict())
    inputs = settled(module)
    with torch.no_grad():
        np.testing.assert_allclose(found[-3:], module(inputs).T, atol=1e-5)


def test_a_perceptron_reads_each_input_by_itself() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 12), nn.ReLU(), nn.Linear(12, 3))
    _, found = fields(module, module.state_dict())
    inputs = ProbesConfig(count=FIELDS).inputs((SIDE**2, SIDE, SIDE))
    with torch.no_grad():  # each position of the torus is an input of its own
        outputs = module(inputs.flatten(2).swapaxes(1, 2).flatten(0, 1)).view(-1, SIDE**2, 3)
    half = outputs[:, : HALF * SIDE].mean(dim=1)
    np.testing.assert_allclose(found[12:], half.T, atol=1e-5)


@pytest.mark.parametrize("family", ["resnet18", "mobilenet_v2", "densenet121"])
def test_a_permuted_network_has_permuted_fields(family: str, reordered: Any) -> None:
    module, state, moved = reordered(family, 8)
    networks, found = fields(module, state, moved, size=8)
    features = token_features(networks)
    half = features.token_offsets[1]
    assert not np.allclose(found[:half], found[half:])
    assert (found[:half].std(axis=1) > 0).mean() > 0.5
    np.testing.assert_allclose(
        np.sort(found[:half], axis=0), np.sort(found[half:], axis=0), rtol=1e-3, atol=1e-4
    )
    names, table = response_statistics(
        found, features.layer_offsets, features.layer_starts, "fields"
    )
    assert all(name.startswith("fields_") for name in names)
    np.testing.assert_allclose(table[0], table[1], rtol=1e-3, atol=1e-3)
    assert all(name.startswith("field_") for name in response_features(found[:1], "field")[0])


def test_networks_are_read_alike_in_any_company() -> None:
    module = nn.Sequential(*body(), *HEADS["flattened"]).eval()
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(
            {
                k: torch.rand_like(v) if v.is_floating_point() else v
                for k, v in module.state_dict().items()
            }
        )
    networks, together = fields(module, *states)
    alone = np.concatenate([token_fields(networks.select([i])) for i in range(3)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_diverged_weights_give_finite_fields() -> None:
    module = nn.Sequential(*body(), *HEADS["averaged"])
    for value in (torch.inf, torch.nan):
        state = {
            name: torch.full_like(one, value) if one.is_floating_point() else one
            for name, one in module.state_dict().items()
        }
        _, found = fields(module, state)
        assert np.isfinite(found).all()
