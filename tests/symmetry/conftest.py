"""Architectures for the tests of symmetry: small families, and topologies of no family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weightnet.torchvision_import import load_torchvision
from weightnet.zoo.architectures import FAMILIES, build

models = load_torchvision().models


def conv_norm(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    """A conv without bias and its norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class NestedResidual(nn.Module):
    """A residual block whose branch is a residual block, then a Linear on a 5 x 5 map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 6)
        self.outer = conv_norm(6, 6)
        self.inner = nn.Sequential(conv_norm(6, 9), nn.ReLU(), conv_norm(9, 6))
        self.close = conv_norm(6, 6)
        self.pool = nn.AdaptiveAvgPool2d((5, 5))
        self.hidden = nn.Linear(6 * 25, 11)
        self.head = nn.Linear(11, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        branch = F.relu(self.outer(x))
        branch = F.relu(branch + self.inner(branch))
        x = F.relu(x + self.close(branch))
        x = self.pool(x).view(x.size(0), -1)
        return self.head(F.leaky_relu(self.hidden(x), 0.1))


class TwoConcats(nn.Module):
    """Two concatenations in a row, a norm and a depthwise conv on the result, a shared conv."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 5, 3, padding=1)
        self.c = nn.Conv2d(9, 3, 1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.after = nn.BatchNorm2d(12)
        self.multiplied = nn.Conv2d(12, 24, 1, groups=12)
        self.shared = nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24 * 9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.relu(torch.cat([self.a(x), self.b(x)], dim=1))
        x = torch.cat((both, self.c(both)), 1)
        x = torch.relu(self.after(self.depthwise(torch.relu(self.norm(x)))))
        x = F.relu(self.multiplied(x))
        x = F.relu(self.shared(F.relu(self.shared(x))))
        return self.head(torch.flatten(F.adaptive_max_pool2d(x, 3), 1))


class Staggered(nn.Module):
    """A residual addition of concatenations with different borders; two kinds of groups."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (4, 2, 1, 5, 6)
        self.parts = nn.ModuleList(nn.Conv2d(3, size, 3) for size in sizes)
        self.middle = nn.Conv2d(6, 8, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.again = nn.Conv2d(12, 8, 1, groups=4)
        self.last = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e = (part(x) for part in self.parts)
        x = torch.cat([a, b], 1) + torch.cat([c, d], 1)
        x += e
        x = F.relu(self.grouped(F.relu(self.middle(F.relu(x)))))
        return self.head(F.relu(self.last(F.relu(self.again(x)))).mean((2, 3)))


class Excited(nn.Module):
    """Squeeze and excitation, hard activations, a sliced and padded shortcut, a PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.wide = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.prelu = nn.PReLU(12)
        self.gain = nn.Parameter(torch.ones(12, 1, 1))
        self.norm = nn.GroupNorm(2, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(self.stem(x))
        gate = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        x = F.relu6(x * torch.sigmoid(gate))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = self.prelu(self.wide(x)) * self.gain + shortcut
        first, second = self.norm(x).chunk(2, dim=1)
        return self.head(torch.cat([first, 2 * second - 1], 1).mean(dim=[2, 3]))


class Attentive(nn.Module):
    """A small vision transformer with a class token and a position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 12))
        self.position = nn.Parameter(torch.zeros(1, 17, 12))
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


def plain() -> nn.Sequential:
    """A VGG: conv, pool, flatten, dropout, linear; one norm after a Linear."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 7, 3), nn.BatchNorm2d(7), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)),
        *(nn.Flatten(), nn.Linear(7 * 9, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 4)),
    )


def small_family(name: str) -> nn.Module:
    """A family of the zoo at a sixteenth of its width; its weights are yet to be drawn."""
    with torch.device("meta"):
        module = build(name, width=0.0625, stem="small", size=16, classes=4)
    return module.to_empty(device="cpu")


SMALL: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "nested_residual": NestedResidual,
    "two_concats": TwoConcats,
    "staggered": Staggered,
    "excited": Excited,
    "attentive": Attentive,
    "vit": lambda: models.VisionTransformer(16, 4, 2, 3, 12, 20, num_classes=4),
    "efficientnet": lambda: models.EfficientNet(
        [
            models.efficientnet.MBConvConfig(1, 3, 1, 32, 16, 1, 0.25, 1.0),
            models.efficientnet.MBConvConfig(6, 5, 2, 16, 24, 2, 0.25, 1.0),
        ],
        dropout=0.2,
        num_classes=4,
    ),
    "convnext": lambda: models.ConvNeXt(
        [
            models.convnext.CNBlockConfig(6, 10, 2),
            models.convnext.CNBlockConfig(10, None, 1),
        ],
        num_classes=4,
    ),
    **{name: partial(small_family, name) for name in FAMILIES if name != "cnn"},
}
FULL = ("resnet18", "vgg11", "mobilenet_v2", "densenet121")


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode, with statistics and parameters that no neuron shares."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if "num_batches" in name:
                tensor.zero_()
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise * (1.5 / tensor[0].numel() ** 0.5))
            elif "running_var" in name:
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() == 1:
                tensor.copy_(noise * 0.3 + float(name.endswith("weight")))
    return module.eval()


def small_input(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Two images of 16 x 16, a size that pools to odd ones."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(params=sorted(SMALL))
def module(request: pytest.FixtureRequest) -> nn.Module:
    """Each small architecture, in float64."""
    torch.manual_seed(0)
    return randomize(SMALL[request.param]()).double()


@pytest.fixture(params=FULL)
def full_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def full_module(full_name: str) -> nn.Module:
    """torchvision's own model, full size, without storage."""
    with torch.device("meta"):
        return build(full_name)


@pytest.fixture
def image() -> torch.Tensor:
    return small_input()


@pytest.fixture
def resnet18() -> nn.Module:
    """torchvision's own, full size, in float64."""
    with torch.device("meta"):
        module = build("resnet18")
    return randomize(module.to_empty(device="cpu")).double()
