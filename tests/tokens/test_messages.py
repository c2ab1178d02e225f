"""Messages along the weights: against a direct simulation, and unchanged by permutation."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from weightnet.symmetry import trace
from weightnet.tokens import (
    TOKEN_MESSAGES,
    Networks,
    message_statistics,
    token_features,
    token_messages,
)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def messages(module: nn.Module, *states: dict[str, torch.Tensor]) -> tuple[Networks, np.ndarray]:
    spec = trace(module, torch.zeros(1, 1, 4, 4))
    frame = pd.DataFrame({"run": [str(i) for i in range(len(states))]})
    networks = Networks.from_states(frame, [spec] * len(states), list(states))
    return networks, token_messages(networks)


def test_forward_messages_are_the_moments_of_noise_through_the_network() -> None:
    module = plain()
    _, found = messages(module, module.state_dict())
    noise = torch.randn(200_000, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, out = module[1](noise.flatten(1)), module(noise)
    columns = {name: found[:, place] for place, name in enumerate(TOKEN_MESSAGES)}
    np.testing.assert_allclose(
        np.exp(columns["white_log_spread"][:12]), hidden.std(dim=0).numpy(), rtol=0.02
    )
    np.testing.assert_allclose(
        columns["white_on"][:12], (hidden > 0).float().mean(dim=0).numpy(), atol=0.01
    )
    np.testing.assert_allclose(
        np.sinh(columns["white_mean"][12:]), out.mean(dim=0).numpy(), atol=0.03
    )


def test_backward_messages_are_squared_gradients() -> None:
    module = plain()
    _, found = messages(module, module.state_dict())
    gradient = found[:, TOKEN_MESSAGES.index("white_gradient")]
    np.testing.assert_allclose(gradient[12:], 0, atol=1e-6)
    on = found[:12, TOKEN_MESSAGES.index("white_on")]
    outgoing = (module[3].weight.detach() ** 2).sum(dim=0).numpy()
    np.testing.assert_allclose(np.exp(2 * gradient[:12]), outgoing * on, rtol=1e-4)


class Dense(nn.Module):
    """Norms that stand alone, before a concatenation and behind it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flatten, self.activation = nn.Flatten(), activation
        self.stem, self.hidden, self.head = nn.Linear(16, 12), nn.Linear(12, 8), nn.Linear(20, 3)
        self.one, self.other = nn.BatchNorm1d(12), nn.BatchNorm1d(20)
        for norm in (self.one, self.other):
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                assert values is not None
                nn.init.uniform_(values, 0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(self.flatten(x))
        x = torch.cat([x, self.hidden(self.activation(self.one(x)))], dim=1)
        return self.head(self.activation(self.other(x)))


def test_a_norm_changes_its_channels_for_those_alone_who_read_it() -> None:
    module = Dense(nn.ReLU()).eval()
    _, found = messages(module, module.state_dict())
    noise = torch.randn(200_000, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = module.stem(noise.flatten(1))
        both = torch.cat([before, module.hidden(module.one(before).relu())], dim=1)
        behind = module.other(both)[:, :12]
    mean, spread = (
        found[32:44, TOKEN_MESSAGES.index(f"white_{n}")] for n in ("mean", "log_spread")
    )
    np.testing.assert_allclose(np.sinh(mean), behind.mean(dim=0).numpy(), atol=0.02)
    np.testing.assert_allclose(np.exp(spread), behind.std(dim=0).numpy(), rtol=0.02)


def test_gradients_pass_norms_by_every_way() -> None:
    module = Dense(nn.Identity()).eval()
    _, found = messages(module, module.state_dict())
    found = np.exp(2 * found[:, TOKEN_MESSAGES.index("white_gradient")])
    with torch.no_grad():
        gains = [
            (norm.weight / (norm.running_var + norm.eps).sqrt()) ** 2
            for norm in (module.one, module.other)
        ]
        behind = (module.head.weight**2).sum(dim=0)
        concatenated = behind * gains[1]
        first = (module.hidden.weight**2 * concatenated[12:, None]).sum(dim=0)
        stem = concatenated[:12] + first * gains[0]
    np.testing.assert_allclose(found[32:52], behind.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found[24:32], concatenated[12:].numpy(), rtol=1e-4)
    np.testing.assert_allclose(found[12:24], first.numpy(), rtol=1e-4)
    np.testing.assert_allclose(found[:12], stem.numpy(), rtol=1e-4)


def test_a_permuted_network_has_permuted_messages(reordered: Any) -> None:
    module, state, moved = reordered("resnet18", 4)
    networks, found = messages(module, state, moved)
    features = token_features(networks)
    half = features.token_offsets[1]
    assert not np.allclose(found[:half], found[half:])
    for values in (found[:half], found[half:]):
        assert np.isfinite(values).all()
    np.testing.assert_allclose(
        np.sort(found[:half], axis=0), np.sort(found[half:], axis=0), rtol=1e-4, atol=1e-4
    )
    names, table = message_statistics(found, features.layer_offsets, features.layer_starts)
    assert table.shape == (2, len(names))
    np.testing.assert_allclose(table[0], table[1], rtol=1e-4, atol=1e-4)


def test_diverged_weights_give_finite_messages() -> None:
    module = plain()
    state = {
        name: torch.full_like(value, torch.inf) for name, value in module.state_dict().items()
    }
    _, found = messages(module, state)
    assert np.isfinite(found).all()
