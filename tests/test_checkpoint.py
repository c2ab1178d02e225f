"""Checkpoints as people save them are read; broken and hostile ones are refused by a sentence."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightnet import checkpoint
from weightnet.architecture import build_architecture, trace_architecture
from weightnet.checkpoint import CheckpointError, read_checkpoint, read_state

ARGUMENTS = {"size": 8, "width": 2, "depth": 2, "batchnorm": True}


@pytest.fixture
def module() -> nn.Module:
    return build_architecture("cnn", ARGUMENTS)


def weights() -> dict[str, torch.Tensor]:
    from weightnet.zoo.architectures import build

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("cnn", **ARGUMENTS).state_dict()


def test_all_ways_of_saving_give_the_same_weights(tmp_path: Path, module: nn.Module) -> None:
    state = weights()
    ways: dict[str, tuple[Any, str]] = {
        "plain.pt": (state, ""),
        "parallel.pth": ({f"module.{k}": v for k, v in state.items()}, "module."),
        "compiled.pt": ({f"_orig_mod.module.{k}": v for k, v in state.items()}, "_orig_mod."),
        "lightning.ckpt": (
            {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 3},
            "state_dict",
        ),
        "training.pt": (
            {"model": state, "ema": {"other": torch.ones(2)}, "optimizer": {"state": {}}},
            "'model'",
        ),
        "nested.pt": ({"run": {"weights": state}, "best": 0.9}, "run.weights"),
        "parameters.pt": (OrderedDict((k, nn.Parameter(v.float())) for k, v in state.items()), ""),
        "double.pt": ({k: v.double() for k, v in state.items()}, ""),
        "no_counter.pt": ({k: v for k, v in state.items() if "tracked" not in k}, ""),
    }
    for name, (saved, note) in ways.items():
        torch.save(saved, tmp_path / name)
        found, notes = read_state(tmp_path / name, module)
        assert all(torch.equal(found[k].float(), v) for k, v in state.items() if k in found)
        assert len(found) >= len(state) - 2
        assert note in " ".join(notes)
        assert bool(notes) == bool(note)
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "a.safetensors")
    for name in ("old.pt", "a.safetensors"):
        found, _ = read_state(tmp_path / name, module)
        assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.int64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_types_are_read_correctly(
    dtype: torch.dtype, suffix: str, tmp_path: Path, module: nn.Module
) -> None:
    state = {key: (10 * value).to(dtype) for key, value in weights().items()}
    path = tmp_path / f"net{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    found, notes = read_state(path, module)
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in found.items())
    assert found["head.weight"].dtype == torch.float32
    assert str(dtype).removeprefix("torch.") in notes[0]


class Evil:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def archive(content: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in content.items():
            file.writestr(name, data)
    return buffer.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for number, content in enumerate(
        (
            saved({"a": Evil(marker)}),
            saved({"a": Evil(marker)}, _use_new_zipfile_serialization=False),
            pickle.dumps(Evil(marker)),
            archive({"x/data.pkl": pickle.dumps(Evil(marker)), "x/version": b"3\n"}),
        )
    ):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="must") as refused:
            read_checkpoint(path)
        assert not marker.exists()
        if number == 0:
            assert "state_dict()" in str(refused.value)


WEIGHT = torch.ones(2, 3)
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty.pt": (b"", "empty"),
    "empty.safetensors": (b"", "empty"),
    "text.pt": (b"hello", "neither a zip archive nor a pickle"),
    "text.safetensors": (b"hello world, this is text", "safetensors"),
    "truncated.pt": (saved({"a": torch.ones(1000)})[:2000], "cut off"),
    "truncated_old.pt": (
        saved({"a": torch.ones(1000)}, _use_new_zipfile_serialization=False)[:2000],
        "PyTorch checkpoint",
    ),
    "pickle.pt": (pickle.dumps({"a": 1}), "must"),
    "zip.pt": (archive({"notes.txt": b"x"}), "PyTorch checkpoint"),
    "bomb.pt": (archive({"x/data/0": bytes(10_000_000)}, zipfile.ZIP_DEFLATED), "uncompressed"),
    "tensor.pt": (saved(WEIGHT), "one tensor"),
    "list.pt": (saved([WEIGHT]), "a list"),
    "number.pt": (saved(3), "a int"),
    "nothing.pt": (saved({}), "a dict"),
    "settings.pt": (saved({"lr": 0.1, "epoch": 3}), "the keys lr, epoch"),
    "several.pt": (saved({"gen": {"a": WEIGHT}, "disc": {"b": WEIGHT}}), "gen, disc"),
    "sparse.pt": (saved({"a": WEIGHT.to_sparse()}), "sparse"),
    "meta.pt": (saved({"a": torch.empty(9, device="meta")}), "without data"),
    "module.pt": (saved(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    "absurd.pt": (saved({"a": torch.ones(1).expand(1 << 20, 1 << 20)}), "at most 4 GiB"),
    "a.onnx": (b"x", ".safetensors"),
    "huge_header.safetensors": (b"\xff" * 8 + b"{}", "safetensors"),
    "lying.safetensors": (
        (97).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'.ljust(
            97
        ),
        "safetensors",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    content, fact = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(tmp_path / name)
    assert fact in str(refused.value)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    for name in ("none.pt", "folder.pt"):
        with pytest.raises(CheckpointError, match="no such file"):
            read_checkpoint(tmp_path / name)


def test_the_bound_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 1000)
    save_file({"a": torch.ones(1000)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="at most"):
        read_checkpoint(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_must_be_finite(value: float, tmp_path: Path, module: nn.Module) -> None:
    state = weights()
    state["head.weight"][0, 0] = value
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"1 of 20 in .* are NaN or infinite"):
        read_state(tmp_path / "net.pt", module)


def test_a_wrong_architecture_names_keys_and_the_closest(tmp_path: Path) -> None:
    save_file(build("resnet18"), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as refused:
        read_state(tmp_path / "a.safetensors", build_architecture("resnet34"))
    assert "missing: layer1.2.conv1.weight" in str(refused.value)
    assert "closest registered architecture is resnet18" in str(refused.value)
    with pytest.raises(CheckpointError, match=r"of another shape: fc\.weight .* arguments"):
        read_state(tmp_path / "a.safetensors", build_architecture("resnet18", {"classes": 10}))
    with pytest.raises(CheckpointError, match="unexpected: bn1"):
        read_state(tmp_path / "a.safetensors", nn.Linear(2, 2))


def build(name: str) -> dict[str, torch.Tensor]:
    module = build_architecture(name)
    return {key: torch.zeros(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("resnet19", "did you mean resnet18"),
        ("nowhere.net:Net", "importable"),
        ("os:nothing", "importable"),
        ("os:sep", "callable"),
        ("os:getcwd", "must return a torch.nn.Module"),
        ("../evil:run", "package.module:callable"),
        (":x", "package.module:callable"),
    ],
)
def test_unknown_architectures_are_refused(name: str, fact: str) -> None:
    with pytest.raises(ValueError, match="architecture") as refused:
        build_architecture(name)
    assert fact in str(refused.value)


def test_the_shape_of_inputs_is_found(tmp_path: Path) -> None:
    (tmp_path / "flat_net_of_test.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(3 * 26 * 26, 10))\n"
        "def odd():\n"
        "    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(3 * 77 * 77, 10))\n"
    )
    _, spec = trace_architecture("flat_net_of_test:make", path=tmp_path)
    assert [space.size for space in spec.spaces] == [3]
    with pytest.raises(ValueError, match="--input"):
        trace_architecture("flat_net_of_test:odd", path=tmp_path)
    trace_architecture("flat_net_of_test:odd", shape=(1, 79, 79), path=tmp_path)
