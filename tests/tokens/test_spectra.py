"""Statistics of singular values: against NumPy's, and unchanged by permutation."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import weightnet.tokens.spectra as spectra
from weightnet.symmetry import trace
from weightnet.tokens import Networks, spectral_statistics


def statistics(
    module: nn.Module, *states: dict[str, Tensor], size: int = 4
) -> list[dict[str, float]]:
    spec = trace(module, torch.zeros(1, 1, size, size))
    frame = pd.DataFrame({"run": [str(i) for i in range(len(states))]})
    networks = Networks.from_states(frame, [spec] * len(states), list(states))
    names, values = spectral_statistics(networks)
    return [dict(zip(names, row, strict=True)) for row in values]


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)),
    )


def test_singular_values_are_those_of_numpy() -> None:
    module = plain()
    (found,) = statistics(module, module.state_dict())
    weights = {"first": module[0], "middle": module[2], "last": module[5], "outputs": module[7]}
    for place, layer in weights.items():
        weight = layer.weight.detach().double().flatten(1).numpy()
        share = np.linalg.svd(weight, compute_uv=False) ** 2
        share /= share.sum()
        few, many = sorted(weight.shape)
        edge = (1 + np.sqrt(few / many)) ** 2 / few
        entropy = -(share * np.log(share)).sum()
        expected = {
            "log_stable_rank": -np.log(share[0]),
            "entropy": entropy,
            "log_flatness": np.log(few) - entropy,
            "log_edge": np.log(share[0] / edge),
            "outliers": (share > edge).sum(),
            "log_participation": np.log((share**2).sum() * few),
            "log_median": np.log(np.median(share) * few),
            "log_share2": np.log(share[2]),
            "log_share4": np.log(share[4]) if few > 4 else np.nan,
        }
        for name, value in expected.items():
            assert found[f"spectrum_{place}_{name}"] == pytest.approx(value, nan_ok=True), name


def test_fit_is_how_much_a_layer_reads_of_what_is_written() -> None:
    module = plain()
    (found,) = statistics(module, module.state_dict())
    first, second = (module[i].weight.detach().double().numpy() for i in (0, 2))
    written = first.reshape(8, -1)
    covariance = written @ written.T
    reading = second.transpose(1, 0, 2, 3).reshape(8, -1)
    scale = 8 / (np.square(written).sum() * np.square(reading).sum())
    assert found["spectrum_middle_log_fit"] == pytest.approx(
        np.log(np.trace(covariance @ reading @ reading.T) * scale)
    )
    alone = (np.square(written).sum(axis=1) * np.square(reading).sum(axis=1)).sum()
    assert found["spectrum_middle_log_fit_apart"] == pytest.approx(np.log(alone * scale))
    sums = second.sum(axis=(2, 3))
    flat = np.square(sums @ written).sum() * 8 / (np.square(sums).sum() * np.square(written).sum())
    assert found["spectrum_middle_log_fit_sums"] == pytest.approx(np.log(flat))
    assert np.isnan(found["spectrum_first_log_fit"])  # it reads the image

    turned = {name: value.clone() for name, value in module.state_dict().items()}
    turned["7.weight"] = module[5].weight.detach()[:, :3].T.contiguous()
    better = statistics(module, turned)[0]["spectrum_outputs_log_fit"]
    assert better > found["spectrum_outputs_log_fit"] + 0.5


@pytest.mark.parametrize("family", ["resnet18", "mobilenet_v2", "densenet121", "vgg11"])
def test_a_permuted_network_has_the_same_spectra(family: str, reordered: Any) -> None:
    module, state, moved = reordered(family, 8)
    one, other = statistics(module, state, moved, size=8)
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name


def test_wide_layers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "_WIDEST", 5)
    module = plain()
    (found,) = statistics(module, module.state_dict())
    assert np.isnan(found["spectrum_first_entropy"])
    assert np.isfinite(found["spectrum_outputs_entropy"])
    assert np.isnan(found["spectrum_outputs_log_fit"])


def test_diverged_weights_give_no_infinite_value() -> None:
    module = plain()
    for value in (torch.inf, torch.nan, 0.0):
        state = {name: torch.full_like(one, value) for name, one in module.state_dict().items()}
        (found,) = statistics(module, state)
        assert not np.isinf(list(found.values())).any()
