"""WeightNet from Python and `weightnet predict`, `inspect`: the reference works right after
installation, the documented example runs, and scikit-learn's habits hold."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from weightnet import WeightNet
from weightnet.cli import app
from weightnet.estimator import REFERENCE
from weightnet.inspection import describe_layers
from weightnet.predictors.novelty import LEVEL, Novelty
from weightnet.symmetry import permute, trace
from weightnet.zoo.architectures import build

ROOT = Path(__file__).parents[1]
SMALL = {"size": 14, "width": 8, "depth": 3}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def network(seed: int = 0, family: str = "cnn", **arguments: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(family, **(arguments or SMALL))


def run(*arguments: str) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, list(arguments))
    assert "Traceback" not in found.output
    assert found.exception is None or isinstance(found.exception, SystemExit)
    return found.exit_code, found.stdout, found.stderr


def test_the_documented_example_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "OWN_NETWORKS.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    found = runpy.run_path(str(tmp_path / "example.py"))
    assert len(found["vectors"]) == len(found["networks"])
    loaded = WeightNet.load("my-predictor").predict(found["networks"])
    pd.testing.assert_frame_equal(loaded, found["own"].predict(found["networks"]))


def test_the_reference_is_small_whole_and_has_a_card() -> None:
    files = [path for path in REFERENCE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10 << 20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    card = (REFERENCE / "MODEL_CARD.md").read_text(encoding="utf-8")
    for heading in ("Data", "Splits", "Figures", "Limits"):
        assert f"## {heading}" in card


@pytest.mark.parametrize("name", sorted(path.name for path in REFERENCE.glob("*.*")))
def test_a_reference_that_was_damaged_is_refused(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(REFERENCE, tmp_path / "reference"))
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    if name == "MODEL_CARD.md":  # nobody reads it but people
        WeightNet.load(folder)
        return
    with pytest.raises(ValueError, match="train it again"):
        WeightNet.load(folder)


def test_predictions_follow_the_function_not_the_order_of_neurons() -> None:
    module = network()
    spec = trace(module, torch.zeros(1, 1, 14, 14))
    generator = torch.Generator().manual_seed(1)
    other = permute(spec, spec.random(generator), module.state_dict())
    model = WeightNet.load()
    one = model.predict(module)
    two = model.predict(other, architecture="cnn", arguments=SMALL)
    assert np.allclose(one.to_numpy(float), two.to_numpy(float), atol=1e-5)
    half = {key: value.half() for key, value in other.items()}
    three = model.predict(half, architecture=module)
    assert np.allclose(one.to_numpy(float), three.to_numpy(float), atol=0.05)
    assert (one["test_accuracy_low"] <= one["test_accuracy"]).all()
    assert model.embed([module, module]).shape[0] == 2


def test_a_network_unlike_those_of_training_is_outside() -> None:
    generator = np.random.default_rng(0)
    views = {"embedding": generator.normal(size=(600, 8)), "size": generator.normal(size=(600, 2))}
    train = {name: values[:300] for name, values in views.items()}
    validation = {name: values[300:450] for name, values in views.items()}
    test = {name: values[450:] for name, values in views.items()}
    novelty = Novelty.fit(train, validation)
    assert 0 < (novelty.shares(test) <= LEVEL).mean() < 0.15
    far = {"embedding": test["embedding"], "size": test["size"] + 20}
    assert (novelty.shares(far) <= LEVEL).all()
    table = WeightNet.load().predict(network(family="resnet18", width=1.0, classes=1000))
    assert table["outside"].all()


def test_constructors_do_no_work_and_params_go_round() -> None:
    new = WeightNet("nothing of this name", seed=3, config={"width": "wrong"})
    assert new.get_params()["seed"] == 3
    same = WeightNet(**new.get_params())
    assert same.get_params() == new.get_params()
    assert new.set_params(seed=4) is new
    assert new.seed == 4
    with pytest.raises(ValueError, match="parameters must be among"):
        new.set_params(sead=4)
    with pytest.raises(ValueError, match="fitted or loaded first"):
        new.predict(network())
    with pytest.raises(ValueError, match="predictor must be one of"):
        new.fit([network()] * 2, pd.DataFrame({"a": [1.0, 2.0]}))
    with pytest.raises(ValueError, match="architecture must be given"):
        WeightNet.load().predict(network().state_dict())
    with pytest.raises(ValueError, match="must hold a saved predictor"):
        WeightNet.load("nowhere")


def test_predict_speaks_to_people_and_programs(tmp_path: Path) -> None:
    torch.save(network().state_dict(), "a.pt")
    torch.save({"module." + k: v for k, v in network(1).state_dict().items()}, "b.pt")
    Path("bad.pt").write_bytes(b"")
    options = ("--architecture", "cnn", "--architecture-args", json.dumps(SMALL))
    code, out, err = run("predict", "a.pt", "b.pt", *options)
    assert code == 0
    assert "test_accuracy" in out
    assert "90% interval" in out
    assert "stripped the prefix" in err
    code, out, _ = run("predict", "a.pt", "b.pt", "--json", *options)
    assert [row["network"] for row in json.loads(out)] == ["a.pt", "b.pt"]
    code, out, err = run("predict", "a.pt", "bad.pt", "--csv", *options)
    assert code == 1
    assert out.splitlines()[0].startswith("network,test_accuracy,test_accuracy_low")
    assert len(out.splitlines()) == 2
    assert "error: bad.pt must be a checkpoint file, however: it is empty" in err
    code, out, err = run("predict", "bad.pt", *options)
    assert (code, out) == (2, "")
    for wrong in (
        ("predict", "a.pt", "--architecture", "vgg11"),
        ("predict", "a.pt", "--architecture", "cnn", "--architecture-args", "{"),
        ("predict", "a.pt", "--json", "--csv", *options),
        ("predict", "a.pt", "--predictor", "nowhere", *options),
        ("inspect", "bad.pt", *options),
        ("inspect", "a.pt", "--histogram", "x.txt", *options),
    ):
        code, _, err = run(*wrong)
        assert code == 2
        assert err.count("error: ") == 1


def test_a_full_size_network_is_warned_of() -> None:
    torch.save(network(family="resnet18", classes=1000).state_dict(), "full.pt")
    code, _, err = run("predict", "full.pt", "--architecture", "resnet18")
    assert code == 0
    assert "warning: full.pt is unlike the networks" in err


def test_inspect_counts_and_draws() -> None:
    module = network(batchnorm=True, **SMALL)
    with torch.no_grad():
        module.get_parameter("blocks.1.conv.weight")[2] = 0
        module.get_parameter("blocks.0.norm.weight")[3] = 0
    torch.save(module.state_dict(), "net.pt")
    options = ("--architecture-args", json.dumps({**SMALL, "batchnorm": True}))
    code, out, _ = run(
        "inspect", "net.pt", "--architecture", "cnn", "--histogram", "h.png", *options
    )
    assert code == 0
    count = sum(p.numel() for p in module.parameters())
    flat = " ".join(out.split())
    assert f"{count:,} parameters" in flat
    assert "2 dead neurons" in flat
    assert Path("h.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_does_not_overflow() -> None:
    module = network(**SMALL)
    spec = trace(module, torch.zeros(1, 1, 14, 14))
    one = {key: value.double() for key, value in module.state_dict().items()}
    plain = describe_layers(spec, one)
    for factor in (1e200, 1e-200):
        layers = describe_layers(spec, {key: value * factor for key, value in one.items()})
        for column in ("norm", "spread"):
            assert np.allclose(layers[column] / factor, plain[column])
        assert (layers["dead"] == plain["dead"]).all()


def test_the_probing_predictor_takes_networks_too() -> None:
    networks = [network(seed) for seed in range(8)]
    fit = {"epochs": 1, "patience": 1}
    config = {"width": 8, "heads": 2, "blocks": 1, "points": 2, "fit": fit}
    model = WeightNet("weightnet_probe", config=config, preparation={"probes": {"count": 2}})
    model.fit(networks, pd.DataFrame({"order": np.arange(8.0)}))
    assert np.isfinite(model.predict(networks[0])["order"]).all()
    assert "outside" in model.predict(networks[0])
    files = model.predict(networks[0].state_dict(), architecture="cnn", arguments=SMALL)
    same = model.predict(networks[0], shape=(1, 14, 14))  # the probes have this size
    assert np.allclose(files["order"], same["order"])


def test_learned_probes_are_answered_by_modules_and_files_alike() -> None:
    networks = [network(seed) for seed in range(16)]
    fit = {"epochs": 1, "patience": 1}
    config = {"width": 8, "heads": 2, "blocks": 1, "points": 2, "fit": fit}
    config["learned_probes"] = {"per_class": 1, "steps": 2}
    model = WeightNet("weightnet_probe", config=config, preparation={"probes": {"count": 2}})
    measured = pd.DataFrame({"test_accuracy": np.linspace(0, 1, 16)})
    model.fit(networks, measured, shape=(1, 14, 14))
    modules = model.predict(networks[0], shape=(1, 14, 14))
    files = model.predict(networks[0].state_dict(), architecture="cnn", arguments=SMALL)
    assert np.allclose(files["test_accuracy"], modules["test_accuracy"])
    (learned,) = model.predictor_.probes.sets
    assert learned.images.shape == (30, 1, 14, 14)
