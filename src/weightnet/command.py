"""What every command shares: its section of params.yaml, its inputs and its outputs, and errors
without tracebacks."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from weightnet.durable import replace_file
from weightnet.lock import sole_writer
from weightnet.params import Model, parse, read_params

if TYPE_CHECKING:
    import pandas as pd

PARAMS_FILE = Path("params.yaml")
FAILURE, USAGE_ERROR = 1, 2
CONTINUE = "run the same command again to continue"
ORPHAN_SECONDS = 1.0  # between two looks at whether DVC still lives
RESEND_SECONDS = 0.02  # before a signal is sent again whose exception Python dropped

_seen: dict[tuple[str, ...], object] = {}  # what the command has read of params.yaml


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextmanager
def reported() -> Iterator[None]:
    """Turn an error into one message on standard error, and an exit code: 2 if it is the caller's
    (ValueError), 130 or 143 after SIGINT or SIGTERM, else 1.

    With WEIGHTNET_TRACEBACK=1 an error that nobody foresaw shows where it arose.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _seen.clear()
    try:
        with _signals():
            yield
    except ValueError as error:
        _stop(str(error), USAGE_ERROR)
    except KeyboardInterrupt as error:
        print(f"interrupted; {CONTINUE}", file=sys.stderr)
        raise SystemExit(143 if isinstance(error, Terminated) else 130) from None
    except OSError as error:
        _stop(describe_fault(error), FAILURE)
    except BrokenProcessPool:
        _stop(
            "worker processes must live until they have finished, however: one was killed, "
            "perhaps for want of memory; set WEIGHTNET_JOBS=1 if so; what was finished is kept: "
            f"{CONTINUE}",
            FAILURE,
        )
    except MemoryError:
        _stop(
            "memory must suffice, however: it did not; set WEIGHTNET_JOBS=1, or use a larger "
            f"machine, and {CONTINUE}",
            FAILURE,
        )
    except Exception as error:
        if os.environ.get("WEIGHTNET_TRACEBACK") == "1":
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        _stop(
            f"the command must finish, however: {type(error).__name__}: {error} "
            f"({Path(frame.filename).name}, line {frame.lineno}); if its inputs are whole, this "
            "is a fault of the program: WEIGHTNET_TRACEBACK=1 shows where",
            FAILURE,
        )


def conclude(
    title: str, *, done: str, reused: str = "none", skipped: str = "none", bad: str = "none"
) -> None:
    """Print the last line of a stage: what was done, reused, skipped and marked bad."""
    print(f"{title}: done {done}; reused {reused}; skipped {skipped}; marked bad {bad}")


def describe_fault(error: OSError) -> str:
    """An error of the operating system as requirement, fact and remedy."""
    place = error.filename or "the output"
    fact = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{place} must have room on its disk, however: {fact}; free some, and {CONTINUE}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{place} must be readable and writable, however: {fact}; make it so, and {CONTINUE}"
        )
    return f"{place} must be usable, however: {fact}; mend that, and {CONTINUE}"


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Be the only process that writes ``output``, from params that stay as they were read.

    Raises:
        ValueError: if another process writes it; or, at the end, if params.yaml says something
        else than at the start. DVC would take the result for one of the new params.
    """
    with sole_writer(output):
        yield
        for path, value in _seen.items():
            if _look_up(*path) != value:
                raise ValueError(
                    f"params key {'.'.join(path)} must stay as it is while a stage runs, however: "
                    "it has changed; run `dvc repro` again"
                )


@contextmanager
def _signals() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM; send a signal again whose exception fell into a destructor or
    a callback, where Python drops it; and if DVC started the command, end when DVC does, so that
    its next run finds nobody at work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> NoReturn:
        raise Terminated

    def send_again(dropped: sys.UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            report(dropped)
            return
        number = signal.SIGTERM if isinstance(dropped.exc_value, Terminated) else signal.SIGINT
        # from a thread and later: here it would be dropped as well
        threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), number)).start()

    report, sys.unraisablehook = sys.unraisablehook, send_again
    before = signal.signal(signal.SIGTERM, terminate)
    ended = threading.Event()
    if "DVC_STAGE" in os.environ:
        parent = os.getppid()
        if _adopted(parent):
            signal.signal(signal.SIGTERM, before)
            sys.unraisablehook = report
            raise Terminated  # DVC was killed while Python started

        def watch() -> None:
            while not ended.wait(ORPHAN_SECONDS):
                if os.getppid() != parent:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = report


def _adopted(parent: int) -> bool:
    """Whether ``parent`` is the system's process that takes over orphans, not the one that DVC
    started this command in."""
    try:
        if os.getsid(parent) != os.getsid(0):
            return True
        return parent == 1 and b"dvc" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:  # it has just ended, or lies outside of our view
        return os.getppid() != parent


def _stop(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code) from None


def load_section(model: type[Model], *path: str) -> Model:
    """Load and validate one section of params.yaml, named by its path of keys.

    Raises:
        ValueError: if the section is missing or wrong.
    """
    data = _look_up(*path)
    _seen[path] = data
    return parse(model, data, ".".join(path))


def _look_up(*path: str) -> object:
    data: object = read_params(PARAMS_FILE)
    for depth, key in enumerate(path):
        where = ".".join(path[: depth + 1])
        if not isinstance(data, dict) or key not in data:
            known = ", ".join(map(str, data)) if isinstance(data, dict) else "nothing"
            raise ValueError(
                f"params key {where} is required, however: it is missing (there are: {known})"
            )
        data = data[key]
    return data


def require(path: Path, stage: str) -> Path:
    """Return ``path`` if it exists.

    Raises:
        ValueError: naming the stage that makes it.
    """
    if not path.exists():
        raise ValueError(f"{path} must exist, however: it is missing; run `dvc repro {stage}`")
    return path


Columns = Mapping[str, Literal["text", "count", "number", "measurement"]]
"""What a table must have: text, whole numbers from 1, finite numbers, or numbers that may be
missing or infinite."""

RECIPES: Columns = {"run": "text", "stack": "text", "width": "number"}
OWN_RECIPES: Columns = {
    **RECIPES,
    **dict.fromkeys(("family", "task", "arguments", "optimizer", "initialization"), "text"),
    **dict.fromkeys(("batch_size", "steps", "train_images"), "count"),
    **dict.fromkeys(("seed", "augmentation"), "number"),
    **dict.fromkeys(("learning_rate", "weight_decay", "dropout", "label_noise"), "number"),
    "initialization_scale": "number",
}
PREDICTIONS: Columns = {
    **dict.fromkeys(("run", "family", "task", "part", "property"), "text"),
    **dict.fromkeys(("predicted", "seed"), "number"),
    **dict.fromkeys(("measured", "low", "high"), "measurement"),
}
SCORES: Columns = {
    **dict.fromkeys(("predictor", "split", "property", "subset", "metric"), "text"),
    **dict.fromkeys(("value", "low", "high", "n"), "measurement"),
}
DIFFERENCES: Columns = {
    **dict.fromkeys(("predictor", "rival", "split", "property", "subset", "metric"), "text"),
    **dict.fromkeys(("value", "low", "high", "n"), "measurement"),
}
SIZES: Columns = {
    "split": "text",
    **dict.fromkeys(("seed", "train", "validation", "test", "unused"), "number"),
}
AUDIT: Columns = {
    **dict.fromkeys(("predictor", "split", "family", "transformation", "property"), "text"),
    **dict.fromkeys(("largest", "relative", "tau", "tau_copies", "n"), "measurement"),
}
IMPORTANCE: Columns = {
    **dict.fromkeys(("family", "model", "property", "view"), "text"),
    **dict.fromkeys(("position", "importance"), "measurement"),
}
AGREEMENT: Columns = {
    **dict.fromkeys(("family", "model", "property"), "text"),
    **dict.fromkeys(("correlation", "top_tenth"), "measurement"),
}


def read_table(
    path: Path, stage: str, columns: Columns, *, unique: str = "", empty: bool = False
) -> pd.DataFrame:
    """Read the .parquet or .csv that ``stage`` made.

    Raises:
        ValueError: if it is missing or broken, or lacks what ``columns`` asks, or rows (unless it
            may be ``empty``), or repeats a value of the column ``unique``.
    """
    import pandas as pd

    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": _read_parquet,
        ".csv": pd.read_csv,
    }
    try:
        table = readers[path.suffix](require(path, stage))
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        if not path.exists():
            raise
        fact = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        reason = " ".join(fact.split())
        raise ValueError(
            f"{path} must be a whole {path.suffix} file, however: {reason}; remove it and run "
            f"`dvc repro {stage}`"
        ) from None
    expect_columns(table, path, stage, columns, unique=unique, empty=empty)
    return table


def _read_parquet(path: Path) -> pd.DataFrame:
    """Read what `write_table` wrote. Checksums guard its pages; the names of the columns, which
    are in its footer, are there twice.

    Raises:
        ValueError: or whatever pandas raises, if it is broken.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(path, page_checksum_verification=True)
    described = (table.schema.pandas_metadata or {}).get("columns")
    if described is not None:
        names = [column["field_name"] for column in described]
        odd = set(names) ^ set(table.column_names)
        odd |= {c["name"] for c in described} - {None, *names}
        if odd:
            raise ValueError(f"its footer tells two names of a column, such as {min(odd)}")
    return table.to_pandas()


def expect_columns(
    table: pd.DataFrame,
    path: Path,
    stage: str,
    columns: Columns,
    *,
    unique: str = "",
    empty: bool = False,
) -> None:
    """Refuse a ``table``, read from ``path``, that ``stage`` would not have made (see
    `read_table`).

    Raises:
        ValueError: saying what it lacks.
    """
    if fact := _lack(table, columns, unique, empty):
        raise ValueError(
            f"{path} must be as {stage} makes it, however: {fact}; remove it and run "
            f"`dvc repro {stage}`"
        )


def _lack(table: pd.DataFrame, columns: Columns, unique: str, empty: bool) -> str:
    """What ``table`` lacks of ``columns``, in words; nothing if nothing."""
    import numpy as np
    import pandas as pd

    if table.empty and not empty:
        return "it has no rows"
    for name, kind in columns.items():
        if name not in table:
            return f"it has no column {name}"
        if table.empty:  # which has no types
            continue
        values = table[name]
        if kind == "text":
            if not all(isinstance(value, str) for value in values):
                return f"column {name} is not text"
        elif not pd.api.types.is_numeric_dtype(values):
            return f"column {name} is not numbers"
        elif kind != "measurement" and not np.isfinite(values.to_numpy(dtype=float)).all():
            return f"column {name} has values that are not finite"
        elif kind == "count" and not (pd.api.types.is_integer_dtype(values) and min(values) >= 1):
            return f"column {name} has values that are not whole numbers from 1"
    if unique and table[unique].duplicated().any():
        return f"column {unique} repeats {table[unique][table[unique].duplicated()].iat[0]}"
    return ""


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a .parquet for `read_table`, whole or not at all, with a checksum of each page."""
    with replace_file(path) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)


def load_names(key: str) -> list[str]:
    """Load one of the matrix lists of params.yaml: families, predictors or splits.

    Raises:
        ValueError: if it is missing, empty, repeats a name, or is not a list of names.
    """
    names = read_params(PARAMS_FILE).get(key)
    _seen[(key,)] = names
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) for name in names)
        or len(set(names)) != len(names)
    ):
        raise ValueError(f"params key {key} must be a list of distinct names, however: {names!r}")
    return list(names)


def expect_only(folder: Path, names: list[str], stage: str) -> None:
    """Check that ``folder`` holds ``names`` and nothing else: what params no longer names must not
    leak into a result.

    Raises:
        ValueError: naming what is missing or left over.
    """
    found = {path.name.removesuffix(".parquet") for path in folder.glob("[!.]*")}
    missing, stale = sorted(set(names) - found), sorted(found - set(names))
    if missing:
        raise ValueError(
            f"{folder} must hold {', '.join(missing)}, however: it does not; "
            f"run `dvc repro {stage}`"
        )
    if stale:
        raise ValueError(
            f"{folder} must hold only what params.yaml names, however: it also holds "
            f"{', '.join(stale)}; remove it from there (DVC's cache keeps it)"
        )
