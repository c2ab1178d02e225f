"""WeightNet: the same answer for permuted networks, in any company, and after saving."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import weightnet.predictors.weightnet as weightnet_module
import weightnet.tokens.scratch as scratch
from weightnet.predictors import Predictor, build
from weightnet.predictors.ranks import mean_tau
from weightnet.predictors.weightnet import (
    TokenReader,
    WeightNetConfig,
    _sample,
    segment_max,
    segment_mean,
    segment_softmax,
)
from weightnet.symmetry import permute, random_permutation, trace
from weightnet.tokens import Networks, ProbesConfig, probe_responses
from weightnet.zoo.architectures import build as build_architecture

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "cnn": {"width": 6, "depth": 3, "residual": True, "batchnorm": True},
    "resnet18": {"width": 1 / 32, "stem": "small", "size": 8, "image_channels": 1},
    "mobilenet_v2": {"width": 1 / 16, "stem": "small", "size": 8, "image_channels": 1},
    "densenet121": {"width": 1 / 32, "stem": "small", "size": 8, "image_channels": 1},
    "vgg11": {"width": 1 / 32, "stem": "small", "size": 8, "image_channels": 1},
    "resnet34": {"width": 1 / 32, "stem": "small", "size": 8, "image_channels": 1},
    "resnet50": {"width": 1 / 32, "stem": "small", "size": 8, "image_channels": 1},
    "vgg16": {"width": 1 / 32, "stem": "small", "size": 8, "image_channels": 1},
}
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "points": 2, "training_tokens": 4}


def make_networks(
    families: dict[str, int], *, seed: int, moved: bool = False, probes: int = 0
) -> Networks:
    """Networks whose property is the logarithm of the scale of their last layer."""
    generator = torch.Generator().manual_seed(seed)
    moves = torch.Generator().manual_seed(seed + 1)
    specs, states, rows, responses = [], [], [], []
    for family, count in families.items():
        arguments = {"classes": 10, **ARCHITECTURES[family]}
        module = build_architecture(family, **arguments)
        size = arguments.get("size", 14)
        spec = trace(module, torch.zeros(1, 1, size, size))
        inputs = ProbesConfig(count=probes).inputs((1, size, size))
        head = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        for _ in range(count):
            scale = float(torch.randn((), generator=generator))
            state = {
                name: torch.rand(tensor.shape, generator=generator) + 0.1
                if "running_var" in name
                else torch.randn(tensor.shape, generator=generator) * 0.3
                for name, tensor in module.state_dict().items()
                if tensor.is_floating_point()
            }
            state[f"{head[-1]}.weight"] *= np.exp(scale)
            if moved:
                state = dict(permute(spec, random_permutation(spec, moves), state))
            specs.append(spec)
            states.append(state)
            responses.append(probe_responses(module, spec, state, inputs) if probes else {})
            rows.append({"run": f"{len(rows):016x}", "family": family, "property.scale": scale})
    frame = pd.DataFrame(rows).assign(task="digits")
    return Networks.from_states(frame, specs, states, responses=responses if probes else None)


@pytest.fixture(scope="module")
def fitted() -> Predictor:
    config = {**SMALL, "fit": {"epochs": 12, "learning_rate": 0.01, "batch_size": 16}}
    train, validation = (make_networks({"cnn": n}, seed=n) for n in (120, 40))
    return build("weightnet", config, ["scale"], 0).fit(train, validation)


def test_learns_what_the_weights_say(fitted: Predictor) -> None:
    test = make_networks({"cnn": 60}, seed=7)
    assert mean_tau(fitted.predict(test).mean, test.frame[["property.scale"]].to_numpy()) > 0.6


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_permuted_networks_get_the_same_prediction(fitted: Predictor, family: str) -> None:
    original = fitted.predict(make_networks({family: 3}, seed=3))
    moved = fitted.predict(make_networks({family: 3}, seed=3, moved=True))
    np.testing.assert_allclose(moved.mean, original.mean, atol=1e-5)
    np.testing.assert_allclose(moved.high, original.high, atol=1e-4)


def test_the_probing_predictor_reads_responses_and_not_their_order() -> None:
    config = {**SMALL, "fit": {"epochs": 4, "learning_rate": 0.01, "batch_size": 16}}
    train, validation = (make_networks({"cnn": n}, seed=n, probes=4) for n in (40, 20))
    predictor = build("weightnet_probe", config, ["scale"], 0).fit(train, validation)
    for family in ("cnn", "mobilenet_v2"):
        original = predictor.predict(make_networks({family: 2}, seed=3, probes=4))
        moved = predictor.predict(make_networks({family: 2}, seed=3, probes=4, moved=True))
        np.testing.assert_allclose(moved.mean, original.mean, atol=1e-4)
    with pytest.raises(ValueError, match="must carry probe responses"):
        predictor.predict(make_networks({"cnn": 2}, seed=3))


def test_a_prediction_does_not_depend_on_the_rest_of_the_batch(fitted: Predictor) -> None:
    together = make_networks({"cnn": 2, "resnet18": 2, "densenet121": 1}, seed=5)
    alone = [fitted.predict(together.select([i])).mean for i in range(len(together))]
    np.testing.assert_allclose(fitted.predict(together).mean, np.concatenate(alone), atol=1e-5)


def test_large_arrays_in_files_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = make_networks({"cnn": 20, "resnet18": 3}, seed=5, probes=4)
    reads = []
    for limit, block in ((scratch.LIMIT, scratch.BLOCK), (64, 700)):
        monkeypatch.setattr(scratch, "LIMIT", limit)
        monkeypatch.setattr(scratch, "BLOCK", block)
        monkeypatch.setattr(weightnet_module, "BLOCK", block)
        reader = TokenReader(WeightNetConfig(), responses=True)
        reader.prepare(networks)
        batch = reader.batches(networks, training=False).collate(torch.arange(len(networks)))
        scales = [one.standardizer for one in (reader.tokens, reader.statistics)]
        arrays = [batch.values.numpy(), batch.kind.numpy(), batch.statistics.numpy()]
        arrays += [array for one in scales if one for array in (one.center, one.scale)]
        reads.append([array.tobytes() for array in arrays])
    assert reads[0] == reads[1]


def test_networks_that_are_read_together_are_read_once_and_as_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    networks = make_networks({"cnn": 6, "resnet18": 3}, seed=5, probes=4)
    computed: list[Networks] = []
    read = TokenReader._read
    monkeypatch.setattr(
        TokenReader, "_read", lambda self, of: computed.append(of) or read(self, of)
    )

    def batch_of(selection: Networks, fitted_to: Networks) -> list[bytes]:
        reader = TokenReader(WeightNetConfig(), responses=True)
        reader.prepare(fitted_to)
        batch = reader.batches(selection, training=False).collate(torch.arange(len(selection)))
        tensors = (batch.values, batch.kind, batch.segment, batch.place, batch.statistics)
        return [tensor.numpy().tobytes() for tensor in tensors]

    together = networks.read_together()
    for train, test in (([8, 0, 2, 6, 3], [1, 7]), ([1, 4, 5, 7], [0, 8])):
        alone = batch_of(networks.select(test), networks.select(train))
        assert batch_of(together.select(test), together.select(train)) == alone
    assert sum(one is networks for one in computed) == 1
    assert len(computed) == 5


def test_saved_and_loaded_it_predicts_the_same(fitted: Predictor, tmp_path: Path) -> None:
    test = make_networks({"cnn": 5}, seed=9)
    fitted.save(tmp_path / "weightnet")
    loaded = Predictor.load(tmp_path / "weightnet").predict(test)
    assert np.array_equal(loaded.mean, fitted.predict(test).mean)


@pytest.mark.parametrize(
    "change",
    [{"intra_layer": False}, {"cross_layer": False}, {"statistics": False}, {"tokens": "raw"}],
)
def test_runs_without_each_part(change: dict[str, Any]) -> None:
    config = {**SMALL, **change, "fit": {"epochs": 1}}
    networks = make_networks({"cnn": 12}, seed=1)
    prediction = build("weightnet", config, ["scale"], 0).fit(networks, networks).predict(networks)
    assert np.isfinite(prediction.mean).all()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        build("weightnet", {"width": 10, "heads": 4}, ["scale"], 0)


def test_segment_operations_equal_loops() -> None:
    values = torch.randn(9, 3)
    segment = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    for k in range(3):
        own = values[segment == k]
        torch.testing.assert_close(segment_mean(values, segment, 3)[k], own.mean(0))
        assert torch.equal(segment_max(values, segment, 3)[k], own.amax(0))
        softmax = segment_softmax(values, segment, 3)[segment == k]
        torch.testing.assert_close(softmax, own.softmax(0))


def test_sampling_keeps_small_groups_and_bounds_large_ones() -> None:
    sizes = torch.tensor([3, 10, 1])
    kept = _sample(sizes, 4)
    assert [int(((kept >= a) & (kept < b)).sum()) for a, b in ((0, 3), (3, 13), (13, 14))] == [
        3,
        4,
        1,
    ]
    draws = {tuple(_sample(sizes, 4).tolist()) for _ in range(20)}
    assert len(draws) > 1
