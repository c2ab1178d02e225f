"""The symmetry commands of `weightnet`: what they write loads, computes the same, and is equal for
permuted copies; what they refuse leaves no file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

from weightnet.cli import app
from weightnet.zoo.architectures import build

ARGUMENTS = {"width": 8, "depth": 3, "batchnorm": True, "residual": True}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return build("cnn", **ARGUMENTS).eval()


@pytest.fixture
def architecture() -> list[str]:
    return ["--architecture", "cnn", "--architecture-args", json.dumps(ARGUMENTS)]


@pytest.fixture
def checkpoint(module: nn.Module, tmp_path: Path) -> Path:
    torch.save(module.state_dict(), tmp_path / "in.pt")
    return tmp_path / "in.pt"


def outputs(module: nn.Module, path: Path) -> torch.Tensor:
    module.load_state_dict(load_file(path), strict=True)
    with torch.no_grad():
        found: torch.Tensor = module(torch.randn(3, 1, 14, 14, generator=torch.manual_seed(1)))
    return found


def test_permuted_copies_have_one_canonical_form(
    module: nn.Module, checkpoint: Path, architecture: list[str], tmp_path: Path
) -> None:
    out = [tmp_path / f"{name}.safetensors" for name in "abcdef"]
    save_file(module.state_dict(), out[5])
    expected = outputs(module, out[5])
    assert run("permute", checkpoint, out[0], *architecture, "--seed", 1).exit_code == 0
    assert run("permute", checkpoint, out[1], *architecture, "--seed", 2).exit_code == 0
    assert out[0].read_bytes() != out[1].read_bytes()
    assert run("canonicalize", out[0], out[2], *architecture).exit_code == 0
    assert run("canonicalize", out[1], out[3], *architecture).exit_code == 0
    assert out[2].read_bytes() == out[3].read_bytes()
    aligned = ["--order", "align", "--reference", checkpoint, "--no-scale"]
    assert run("canonicalize", out[0], out[4], *architecture, *aligned).exit_code == 0
    for path in out:
        torch.testing.assert_close(outputs(module, path), expected)
    found, original = load_file(out[4]), torch.load(checkpoint)
    assert all(torch.equal(found[key], original[key]) for key in original)


def test_folding(
    module: nn.Module, checkpoint: Path, architecture: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    result = run("canonicalize", checkpoint, out, *architecture, "--fold-batchnorm")
    assert result.exit_code == 0, result.stderr
    assert torch.all(load_file(out)["blocks.0.norm.running_mean"] == 0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--architecture", "cnm"], "architecture must be one of"),
        (["--architecture", "resnet18"], "must be built from its arguments"),
        (["--architecture-args", "{"], "must be JSON"),
        (["--architecture-args", '{"width": 4}'], "must fit the architecture"),
        (["--order", "align"], "reference must come"),
        (["--input", "3,x"], "must be positive numbers"),
    ],
)
def test_errors_leave_no_file(
    changed: list[str],
    words: str,
    checkpoint: Path,
    architecture: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = run("canonicalize", checkpoint, tmp_path / "out.safetensors", *architecture, *changed)
    assert result.exit_code == 2
    assert words in result.stderr + capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_table_of_spaces() -> None:
    result = run("symmetry", "resnet18", "--width", "0.25", "--stem", "small")
    assert result.exit_code == 0
    assert "12 spaces of 720 channels" in result.stdout
    assert "layer2.0.downsample.0" in result.stdout
    assert run("symmetry", "shufflenet_v2_x0_5").exit_code == 2


def test_help_is_quick() -> None:
    started = time.perf_counter()
    code = "import sys, weightnet.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert time.perf_counter() - started < 5
