"""Weights to tokens and back, exactly.

A token is one output channel of one layer with its incoming weights, bias and normalization
parameters (docs/SHARDS.md lists the columns). Whole layers are built at once; in float32 the
weight values are not even copied. Weights in another precision are converted to float32 first, so
the round trip is bit for bit for float32 and to the nearest float32 otherwise (to the nearest
float16 with ``dtype="float16"``).

BatchNorm's ``num_batches_tracked`` is kept; other integer buffers hold no learned quantity and are
dropped. Any other tensor that no layer carries is an error: nothing learned is lost silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from weightnet.params import Params
from weightnet.symmetry.spec import Layer, PermutationSpec
from weightnet.tokens.layout import LayerLayout, Layout, Rows, layout, rows

SCALARS = ("bias", "scale", "shift", "mean", "variance")
COUNTER = "num_batches_tracked"
_JOINED = 1 << 24  # weights of networks that share one array

Floats = NDArray[np.float32]


class TokensConfig(Params):
    """How tokens are stored. ``max_row``: weights in one row (longer ones are chunked);
    ``networks_per_shard``: networks in one file; ``row_group_rows``: rows that a reader holds at a
    time."""

    dtype: Literal["float32", "float16"] = "float32"
    max_row: int = Field(default=4096, ge=1)
    networks_per_shard: int = Field(default=256, ge=1)
    row_group_rows: int = Field(default=4096, ge=1)
    compression_level: int = Field(default=3, ge=1, le=22)


class ListColumn:
    """A list column of numbers whose flat values can be taken by row range, without copying within
    a chunk."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy(zero_copy_only=False) for chunk in column.chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])

    def values(self, start: int, stop: int) -> NDArray[Any]:
        """The values of rows ``start`` to ``stop`` - 1, one after another."""
        parts = []
        chunk = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = int(self._starts[chunk])
            until = min(stop, int(self._starts[chunk + 1]))
            offsets = self._offsets[chunk]
            parts.append(self._values[chunk][offsets[start - first] : offsets[until - first]])
            start, chunk = until, chunk + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def lengths(self) -> NDArray[np.int64]:
        """How many values each row has."""
        parts = [np.diff(offsets).astype(np.int64) for offsets in self._offsets]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def tokenize(
    spec: PermutationSpec,
    state: Mapping[str, torch.Tensor],
    *,
    config: TokensConfig | None = None,
    responses: Mapping[int, Floats] | None = None,
) -> pa.Table:
    """Turn one network into tokens, in the order layer, index, chunk.

    Args:
        responses: for every layer index an array [outputs, probes]: what each neuron answers to
        fixed
            inputs. Stored beside the weights in the column ``response``.

    Raises:
        ValueError: if a tensor of the spec is missing, has another shape, or is carried by no
        layer; if
            responses leave out a layer.
    """
    return tokenize_stack(
        spec,
        {name: tensor[None] for name, tensor in state.items()},
        config=config,
        responses=responses and {i: np.asarray(found)[None] for i, found in responses.items()},
    )


def tokenize_stack(
    spec: PermutationSpec,
    states: Mapping[str, torch.Tensor],
    *,
    config: TokensConfig | None = None,
    responses: Mapping[int, Floats] | None = None,
) -> pa.Table:
    """`tokenize` for many networks of one spec: one table, network by network. Each tensor, and
    each array of responses, has a leading axis, the networks."""
    config = config or TokensConfig()
    plan, order = layout(spec), rows(spec, config.max_row)
    count = _check_states(plan, states)
    element = pa.float16() if config.dtype == "float16" else pa.float32()
    columns: dict[str, Any] = dict(_places(plan, order, count))
    columns["weight"] = _weight_rows(plan, states, count, config.max_row, element)
    for field in SCALARS:
        values, absent = np.zeros((count, order.count), np.float32), np.ones(order.count, bool)
        for one in plan.layers:
            if (name := getattr(one.layer, field)) is not None:
                where = order.first[one.tokens]
                values[:, where], absent[where] = _float32(states[name]), False
        columns[field] = pa.array(values.reshape(-1), mask=np.tile(absent, count))
    counters, absent = np.zeros((count, order.count), np.int64), np.ones(order.count, bool)
    for one in plan.layers:
        if (counter := states.get(counter_name(one.layer) or "")) is not None and one.outputs:
            where_first = order.layer_first[one.layer.index]
            counters[:, where_first] = counter.cpu().numpy().reshape(count)
            absent[where_first] = False
    columns["batches_tracked"] = pa.array(counters.reshape(-1), mask=np.tile(absent, count))
    if responses is not None:
        columns["response"] = _response_rows(plan, order, count, responses)
    return pa.table(columns)


def detokenize(spec: PermutationSpec, table: pa.Table) -> dict[str, torch.Tensor]:
    """Rebuild the state dict that `tokenize` was given (float32; see the module's text for what is
    exact).

    Raises:
        ValueError: if the rows are not those of one network of this spec, complete and in order.
    """
    plan = layout(spec)
    weights = ListColumn(table.column("weight"))
    first = _check_rows(plan, table, weights)
    bounds = np.append(first, table.num_rows)
    kept = table.select([*SCALARS, "batches_tracked"]).take(pa.array(first))
    scalars = {field: kept.column(field).to_numpy() for field in SCALARS}
    state: dict[str, torch.Tensor] = {}
    for one in plan.layers:
        layer = one.layer
        if layer.weight is not None:
            flat = weights.values(bounds[one.first], bounds[one.first + one.outputs])
            state[layer.weight] = torch.from_numpy(flat.astype(np.float32)).reshape(
                one.weight_shape
            )
        for field in SCALARS:
            if (name := getattr(layer, field)) is not None:
                state[name] = torch.from_numpy(scalars[field][one.tokens].astype(np.float32))
        name = counter_name(layer)
        if name is not None and one.outputs:
            counter = kept.column("batches_tracked")[one.first].as_py()
            if counter is not None:
                state[name] = torch.tensor(counter)
    return state


def counter_name(layer: Layer) -> str | None:
    """The state-dict key of the batch counter that stands beside the layer's running mean."""
    if layer.mean is None:
        return None
    prefix, dot, _ = layer.mean.rpartition(".")
    return f"{prefix}{dot}{COUNTER}"


def _places(plan: Layout, order: Rows, count: int) -> dict[str, pa.Array]:
    """The columns that tell tokens apart, so many times."""
    token = np.tile(order.token, count)
    layer = plan.layer[token]
    space = plan.space[token]
    layers = [one.layer for one in plan.layers]

    def small(values: list[int]) -> pa.Array:
        return pa.array(np.array(values, np.int16)[layer])

    def words(values: list[str]) -> pa.Array:
        known, code = np.unique(np.array(values, dtype=np.str_), return_inverse=True)
        return pa.DictionaryArray.from_arrays(
            pa.array(code.astype(np.int32)[layer]), pa.array(known.tolist(), pa.string())
        )

    names = [one.name for one in plan.spec.spaces]
    return {
        "layer": pa.array(layer.astype(np.int16)),
        "index": pa.array(plan.index[token]),
        "chunk": pa.array(np.tile(order.chunk, count)),
        "chunks": pa.array(np.tile(order.chunks, count)),
        "kind": words([one.kind for one in layers]),
        "kernel_h": small([one.kernel[0] for one in layers]),
        "kernel_w": small([one.kernel[1] for one in layers]),
        "stride_h": small([one.stride[0] for one in layers]),
        "stride_w": small([one.stride[1] for one in layers]),
        "groups": pa.array(np.array([one.groups for one in layers], np.int32)[layer]),
        "activation": words([one.activation for one in layers]),
        "space": pa.DictionaryArray.from_arrays(
            pa.array(np.maximum(space, 0), mask=space < 0), pa.array(names, pa.string())
        ),
        "space_index": pa.array(plan.space_index[token]),
    }


def _list_type(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element))


def _weight_rows(
    plan: Layout,
    states: Mapping[str, torch.Tensor],
    count: int,
    max_row: int,
    element: pa.DataType,
) -> pa.ChunkedArray:
    """Weights as rows of at most ``max_row`` values: offsets over the flat values. Small networks
    share one array; a large one has an array for each layer, over its untouched values."""
    if count > 1 and count * plan.values <= _JOINED:
        values = np.empty((count, plan.values), np.float32)
        starts, done = [], 0
        for one in plan.layers:
            size = one.outputs * one.fan_in
            if one.layer.weight is not None:
                flat = _float32(states[one.layer.weight]).reshape(count, size)
                values[:, done : done + size] = flat
            starts.append(done + _row_starts(one, max_row))
            done += size
        offsets = np.arange(count)[:, None] * plan.values + np.concatenate(starts)
        arrays = [_list_rows(offsets.reshape(-1), values.reshape(-1), element)]
    else:
        arrays = []
        for network in range(count):
            for one in plan.layers:
                if one.outputs * one.fan_in > np.iinfo(np.int32).max:
                    raise ValueError(
                        f"a layer must have fewer than 2^31 weights, however: {one.layer.name} "
                        f"has {one.outputs * one.fan_in}"
                    )
                own = np.zeros(0, np.float32)
                if one.layer.weight is not None:
                    own = _float32(states[one.layer.weight][network]).reshape(-1)
                arrays.append(_list_rows(_row_starts(one, max_row), own, element))
    return pa.chunked_array(arrays, type=_list_type(element))


def _row_starts(one: LayerLayout, max_row: int) -> NDArray[np.int64]:
    """Where each row of a layer starts among the layer's weights."""
    chunks = max(1, -(-one.fan_in // max_row))
    within = np.minimum(np.arange(chunks) * max_row, one.fan_in)
    return (np.arange(one.outputs)[:, None] * one.fan_in + within).reshape(-1)


def _list_rows(starts: NDArray[np.int64], values: Floats, element: pa.DataType) -> pa.ListArray:
    offsets = np.append(starts, len(values)).astype(np.int32)
    kept: NDArray[Any] = values
    if element == pa.float16():
        with np.errstate(over="ignore"):
            kept = values.astype(np.float16)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(kept, element), type=_list_type(element)
    )


def _response_rows(
    plan: Layout, order: Rows, count: int, responses: Mapping[int, Floats]
) -> pa.ListArray:
    """Responses as one list per token, on its chunk 0 (null on the others)."""
    parts = []
    for one in plan.layers:
        index, found = one.layer.index, responses.get(one.layer.index)
        if found is None or found.ndim != 3 or found.shape[:2] != (count, one.outputs):
            shape = None if found is None else found.shape[1:]
            raise ValueError(
                f"responses must hold an array [{one.outputs}, probes] for layer {index} "
                f"({one.layer.name}), however: shape={shape}"
            )
        parts.append(np.asarray(found, np.float32))
    probes = {part.shape[2] for part in parts}
    if len(probes) > 1:
        raise ValueError(
            f"every layer must answer the same probes, however: counts={sorted(probes)}"
        )
    later = np.tile(order.chunk > 0, count)
    lengths = np.where(later, 0, probes.pop() if probes else 0)
    values = np.concatenate(parts, axis=1).reshape(-1) if parts else np.zeros(0, np.float32)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values), type=_list_type(pa.float32()), mask=pa.array(later)
    )


def _check_states(plan: Layout, state: Mapping[str, torch.Tensor]) -> int:
    """How many networks there are. Every tensor of the spec is there with its shape, and every
    learned tensor belongs to a layer."""
    needed: dict[str, tuple[int, ...]] = {}
    for one in plan.layers:
        if one.layer.weight is not None:
            needed[one.layer.weight] = one.weight_shape
        for field in SCALARS:
            if (name := getattr(one.layer, field)) is not None:
                needed[name] = (one.outputs,)
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(
            "the state must hold every tensor of the spec, however: missing "
            f"{', '.join(missing)}; "
            "trace the module that these weights belong to"
        )
    counts = {len(state[name]) for name in needed}
    for name, shape in needed.items():
        if tuple(state[name].shape[1:]) != shape or len(counts) > 1:
            raise ValueError(
                f"{name} must have shape {shape}, however: shape={tuple(state[name].shape[1:])} "
                f"in a stack of {len(state[name])}; "
                "trace the module that these weights belong to"
            )
    learned = (
        name for name, tensor in state.items() if tensor.is_floating_point() or tensor.is_complex()
    )
    lost = [name for name in learned if name not in needed]
    if lost:
        raise ValueError(
            "every learned tensor must belong to a layer, however: no layer carries "
            f"{', '.join(lost)}; "
            "leave them out of the state, or use conv, linear and norm layers only"
        )
    return counts.pop() if counts else 1


def _check_rows(plan: Layout, table: pa.Table, weights: ListColumn) -> NDArray[np.int64]:
    """Check order and completeness; return the row of each token's chunk 0."""
    layer, index, chunk, chunks = (
        table.column(name).to_numpy() for name in ("layer", "index", "chunk", "chunks")
    )
    first = np.flatnonzero(chunk == 0)
    whole = len(first) == plan.tokens and (not len(chunk) or chunk[0] == 0)
    if whole and len(chunk):
        token = np.cumsum(chunk == 0) - 1
        fan_in = np.array([one.fan_in for one in plan.layers], np.int64)[plan.layer]
        whole = bool(
            np.array_equal(layer, plan.layer[token])
            and np.array_equal(index, plan.index[token])
            and np.array_equal(chunk, np.arange(len(chunk)) - first[token])
            and np.array_equal(chunks, np.bincount(token)[token])
            and np.array_equal(np.add.reduceat(weights.lengths(), first), fan_in)
        )
    if not whole:
        raise ValueError(
            "tokens must be the rows of one network of this spec, complete and in order, "
            "however: "
            f"{table.num_rows} rows do not match its {plan.tokens} tokens; read them with "
            "read_networks"
        )
    return first


def _float32(tensor: torch.Tensor) -> Floats:
    values: Floats = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous().numpy()
    return values
