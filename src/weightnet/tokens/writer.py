"""Writing tokens: one family's networks as a folder of Parquet shards, set in place atomically.

Files are byte-deterministic: the same networks, in whatever order they arrive, give the same
bytes. docs/SHARDS.md documents the schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from weightnet.durable import replace_folder, write_digests
from weightnet.symmetry.spec import PermutationSpec
from weightnet.tokens.layout import rows, spec_id
from weightnet.tokens.schema import MAX_ROW, metadata
from weightnet.tokens.tokenizer import TokensConfig

REQUIRED = ("run", "family", "task", "width", "spec", "diverged")


def write_tokens(
    directory: Path,
    networks: pd.DataFrame,
    specs: Mapping[str, PermutationSpec],
    tables: Iterable[tuple[str | Sequence[str], pa.Table]],
    *,
    config: TokensConfig | None = None,
) -> None:
    """Write one family's tokens as the folder ``directory``, which is replaced whole or not
    touched at all.

    ``tables`` are (run, tokens) in any order, or (runs, tokens of a stack of as many networks);
    they are set down on disk as they come, so that memory holds one table and one row group at a
    time.

    Raises:
        ValueError: if the table of networks lacks a column, a run is doubled, missing or unknown,
        a spec is
            missing or misnamed, or tokens were made with another configuration.
    """
    config = config or TokensConfig()
    frame = _check_networks(networks, specs)
    directory = Path(directory)
    with replace_folder(directory) as partial:
        spill = _Spill(partial / "arrived")
        with spill:
            _set_down(spill, frame, specs, tables, config)
            _write_shards(partial, list(frame["run"]), spill, config)
        _write_table(partial / "networks.parquet", _networks_table(frame), "networks", config)
        used = sorted(set(frame["spec"]))
        listed = pa.table({"spec": used, "json": [specs[name].to_json() for name in used]})
        _write_table(partial / "specs.parquet", listed, "specs", config)
        write_digests(partial)


def _set_down(
    spill: _Spill,
    frame: pd.DataFrame,
    specs: Mapping[str, PermutationSpec],
    tables: Iterable[tuple[str | Sequence[str], pa.Table]],
    config: TokensConfig,
) -> None:
    """Check tables as they arrive and set them down: one for each network."""
    known = dict(zip(frame["run"], frame["spec"], strict=True))
    for given, table in tables:
        runs = [given] if isinstance(given, str) else list(given)
        for number, run in enumerate(runs):
            if run not in known or run in spill or run in runs[:number]:
                fact = "is not in the table of networks" if run not in known else "arrived twice"
                raise ValueError(
                    f"tokens must arrive once per network, however: run {run!r} {fact}"
                )
        names = {known[run] for run in runs}
        expected = sum(rows(specs[name], config.max_row).count for name in names) * len(runs)
        if len(names) != 1 or table.num_rows != expected:
            raise ValueError(
                f"tokens must be made with max_row={config.max_row}, however: run {runs[0]!r} has "
                f"{table.num_rows} rows instead of {expected}; pass the same config to tokenize"
            )
        spill.add(runs, table)
    absent = [run for run in known if run not in spill]
    if absent:
        raise ValueError(
            f"every network must have tokens, however: {len(absent)} have none, "
            f"first {absent[0]!r}; tokenize them, or leave them out of the table"
        )


class _Spill:
    """Tables set down in one file as they arrive, and taken from it in any order without reading
    the rest."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int, int, int]] = {}  # bytes of a table, rows of it
        self._file = path.open("wb")

    def __contains__(self, run: str) -> bool:
        return run in self._places

    def add(self, runs: Sequence[str], table: pa.Table) -> None:
        start = self._file.tell()
        with pa.ipc.new_stream(self._file, table.schema) as writer:
            writer.write_table(table.unify_dictionaries().combine_chunks())
        length, each = self._file.tell() - start, table.num_rows // len(runs)
        for number, run in enumerate(runs):
            self._places[run] = (start, length, number * each, each)

    def tables(self, runs: Iterable[str]) -> Iterator[tuple[str, pa.Table]]:
        self._file.close()
        if not self._path.stat().st_size:
            return
        with pa.memory_map(str(self._path)) as mapped:
            whole = mapped.read_buffer()
            for run in runs:
                start, length, first, count = self._places[run]
                table = pa.ipc.open_stream(whole.slice(start, length)).read_all()
                yield run, table.slice(first, count)

    def __enter__(self) -> _Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink()


def _write_shards(directory: Path, runs: list[str], spill: _Spill, config: TokensConfig) -> None:
    """Write tokens-00000.parquet ...: ``networks_per_shard`` networks each, row groups of one
    size."""
    writer: pq.ParquetWriter | None = None
    path = directory
    waiting: list[pa.Table] = []
    schema: pa.Schema | None = None
    for number, (run, table) in enumerate(spill.tables(runs)):
        names = pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(table.num_rows, np.int32)), pa.array([run], pa.string())
        )
        table = table.add_column(0, "run", names)
        if schema is None:
            meta = {**metadata("tokens"), MAX_ROW: str(config.max_row).encode()}
            schema = table.schema.with_metadata(meta)
            _check_element(schema, config)
        elif not table.schema.equals(schema, check_metadata=False):
            raise ValueError(
                f"all tokens of a folder must have the same columns, however: run {run!r} has "
                f"{table.schema.names}; pass the same config and responses for every network"
            )
        if number % config.networks_per_shard == 0:
            if writer is not None:
                _flush(writer, waiting, config.row_group_rows, last=True)
                writer.close()
            path = directory / f"tokens-{number // config.networks_per_shard:05d}.parquet"
            writer = pq.ParquetWriter(path, schema, **_parquet_options(schema, config))
            waiting = []
        assert writer is not None
        waiting.append(table.cast(schema))
        waiting = _flush(writer, waiting, config.row_group_rows, last=False)
    if writer is not None:
        _flush(writer, waiting, config.row_group_rows, last=True)
        writer.close()


def _flush(
    writer: pq.ParquetWriter, waiting: list[pa.Table], size: int, *, last: bool
) -> list[pa.Table]:
    """Write as many full row groups as there are (and the rest, if ``last``); return what still
    waits."""
    count = sum(table.num_rows for table in waiting)
    if count < size and not (last and count):
        return waiting
    table = pa.concat_tables(waiting)
    done = table.num_rows if last else table.num_rows // size * size
    for start in range(0, done, size):
        group = table.slice(start, min(size, done - start)).unify_dictionaries().combine_chunks()
        writer.write_table(group, row_group_size=size)
    return [table.slice(done)]


def _parquet_options(schema: pa.Schema, config: TokensConfig) -> dict[str, Any]:
    floats = [f"{field.name}.list.element" for field in schema if pa.types.is_list(field.type)]
    words = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    return {
        "compression": "zstd",
        "compression_level": config.compression_level,
        "use_dictionary": words,
        "use_byte_stream_split": floats,
        "write_statistics": ["run", "layer", "index"],
        "write_page_checksum": True,
    }


def _write_table(path: Path, table: pa.Table, name: str, config: TokensConfig) -> None:
    table = table.replace_schema_metadata(metadata(name))
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=config.compression_level,
        write_page_checksum=True,
    )


def _networks_table(frame: pd.DataFrame) -> pa.Table:
    """The frame in Arrow, with one type for text and none for 'all missing', whatever pandas made
    of it."""
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"each column of networks must have one type, however: {error}; convert it before "
            "writing"
        ) from None
    fields = []
    for field in table.schema:
        kind = field.type
        if pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
            kind = pa.string()
        elif pa.types.is_null(kind):
            kind = pa.float64()
        fields.append(pa.field(field.name, kind))
    return table.replace_schema_metadata(None).cast(pa.schema(fields))


def _check_networks(networks: pd.DataFrame, specs: Mapping[str, PermutationSpec]) -> pd.DataFrame:
    missing = [name for name in REQUIRED if name not in networks]
    if missing:
        raise ValueError(
            f"networks must have the columns {', '.join(REQUIRED)}, however: missing "
            f"{', '.join(missing)}"
        )
    if not len(networks):
        raise ValueError("there must be a network to write, however: the table is empty")
    doubled = networks["run"][networks["run"].duplicated()]
    if len(doubled):
        raise ValueError(f"runs must differ, however: {doubled.iloc[0]!r} is there more than once")
    for name in sorted(set(networks["spec"])):
        if name not in specs or spec_id(specs[name]) != name:
            fact = "has another id" if name in specs else "is missing"
            raise ValueError(
                f"specs must be keyed by spec_id(spec), however: spec {name!r} {fact}"
            )
    return networks.sort_values(["family", "run"], kind="stable").reset_index(drop=True)


def _check_element(schema: pa.Schema, config: TokensConfig) -> None:
    found = "float16" if schema.field("weight").type.value_type == pa.float16() else "float32"
    if found != config.dtype:
        raise ValueError(
            f"tokens must be made with dtype={config.dtype}, however: they are {found}; "
            "pass the same config to tokenize"
        )
