"""What is read off the graph: spaces, layers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weightnet.symmetry import Axis, PermutationSpec, Segment, trace
from weightnet.symmetry.trace import known_shape

# (spaces, hidden channels, layers), by hand
COUNTS = {
    # stream of 64, 128, 256, 512; two blocks each with one hidden space; 20 convs and a classifier
    "resnet18": (4 + 8, 3 * (64 + 128 + 256 + 512), 21),
    "vgg11": (10, 64 + 128 + 2 * 256 + 4 * 512 + 2 * 4096, 11),
    # 8 linear bottlenecks (and the last conv), then the expanded space of each of 17 blocks
    "mobilenet_v2": (
        8 + 17,
        (16 + 24 + 32 + 64 + 96 + 160 + 320 + 1280)
        + (32 + 96 + 3 * 192 + 2 * 144 + 4 * 384 + 3 * 576 + 3 * 960),
        53,
    ),
    # stem, 58 x (bottleneck 128, growth 32), 3 transitions; norms that no single conv feeds
    "densenet121": (
        1 + 2 * 58 + 3,
        64 + 58 * (128 + 32) + 128 + 256 + 512,
        1 + 3 * 58 + 2 * 3 + 2,
    ),
}


def by_layer(spec: PermutationSpec) -> dict[str, tuple[Segment, ...]]:
    return {layer.name: layer.outputs for layer in spec.layers}


def test_counts(full_module: nn.Module, full_name: str) -> None:
    spec = trace(full_module, torch.zeros(1, 3, 64, 64))
    channels = sum(space.size for space in spec.spaces)
    assert (len(spec.spaces), channels, len(spec.layers)) == COUNTS[full_name]


def test_every_hidden_axis_is_covered(module: nn.Module, image: torch.Tensor) -> None:
    """Each index of a weight's axes 0 and 1 belongs to one space or to a fixed segment."""
    spec, state = trace(module, image), module.state_dict()
    covered: dict[tuple[str, int], list[int]] = {}
    for space in spec.spaces:
        for axis in space.axes:
            span = range(axis.offset, axis.offset + space.size * axis.repeat)
            covered.setdefault((axis.tensor, axis.axis), []).extend(span)
    assert all(len(set(found)) == len(found) for found in covered.values())
    for layer in spec.layers:
        tensor = layer.weight or layer.scale
        assert tensor is not None
        sides = [layer.outputs] if layer.weight is None else [layer.outputs, layer.inputs]
        for place, segments in enumerate(sides):
            length = state[tensor].shape[place]
            assert sum(s.size * s.repeat for s in segments) == length
            moving = sum(s.size * s.repeat for s in segments if s.space is not None)
            assert moving == len(covered.get((tensor, place), []))


def test_images_and_classes_never_move(module: nn.Module, image: torch.Tensor) -> None:
    spec, state = trace(module, image), module.state_dict()
    first, last = spec.layers[0], spec.layers[-1]
    assert first.inputs == (Segment(None, 3),)
    assert first.weight and last.weight
    assert last.outputs == (Segment(None, state[last.weight].shape[0]),)
    fixed = {(first.weight, 1), (last.weight, 0), (last.bias, 0)}
    assert not fixed & {(a.tensor, a.axis) for space in spec.spaces for a in space.axes}


def test_layers_of_resnet18() -> None:
    from torchvision.models import resnet18

    spec = trace(resnet18(weights=None), torch.zeros(1, 3, 64, 64))
    layers = {layer.name: layer for layer in spec.layers}
    assert [layer.index for layer in spec.layers] == list(range(21))
    assert list(layers)[:3] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    stem = layers["conv1"]
    assert (stem.kind, stem.kernel, stem.stride, stem.groups) == ("conv", (7, 7), (2, 2), 1)
    assert (stem.scale, stem.variance, stem.bias) == ("bn1.weight", "bn1.running_var", None)
    assert {layer.activation for layer in spec.layers} == {"relu", "identity"}
    assert [layer.name for layer in spec.layers if layer.activation == "identity"] == ["fc"]
    assert layers["layer2.0.downsample.0"].outputs == layers["layer2.1.conv2"].outputs
    stream = spec.space("layer2.0.conv2")
    assert Axis("layer3.0.conv1.weight", 1) in stream.axes
    assert Axis("layer2.0.downsample.1.running_mean", 0) in stream.axes
    assert all(space.scalable for space in spec.spaces)


def test_flatten_concat_and_residual_borders() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(1, n, 1) for n in (4, 2, 6))
            self.head = nn.Linear(6 * 9, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).flatten(1))

    spec = trace(Net(), torch.zeros(2, 1, 3, 3))
    assert [(space.name, space.size) for space in spec.spaces] == [("a", 4), ("b", 2)]
    assert by_layer(spec)["c"] == (Segment("a", 4), Segment("b", 2))
    assert spec.layers[-1].inputs == (Segment("a", 4, 9), Segment("b", 2, 9))
    assert Axis("head.weight", 1, 36, 9) in spec.space("b").axes


def test_depthwise_and_grouped() -> None:
    module = nn.Sequential(
        *(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 9, 1, groups=3)),
        nn.Conv2d(9, 2, 1),
    )
    spec = trace(module, torch.zeros(1, 3, 5, 5))
    (space,) = spec.spaces
    assert space.size == 3  # two channels move as one
    assert by_layer(spec)["1"] == (Segment("0", 3, 2),)
    assert by_layer(spec)["2"] == (Segment("0", 3, 3),)
    assert spec.layers[1].inputs == (Segment(None, 1),)


def test_attention_heads_and_units_are_spaces() -> None:
    from torchvision.models import VisionTransformer

    module = VisionTransformer(16, 4, 2, 3, 12, 20, num_classes=5)
    spec = trace(module, torch.zeros(1, 3, 16, 16))
    assert sorted(space.size for space in spec.spaces) == [3, 3, 12, 20, 20]
    heads = spec.space("encoder.layers.encoder_layer_0.self_attention")
    key = "encoder.layers.encoder_layer_0.self_attention.in_proj_weight"
    assert [a for a in heads.axes if a.tensor == key] == [Axis(key, 0, o, 4) for o in (0, 12, 24)]


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny"])
def test_newer_torchvision(name: str) -> None:
    from torchvision import models

    spec = trace(getattr(models, name)(weights=None), torch.zeros(1, 3, 32, 32))
    assert len(spec.spaces) == {"efficientnet_b0": 40, "convnext_tiny": 22}[name]


@pytest.mark.parametrize(
    ("activation", "scalable"),
    [
        *((nn.ReLU(), True), (nn.LeakyReLU(), True), (nn.PReLU(), True), (nn.Identity(), True)),
        *((nn.ReLU6(), False), (nn.Tanh(), False), (nn.GELU(), False), (nn.SiLU(), False)),
        *((nn.Hardswish(), False), (nn.Sigmoid(), False), (nn.ELU(), False)),
    ],
)
def test_only_homogeneous_units_are_scalable(activation: nn.Module, scalable: bool) -> None:
    module = nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, 2))
    spec = trace(module, torch.zeros(1, 3))
    assert [space.scalable for space in spec.spaces] == [scalable]
    name = type(activation).__name__
    expected = {"LeakyReLU": "leaky_relu", "Identity": "identity"}.get(name, name.lower())
    assert spec.layers[0].activation == expected


class Body(nn.Module):
    """conv, then what the test asks for, then a conv."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.cumsum(x, 1), "cumsum"),
        (lambda x: F.conv2d(x, torch.ones(4, 4, 1, 1)), "conv2d"),
        (lambda x: x.view(2, 2, 2, 5, 5).transpose(1, 2).reshape(2, 4, 5, 5), "view"),
        (lambda x: x.flatten(1)[:, :30], "getitem .* cut through channels that are 25 wide"),
        (lambda x: x[:, ::2], "getitem .* must have step 1"),
        (lambda x: x if x.sum() > 0 else -x, "torch.fx.*module '1'"),
        (lambda x: x[: int(x.sum())], "torch.fx.*module '1'"),
    ],
)
def test_refusals_name_the_operation(
    function: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        trace(nn.Sequential(nn.Identity(), Body(function)), torch.zeros(2, 3, 5, 5))


def test_refusal_names_node_and_module() -> None:
    module = nn.Sequential(nn.ReLU(), Body(lambda x: torch.cumsum(x, 1)))
    with pytest.raises(ValueError, match=r"however: cumsum \(node 'cumsum' in module '1'\)"):
        trace(module, torch.zeros(2, 3, 5, 5))
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(ValueError, match=r"ConvTranspose2d .*'1'"):
        trace(layers, torch.zeros(2, 3, 5, 5))
    uneven = nn.Sequential(
        nn.Conv2d(3, 12, 1, groups=1), *(nn.Conv2d(12, 12, 1, groups=g) for g in (4, 3))
    )
    with pytest.raises(ValueError, match=r"Conv2d .*'2'.*: 4 channels that are 3 wide"):
        trace(uneven, torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match="node"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(2, 5, 5, 5))


def test_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    module[1].eval()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    trace(module, torch.zeros(2, 3, 5, 5))
    assert [part.training for part in module] == [True, False, True]
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_shared_weights_are_tied() -> None:
    tied = nn.Linear(4, 4)
    spec = trace(nn.Sequential(nn.Linear(3, 4), tied, tied, nn.Linear(4, 2)), torch.zeros(1, 3))
    assert [space.size for space in spec.spaces] == [4]
    assert [layer.name for layer in spec.layers] == ["0", "1", "3"]


def test_shared_parameters_move_under_both_keys() -> None:
    module = nn.Sequential(
        *(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()),
        nn.Linear(4, 2),
    )
    module[4].weight = module[2].weight
    spec = trace(module, torch.zeros(1, 3))
    (space,) = spec.spaces
    assert {Axis(f"{name}.weight", axis) for name in "24" for axis in (0, 1)} <= set(space.axes)
    assert not space.scalable


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 1), padding=(0, 2), dilation=2, groups=2),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.MaxPool2d(2),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.BatchNorm2d(4),
        nn.Linear(11, 5),
        nn.GELU(),
        nn.Conv2d(5, 6, 3),
        nn.Linear(9, 2),
        nn.BatchNorm2d(3),
        nn.MaxPool2d(20),
    ],
    ids=str,
)
def test_a_shape_told_without_running_is_the_one_that_running_gives(module: nn.Module) -> None:
    image = torch.randn(2, 4, 9, 11)
    told = known_shape(module, (image,))
    if told is not None:
        assert told == module(image).shape
