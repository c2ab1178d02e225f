"""The published rival reads plain chains, whatever their width, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from weightnet.evaluation.invariance import permuted
from weightnet.predictors import Predictor, build
from weightnet.predictors.nfn import WeightReader
from weightnet.symmetry import trace
from weightnet.tokens import Networks
from weightnet.zoo.architectures import build as architecture

TINY = {"channels": [2, 2], "hidden": 8, "fit": {"epochs": 2, "batch_size": 4}}
CHAINS = [
    {"width": 4, "depth": 2},
    {"width": 6, "depth": 3, "kernel": 5, "batchnorm": True},
    {"width": 4, "depth": 6, "tapered": True},
]
OTHERS = [
    ("cnn", {"width": 4, "depth": 4, "residual": True}),
    ("cnn", {"width": 4, "depth": 7}),
    ("cnn", {"width": 4, "depth": 2, "kernel": 7}),
    ("cnn", {"width": 4, "depth": 1}),
    ("cnn", {"width": 4, "depth": 2, "classes": 3}),
    ("resnet18", {"width": 0.0625, "stem": "small"}),
    ("mobilenet_v2", {"width": 0.125, "stem": "small"}),
    ("densenet121", {"width": 0.0625, "stem": "small"}),
]


def make(descriptions: list[tuple[str, dict]], copies: int = 1) -> Networks:
    torch.manual_seed(0)
    specs, states, rows = [], [], []
    for family, given in descriptions:
        arguments = {**given, "image_channels": 1}
        spec = trace(architecture(family, **arguments).eval(), torch.zeros(1, 1, 14, 14))
        for _ in range(copies):
            specs.append(spec)
            state = architecture(family, **arguments).state_dict()
            for name, value in state.items():
                if "running" in name:
                    value.uniform_(0.5, 2.0)
            states.append(state)
            rows.append({"run": f"{len(rows):016x}", "family": family, "task": "digits"})
    frame = pd.DataFrame(rows).assign(**{"property.test_accuracy": np.linspace(0, 1, len(rows))})
    return Networks.from_states(frame, specs, states)


@pytest.fixture(scope="module")
def chains() -> Networks:
    return make([("cnn", arguments) for arguments in CHAINS], copies=4)


@pytest.fixture(scope="module")
def fitted(chains: Networks) -> Predictor:
    pytest.importorskip("nfn", reason="an optional extra")
    return build("nfn", TINY, ["test_accuracy"], 0).fit(chains, chains)


def test_accepts_chains_only(chains: Networks) -> None:
    predictor = build("nfn", TINY, ["test_accuracy"], 0)
    assert predictor.accepts(chains).all()
    others = make(OTHERS)
    assert not predictor.accepts(others).any()
    with pytest.raises(ValueError, match="must be given chains of at most 7 layers"):
        WeightReader(predictor.config).batches(others, training=False)


def test_without_the_package_the_error_says_how_to_get_it(
    chains: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "nfn", raising=False)
    with pytest.raises(ValueError, match=r"must have the package nfn.*pip install -e '\.\[nfn\]'"):
        build("nfn", TINY, ["test_accuracy"], 0).fit(chains, chains)


def test_folding_and_padding_keep_the_function(chains: Networks) -> None:
    reader = WeightReader(build("nfn", TINY, ["test_accuracy"], 0).config)
    x = torch.randn(3, 1, 14, 14)
    for stack in chains.stacks():
        arguments = CHAINS[stack.members[0] // 4]
        if arguments.get("tapered"):
            continue
        module = architecture("cnn", **arguments, downsample="stride").eval()
        module.load_state_dict(chains.state(int(stack.members[0])), strict=False)
        weights, biases = reader._read(stack)
        y = x
        for first, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
            stride = 2 if first in {0, arguments["depth"] // 2} else 1
            y = torch.relu(
                torch.nn.functional.conv2d(
                    y, torch.from_numpy(weight[0]), torch.from_numpy(bias[0]), stride, padding=2
                )
            )
        logits = y.mean(dim=(2, 3)) @ torch.from_numpy(weights[-1][0]).T
        logits = logits + torch.from_numpy(biases[-1][0])
        with torch.no_grad():
            torch.testing.assert_close(logits, module(x), rtol=1e-4, atol=1e-5)


def test_permuted_neurons_change_nothing(fitted: Predictor, chains: Networks) -> None:
    generator = torch.Generator().manual_seed(1)
    states = [permuted(chains.spec(i), chains.state(i), generator) for i in range(len(chains))]
    copies = Networks.from_states(chains.frame, dict(chains.specs), states)
    before, after = fitted.predict(chains).mean, fitted.predict(copies).mean
    assert before.std() > 0
    np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-5)


def test_a_network_alone_and_in_a_batch(fitted: Predictor, chains: Networks) -> None:
    together = fitted.predict(chains).mean
    for i in (0, 5, 11):
        alone = fitted.predict(chains.select([i])).mean
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_save_and_load_change_nothing(fitted: Predictor, chains: Networks, tmp_path: Path) -> None:
    fitted.save(tmp_path / "saved")
    loaded = Predictor.load(tmp_path / "saved")
    assert np.array_equal(loaded.predict(chains).mean, fitted.predict(chains).mean)
