"""Edges against dense matrix products, under permutations, and in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weightnet.symmetry.spec import PermutationSpec
from weightnet.tokens import EDGES, Graph, dense_blocks, layer_blocks, layout


def messages(graph: Graph, nodes: np.ndarray, kind: int = 0) -> np.ndarray:
    """Gather channels along the edges, multiply, add at the tokens."""
    out = np.zeros(len(graph.token_channel))
    np.add.at(out, graph.edges_target, graph.edge_values[:, kind] * nodes[graph.edges_source])
    return out


def node_values(
    spec: PermutationSpec, seed: int
) -> tuple[np.ndarray, dict[tuple[str, int], float]]:
    """A random value per channel, by node id and by (space, channel) or (-, network input)."""
    plan = layout(spec)
    values = np.random.default_rng(seed).normal(size=len(plan.channel_space))
    names = {number: space.name for number, space in enumerate(spec.spaces)} | {-1: "-"}
    by_name = {
        (names[s], i): v
        for s, i, v in zip(
            plan.channel_space.tolist(), plan.channel_index.tolist(), values, strict=True
        )
        if s > -2
    }
    return values, by_name


def test_sum_messages_equal_the_layer_on_constant_channels(samples, spec: PermutationSpec) -> None:
    """With every position of a channel equal, a layer is a matrix product with kernel-summed
    weights."""
    state = samples.state(spec, 1)
    graph = layer_blocks(samples.networks([spec], [state]))
    nodes, by_name = node_values(spec, 2)
    found = messages(graph, nodes)
    expected = []
    for one in spec.layers:
        x = torch.tensor([by_name[place] for place in samples.inputs(one)]).double()
        if one.weight is None:
            scale = state[one.scale] / torch.sqrt(state[one.variance] + 1e-5)
            expected.append(scale.double() * x)
        elif one.kind == "linear":
            expected.append(state[one.weight].double() @ x)
        else:
            image = x[None, :, None, None].expand(-1, -1, *one.kernel).contiguous()
            weight = state[one.weight].double()
            expected.append(
                torch.nn.functional.conv2d(image, weight, groups=one.groups).reshape(-1)
            )
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), rtol=1e-5, atol=1e-5)


def test_reductions_over_kernel_positions(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 1)
    graph = layer_blocks(samples.networks([spec], [state]))
    flattened = state["l2.weight"].reshape(5, 3, 4).numpy()
    kernels = state["l1.weight"].reshape(3, 4, 3).numpy()
    values = {name: graph.edge_values[:, i] for i, name in enumerate(EDGES)}
    for weight, first, count in ((kernels, 8, 12), (flattened, 20, 15)):
        here = slice(first, first + count)
        np.testing.assert_allclose(
            values["sum"][here], weight.sum(-1).reshape(-1), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            values["mean_abs"][here], np.abs(weight).mean(-1).reshape(-1), rtol=1e-5
        )
        largest = np.take_along_axis(weight, np.abs(weight).argmax(-1)[..., None], -1)
        np.testing.assert_array_equal(values["peak"][here], largest.reshape(-1))
    assert len(graph.edge_values) == 8 + 12 + 15
    np.testing.assert_array_equal(graph.edges_target[8:20], np.repeat([4, 5, 6], 4))
    np.testing.assert_array_equal(graph.edges_source[8:20], np.tile([0, 1, 2, 3], 3))


def test_residual_layers_share_channels_and_classes_have_their_own(samples) -> None:
    spec = samples.specs["branched"]
    graph = layer_blocks(samples.networks([spec], [samples.state(spec, 1)]))
    a = graph.token_channel[:4]
    for first in (4, 8, 18):  # depthwise, residual, the norm's first part
        np.testing.assert_array_equal(graph.token_channel[first : first + 4], a)
    classes = graph.token_channel[-5:]
    assert len(set(classes)) == 5 and (graph.channel_space[classes] == -2).all()
    inputs = graph.edges_source[graph.edges_target == 0]
    assert (graph.channel_space[inputs] == -1).all()


def test_permuting_channels_renumbers_nodes_and_changes_no_edge(
    samples, spec: PermutationSpec
) -> None:
    state = samples.state(spec, 5)
    orders, moved = samples.permuted(spec, state, 6)
    before, after = (layer_blocks(samples.networks([spec], [s])) for s in (state, moved))
    plan = layout(spec)
    node = np.arange(len(plan.channel_space))
    token = samples.moved_tokens(spec, orders)
    for number, space in enumerate(spec.spaces):
        here = np.flatnonzero(plan.channel_space == number)
        node[here] = here[orders[space.name].numpy()]

    def edges(graph: Graph, node: np.ndarray, token: np.ndarray) -> list[tuple]:
        ends = (node[graph.edges_source], token[graph.edges_target], *graph.edge_values.round(4).T)
        return sorted(zip(*(end.tolist() for end in ends), strict=True))

    still = (np.arange(len(node)), np.arange(len(token)))
    left, right = edges(after, node, token), edges(before, *still)
    assert [edge[:2] for edge in left] == [edge[:2] for edge in right]
    np.testing.assert_allclose(np.array(left), np.array(right), atol=2e-4)
    np.testing.assert_array_equal(node[after.token_channel], before.token_channel[token])


def test_batches_are_the_graphs_of_their_networks(samples) -> None:
    specs = [
        samples.specs["small_cnn"],
        samples.specs["branched"],
        samples.specs["small_cnn"],
        samples.specs["grouped"],
    ]
    networks = samples.networks(
        specs, [samples.state(spec, seed) for seed, spec in enumerate(specs)]
    )
    batch = layer_blocks(networks).select([2, 3, 0])
    direct = layer_blocks(networks.select([2, 3, 0]))
    for name, value in vars(direct).items():
        np.testing.assert_array_equal(getattr(batch, name), value, err_msg=name)
    assert batch.edges_source.dtype == np.int32 and batch.token_channel.dtype == np.int32
    assert len(batch) == 3 and len(batch.token_channel) == batch.token_offsets[-1]


def test_dense_blocks_are_the_same_edges(samples, spec: PermutationSpec) -> None:
    networks = samples.networks([spec], [samples.state(spec, 1)])
    graph = layer_blocks(networks)
    nodes, _ = node_values(spec, 2)
    out = np.zeros(layout(spec).tokens)
    for block in dense_blocks(networks):
        out[block.tokens] = np.einsum("gocK,gc->goK", block.values[0], nodes[block.sources])[
            ..., 0
        ].reshape(-1)
    np.testing.assert_allclose(out, messages(graph, nodes), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_diverged_networks_have_finite_edges(samples) -> None:
    spec = samples.specs["small_cnn"]
    state = samples.state(spec, 0)
    state["l1.weight"][:] = float("nan")
    state["l0.weight"][:] = 3e38
    assert np.isfinite(layer_blocks(samples.networks([spec], [state])).edge_values).all()
