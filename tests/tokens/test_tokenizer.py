"""Round trips are exact, whatever the chunking; what would be lost is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightnet.symmetry.spec import PermutationSpec
from weightnet.tokens import TokensConfig, detokenize, layout, tokenize, tokenize_stack


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal keys, types and bits (NaN and -0.0 included)."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].numpy().tobytes() == b[k].numpy().tobytes()
        for k in a
    )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["branched", "grouped", "small_cnn"]), st.integers(0, 100), st.integers(1, 40)
)
def test_round_trip_is_exact_for_every_chunking(
    samples, name: str, seed: int, max_row: int
) -> None:
    spec, state = samples.specs[name], samples.state(samples.specs[name], seed)
    table = tokenize(spec, state, config=TokensConfig(max_row=max_row))
    assert max(len(row) for row in table.column("weight").to_pylist()) <= max_row
    assert same(detokenize(spec, table), state)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(width=32), min_size=4, max_size=4))
def test_special_values_survive(samples, values: list[float]) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 0)
    state["l0.bn.weight"] = torch.tensor(values)
    state["l2.bias"][:4] = torch.tensor(values)
    state["l1.weight"].view(-1)[:4] = torch.tensor(values)
    assert same(detokenize(spec, tokenize(spec, state)), state)


def test_float16_rounds_weights_to_float16_and_nothing_else(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 0)
    back = detokenize(spec, tokenize(spec, state, config=TokensConfig(dtype="float16")))
    weights = {one.weight for one in spec.layers}
    expected = {k: v.half().float() if k in weights else v for k, v in state.items()}
    assert same(back, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted_to_float32(samples, dtype: torch.dtype) -> None:
    spec = samples.specs["small_cnn"]
    state = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in samples.state(spec, 0).items()
    }
    expected = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    assert same(detokenize(spec, tokenize(spec, state)), expected)


def test_weights_that_are_not_contiguous(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 0)
    moved = {
        k: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in state.items()
    }
    assert same(detokenize(spec, tokenize(spec, moved)), detokenize(spec, tokenize(spec, state)))


def test_counters_are_kept_when_present_and_not_invented(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 0)
    assert detokenize(spec, tokenize(spec, state))["l0.bn.num_batches_tracked"] == 7
    del state["l0.bn.num_batches_tracked"]
    assert same(detokenize(spec, tokenize(spec, state)), state)


def test_integer_buffers_are_dropped_but_learned_tensors_are_not(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 0)
    kept = detokenize(spec, tokenize(spec, {**state, "positions": torch.arange(3)}))
    assert same(kept, state)
    with pytest.raises(ValueError, match=r"no layer carries prelu\.weight"):
        tokenize(spec, {**state, "prelu.weight": torch.ones(1)})


def test_missing_and_misshapen_tensors_are_named(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 0)
    with pytest.raises(ValueError, match=r"missing l1\.bias"):
        tokenize(spec, {k: v for k, v in state.items() if k != "l1.bias"})
    with pytest.raises(ValueError, match=r"l1\.weight must have shape \(3, 4, 3, 1\)"):
        tokenize(spec, {**state, "l1.weight": torch.zeros(3, 4, 3, 3)})


def test_columns_say_what_tells_tokens_apart(samples) -> None:
    spec = samples.specs["small_cnn"]
    table = tokenize(spec, samples.state(spec, 0), config=TokensConfig(max_row=5))
    rows = [row for row in table.to_pylist() if row["layer"] == 1 and row["index"] == 2]
    assert [row["chunk"] for row in rows] == [0, 1, 2]
    first = rows[0]
    assert first["chunks"] == 3 and len(first["weight"]) == 5
    assert (first["kind"], first["activation"], first["space"]) == ("conv", "gelu", "b")
    assert (first["kernel_h"], first["kernel_w"], first["groups"]) == (3, 1, 1)
    assert first["space_index"] == 2 and first["bias"] is not None and first["scale"] is None
    assert rows[1]["bias"] is None
    last = table.to_pylist()[-1]
    assert (last["layer"], last["index"], last["space"], last["kind"]) == (2, 4, None, "linear")


def test_rows_of_another_network_are_refused(samples) -> None:
    spec = samples.specs["small_cnn"]
    table = tokenize(spec, samples.state(spec, 0), config=TokensConfig(max_row=5))
    other = samples.wider
    for broken, reader in [
        (table.slice(1), spec),
        (table.slice(0, table.num_rows - 1), spec),
        (table.take(pa.array(np.arange(table.num_rows)[::-1])), spec),
        (pa.concat_tables([table, table]), spec),
        (table, other),
    ]:
        with pytest.raises(ValueError, match="complete and in order"):
            detokenize(reader, broken)


def test_responses_ride_on_the_first_chunk(samples) -> None:
    spec = samples.specs["small_cnn"]
    plan = layout(spec)
    responses = {
        one.layer.index: np.random.default_rng(one.first)
        .normal(size=(one.outputs, 6))
        .astype(np.float32)
        for one in plan.layers
    }
    state = samples.state(spec, 0)
    table = tokenize(spec, state, config=TokensConfig(max_row=5), responses=responses)
    found = [row["response"] for row in table.to_pylist() if row["chunk"] == 0]
    np.testing.assert_array_equal(
        np.array(found, np.float32), np.concatenate(list(responses.values()))
    )
    assert all(row["response"] is None for row in table.to_pylist() if row["chunk"] > 0)
    assert same(detokenize(spec, table), state)
    del responses[1]
    with pytest.raises(ValueError, match="layer 1"):
        tokenize(spec, state, responses=responses)


def test_impossible_layers_are_refused(samples) -> None:
    spec = samples.specs["small_cnn"]
    strange = replace(spec.layers[0], kind="attention")
    with pytest.raises(ValueError, match="attention"):
        layout(PermutationSpec(spec.spaces, (strange, *spec.layers[1:])))
    uneven = replace(spec.layers[1], groups=2)
    with pytest.raises(ValueError, match="fit its kind and groups"):
        layout(PermutationSpec(spec.spaces, (spec.layers[0], uneven, spec.layers[2])))


@pytest.mark.parametrize("name", ["branched", "grouped", "small_cnn"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_stack_is_its_networks_one_after_another(samples, name: str, dtype: Any) -> None:
    spec = samples.specs[name]
    states = [samples.state(spec, seed) for seed in range(3)]
    stack = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    generator = np.random.default_rng(0)
    responses = {
        one.layer.index: generator.normal(size=(3, one.outputs, 4)).astype(np.float32)
        for one in layout(spec).layers
    }
    config = TokensConfig(max_row=5, dtype=dtype)
    tables = [
        tokenize(spec, state, config=config, responses={k: v[i] for k, v in responses.items()})
        for i, state in enumerate(states)
    ]
    found = tokenize_stack(spec, stack, config=config, responses=responses)
    assert found.combine_chunks().equals(pa.concat_tables(tables).combine_chunks())
    assert same(detokenize(spec, tables[1]), detokenize(spec, found.slice(*[len(tables[0])] * 2)))
