"""Features against plain loops over neurons, and under permutations of hidden channels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from weightnet.symmetry.spec import Layer, PermutationSpec
from weightnet.tokens import (
    FEATURES,
    KINDS,
    Networks,
    TokenFeatures,
    layout,
    token_features,
    token_rows,
)


def column(features: TokenFeatures, name: str) -> np.ndarray:
    return features.values[:, features.names.index(name)]


def readers(samples, spec: PermutationSpec, state: dict, space: str, channel: int) -> np.ndarray:
    """Every weight of every layer whose input contains the channel, by plain loops."""
    found: list[float] = []
    for one in spec.layers:
        if one.weight is None:
            continue
        weight = state[one.weight].double().numpy()
        inputs = samples.inputs(one)
        per_group, outputs = weight.shape[1], weight.shape[0]
        for o in range(outputs):
            group = o // (outputs // one.groups)
            for j in range(per_group):
                if inputs[group * per_group + j] == (space, channel):
                    found.extend(np.atleast_1d(weight[o, j]).reshape(-1))
    return np.array(found)


def naive(samples, spec: PermutationSpec, state: dict, one: Layer, index: int) -> dict[str, float]:
    """The features of one neuron."""
    out: dict[str, float] = dict.fromkeys(FEATURES, 0.0)
    norm = 1.0
    if one.weight is not None:
        row = state[one.weight][index].double().numpy().reshape(-1)
        norm = float(np.linalg.norm(row))
        out |= {"row_mean": row.mean(), "row_std": row.std(), "row_l2": norm}
        out |= {
            "row_l1": np.abs(row).sum() / np.sqrt(len(row)),
            "row_min": row.min(),
            "row_max": row.max(),
        }
        for q in (10, 25, 50, 75, 90):
            out[f"row_q{q}"] = np.percentile(row, q)
        if len(row) > 1:
            out |= {"row_skew": stats.skew(row), "row_kurtosis": stats.kurtosis(row, fisher=False)}
        out["row_near_zero"] = np.mean(np.abs(row) < 0.1 * np.sqrt(np.mean(row**2)))
        out["log_fan_in"] = np.log1p(len(row))
    get = {
        f: state[getattr(one, f)][index].item()
        for f in ("bias", "scale", "shift", "mean", "variance")
        if getattr(one, f) is not None
    }
    variance = get.get("variance", 1 - 1e-5) + 1e-5
    out |= {
        "bias": get.get("bias", 0.0),
        "scale": get.get("scale", 1.0),
        "shift": get.get("shift", 0.0),
    }
    out |= {"running_mean": get.get("mean", 0.0), "log_variance": np.log(variance)}
    out |= {"has_bias": float("bias" in get), "has_norm": float("scale" in get)}
    out["effective_l2"] = abs(out["scale"]) / np.sqrt(variance) * norm
    space, channel = samples.channels(one.outputs)[index]
    if space != "-":
        reads = readers(samples, spec, state, space, channel)
        out["log_readers"] = np.log1p(len(reads))
        if len(reads):
            out |= {
                "out_mean": reads.mean(),
                "out_std": reads.std(),
                "out_l2": np.linalg.norm(reads),
            }
            out["out_max"] = np.abs(reads).max()
    width = len(samples.channels(one.outputs))
    out |= {"depth": one.index / (len(spec.layers) - 1), "log_width": np.log(width)}
    out |= {"log_kernel": np.log(np.prod(one.kernel)), "log_stride": np.log(np.prod(one.stride))}
    out |= {"log_groups": np.log(one.groups), "fixed": float(space == "-")}
    out["depthwise"] = float(one.kind == "conv" and one.groups == width)
    return out


@pytest.mark.parametrize("max_row", [3, 4096])
def test_features_equal_plain_loops(samples, spec: PermutationSpec, max_row: int) -> None:
    states = [samples.state(spec, seed) for seed in (1, 2)]
    features = token_features(samples.networks([spec, spec], states, max_row))
    assert features.values.dtype == np.float32 and features.names == FEATURES
    token = 0
    for network, state in enumerate(states):
        for one in spec.layers:
            for index, (space, channel) in enumerate(samples.channels(one.outputs)):
                expected = naive(samples, spec, state, one, index)
                found = dict(zip(features.names, features.values[token], strict=True))
                for name in FEATURES:
                    assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (
                        name,
                        one.name,
                        index,
                    )
                assert features.network[token] == network and features.layer[token] == one.index
                assert KINDS[features.kind[token]] == one.kind
                names = [s.name for s in spec.spaces]
                assert features.space[token] == (names.index(space) if space != "-" else -1)
                assert features.channel[token] == channel
                token += 1
    assert token == len(features.values)


def test_rows_are_the_first_weights_of_each_neuron(samples, spec: PermutationSpec) -> None:
    states = [samples.state(spec, seed) for seed in range(2)]
    rows = token_rows(samples.networks([spec] * 2, states), 5)
    expected = []
    for state in states:
        for one in spec.layers:
            weight = torch.zeros(1) if one.weight is None else state[one.weight].flatten(1)[:, :5]
            for index in range(len(samples.channels(one.outputs))):
                row = np.zeros(5, np.float32)
                if one.weight is not None:
                    row[: weight.shape[1]] = weight[index]
                expected.append(row)
    np.testing.assert_array_equal(rows, np.array(expected))


def test_blocks_change_nothing(
    samples, spec: PermutationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = samples.networks([spec] * 3, [samples.state(spec, seed) for seed in range(3)])
    whole = token_features(networks)
    monkeypatch.setattr("weightnet.tokens.features.BLOCK_VALUES", 20)
    monkeypatch.setattr("weightnet.tokens.networks.STACK_VALUES", 1)
    np.testing.assert_allclose(token_features(networks).values, whole.values, rtol=1e-6, atol=1e-7)


def test_permuting_channels_permutes_tokens_and_changes_no_value(
    samples, spec: PermutationSpec
) -> None:
    state = samples.state(spec, 3)
    orders, moved = samples.permuted(spec, state, 4)
    before = token_features(samples.networks([spec], [state]))
    after = token_features(samples.networks([spec], [moved]))
    source = samples.moved_tokens(spec, orders)
    np.testing.assert_allclose(after.values, before.values[source], rtol=1e-5, atol=1e-6)


def test_select_is_a_renumbered_slice_of_everything(samples) -> None:
    specs = [
        samples.specs["small_cnn"],
        samples.specs["branched"],
        samples.specs["small_cnn"],
        samples.specs["grouped"],
    ]
    states = [samples.state(spec, seed) for seed, spec in enumerate(specs)]
    networks = samples.networks(specs, states)
    batch = token_features(networks).select([3, 0, 1])
    direct = token_features(networks.select([3, 0, 1]))
    for name in (
        "values",
        "network",
        "layer",
        "kind",
        "activation",
        "space",
        "channel",
        "token_offsets",
        "layer_offsets",
        "layer_starts",
        "layer_segment",
    ):
        np.testing.assert_array_equal(getattr(batch, name), getattr(direct, name), err_msg=name)
    assert len(batch) == 3
    starts = batch.layer_offsets[batch.layer_segment]
    assert (starts <= np.arange(len(starts))).all()


def test_responses_follow_their_tokens(samples) -> None:
    specs = [samples.specs["small_cnn"], samples.specs["branched"]]
    answers = [
        {
            one.layer.index: np.arange(one.outputs * 2.0).reshape(-1, 2).astype(np.float32)
            + one.first
            for one in layout(spec).layers
        }
        for spec in specs
    ]
    frame = pd.DataFrame({"run": ["a", "b"]})
    states = [samples.state(spec, 0) for spec in specs]
    networks = Networks.from_states(frame, specs, states, responses=answers)
    found = token_features(networks)
    expected = [np.concatenate(list(one.values())) for one in answers]
    assert found.responses is not None
    np.testing.assert_array_equal(found.responses, np.concatenate(expected))
    np.testing.assert_array_equal(found.select([1]).responses, expected[1])
    assert token_features(samples.networks(specs, states)).responses is None


def test_diverged_networks_have_finite_features(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 0)
    state["l1.weight"][0, 0] = torch.tensor([[float("nan")], [float("inf")], [1.0]])
    state["l0.bn.running_var"][:] = float("inf")
    state["l2.weight"][:] = 3e38
    features = token_features(samples.networks([spec], [state]))
    assert np.isfinite(features.values).all()
    assert column(features, "row_nonfinite")[4] == pytest.approx(2 / 12)
    assert column(features, "row_nonfinite").sum() == pytest.approx(2 / 12)


def test_unknown_activations_are_other(samples) -> None:
    spec = samples.specs["branched"]
    features = token_features(samples.networks([spec], [samples.state(spec, 0)]))
    from weightnet.tokens import ACTIVATIONS

    assert ACTIVATIONS[features.activation[-1]] == "other"


def test_no_networks(samples) -> None:
    empty = samples.networks([], [])
    features = token_features(empty)
    assert features.values.shape == (0, len(FEATURES)) and len(features) == 0
