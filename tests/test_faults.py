"""Full disks, damaged files, edited params, killed workers: one clear message, an exit code other
than 0, no half file, and after the fault is gone the same bytes as if it had never been."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from weightnet import command, compute

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location(
    "weightnet_killing_of_faults", ROOT / "tests" / "killing.py"
)
assert specification is not None
assert specification.loader is not None
killing = importlib.util.module_from_spec(specification)
sys.modules["weightnet_killing_of_faults"] = killing
specification.loader.exec_module(killing)

STAGES = {
    name: killing.Stage(name, arguments, outputs)
    for name, arguments, outputs in [
        ("generate_zoo", ("cnn",), ("data/recipes",)),
        ("train_zoo", ("cnn",), ("data/zoo",)),
        ("tokenize_zoo", ("cnn",), ("data/tokens",)),
        (
            "train_predictor",
            ("weightnet", "iid"),
            ("data/predictors", "data/predictions", "data/curves"),
        ),
        ("evaluate", (), ("metrics",)),
        ("plot", (), ("plots", "results")),
    ]
}
MODULES = {
    name: killing.load(ROOT / "stages" / f"{name}.py", f"weightnet_faults_{name}")
    for name in STAGES
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Stages run in this process, without workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEIGHTNET_JOBS", "1")
        patch.setenv("WEIGHTNET_DEVICE", "cpu")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run."""
    folder = tmp_path_factory.mktemp("faults")
    params = killing.tiny(["weightnet"])
    params["train_predictor"]["common"]["seeds"] = 1
    killing.smoke.write(folder / "params.yaml", params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in STAGES:
            run(name)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to harm, as the working directory."""
    copy = Path(shutil.copytree(finished, tmp_path / "work"))
    monkeypatch.chdir(copy)
    return copy


def run(name: str) -> None:
    MODULES[name].main(*STAGES[name].arguments)


def fails(capsys: pytest.CaptureFixture[str], name: str, code: int) -> str:
    """Run a stage that must fail; return its message, which leaves nothing temporary."""
    with pytest.raises(SystemExit) as stopped:
        run(name)
    message = capsys.readouterr().err
    assert stopped.value.code == code, message
    assert message.count("error: ") == 1, message
    assert "Traceback" not in message
    left = [name for name in killing.leftovers(Path()) if "checkpoints" not in name]
    assert not left
    return message


def content(name: str) -> dict[str, str]:
    return dict(killing.content(Path(), STAGES[name]))


def first_stack() -> Path:
    return sorted(Path("data/zoo/cnn").iterdir())[0]


def flip(path: Path, position: float = 0.5) -> None:
    """Change one bit of a file, whose size stays."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


FAULTS = {
    "generate_zoo": (errno.ENOSPC, "must have room on its disk"),
    "train_zoo": (errno.ENOSPC, "must have room on its disk"),
    "tokenize_zoo": (errno.EDQUOT, "must have room on its disk"),
    "train_predictor": (errno.ENOSPC, "must have room on its disk"),
    "evaluate": (errno.EROFS, "must be readable and writable"),
    "plot": (errno.EIO, "must be usable"),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_disk_that_fails_late_leaves_no_half_file(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number, words = FAULTS[name]
    expected = content(name)
    if name == "train_zoo":  # nothing else would have to be written
        shutil.rmtree(first_stack())

    def fault(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("weightnet.durable.synchronize", fault)
        message = fails(capsys, name, 1)
    assert words in message
    assert "run the same command again to continue" in message
    assert content(name).items() <= expected.items()
    run(name)
    assert content(name) == expected


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """A file system of its own as data/zoo, where that is allowed; call it to mount it anew."""

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", "data/zoo"]
        if (
            shutil.which("mount") is None
            or subprocess.run(command, capture_output=True).returncode
        ):
            pytest.skip("mounting is not allowed here")

    mount("size=64k")
    yield mount
    subprocess.run(["umount", str(folder / "data/zoo")], check=True)


def test_a_full_disk_and_one_that_is_read_only(
    small_disk: Callable[[str], None], folder: Path, finished: Path, capsys: Any
) -> None:
    assert "must have room on its disk" in fails(capsys, "train_zoo", 1)
    expected = killing.content(finished, STAGES["train_zoo"])
    assert content("train_zoo").items() < expected.items()  # a stack may have had room
    small_disk("remount,ro,size=9m")
    assert "must be readable and writable" in fails(capsys, "train_zoo", 1)
    small_disk("remount,rw,size=9m")
    run("train_zoo")
    assert content("train_zoo") == expected


@pytest.mark.parametrize("name", STAGES)
def test_a_file_where_the_output_folder_belongs(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path(STAGES[name].outputs[0])
    shutil.rmtree(place)
    place.write_text("mine")
    message = fails(capsys, name, 1)
    assert str(place) in message
    assert place.read_text() == "mine"


@pytest.mark.parametrize("harm", [flip, cut])
@pytest.mark.parametrize("file", ["weights.safetensors", "networks.parquet", "manifest.json"])
def test_a_damaged_stack_is_refused_downstream_and_trained_again_alone(
    file: str, harm: Callable[[Path], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, stack = content("train_zoo"), first_stack()
    others = killing.whole_stacks(Path(), STAGES["train_zoo"])
    others.pop(str(stack / "manifest.json"))
    harm(stack / file)
    tokens = content("tokenize_zoo")
    message = fails(capsys, "tokenize_zoo", 2)
    assert f"{stack} must be a whole stack, however: it is damaged" in message
    assert content("tokenize_zoo") == tokens
    run("train_zoo")
    said = capsys.readouterr()
    assert f"{stack} is damaged: training it again" in said.err
    assert f"done 1 stacks; reused {len(others)} stacks" in said.out
    assert content("train_zoo") == expected
    assert killing.whole_stacks(Path(), STAGES["train_zoo"]).items() >= others.items()


@pytest.mark.parametrize("name", ["train_predictor", "evaluate", "plot"])
@pytest.mark.parametrize("file", ["networks", "specs", "tokens-00000"])
def test_a_cut_shard_is_refused_with_the_remedy(
    name: str, file: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = content(name)
    path = Path(f"data/tokens/cnn/{file}.parquet")
    cut(path)
    message = fails(capsys, name, 2)
    assert f"{path} must be a Parquet file" in message
    assert "tokenize_zoo" in message
    assert content(name).items() <= expected.items()


@pytest.mark.parametrize(
    ("name", "file", "maker"),
    [
        ("train_zoo", "data/recipes/cnn.parquet", "generate_zoo@cnn"),
        ("tokenize_zoo", "data/recipes/cnn.parquet", "generate_zoo@cnn"),
        ("train_predictor", "data/tokens/cnn/tokens-00000.parquet", "tokenize_zoo"),
        ("evaluate", "data/predictions/weightnet-iid.parquet", "train_predictor@weightnet-iid"),
        ("plot", "data/predictions/weightnet-iid.parquet", "train_predictor@weightnet-iid"),
    ],
)
def test_a_flipped_bit_is_refused_with_the_remedy(
    name: str, file: str, maker: str, folder: Path, capsys: Any
) -> None:
    expected, path = content(name), Path(file)
    column = pq.read_metadata(path).row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    flip(path, (start + column.total_compressed_size - 0.5) / path.stat().st_size)
    message = fails(capsys, name, 2)
    assert f"{file} must be a" in message
    assert f"dvc repro {maker}" in message
    assert content(name).items() <= expected.items()


@pytest.mark.parametrize(
    ("file", "columns"),
    [
        ("data/recipes/cnn.parquet", command.OWN_RECIPES),
        ("data/predictions/weightnet-iid.parquet", command.PREDICTIONS),
    ],
)
def test_a_bit_flipped_in_a_footer_is_refused_or_changes_nothing(
    file: str, columns: command.Columns, folder: Path
) -> None:
    path, generator = Path(file), random.Random(0)
    whole, before = path.read_bytes(), command.read_table(Path(file), "its_stage", columns)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[generator.randrange(footer, len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            after = command.read_table(path, "its_stage", columns)
        except ValueError as error:
            assert str(path) in str(error)
            assert "dvc repro its_stage" in str(error)
            refused += 1
        else:
            assert after.equals(before)
    assert refused > 50


@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_predictor_is_refused_with_the_remedy(
    harm: Callable[[Path], None], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = content("evaluate")
    for path in sorted(Path("data/predictors/weightnet-iid/seed0").glob("*.safetensors")):
        whole = path.read_bytes()
        harm(path)
        message = fails(capsys, "evaluate", 2)
        assert "data/predictors/weightnet-iid/seed0" in message
        assert path.name in message
        path.write_bytes(whole)
    assert content("evaluate") == expected


@pytest.mark.parametrize("harm", [flip, cut])
def test_a_damaged_checkpoint_is_not_continued(
    harm: Callable[[Path], None],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = content("train_predictor")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("weightnet.predictors.Predictor.save", interrupt)
        with pytest.raises(SystemExit) as stopped:
            run("train_predictor")
    assert stopped.value.code == 130
    for checkpoint in Path("data/checkpoints").rglob("*.safetensors"):
        harm(checkpoint)
    run("train_predictor")
    assert "is damaged" in caplog.text
    assert "this fit starts anew" in caplog.text
    assert content("train_predictor") == expected
    assert not killing.leftovers(Path())


PREDICTED = "data/predictions/weightnet-iid.parquet"
HEAD = "predictor,split,property,subset,metric,value,low,high,n\n"
BAD_FILES: list[tuple[str, str, Any, str]] = [
    *(
        ("generate_zoo", "params.yaml", content, words)
        for content, words in [
            (b"families: \xff\xfe", "can't decode byte"),
            (b"- 1", "it is list"),
            (b"\t- x", "cannot start any token"),
            (b"families: \0", "special characters are not allowed"),
            (b"families: [cnn]\nfamilies: [vgg11]", "while constructing a mapping"),
            (b"a: !!python/object/apply:os.mkdir [evil]", "could not determine a constructor"),
            ("folder", "no such file"),
            ("loop", "no such file"),
        ]
    ),
    *(
        ("train_zoo", "data/recipes/cnn.parquet", content, words)
        for content, words in [
            (pd.DataFrame({"x": [1]}), "it has no column run"),
            (b"run,stack,width", "is not a parquet file"),
            ("folder", "it has no rows"),
            ("loop", "it is missing"),
        ]
    ),
    *(
        (stage, PREDICTED, content, words)
        for stage in ("evaluate", "plot")
        for content, words in [
            (pd.DataFrame({"run": ["a"]}), "it has no column family"),
            (lambda table: table[:0], "it has no rows"),
            (lambda table: table.assign(predicted="wide"), "column predicted is not numbers"),
            (
                lambda table: table.assign(predicted=float("inf")),
                "column predicted has values that are not finite",
            ),
            (lambda table: table.assign(run=3), "column run is not text"),
            ("folder", "it has no rows"),
            ("loop", "it is missing"),
        ]
    ),
    (
        "evaluate",
        PREDICTED,
        lambda table: table.assign(run="unknown"),
        "a prediction must occur once",
    ),
    (
        "evaluate",
        PREDICTED,
        lambda table: pd.concat([table, table]),
        "a prediction must occur once",
    ),
    *(
        ("plot", f"metrics/{name}.csv", content, words)
        for name in ("scores", "audit", "importance", "agreement", "differences", "splits")
        for content, words in [
            (b"", "No columns to parse"),
            (b"\xff\0\x01" * 99, "can't decode byte"),
            (b"a,b\n1,2\n", "it has no column "),
            (HEAD.encode(), "metrics/"),
            (f"{HEAD}{'x,' * 8}x\n".encode(), "metrics/"),
            ("folder", "Is a directory"),
        ]
    ),
]


@pytest.mark.parametrize(
    ("name", "file", "content", "words"), BAD_FILES, ids=[str(i) for i in range(len(BAD_FILES))]
)
def test_a_bad_input_is_refused_in_words(
    name: str, file: str, content: Any, words: str, folder: Path, capsys: Any
) -> None:
    expected, path = killing.content(folder, STAGES[name]), Path(file)
    table = content(pd.read_parquet(path)) if callable(content) else content
    path.unlink()
    if isinstance(table, pd.DataFrame):
        table.to_parquet(path, index=False)
    elif isinstance(table, bytes):
        path.write_bytes(table)
    elif table == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name)
    with pytest.raises(SystemExit) as stopped:
        run(name)
    message = capsys.readouterr().err
    assert words in " ".join(message.split())
    assert stopped.value.code in (1, 2)
    assert message.count("error: ") == 1
    assert "Traceback" not in message
    assert "fault of the program" not in message
    assert killing.content(folder, STAGES[name]) == expected
    assert not Path("evil").exists()


def test_params_that_change_while_a_stage_runs_are_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, params = content("train_zoo"), Path("params.yaml").read_text()
    shutil.rmtree(first_stack())
    train = MODULES["train_zoo"].train

    def edited(*arguments: object) -> None:
        train(*arguments)
        changed = killing.smoke.read(Path("params.yaml"))
        changed["train_zoo"]["measure"]["noise"] = 0.9
        killing.smoke.write(Path("params.yaml"), changed)

    with monkeypatch.context() as patch:
        patch.setattr(MODULES["train_zoo"], "train", edited)
        message = fails(capsys, "train_zoo", 2)
    assert "params key train_zoo must stay as it is while a stage runs" in message
    Path("params.yaml").write_text(params)
    run("train_zoo")
    assert content("train_zoo") == expected


def test_a_stack_that_raises_does_not_take_its_neighbours_along(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = content("train_zoo")
    stacks = sorted(Path("data/zoo/cnn").iterdir())
    assert len(stacks) > 1
    shutil.rmtree("data/zoo/cnn")
    stack = MODULES["train_zoo"].plan_stacks.__globals__["Stack"]
    train = stack.train

    def first_fails(self: Any) -> None:
        if self.folder == stacks[0]:
            raise RuntimeError("no such kernel")
        train(self)

    with monkeypatch.context() as patch:
        patch.setattr(stack, "train", first_fails)
        message = fails(capsys, "train_zoo", 1)
    assert f"stack {stacks[0].name}: RuntimeError: no such kernel" in message
    assert f"1 failed; the other {len(stacks) - 1} are kept" in message
    assert sorted(Path("data/zoo/cnn").iterdir()) == stacks[1:]
    run("train_zoo")
    assert f"done 1 stacks; reused {len(stacks) - 1} stacks" in capsys.readouterr().out
    assert content("train_zoo") == expected


def test_a_worker_killed_while_the_next_starts_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(ProcessPoolExecutor):
        def _spawn_process(self) -> None:
            for process in self._processes.values():
                process.kill()
                self._shutdown_lock.release()  # the thread that closes the queue may wait for it
                while not self._call_queue._reader.closed:
                    time.sleep(0.01)
                self._shutdown_lock.acquire()
            super()._spawn_process()

    monkeypatch.setattr(compute, "ProcessPoolExecutor", Pool)
    with pytest.raises(BrokenProcessPool), compute.worker_pool(2):
        pass


def test_a_killed_worker_is_told_from_a_fault_of_the_program(folder: Path) -> None:
    expected = content("train_zoo")
    shutil.rmtree("data/zoo/cnn")
    process = killing.start(folder, STAGES["train_zoo"], jobs=2)
    deadline = time.monotonic() + 60
    workers: list[int] = []
    while not workers:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        for number in killing.processes(process.pid):
            command = Path(f"/proc/{number}/cmdline")
            if command.exists() and b"--multiprocessing-fork" in command.read_bytes():
                workers.append(number)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "one was killed, perhaps for want of memory" in errors
    assert "Traceback" not in errors
    killing.expect_alone(process.pid)
    run("train_zoo")
    assert content("train_zoo") == expected
