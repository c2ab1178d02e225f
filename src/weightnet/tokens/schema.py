"""What tells a file of this schema from others: its name and version in the file's metadata
(docs/SHARDS.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

SCHEMA_VERSION = 1
REMEDY = "run `dvc repro tokenize_zoo`"
MAX_ROW = b"weightnet.max_row"

_NAME, _VERSION = b"weightnet.schema", b"weightnet.version"


def metadata(name: str) -> dict[bytes, bytes]:
    """What a file of schema ``name`` (tokens, networks, specs) carries."""
    return {_NAME: name.encode(), _VERSION: str(SCHEMA_VERSION).encode()}


def check_schema(path: Path, carried: Mapping[bytes, bytes] | None, name: str) -> None:
    """Require that the metadata which ``path`` carries is that of schema ``name``.

    Raises:
        ValueError: if it is another schema or version, or none.
    """
    carried = carried or {}
    found = (carried.get(_NAME, b"none").decode(), carried.get(_VERSION, b"none").decode())
    if found != (name, str(SCHEMA_VERSION)):
        raise ValueError(
            f"{path} must have the schema {name} version {SCHEMA_VERSION}, however: it has "
            f"{found[0]} version {found[1]}; {REMEDY}"
        )
