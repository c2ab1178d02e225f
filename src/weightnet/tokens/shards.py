"""Reading tokens: Parquet shards of one or several families, memory-mapped, checked before they
are used.

The schema, its version and its guarantees are in docs/SHARDS.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from weightnet.durable import expect_digests
from weightnet.symmetry.spec import PermutationSpec
from weightnet.tokens.layout import rows, spec_id
from weightnet.tokens.networks import Networks, TokenPart
from weightnet.tokens.schema import MAX_ROW, REMEDY, check_schema
from weightnet.tokens.scratch import fits
from weightnet.tokens.tokenizer import tokenize
from weightnet.tokens.writer import REQUIRED


def read_networks(directories: Sequence[Path]) -> Networks:
    """Read the networks of one or several families. Tokens are read (memory-mapped) when first
    needed.

    Raises:
        ValueError: if a folder or file is missing, broken, of another schema version, or they
        disagree.
    """
    frames, specs, parts, places = [], {}, [], []
    for number, directory in enumerate(map(Path, directories)):
        if not directory.is_dir():
            raise ValueError(
                f"{directory} must be a folder of tokens, however: no such folder; {REMEDY}"
            )
        frame = _read_table(directory / "networks.parquet", "networks").to_pandas()
        missing = [name for name in REQUIRED if name not in frame]
        if missing:
            raise ValueError(
                f"{directory / 'networks.parquet'} must have the columns {', '.join(REQUIRED)}, "
                f"however: missing {', '.join(missing)}; {REMEDY}"
            )
        listed = _read_table(directory / "specs.parquet", "specs").to_pydict()
        try:
            here = {
                name: PermutationSpec.from_json(text)
                for name, text in zip(listed["spec"], listed["json"], strict=True)
            }
            damaged = [name for name, spec in here.items() if spec_id(spec) != name]
            if damaged:
                raise ValueError(f"spec {damaged[0]} has another content")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{directory / 'specs.parquet'} must hold specs, however: {error!r}; {REMEDY}"
            ) from None
        unknown = sorted(set(frame["spec"]) - set(here))
        if unknown:
            raise ValueError(
                f"{directory / 'specs.parquet'} must hold every spec, however: missing {unknown}; "
                f"{REMEDY}"
            )
        parts.append(_open_part(directory, frame, here))
        specs.update(here)
        frames.append(frame)
        places.append(np.stack([np.full(len(frame), number), np.arange(len(frame))], axis=1))
    if not frames:
        raise ValueError(
            "at least one folder of tokens must be given, however: none; name the families"
        )
    together = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
    return Networks(together, specs, tuple(parts), np.concatenate(places).astype(np.int64))


def iter_tokens(directory: Path) -> Iterator[pa.Table]:
    """Stream the tokens of one folder as tables of whole networks (with column ``run``), in order.

    Memory holds one row group and at most one network that reaches into it. Each file is read
    twice: first for its digest.

    Raises:
        ValueError: as `read_networks`.
    """
    for path in _shards(Path(directory)):
        with _open_parquet(path) as file:
            check_schema(path, file.schema_arrow.metadata, "tokens")
            expect_digests(path.parent, REMEDY, [path.name])
            rest: list[pa.Table] = []
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, use_threads=False)
                table.validate(full=True)
                _check_columns(path, table)
                last = _last_network(table)
                if last == 0 and rest and _run(table, 0) == _run(rest[-1], -1):
                    rest.append(table)
                    continue
                ready = pa.concat_tables([*rest, table.slice(0, last)])
                rest = [table.slice(last)]
                if ready.num_rows:
                    yield ready
            if rest:
                yield pa.concat_tables(rest)


def _read_table(path: Path, name: str) -> pa.Table:
    with _open_parquet(path) as file:
        check_schema(path, file.schema_arrow.metadata, name)
        table = _read(file)
    expect_digests(path.parent, REMEDY, [path.name])
    return table


def _read(file: pq.ParquetFile) -> pa.Table:
    """All of a file; an Arrow error if its text is no UTF-8, or an index points nowhere."""
    table = file.read().replace_schema_metadata(None)
    table.validate(full=True)
    return table


@contextmanager
def _open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file for a block that reads it; whatever is broken in it is a ValueError there."""
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path} must exist, however: no such file; {REMEDY}") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a Parquet file, however: {error}; {REMEDY}") from None


def _shards(directory: Path) -> list[Path]:
    """The shards of a folder, which must be numbered without a gap."""
    found = sorted(directory.glob("tokens-*.parquet"))
    expected = [directory / f"tokens-{number:05d}.parquet" for number in range(len(found))]
    if not found or found != expected:
        gap = next(
            (path for path in expected if path not in found), directory / "tokens-00000.parquet"
        )
        raise ValueError(f"{gap} must exist, however: no such file; {REMEDY}")
    return found


def _open_part(
    directory: Path, frame: pd.DataFrame, specs: Mapping[str, PermutationSpec]
) -> TokenPart:
    """Check the shards' footers against the table of networks; the tokens themselves are not read
    yet."""
    if not len(frame):
        raise ValueError(f"{directory} must hold a network, however: it holds none; {REMEDY}")
    paths = _shards(directory)
    total, max_row, size = 0, 0, 0
    for path in paths:
        with _open_parquet(path) as file:
            check_schema(path, file.schema_arrow.metadata, "tokens")
            text = file.schema_arrow.metadata.get(MAX_ROW, b"nothing").decode()
            if not text.isdecimal():
                raise ValueError(f"{path} must state its max_row, however: {text}; {REMEDY}")
            max_row = int(text)
            total += file.metadata.num_rows
            groups = range(file.metadata.num_row_groups)
            size += sum(file.metadata.row_group(group).total_byte_size for group in groups)
    counts = {name: rows(spec, max_row).count for name, spec in specs.items()}
    starts = np.concatenate([[0], np.cumsum(frame["spec"].map(counts).to_numpy(np.int64))])
    if total != starts[-1]:
        raise ValueError(
            f"the shards in {directory} must hold the {starts[-1]} rows of the networks in "
            f"networks.parquet, however: they hold {total}; {REMEDY}"
        )
    runs = frame["run"].to_numpy()

    def load() -> pa.Table:
        table = _keep(_read_shards(paths), size)
        first = table.column("run").take(pa.array(starts[:-1])).to_numpy()
        if not np.array_equal(first.astype(object), runs.astype(object)):
            raise ValueError(
                f"the shards in {directory} must be in the order of networks.parquet, "
                f"however: they are not; {REMEDY}"
            )
        return table.drop_columns("run")

    return TokenPart(load, starts.astype(np.int64), max_row)


def _read_shards(paths: Sequence[Path]) -> Iterator[pa.Table]:
    for path in paths:
        with _open_parquet(path) as file:
            table = _read(file)
        _check_columns(path, table)
        expect_digests(path.parent, REMEDY, [path.name])
        yield table


def _keep(tables: Iterator[pa.Table], size: int) -> pa.Table:
    """One table of several, decoded; if it is large, in a temporary file that is mapped."""
    if fits(size):
        return pa.concat_tables(list(tables)).unify_dictionaries()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "tokens.arrows"
        first = next(tables)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, first.schema) as stream:
            stream.write_table(first)
            del first
            for table in tables:
                stream.write_table(table)
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_stream(source).read_all().unify_dictionaries()


def _check_columns(path: Path, table: pa.Table) -> None:
    expected = ["run", *tokenize(PermutationSpec((), ()), {}).column_names]
    missing = [name for name in expected if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path} must have the columns {', '.join(expected)}, however: missing "
            f"{', '.join(missing)}; {REMEDY}"
        )


def _run(table: pa.Table, row: int) -> str:
    return str(table.column("run")[row].as_py())


def _last_network(table: pa.Table) -> int:
    """The row where the last network of a table begins."""
    runs = table.column("run").unify_dictionaries().combine_chunks().dictionary_encode()
    codes = runs.indices.to_numpy()
    changes = np.flatnonzero(codes[1:] != codes[:-1])
    return int(changes[-1]) + 1 if len(changes) else 0
