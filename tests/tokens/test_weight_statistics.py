"""Weight statistics, norms and flat weights against plain computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightnet.symmetry.spec import PermutationSpec
from weightnet.tokens import flat_weights, layer_norms, weight_statistics


def test_statistics_of_each_layer(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 1)
    names, values = weight_statistics(samples.networks([spec], [state]))
    found = dict(zip(names, values[0], strict=True))
    assert values.dtype == np.float64 and len(set(names)) == len(names) == values.shape[1]
    keys = [("l0.weight", "l0.bn.bias"), ("l1.weight", "l1.bias"), ("l2.weight", "l2.bias")]
    for position, (weight_key, bias_key) in enumerate(keys):
        for label, key in (("weight", weight_key), ("bias", bias_key)):
            tensor = state[key].double().numpy().reshape(-1)
            for place in (f"first{position}", f"last{2 - position}"):
                assert found[f"{place}_{label}_mean"] == pytest.approx(tensor.mean(), abs=1e-6)
                assert found[f"{place}_{label}_var"] == pytest.approx(tensor.var(), abs=1e-6)
                for q in (0, 25, 50, 75, 100):
                    expected = np.percentile(tensor, q)
                    assert found[f"{place}_{label}_q{q}"] == pytest.approx(expected, abs=1e-6)
    means = [state[key].mean().item() for key, _ in keys]
    assert found["mean_weight_mean"] == pytest.approx(np.mean(means), abs=1e-6)
    assert found["max_weight_mean"] == pytest.approx(np.max(means), abs=1e-6)
    assert found["std_weight_mean"] == pytest.approx(np.std(means), abs=1e-6)
    assert np.isnan(found["first3_weight_mean"])
    assert found["depth"] == 3
    parameters = sum(v.numel() for k, v in state.items() if "running" not in k and "num" not in k)
    assert found["log_parameters"] == pytest.approx(np.log(parameters))
    whole = np.concatenate([state[key].numpy().reshape(-1) for key, _ in keys])
    assert found["log_norm"] == pytest.approx(np.log(np.linalg.norm(whole)), abs=1e-6)


def test_norms_of_each_layer(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 1)
    names, values = layer_norms(samples.networks([spec], [state]))
    found = dict(zip(names, values[0], strict=True))
    matrix = state["l2.weight"].double().numpy()
    assert found["last0_log_frobenius"] == pytest.approx(np.log(np.linalg.norm(matrix)), abs=1e-6)
    rows = np.linalg.norm(matrix, axis=1)
    assert found["last0_log_max_row"] == pytest.approx(np.log(rows.max()), abs=1e-6)
    exact = np.log(np.linalg.norm(matrix, 2))
    assert exact - 0.1 < found["last0_log_spectral"] <= exact + 1e-6
    both = dict(
        zip(
            *(
                part if i == 0 else part[0]
                for i, part in enumerate(weight_statistics(samples.networks([spec], [state])))
            ),
            strict=True,
        )
    )
    assert set(names) < set(both)
    np.testing.assert_array_equal([found[name] for name in names], [both[name] for name in names])


def test_permutation_changes_no_statistic(samples, spec: PermutationSpec) -> None:
    state = samples.state(spec, 1)
    _, moved = samples.permuted(spec, state, 2)
    _, values = weight_statistics(samples.networks([spec, spec], [state, moved]))
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5, atol=1e-6)


def test_architectures_share_one_vector(samples) -> None:
    specs = list(samples.specs.values())
    states = [samples.state(spec, 1) for spec in specs]
    _, together = weight_statistics(samples.networks(specs, states))
    for i, (spec, state) in enumerate(zip(specs, states, strict=True)):
        _, alone = weight_statistics(samples.networks([spec], [state]))
        np.testing.assert_allclose(together[i], alone[0])


@pytest.mark.filterwarnings("error")
def test_diverged_layers_have_no_statistics(samples) -> None:
    spec = samples.specs["small_cnn"]
    state, sound = samples.state(spec, 1), samples.state(spec, 1)
    state["l1.weight"][0] = float("nan")
    names, values = weight_statistics(samples.networks([spec, spec], [state, sound]))
    found = dict(zip(names, values[0], strict=True))
    assert np.isnan(found["first1_weight_mean"]) and np.isnan(found["mean_log_frobenius"])
    assert np.isfinite(found["first0_weight_mean"])
    absent = [name for name, value in zip(names, values[1], strict=True) if np.isnan(value)]
    assert all(name.startswith(("first3_", "last3_")) for name in absent)


def test_flat_weights_are_in_forward_order_padded_or_thinned(samples) -> None:
    spec = samples.specs["small_cnn"]
    states = [samples.state(spec, seed) for seed in (1, 2)]
    keys = [
        "l0.weight",
        "l0.bn.weight",
        "l0.bn.bias",
        "l1.weight",
        "l1.bias",
        "l2.weight",
        "l2.bias",
    ]
    flat = torch.stack([torch.cat([s[key].reshape(-1) for key in keys]) for s in states]).numpy()
    networks = samples.networks([spec, spec], states)
    total = flat.shape[1]
    padded = flat_weights(networks, total + 9)
    assert padded.dtype == np.float32
    np.testing.assert_array_equal(padded[:, :total], flat)
    np.testing.assert_array_equal(padded[:, total:], 0)
    thinned = flat_weights(networks, 50)
    np.testing.assert_array_equal(thinned, flat[:, np.arange(50) * total // 50])
    with pytest.raises(ValueError, match="size=0"):
        flat_weights(networks, 0)
