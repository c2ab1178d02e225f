"""One writer for an output: a lock file with the process id and the start time of its owner.

The operating system drops the lock (flock) with the process that holds it, however that ends, so
a killed owner is noticed at once; the text in the file says who it is or was. The id alone would
not tell an owner from a later process that was given the same number, hence the start time.
Locks lie in data/.locks, outside of every folder that a stage depends on.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCKS = Path("data/.locks")
PATIENCE = 60.0  # seconds for an owner to end whose DVC was killed


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Hold the lock of ``output`` for the block. A dead owner's lock is taken over, and said.

    An owner whose DVC was killed is about to end: it is waited for.

    Raises:
        ValueError: if a living process holds it.
    """
    path = LOCKS / ("-".join(output.parts) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE
    while (descriptor := _lock(path)) is None:
        owner = _read(path)
        if not _orphaned(owner) or time.monotonic() > deadline:
            raise ValueError(_refusal(output, owner))
        time.sleep(0.2)
    try:
        owner = _read(path)
        if owner and owner["process"] != os.getpid():
            if owner["started"] is not None and started(owner["process"]) == owner["started"]:
                raise ValueError(_refusal(output, owner))
            print(
                f"{output}: process {owner['process']}, started {owner['since']}, ended without "
                "finishing it; taking over",
                file=sys.stderr,
            )
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_myself()).encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def started(process: int) -> str | None:
    """When a process was started, in the kernel's ticks since the machine was; None if there is no
    such process, or it has ended and only its name is left, or no /proc to look it up in."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
    return None if state in "ZX" else fields[18]


def _lock(path: Path) -> int | None:
    """Open and lock ``path``, the file that still bears this name once it is locked; None if
    another process holds the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):  # its owner removed it just now
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _myself() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    parent = os.getppid() if "DVC_STAGE" in os.environ else None
    return {
        "process": os.getpid(),
        "started": started(os.getpid()),
        "since": since,
        "parent": parent and [parent, started(parent)],
    }


def _orphaned(owner: dict[str, Any]) -> bool:
    """Whether DVC started the owner, and has ended before it. The owner notices within seconds
    (see command.py)."""
    parent = owner.get("parent")
    return parent is not None and started(parent[0]) != parent[1]


def _read(path: Path) -> dict[str, Any]:
    """What the owner wrote; nothing if it did not come to it."""
    try:
        owner = json.loads(path.read_text())
        parent = owner.get("parent") and [int(owner["parent"][0]), owner["parent"][1]]
        kept = {k: owner[k] for k in ("started", "since")}
        return {"process": int(owner["process"]), **kept, "parent": parent}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}


def _refusal(output: Path, owner: dict[str, Any]) -> str:
    who = f"process {owner['process']}, started {owner['since']}," if owner else "another process"
    remedy = f"`kill {owner['process']}`" if owner else "stop it"
    return (
        f"{output} must have one writer at a time, however: {who} is writing it; wait until it "
        f"has finished, or {remedy} and run the same command again"
    )
