"""A corpus of bad inputs to every command: each is refused with exit code 2 and a message that
says why, without a traceback, and no file is made, changed or lost."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn
from typer.testing import CliRunner

from weightnet.cli import app
from weightnet.importing import check_zoo
from weightnet.zoo.architectures import build

SMALL = {"width": 4, "depth": 2, "size": 8}
CNN = ("--architecture", "cnn", "--architecture-args", json.dumps(SMALL))
KEY = "blocks.0.conv.weight"
BYTES = "content of a file that nobody may lose"


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


torch.manual_seed(0)
STATE = dict(build("cnn", **SMALL).state_dict())
OTHER = torch.ones(2, 3)
GOOD, SAFE = saved(STATE), save(STATE)


class Evil:
    """Pickled, it is a call that whoever unpickles it makes."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("evil",)


def headed(header: dict[str, Any] | bytes, data: bytes = bytes(4)) -> bytes:
    """A .safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def claiming(shape: list[int], dtype: str = "F32", end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def zipped(size: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(size))
    return stream.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "empty.pt": (b"", "it is empty"),
    "empty.safetensors": (b"", "it is empty"),
    "text.pt": (b"hello", "neither a zip archive nor a pickle"),
    "text.safetensors": (b"hello, this is text", "must be a safetensors file"),
    "cut.pt": (GOOD[: len(GOOD) // 2], "it was cut off or damaged"),
    "cut.safetensors": (SAFE[:-7], "must be a safetensors file"),
    "header.safetensors": (b"\xff" * 8 + b"{}", "must be a safetensors file"),
    "zip.pt": (b"PK\x03\x04", "must be a whole zip archive"),
    "pickle.pt": (pickle.dumps(os.getcwd, protocol=2), "which are not loaded"),
    "module.pt": (saved(nn.Linear(2, 2)), "which are not loaded"),
    "list.pt": (saved([OTHER]), "it holds a list"),
    "tensor.pt": (saved(OTHER), "it holds one tensor"),
    "none.pt": (saved(None), "it holds a NoneType"),
    "dict.pt": (saved({}), "it holds a dict"),
    "settings.pt": (saved({"lr": 0.1}), "with the keys lr"),
    "several.pt": (saved({"a": {"x": OTHER}, "b": {"y": OTHER}}), "it holds several, a, b"),
    "sparse.pt": (saved({"a": OTHER.to_sparse()}), "a is sparse_coo"),
    "meta.pt": (saved({"a": torch.empty(9, device="meta")}), "a is without data"),
    "absurd.pt": (saved({"a": torch.ones(1).expand(1 << 20, 1 << 20)}), "at most 4 GiB"),
    "model.onnx": (b"x", "a checkpoint must end in"),
    "no_ending": (SAFE, "a checkpoint must end in"),
    "nan.pt": (saved({**STATE, KEY: STATE[KEY] * torch.nan}), "36 of 36 in blocks.0"),
    "infinite.safetensors": (save({**STATE, KEY: STATE[KEY] / 0}), "36 of 36 in blocks.0"),
    "complex.pt": (saved({**STATE, KEY: STATE[KEY] + 1j}), "is complex"),
    "shape.pt": (saved({**STATE, KEY: OTHER}), "of another shape: blocks.0.conv.weight (2, 3)"),
    "absent.pt": (b"", "there is no such file"),
    "huge.safetensors": (
        headed({"a": claiming([1 << 40, 1 << 20])}),
        "overflow computing buffer size",
    ),
    "negative.safetensors": (headed({"a": claiming([-1])}), "expected usize"),
    "overflow.safetensors": (
        headed({"a": claiming([1 << 63] * 2, end=0)}, b""),
        "overflow computing buffer size",
    ),
    "overlap.safetensors": (
        headed({"a": claiming([1]), "b": claiming([1])}),
        "invalid offset for tensor",
    ),
    "dtype.safetensors": (headed({"a": claiming([1], "F7")}), "invalid JSON in header"),
    "metadata.safetensors": (headed({"__metadata__": {"a": 1}}, b""), "expected a string"),
    "nothing.safetensors": (headed({}, b""), "must hold tensors, however: it holds none"),
    "deep.safetensors": (
        headed(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        "recursion limit exceeded",
    ),
    "coding.safetensors": (headed(b'{"\xff": 1}'), "invalid UTF-8 in header"),
    "endless.safetensors": (struct.pack("<Q", 1 << 62) + b"{", "header too large"),
    "hungry.safetensors": (struct.pack("<Q", 90_000_000) + b"{" * 1000, "invalid header length"),
    "short.safetensors": (SAFE[:100], "invalid header length"),
    "long.safetensors": (SAFE + b"xx", "file not fully covered"),
    "overflown.safetensors": (
        save({k: v.double() * 1e308 * 10 for k, v in STATE.items()}),
        "weights must be finite",
    ),
    "call.pt": (pickle.dumps(Evil()), "other objects, or is broken"),
    "call_inside.pt": (
        pickle.dumps({"a": Evil()}, protocol=2),
        "posix.mkdir, which are not loaded",
    ),
    "call_saved.pt": (saved({"a": Evil()}), "posix.mkdir, which are not loaded"),
    "bomb.pt": (zipped(200_000_000), "it is compressed"),
    "numbered.pt": (saved({1: OTHER, 2: OTHER}), "with the keys 1, 2"),
    "gzip.pt": (b"\x1f\x8b\x08\0\0", "neither a zip archive nor a pickle"),
    "tar.pt": (b"ustar" * 200, "neither a zip archive nor a pickle"),
    "zeros.pt": (bytes(4096), "neither a zip archive nor a pickle"),
    "\u4e16\u754c \xfc.pt": (b"nothing", "neither a zip archive nor a pickle"),
}

SPECIAL = {
    "loop.pt": "loop.pt",
    "dangling.safetensors": "nowhere",
    "device.pt": "/dev/zero",
    "folder.pt": "junk",
}

SYMMETRY: list[tuple[tuple[str, ...], str]] = [
    ((), "Missing argument"),
    (("nothing",), "architecture must be one of cnn"),
    (("",), "architecture must be one of cnn"),
    (("cnn\x07",), "did you mean cnn?"),
    (("x" * 5000,), "architecture must be one of cnn"),
    (("os:system",), "must be built from its arguments"),
    (("os:getcwd",), "must return a torch.nn.Module"),
    (("torch.nn:Linear",), "must be built from its arguments"),
    (("torch.nn:Nothing",), "must be importable"),
    (("a.b:c",), "No module named 'a'"),
    ((":",), "must be package.module:callable"),
    (("a:",), "must be package.module:callable"),
    ((":b",), "must be package.module:callable"),
    (("../x:y",), "must be package.module:callable"),
    (("cnn", "--width", "nan"), "must be built from its arguments"),
    (("cnn", "--width", "x"), "Invalid value for '--width'"),
    (("resnet18", "--width", "-1"), "width must be positive"),
    (("resnet18", "--width", "0"), "width must be positive"),
    (("resnet18", "--width", "inf"), "cannot convert float infinity"),
    (("resnet18", "--stem", "tiny"), "stem must be imagenet or small"),
    (("cnn", "--stem", "small"), "unexpected keyword argument 'stem'"),
    (
        (
            "cnn",
            "--wings",
        ),
        "No such option",
    ),
]
SHAPES = {
    "1,8": "Output size is too small",
    "1,8,8,8": "Expected 3D",
    "3,8,8": "Invalid channel dimensions",
    "0,8,8": "--input must be positive numbers",
    "-1,8,8": "--input must be positive numbers",
    "1;8;8": "--input must be positive numbers",
    ",": "--input must be positive numbers",
    "²,8,8": "--input must be positive numbers",
    "1,999999999,8": "--input must be positive numbers",
    "9" * 5000: "--input must be positive numbers",
}
ARGUMENTS = {
    "{": "--architecture-args must be JSON",
    "": "--architecture-args must be JSON",
    "\x00": "--architecture-args must be JSON",
    '{"a":' * 2000: "--architecture-args must be JSON",
    '{"width": ' + "9" * 5000 + "}": "--architecture-args must be JSON",
    "null": "must be a JSON object",
    "7": "must be a JSON object",
    "[]": "must be a JSON object",
    '"x"': "must be a JSON object",
    '{"width": "wide"}': "must be built from its arguments",
    '{"width": -4}': "width and depth must be positive",
    '{"width": 0}': "width and depth must be positive",
    '{"width": 1e99}': "must be built from its arguments",
    '{"width": NaN}': "must be built from its arguments",
    '{"width": [4]}': "must be built from its arguments",
    '{"width": null}': "must be built from its arguments",
    '{"width": true}': "must be built from its arguments",
    '{"width": {"a": 1}}': "must be built from its arguments",
    '{"width": 99999999999}': "must be built from its arguments",
    '{"depth": 0}': "width and depth must be positive",
    '{"depth": 1.5}': "must be built from its arguments",
    '{"activation": "square"}': "activation must be one of relu",
    '{"wings": 2}': "unexpected keyword argument 'wings'",
    '{"size": 0}': "must be built from its arguments",
    '{"size": "big"}': "must be built from its arguments",
    '{"image_channels": 0}': "must have a known symmetry",
}
TO = ("out.safetensors", *CNN)
CALLS: list[tuple[tuple[str, ...], str]] = [
    ((), "Usage"),
    (("teleport",), "No such command"),
    (("predict", *CNN), "Missing argument"),
    (("predict", "good.pt"), "Missing option '--architecture'"),
    (("predict", "good.pt", *CNN, "--json", "--csv"), "one of --json and --csv may be given"),
    (("predict", "good.pt", *CNN, "--predictor", "nowhere"), "must hold a saved predictor"),
    (("predict", "good.pt", *CNN, "--predictor", "good.pt"), "must hold a saved predictor"),
    (("predict", "good.pt", *CNN, "--predictor", "junk"), "must have format 1"),
    (("predict", "*", *CNN), "there is no such file"),
    (("predict", ".", *CNN), "there is no such file"),
    (("predict", "good.pt", "--architecture", "cnn"), "missing: blocks.2.conv.weight"),
    (("canonicalize", "good.pt", "out.pt", *CNN), "a checkpoint is written as .safetensors"),
    (("canonicalize", "good.pt", "junk", *CNN), "a checkpoint is written as .safetensors"),
    (
        ("canonicalize", "good.pt", "no/a.safetensors", *CNN),
        "must be a file in an existing folder",
    ),
    (("canonicalize", "good.pt", "a.safetensors/", *CNN), "must be a file in an existing folder"),
    (("canonicalize", "good.pt", "/proc/a.safetensors", *CNN), "must be writable"),
    (("canonicalize", "good.pt", *CNN), "Missing argument"),
    (("canonicalize", "good.pt", *TO, "--order", "shuffle"), "is not one of 'sort', 'align'"),
    (("canonicalize", "good.pt", *TO, "--order", "align"), "a reference must come"),
    (("canonicalize", "good.pt", *TO, "--reference", "good.pt"), "a reference must come"),
    (
        ("canonicalize", "good.pt", *TO, "--order", "align", "--reference", "absent.pt"),
        "absent.pt must be a checkpoint file",
    ),
    (
        ("canonicalize", "good.pt", *TO, "--order", "align", "--reference", "nan.pt"),
        "weights must be finite",
    ),
    (("permute", "nan.pt", *TO), "weights must be finite"),
    (("permute", "good.pt", *TO, "--seed", "x"), "Invalid value for '--seed'"),
    (("permute", "good.pt", *TO, "--seed", "9" * 40), "Invalid value for '--seed'"),
    (("permute", "good.pt", *TO, "--seed", "-1"), "Invalid value for '--seed'"),
    (("permute", "good.pt", "good.pt", *CNN), "a checkpoint is written as .safetensors"),
    (("inspect",), "Missing argument"),
    (("inspect", "nan.pt", *CNN), "weights must be finite"),
    (("inspect", "good.pt", *CNN, "--histogram", "no/where.png"), "no/where.png"),
    (("inspect", "good.pt", *CNN, "--histogram", "junk"), "junk"),
    (("inspect", "good.pt", *CNN, "--histogram", "x.exe"), "x.exe"),
    (("import", "junk"), "Missing option '--name'"),
    (("import", "junk", "--name", "cnn"), "--name must not be a family of the project"),
    (("import", "junk", "--name", "../x"), "--name must be small letters"),
    (("import", "junk", "--name", ""), "--name must be small letters"),
    (("import", "junk", "--name", "Mine"), "--name must be small letters"),
    (("import", "junk", "--name", "x" * 99), "--name must be small letters"),
    (("import", "nowhere", "--name", "mine"), "params.yaml must exist"),
    (("ablate", "nothing"), "ablations must be named as in"),
    (("ablate", "no-trees"), "params.yaml must exist"),
    (("reference", "nowhere"), "metrics/scores.csv must exist"),
]
CORPUS = [
    *CALLS,
    *((("symmetry", *arguments), words) for arguments, words in SYMMETRY),
    *((("symmetry", "cnn", "--input", text), words) for text, words in SHAPES.items()),
    *((("symmetry", "cnn", "--architecture-args", text), w) for text, w in ARGUMENTS.items()),
    *((("predict", name, *CNN), words) for name, (_, words) in FILES.items()),
    *((("canonicalize", name, *TO), words) for name, (_, words) in FILES.items()),
    *((("inspect", name, *CNN), "there is no such file") for name in (*SPECIAL, "pipe.pt")),
    *((("permute", name, *TO), "there is no such file") for name in (*SPECIAL, "pipe.pt")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the bad files, a good one, and one that a command must not replace."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (content, _) in FILES.items():
        if name != "absent.pt":
            (folder / name).write_bytes(content)
    for name, target in SPECIAL.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.pt")
    (folder / "good.pt").write_bytes(GOOD)
    (folder / "out.safetensors").write_text(BYTES)
    (folder / "a.safetensors").mkdir()
    (folder / "junk").mkdir()
    (folder / "junk" / "predictor.json").write_text("{}")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_corpus_is_large() -> None:
    assert len({arguments for arguments, _ in CORPUS}) >= 200


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("arguments", "words"), CORPUS, ids=[str(number) for number in range(len(CORPUS))]
)
def test_a_bad_input_is_refused_in_words(
    arguments: tuple[str, ...], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = files(folder)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})
    said = " ".join(result.output.split())
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2, said
    assert words in said
    assert "Traceback" not in said
    assert "fault of the program" not in said
    assert files(folder) == before


CELLS = st.text(max_size=12) | st.sampled_from(
    ["cnn", "w.safetensors", "../w.safetensors", "/", "nan", "inf", "1e999", "{}", "[", '"', "\0"]
)


@settings(max_examples=100, deadline=None)
@given(
    columns=st.lists(CELLS | st.sampled_from(["file", "architecture", "run", "loss"]), max_size=5),
    rows=st.lists(st.lists(CELLS, max_size=5), max_size=4),
    raw=st.none() | st.binary(max_size=80),
)
def test_any_metadata_is_imported_or_refused(
    columns: list[str], rows: list[list[str]], raw: bytes | None
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "w.safetensors").write_bytes(SAFE)
        text = "\n".join(",".join(row) for row in [columns, *rows])
        content = text.encode("utf-8", "surrogatepass") if raw is None else raw
        (folder / "metadata.csv").write_bytes(content)
        try:
            zoo = check_zoo(folder, "mine")
        except ValueError as error:
            assert "however: " in str(error)
        else:
            assert len(zoo.rows) + len({problem.row for problem in zoo.problems}) == zoo.total
