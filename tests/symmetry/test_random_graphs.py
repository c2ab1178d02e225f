"""Soundness on topologies nobody thought of: random graphs of convs, norms, sums and joins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from weightnet.symmetry import canonicalize, fold_batchnorm, permute, random_scales, rescale, trace

STEPS = ["conv", "linear_conv", "depthwise", "grouped", "norm", "add", "join", "part", "mix"]
Step = tuple[str, int, int, int]


class RandomGraph(nn.Module):
    """Each step reads earlier maps (all of one spatial size) and adds one."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict()
        widths = [2]
        for number, (kind, first, second, size) in enumerate(steps):
            a, b = widths[first % len(widths)], widths[second % len(widths)]
            layer: nn.Module | None = None
            width = a
            if kind in ("conv", "linear_conv"):
                layer, width = nn.Conv2d(a, size, 3, padding=1), size
            elif kind == "depthwise":
                layer = nn.Conv2d(a, a, 3, padding=1, groups=a, bias=size % 2 == 0)
            elif kind == "grouped":
                groups = next(g for g in (3, 2, 1) if a % g == 0)
                layer, width = nn.Conv2d(a, groups * size, 1, groups=groups), groups * size
            elif kind == "norm":
                layer = nn.BatchNorm2d(a)
            elif kind == "add":
                width = a if a == b else 0
            elif kind == "join":
                width = a + b
            elif kind == "part":
                width = max(1, a // 2)
            elif kind == "mix":
                layer = nn.Conv2d(a, b, 1)
                width = b
            if layer is not None:
                self.layers[str(number)] = layer
            widths.append(width or a)
        self.widths = widths
        self.head = nn.Linear(widths[-1] * 9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = [x]
        for number, (kind, first, second, size) in enumerate(self.steps):
            left, right = first % len(maps), second % len(maps)
            a, b = maps[left], maps[right]
            if str(number) in self.layers:
                y = self.layers[str(number)](a)
                if kind == "mix":
                    y = F.relu(y) + b
                elif kind == "conv":
                    y = F.relu(y) if size % 3 else torch.tanh(y)
            elif kind == "add":
                same = self.widths[left] == self.widths[right]
                y = a + b if same else F.max_pool2d(a, 3, 1, 1)
            elif kind == "join":
                y = torch.cat([a, b], 1)
            else:
                y = a[:, : max(1, self.widths[left] // 2)]
            maps.append(y)
        return self.head(F.adaptive_avg_pool2d(maps[-1], 3).flatten(1))


steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 11), st.integers(0, 11), st.integers(2, 6)),
    min_size=3,
    max_size=12,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=steps, seed=st.integers(0, 2**16))
def test_random_graphs_keep_their_function(steps: list[Step], seed: int) -> None:
    torch.manual_seed(seed)
    module = RandomGraph([("conv", 0, 0, 6), *steps]).double().eval()
    for name, tensor in module.named_buffers():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    image = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    try:
        spec, state = trace(module, image), module.state_dict()
    except ValueError as refusal:  # a group reaches over the border of two spaces
        assert "wide meet" in str(refusal) and "Conv2d" in str(refusal)
        reject()
    permuted = permute(spec, spec.random(generator), state)
    scaled = rescale(spec, random_scales(spec, generator), permuted)
    form = canonicalize(spec, state, scale=True)
    with torch.no_grad():
        expected = module(image)
        for changed in (permuted, scaled, form, fold_batchnorm(spec, state)):
            found = functional_call(module, changed, (image,))
            assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()
    again = canonicalize(spec, permuted, scale=True)
    assert all(torch.equal(again[key], form[key]) for key in form)


def test_random_graphs_have_symmetries() -> None:
    graph = [("conv", 0, 0, 6), ("join", 1, 1, 2), ("norm", 2, 0, 2), ("conv", 3, 0, 4)]
    spec = trace(RandomGraph(graph), torch.zeros(1, 2, 5, 5))
    assert [space.size for space in spec.spaces] == [6, 4]
    with pytest.raises(ValueError, match="node"):
        trace(RandomGraph(graph), torch.zeros(1, 3, 5, 5))
