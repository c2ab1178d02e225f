"""Checkpoints of an unfinished fit: module, optimizer, averages and history in one file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightnet.durable import replace_file

LOG = logging.getLogger(__name__)


@dataclass
class FitState:
    """What a checkpoint holds, besides module and optimizer."""

    epoch: int = 0  # epochs finished
    best_epoch: int = -1
    best_value: float = math.inf
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(
    path: Path,
    mark: str,
    state: FitState,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write one safetensors file with JSON in its metadata; rename it into place.

    ``mark`` says whose checkpoint it is; only a fit with the same mark continues it.
    """
    from safetensors.torch import save

    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in state.average.items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    described = {
        "mark": mark,
        "epoch": state.epoch,
        "best_epoch": state.best_epoch,
        "best_value": state.best_value,
        "step": state.step,
        "history": state.history,
    }
    # cloned: tied parameters share memory, which the format does not allow
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    metadata = {"fit": json.dumps({**described, "digest": _digest(described, copies)})}
    with replace_file(path) as temporary:
        temporary.write_bytes(save(copies, metadata=metadata))


def read_checkpoint(
    path: Path, mark: str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> FitState | None:
    """Load the checkpoint into module and optimizer; None if there is none, or another fit's, or
    a damaged one, which is said."""
    from safetensors import SafetensorError, safe_open

    device = next(module.parameters()).device
    groups: dict[str, dict[str, Tensor]]
    groups = {name: {} for name in ("module", "average", "best", "optimizer")}
    try:
        with safe_open(path, framework="pt") as file:
            described: dict[str, Any] = json.loads(file.metadata()["fit"])
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if described.pop("digest", "") != _digest(described, found):
            raise ValueError("its content does not have its digest")
        if described.pop("mark") != mark:
            return None
        for key, tensor in found.items():
            group, name = key.split(".", 1)
            groups[group][name] = tensor
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        LOG.warning("%s is damaged (%s): this fit starts anew", path, error)
        return None
    module.load_state_dict(groups["module"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in groups["optimizer"].items():
        index, name = key.split(".", 1)
        moments.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return FitState(
        **described,
        average={name: value.to(device) for name, value in groups["average"].items()},
        best={name: value.to(device) for name, value in groups["best"].items()},
    )


def _digest(described: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Of everything in a checkpoint: safetensors itself would not notice a changed bit."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
