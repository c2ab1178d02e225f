"""torchvision beside a CPU-only torch.

The torchvision wheel of the registry is built for CUDA; beside a CPU build of torch its compiled
operators do not load, and its import then fails on registering their fake kernels. Declaring the
two operators that it registers without asking lets the rest (models, data sets), which is pure
Python, be used.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # a torch.library.Library lives as long as somebody holds it


def load_torchvision() -> ModuleType:
    """Import torchvision with its `models` and `datasets`, whatever build of torch is
    installed."""
    try:
        return _import()
    except RuntimeError:  # "operator torchvision::nms does not exist"
        if not _declared:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, name):
                    library.define(name + _SIGNATURE)
            _declared.append(library)
        return _import()


def _import() -> ModuleType:
    for name in ("datasets", "models"):
        importlib.import_module(f"torchvision.{name}")
    return importlib.import_module("torchvision")
