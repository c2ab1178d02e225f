"""A zoo of one's own: check every row of its metadata and every file, then bring it into the
pipeline's layout.

`check_zoo` reads and changes nothing; it holds one checkpoint in memory at a time. `write_zoo`
makes data/raw/<name>/ (see weightnet.zoo.imported) from what was checked, as a whole or not at
all. The only code that runs is that of the architectures that the metadata names.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from weightnet.architecture import build_architecture, importable, input_shape, trace_module
from weightnet.checkpoint import read_state
from weightnet.durable import digest, replace_file, replace_folder
from weightnet.progress import Progress
from weightnet.symmetry import PermutationSpec
from weightnet.tokens import tokenize
from weightnet.zoo.architectures import FAMILIES
from weightnet.zoo.imported import CODE, STACKS, is_imported, write_manifest
from weightnet.zoo.store import write_stack

METADATA = ("metadata.csv", "metadata.parquet")
REQUIRED = ("file", "architecture")
RESERVED = (*REQUIRED, "architecture_args", "run", "split", "task")
PARTS = ("train", "validation", "test")
MAX_METADATA = 1 << 30  # bytes of metadata, unpacked
MAX_ROWS = 5_000_000
STACK_BYTES = (
    128 << 20
)  # of weights that are written and read at once, unless one network has more
STACK_NETWORKS = 64
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_COLUMN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,63}")


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row (numbered as in the file, the first after the header being 1)."""

    row: int
    file: str
    fact: str


@dataclass
class CheckedZoo:
    """What `check_zoo` found. ``rows`` are the good rows: reserved columns, ``property.*``,
    ``recipe.*``, ``input`` (JSON), ``width`` and ``weights`` (SHA-256 of the file)."""

    folder: Path
    path: Path | None
    rows: pd.DataFrame
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    total: int = 0

    @property
    def properties(self) -> list[str]:
        """The properties that may be predicted."""
        return [c.removeprefix("property.") for c in self.rows if c.startswith("property.")]


def check_zoo(
    folder: Path,
    name: str,
    *,
    path: Path | None = None,
    shape: tuple[int, ...] | None = None,
) -> CheckedZoo:
    """Check the zoo in ``folder``: each row of its metadata, each file, each tensor.

    Args:
        name: the family that it is to become; its networks' runs and tasks are called by it.
        path: a folder of the user's modules; the working directory is searched as well.
        shape: of one input, where it cannot be told from the architecture.

    Raises:
        ValueError: if the folder or its table as a whole is wrong.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} must be a folder with {' or '.join(METADATA)}, however: no")
    if path is not None and not path.is_dir():
        raise ValueError(f"--path must be a folder of modules, however: {path}")
    table = _read_metadata(folder)
    problems: list[Problem] = []
    notes: list[str] = []
    files = table["file"].astype("string").fillna("").tolist()

    def wrong(position: int, fact: str) -> None:
        problems.append(Problem(position + 1, files[position], fact))

    rows = _sort_columns(table, wrong, notes)
    rows["task"] = rows["task"].fillna(name) if "task" in rows else name
    rows["run"] = rows["run"].astype("string") if "run" in rows else rows["file"]
    _check_groups(rows, wrong)
    found: dict[int, dict[str, Any]] = {}
    architectures = _Architectures(path, shape)
    with Progress(f"check {folder}", len(rows), "networks") as progress:
        for position, row in enumerate(rows.to_dict("records")):
            progress.advance()
            try:
                file = _inside(folder, row["file"])
                key = (row["architecture"], row["architecture_args"])
                module, described = architectures.find(*key)
                state, told = read_state(file, module)
                architectures.check(*key, state)
            except ValueError as error:
                wrong(position, str(error).replace(f"{folder}{os.sep}", ""))
                continue
            notes += [f"row {position + 1}, {row['file']}: {note}" for note in told]
            found[position] = {**described, "weights": digest(file)}
    bad = {problem.row - 1 for problem in problems}
    good = [position for position in found if position not in bad]
    kept = rows.iloc[good].reset_index(drop=True)
    for column in ("input", "width", "weights"):
        kept[column] = [found[position][column] for position in good]
    zoo = CheckedZoo(folder, path, kept, sorted(problems, key=lambda p: p.row), notes, len(rows))
    if len(kept):
        _check_properties(zoo)
    return zoo


def write_zoo(zoo: CheckedZoo, name: str, target: Path) -> str:
    """Write the good rows of a checked zoo as ``target``, which an earlier import may have made,
    and return the digest. The folder appears as a whole or not at all.

    Raises:
        ValueError: if ``target`` holds something else, or a file has changed since the check.
    """
    check_target(zoo.folder, name, target)
    try:
        with replace_folder(target) as partial:
            sources = _sources(zoo)
            for relative, content in sources.items():
                (partial / CODE / relative).parent.mkdir(parents=True, exist_ok=True)
                (partial / CODE / relative).write_bytes(content)
            code = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()
            recipes = _recipes(zoo, name, target, code)
            for key, rows in recipes.groupby("stack", sort=False):
                _write_stack(zoo, partial / STACKS / str(key), rows)
            columns = [
                c
                for c in recipes
                if not c.startswith("property.") and c not in ("file", "weights")
            ]
            return write_manifest(partial, recipes[columns])
    except OSError as error:
        raise ValueError(f"{target} must be writable, however: {error}") from None


def check_target(folder: Path, name: str, target: Path) -> None:
    """Raise ValueError unless ``name`` may become a family, and ``target`` may be written."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"--name must be small letters, digits and _, starting with a letter, however: {name}"
        )
    if name in FAMILIES:
        raise ValueError(f"--name must not be a family of the project, however: {name}")
    inside = folder.resolve().is_relative_to(target.resolve())
    if inside or (target.exists() and not is_imported(target)):
        raise ValueError(
            f"{target} is where the imported zoo goes, however: it holds something else; choose "
            "another --name, or move it away"
        )


def add_family(params: Path, name: str, target: Path, digest: str) -> None:
    """Name an imported family in params.yaml, whose comments and layout stay.

    Raises:
        ValueError: if it cannot be read or has a family of this name that was not imported.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    check_family(params, name)
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    data = yaml.load(params.read_text(encoding="utf-8"))
    families = data["generate_zoo"]["families"]
    line, column = families.lc.key(name if name in families else next(iter(families), None))
    entry = f"{name}: {{imported: {target.as_posix()}, digest: {digest}}}"
    lines = params.read_text(encoding="utf-8").splitlines(keepends=True)
    if name in families:
        del lines[line]
    lines.insert(line, f"{' ' * column}{entry}\n")
    families[name] = {"imported": target.as_posix(), "digest": digest}
    dumped = io.StringIO()
    yaml.dump(data, dumped)
    text = dumped.getvalue()
    with suppress(YAMLError):  # one line leaves the layout of all others, which a dump would not
        if yaml.load("".join(lines)) == data:
            text = "".join(lines)
    with replace_file(params) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(params.stat().st_mode)


def check_family(params: Path, name: str) -> None:
    """Raise ValueError unless params.yaml can take the imported family ``name``."""
    from weightnet.params import read_params

    try:
        families = read_params(params)["generate_zoo"]["families"]
        entry = families.get(name) if families else families[name]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{params} must have the section generate_zoo.families, however: it has not"
        ) from None
    if entry is not None and not (isinstance(entry, dict) and "imported" in entry):
        raise ValueError(
            f"--name must be new or an imported family, however: {name} is another family of "
            f"{params}"
        )


# --- the table -------------------------------------------------------------------------------


def _read_metadata(folder: Path) -> pd.DataFrame:
    present = [name for name in METADATA if (folder / name).exists()]
    if len(present) != 1:
        raise ValueError(
            f"{folder} must hold one of {' and '.join(METADATA)}, however: it holds "
            f"{'both' if present else 'neither'}"
        )
    path = _inside(folder, present[0])
    table = _read_csv(path) if path.suffix == ".csv" else _read_parquet(path)
    if not len(table):
        raise ValueError(f"{path} must have a row for each network, however: it has 0 rows")
    missing = [name for name in REQUIRED if name not in table]
    known = {name.lower(): name for name in RESERVED}
    for column in table.columns:
        near = difflib.get_close_matches(column.lower(), known, 1, 0.84)
        if near and column not in RESERVED and known[near[0]] not in table.columns:
            raise ValueError(
                f"the columns of {path} must be known ones, however: {column!r} is unknown; did "
                f"you mean {known[near[0]]!r}?"
            )
    if missing:
        raise ValueError(
            f"{path} must have the columns {' and '.join(REQUIRED)}, however: "
            f"{' and '.join(missing)} missing (there are: {', '.join(table.columns)})"
        )
    odd = [column for column in table.columns if not _COLUMN.fullmatch(column)]
    if odd:
        raise ValueError(
            "a column's name must be letters, digits, _, - and . only, however: "
            f"{path} has an unknown column {odd[0]!r}; rename or remove it"
        )
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    size = path.stat().st_size
    if size > MAX_METADATA:
        raise ValueError(f"{path} must have at most {MAX_METADATA >> 30} GiB, however: {size} B")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
        doubled = [name for name in header if header.count(name) > 1]
        if doubled:
            raise ValueError(f"columns must differ, however: {doubled[0]!r} is there twice")
        if "" in header:
            raise ValueError(
                f"every column must have a name, however: column {header.index('') + 1} has none; "
                "write the table without its index"
            )
        text = dict.fromkeys(RESERVED, str)
        return pd.read_csv(path, dtype=text, encoding="utf-8-sig", low_memory=False)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8, however: byte {error.start} is not; save it as UTF-8"
        ) from None
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path} must have a header and rows, however: it is empty") from None
    except (pd.errors.ParserError, csv.Error, OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} must be a table of comma-separated values, however: {error}"
        ) from None


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            count = file.metadata.num_rows
            if size > MAX_METADATA or count > MAX_ROWS:
                raise ValueError(f"it has {count} rows, {size} bytes; the most are {MAX_ROWS}")
            nested = [f.name for f in file.schema_arrow if pa.types.is_nested(f.type)]
            if nested:
                raise ValueError(f"column {nested[0]!r} holds lists or structures; remove it")
            table = file.read().replace_schema_metadata(None).to_pandas()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} must be a Parquet table, however: {reason}") from None
    for name in RESERVED:
        if name in table:
            table[name] = table[name].astype("string").astype(object)
    return table


def _sort_columns(
    table: pd.DataFrame, wrong: Callable[[int, str], None], notes: list[str]
) -> pd.DataFrame:
    """Reserved columns as they are; numbers as ``property.<name>``, others as
    ``recipe.<name>``."""
    columns: dict[str, Any] = {c: table[c].to_numpy(object) for c in RESERVED if c in table}
    columns.setdefault("architecture_args", np.full(len(table), None, object))
    for column in [c for c in table.columns if c not in RESERVED]:
        values, name = table[column], column
        forced = next((p for p in ("property.", "recipe.") if column.startswith(p)), "")
        name = column.removeprefix(forced)
        boolean = pd.api.types.is_bool_dtype(values)
        numeric = pd.api.types.is_numeric_dtype(values) and not boolean
        if not numeric and not boolean and forced != "recipe.":
            numbers = pd.to_numeric(values, errors="coerce")
            given = values.notna()
            share = numbers[given].notna().mean() if given.any() else 1.0
            if forced == "property." or share > 0.5:  # meant as numbers, with some that are none
                for position in np.flatnonzero((given & numbers.isna()).to_numpy()):
                    text = str(values.iloc[position])[:40]
                    wrong(int(position), f"property {name} must be a number, however: {text!r}")
                values, numeric = numbers, True
        if numeric and forced != "recipe.":
            numbers = values.astype("float64").to_numpy()
            for position in np.flatnonzero(np.isinf(numbers)):
                wrong(int(position), f"property {name} must be finite or empty, however: infinite")
            columns[f"property.{name}"] = numbers
        elif numeric or boolean:
            columns[f"recipe.{name}"] = values.to_numpy()
        else:
            columns[f"recipe.{name}"] = values.astype("string").to_numpy(object, na_value=None)
    if not any(name.startswith("property.") for name in columns):
        raise ValueError(
            "the metadata must have a column of numbers, a property to predict, however: it has "
            "none"
        )
    return pd.DataFrame(columns)


def _check_properties(zoo: CheckedZoo) -> None:
    """A property that does not vary cannot be predicted; it is kept as a recipe column."""
    for name in zoo.properties:
        values = zoo.rows[f"property.{name}"]
        if values.nunique(dropna=True) < 2:
            what = "is empty" if values.isna().all() else f"has one value, {values.max():g}"
            zoo.notes.append(f"column {name} {what}, so it is no property")
            zoo.rows = zoo.rows.rename(columns={f"property.{name}": f"recipe.{name}"})
    if not zoo.properties:
        raise ValueError(
            "a property must vary among the networks, however: "
            + "; ".join(note for note in zoo.notes if note.startswith("column "))
        )


def _check_groups(rows: pd.DataFrame, wrong: Callable[[int, str], None]) -> None:
    """Files are listed once; a run is in one split, of one task and one architecture."""
    for column in ("file", "architecture", "run"):
        for position in np.flatnonzero(rows[column].isna()):
            wrong(int(position), f"{column} must be given, however: it is empty")
    for position in np.flatnonzero(rows["file"].duplicated() & rows["file"].notna()):
        first = int(np.flatnonzero(rows["file"] == rows["file"].iat[position])[0])
        wrong(int(position), f"a file must be listed once, however: it is in row {first + 1} too")
    if "split" in rows:
        known = rows["split"].isna() | rows["split"].isin(PARTS)
        for position in np.flatnonzero(~known):
            text = rows["split"].iat[position]
            wrong(int(position), f"split must be one of {', '.join(PARTS)}, however: {text!r}")
    for column in ("split", "task", "architecture", "architecture_args"):
        if column not in rows:
            continue
        counts = rows.groupby("run")[column].transform(lambda v: v.nunique(dropna=False))
        for position in np.flatnonzero(counts > 1):
            run = rows["run"].iat[position]
            wrong(int(position), f"a run must have one {column}, however: run {run} has several")


def _inside(folder: Path, text: object) -> Path:
    """The file that a metadata row names, which must lie in the folder."""
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError("file must be given, however: it is empty")
    root = folder.resolve()
    relative = Path(text)
    if relative.is_absolute() or ".." in relative.parts or "\\" in text:
        raise ValueError(f"file must be a path inside the folder, however: {text!r}")
    resolved = (root / relative).resolve()
    if not resolved.is_relative_to(root):
        raise ValueError(f"file must lie inside the folder, however: {text!r} is a link out of it")
    if not resolved.is_file():
        raise ValueError(f"file must exist, however: {text!r} does not")
    return folder / relative


# --- the networks ----------------------------------------------------------------------------


class _Architectures:
    """Modules and specs by architecture and arguments, each built, traced and tried once."""

    def __init__(self, path: Path | None, shape: tuple[int, ...] | None) -> None:
        self.path, self.shape = path, shape
        self._found: dict[tuple[str, str], tuple[nn.Module, PermutationSpec, Any] | str] = {}
        self._tried: set[tuple[str, str]] = set()

    def find(self, name: object, text: object) -> tuple[nn.Module, dict[str, Any]]:
        """The module, and what its row says of it."""
        if not isinstance(name, str):
            raise ValueError("architecture must be given, however: it is empty")
        key = (name, arguments_text(text))
        if key not in self._found:
            try:
                self._found[key] = self._build(*key)
            except ValueError as error:
                self._found[key] = str(error)
        found = self._found[key]
        if isinstance(found, str):
            raise ValueError(found)
        module, spec, shape = found
        given = json.loads(key[1]).get("width")
        number = isinstance(given, int | float) and not isinstance(given, bool)
        width = given if number else max((space.size for space in spec.spaces), default=0)
        return module, {"input": json.dumps(list(shape)), "width": float(width)}

    def check(self, name: str, text: object, state: dict[str, torch.Tensor]) -> None:
        """Tokenize the first network of an architecture: every tensor must have its place."""
        key = (name, arguments_text(text))
        if key not in self._tried:
            found = self._found[key]
            assert not isinstance(found, str)
            tokenize(found[1], state)
            self._tried.add(key)

    def _build(self, name: str, text: str) -> tuple[nn.Module, PermutationSpec, tuple[int, ...]]:
        arguments = json.loads(text)
        module = build_architecture(name, arguments, path=self.path)
        shape = self.shape
        if shape is None and ":" not in name:
            shape = input_shape(name, arguments)
        spec, traced = trace_module(module, shape, arguments)
        return module, spec, traced


def arguments_text(text: object) -> str:
    """The column architecture_args in a fixed form; ValueError if it is no JSON object."""
    if text is None or text is pd.NA or text != text or text == "":
        return "{}"
    try:
        values = json.loads(str(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"architecture_args must be JSON, however: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"architecture_args must be a JSON object, however: {str(text)[:60]}")
    return json.dumps(values, sort_keys=True)


def _recipes(zoo: CheckedZoo, name: str, target: Path, code: str) -> pd.DataFrame:
    """The rows as data/recipes/<name>.parquet will have them, with properties and files."""
    rows = zoo.rows
    arguments = [arguments_text(text) for text in rows["architecture_args"]]
    head = pd.DataFrame(
        {
            "run": f"{name}/" + rows["file"].astype(str),
            "group": f"{name}/" + rows["run"].astype(str),
            "family": name,
            "task": rows["task"].astype(str),
            "architecture": rows["architecture"].astype(str),
            "arguments": arguments,
            "input": rows["input"],
            "width": rows["width"].astype(float),
            "source": target.as_posix(),
            "file": rows["file"].astype(str),
        }
    )
    if "split" in rows:
        head["split"] = rows["split"].astype("string").to_numpy(object, na_value=None)
    others = [c for c in rows if c.startswith(("property.", "recipe."))]
    table = pd.concat([head, rows[others]], axis=1)
    described = table.drop(columns="source").to_json(
        orient="records", lines=True, double_precision=15
    )
    content = zip(rows["weights"], described.splitlines(), itertools.repeat(code), strict=False)
    table["digest"] = [hashlib.sha256("\0".join(row).encode()).hexdigest()[:32] for row in content]
    table["weights"] = rows["weights"]
    order = ["architecture", "arguments", "run"]
    table = table.sort_values(order, kind="stable").reset_index(drop=True)
    table["stack"] = _stack_keys(zoo.folder, table)
    return table


def _stack_keys(folder: Path, table: pd.DataFrame) -> list[str]:
    """Group rows of one architecture into stacks of bounded size, named by their content."""
    groups: list[list[int]] = []
    size, previous = 0, None
    for position, row in enumerate(zip(table["architecture"], table["arguments"], strict=True)):
        bytes_ = 2 * (folder / table["file"].iat[position]).stat().st_size
        full = groups and (size + bytes_ > STACK_BYTES or len(groups[-1]) >= STACK_NETWORKS)
        if row != previous or full:
            groups.append([])
            size = 0
        groups[-1].append(position)
        size, previous = size + bytes_, row
    keys: list[str] = []
    for group in groups:
        text = "\n".join(table["digest"].iloc[group])
        keys += [hashlib.sha256(text.encode()).hexdigest()[:16]] * len(group)
    return keys


def _write_stack(zoo: CheckedZoo, folder: Path, rows: pd.DataFrame) -> None:
    first = rows.iloc[0]
    arguments = json.loads(first["arguments"])
    module = build_architecture(first["architecture"], arguments, path=zoo.path)
    states = []
    for name, weights in zip(rows["file"], rows["weights"], strict=True):
        file = _inside(zoo.folder, name)
        states.append(read_state(file, module)[0])
        if digest(file) != weights:
            raise ValueError(f"{file} must not change during the import, however: it did")
    shared = [key for key in states[0] if all(key in state for state in states)]
    networks = rows[["run", *(c for c in rows if c.startswith("property."))]]
    networks = networks.assign(diverged_at=-1).reset_index(drop=True)
    write_stack(folder, networks, [{key: state[key] for key in shared} for state in states])


def _sources(zoo: CheckedZoo) -> dict[str, bytes]:
    """The user's source files that the architectures were imported from, by relative path."""
    named = {name.partition(":")[0] for name in zoo.rows["architecture"] if ":" in name}
    if not named:
        return {}
    with importable(zoo.path):
        roots = [Path(text) for text in sys.path[: 1 if zoo.path is None else 2]]
    found: dict[str, bytes] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not str(file).endswith(".py"):
            continue
        parts = name.split(".")
        for relative in (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")):
            if any(Path(file) == root / relative for root in roots):
                found[relative.as_posix()] = Path(file).read_bytes()
    return found
