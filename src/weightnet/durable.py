"""Files and folders that appear whole or not at all: written beside their place, synchronized with
the disk, renamed. And folders that say when a file of theirs has changed since: digests.json.

What a killed process leaves beside them ends in ``.partial`` or ``.old`` and begins with a dot;
`sweep` removes it, when the next start has the output to itself (see lock.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

DIGESTS = "digests.json"


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path``; the file that is written there takes its place when the block
    succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        synchronize(temporary)
        os.replace(temporary, path)
        synchronize(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty sibling of ``folder`` that takes its place when the block succeeds."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        new.mkdir()
        yield new
        for path in (*new.rglob("*"), new):
            synchronize(path)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
        synchronize(folder.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path) -> None:
    """Write digests.json, the digest of every file that ``folder`` holds now: its last file."""
    (folder / DIGESTS).unlink(missing_ok=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    digests = {path.relative_to(folder).as_posix(): digest(path) for path in files}
    write_text(folder / DIGESTS, json.dumps(digests, indent=1, sort_keys=True) + "\n")


def expect_digests(folder: Path, remedy: str, names: Iterable[str] | None = None) -> None:
    """Require that the files of ``folder``, or those called ``names``, are as `write_digests` saw
    them.

    Raises:
        ValueError: naming one that is not, and the ``remedy``; or if there is no digests.json.
    """
    path = folder / DIGESTS
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} must exist, however: no such file; {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, however: {error}; {remedy}") from None
    if not isinstance(digests, dict):
        raise ValueError(f"{path} must hold digests by name, however: it does not; {remedy}")
    for name in digests if names is None else names:
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} must exist, however: no such file; {remedy}")
        if digests.get(name) != digest(file):
            raise ValueError(
                f"{file} must be as it was written, however: its digest is not that in {DIGESTS}; "
                f"{remedy}"
            )


def synchronize(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, name: str = "*") -> list[str]:
    """Remove what killed writers of ``folder/name`` left beside it; return the names."""
    left = [path for end in ("partial", "old") for path in folder.glob(f".{name}.{end}")]
    left += [path for end in ("partial", "old") for path in folder.glob(f".{name}.*.{end}")]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return sorted({path.name for path in left})


def expect_writable(folder: Path) -> None:
    """Make ``folder`` if need be, and write a file there: better now than after hours of work.

    Raises:
        OSError: if that fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".try.", suffix=".partial", dir=folder)
    try:
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
        os.unlink(name)
