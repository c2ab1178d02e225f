"""Families of architectures: small CNNs, and torchvision's topologies at any width.

A family is one function from keyword arguments to an `nn.Module` that torch.fx can trace; nothing
else has to be written for it (no permutation table, no tokenizer). torchvision's families are
torchvision's own modules, with every hidden width multiplied afterwards, so module names and
topology are the true ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class ConvBlock(nn.Module):
    """Convolution, optional BatchNorm, activation, optional pooling, dropout, optional
    residual."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int,
        activation: str,
        downsample: str,
        residual: bool,
        batchnorm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        stride = 2 if downsample == "stride" else 1
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding=kernel // 2, bias=not batchnorm
        )
        self.norm = nn.BatchNorm2d(outputs) if batchnorm else nn.Identity()
        self.activation = ACTIVATIONS[activation]()
        self.pool = nn.MaxPool2d(2) if downsample == "pool" else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.residual = residual and inputs == outputs and downsample == "none"

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, height, width] -> [B, outputs, height', width']."""
        y = self.norm(self.conv(x))
        if self.residual:
            y = y + x
        return self.dropout(self.pool(self.activation(y)))


class CNN(nn.Module):
    """A small CNN: ``depth`` convolution blocks, global average pooling, one linear layer.

    ``width`` is the number of channels (of the second half of the blocks, when ``tapered``);
    ``size`` is the image height in pixels, which bounds how often the feature maps are halved.
    """

    def __init__(
        self,
        *,
        image_channels: int = 1,
        classes: int = 10,
        size: int = 14,
        width: int = 16,
        depth: int = 3,
        tapered: bool = False,
        kernel: int = 3,
        activation: str = "relu",
        downsample: str = "pool",
        residual: bool = False,
        batchnorm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"activation must be one of {known}, however: activation={activation!r}"
            )
        if width < 1 or depth < 1:
            raise ValueError(
                f"width and depth must be positive, however: width={width}, depth={depth}"
            )
        early = max(1, width // 2) if tapered else width
        channels = [early if i < depth // 2 else width for i in range(depth)]
        halvings = sorted({0, depth // 2})[: int(math.log2(size)) - 1]
        blocks = []
        for i, (inputs, outputs) in enumerate(
            zip([image_channels, *channels], channels, strict=False)
        ):
            blocks.append(
                ConvBlock(
                    inputs,
                    outputs,
                    kernel=kernel,
                    activation=activation,
                    downsample=downsample if i in halvings else "none",
                    residual=residual,
                    batchnorm=batchnorm,
                    dropout=dropout,
                )
            )
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, image_channels, height, width] -> logits [B, classes]."""
        return self.head(torch.flatten(self.pool(self.blocks(x)), 1))


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _resize(module: nn.Module, *, width: float, image_channels: int, classes: int) -> None:
    """Multiply every hidden width of a torchvision classifier in place; keep topology and names.

    The first convolution reads ``image_channels`` and the last linear layer writes ``classes``.
    """
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)
    ]
    convs = [name for name, layer in layers if isinstance(layer, nn.Conv2d)]
    linears = [name for name, layer in layers if isinstance(layer, nn.Linear)]
    for name, layer in layers:
        replacement: nn.Module
        if isinstance(layer, nn.Conv2d):
            first = name == convs[0]
            inputs = image_channels if first else _scaled(layer.in_channels, width)
            replacement = nn.Conv2d(
                inputs,
                _scaled(layer.out_channels, width),
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                groups=1
                if layer.groups == 1
                else inputs,  # torchvision's families group by channel only
                bias=layer.bias is not None,
            )
        elif isinstance(layer, nn.Linear):
            outputs = classes if name == linears[-1] else _scaled(layer.out_features, width)
            replacement = nn.Linear(_scaled(layer.in_features, width), outputs)
        else:
            assert isinstance(layer, nn.BatchNorm2d)
            replacement = nn.BatchNorm2d(
                _scaled(layer.num_features, width), layer.eps, layer.momentum
            )
        module.set_submodule(name, replacement)


def _small_stem(module: nn.Module, family: str, size: int, width: float) -> None:
    """Adapt a torchvision classifier to images of ``size`` pixels, in place: the usual CIFAR
    stems."""

    def narrow(name: str) -> nn.Conv2d:
        conv = module.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        return nn.Conv2d(conv.in_channels, conv.out_channels, 3, 1, 1, bias=conv.bias is not None)

    if family.startswith("resnet"):
        module.set_submodule("conv1", narrow("conv1"))
        module.set_submodule("maxpool", nn.Identity())
    elif family.startswith("densenet"):
        module.set_submodule("features.conv0", narrow("features.conv0"))
        module.set_submodule("features.pool0", nn.Identity())
    elif family.startswith("mobilenet"):
        module.set_submodule("features.0.0", narrow("features.0.0"))
    elif family.startswith("vgg"):
        pools = [n for n, layer in module.named_modules() if isinstance(layer, nn.MaxPool2d)]
        for name in pools[int(math.log2(size)) :]:  # a 14 x 14 image can be halved three times
            module.set_submodule(name, nn.Identity())
        module.set_submodule("avgpool", nn.AdaptiveAvgPool2d(1))
        first = module.get_submodule("classifier.0")
        assert isinstance(first, nn.Linear)
        inputs = _scaled(512, width)
        module.set_submodule("classifier.0", nn.Linear(inputs, first.out_features))


def _torchvision_family(name: str) -> Callable[..., nn.Module]:
    def build_family(
        *,
        image_channels: int = 3,
        classes: int = 1000,
        width: float = 1.0,
        stem: str = "imagenet",
        size: int = 224,
        dropout: float | None = None,
    ) -> nn.Module:
        from weightnet.torchvision_import import load_torchvision

        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be imagenet or small, however: stem={stem!r}")
        if not width > 0:
            raise ValueError(f"width must be positive, however: width={width}")
        module: nn.Module = getattr(load_torchvision().models, name)(weights=None)
        if (width, image_channels, classes) != (1.0, 3, 1000):
            _resize(module, width=width, image_channels=image_channels, classes=classes)
        if stem == "small":
            _small_stem(module, name, size, width)
        if dropout is not None:
            for layer in module.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = dropout
        return module

    build_family.__doc__ = f"torchvision's {name} with every hidden width multiplied by ``width``."
    return build_family


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "cnn": CNN,
    **{
        name: _torchvision_family(name)
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "vgg11",
            "vgg16",
            "mobilenet_v2",
            "densenet121",
        )
    },
}


def build(family: str, **arguments: Any) -> nn.Module:
    """Build an untrained module of a family.

    Raises:
        ValueError: if the family or one of its arguments is unknown or impossible.
    """
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"family must be one of {known}, however: family={family!r}")
    try:
        return FAMILIES[family](**arguments)
    except TypeError as error:
        raise ValueError(f"{family} does not take these arguments, however: {error}") from None
