"""What every command shares: its section of params.yaml, and errors without tracebacks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightnet.params import Model, parse, read_params

PARAMS_FILE = Path("params.yaml")
USAGE_ERROR = 2


@contextmanager
def reported() -> Iterator[None]:
    """Turn an error of the caller's (ValueError) into one message on standard error and exit code
    2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        yield
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        raise SystemExit(130) from None


def load_section(model: type[Model], *path: str) -> Model:
    """Load and validate one section of params.yaml, named by its path of keys.

    Raises:
        ValueError: if the section is missing or wrong.
    """
    data: object = read_params(PARAMS_FILE)
    for depth, key in enumerate(path):
        where = ".".join(path[: depth + 1])
        if not isinstance(data, dict) or key not in data:
            known = ", ".join(map(str, data)) if isinstance(data, dict) else "nothing"
            raise ValueError(
                f"params key {where} is required, however: it is missing (there are: {known})"
            )
        data = data[key]
    return parse(model, data, ".".join(path))


def require(path: Path, stage: str) -> Path:
    """Return ``path`` if it exists.

    Raises:
        ValueError: naming the stage that makes it.
    """
    if not path.exists():
        raise ValueError(f"{path} must exist, however: it is missing; run `dvc repro {stage}`")
    return path


def load_names(key: str) -> list[str]:
    """Load one of the matrix lists of params.yaml: families, predictors or splits.

    Raises:
        ValueError: if it is missing, empty, repeats a name, or is not a list of names.
    """
    names = read_params(PARAMS_FILE).get(key)
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
