"""Checkpoint files, and the architectures that they belong to: what users hand to the commands.

A checkpoint is read as data only: safetensors, or PyTorch's format without its code-bearing parts
(``weights_only``). Code runs for one reason only, that the user names it as an architecture
(``package.module:callable``).
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightnet.symmetry import PermutationSpec, State, trace
from weightnet.zoo.architectures import FAMILIES

PYTORCH = (".pt", ".pth")
SAFETENSORS = ".safetensors"


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one that does not fit its architecture."""


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors, .pt or .pth file by their state-dict keys, on the CPU.

    Raises:
        CheckpointError: if the file is missing, broken, or holds anything but a dictionary of
            tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} must be a checkpoint file, however: there is no such file")
    if path.suffix == SAFETENSORS:
        return _read_safetensors(path)
    if path.suffix in PYTORCH:
        return _read_pytorch(path)
    raise CheckpointError(
        f"a checkpoint must end in {SAFETENSORS}, {' or '.join(PYTORCH)}, however: {path}"
    )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} must be a safetensors file, however: {error}") from None


def _read_pytorch(path: Path) -> dict[str, torch.Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} must hold tensors only, however: it holds other objects, which are not "
            "loaded because that could run code; save model.state_dict() instead"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} must be a PyTorch checkpoint, however: {reason}") from None
    if not isinstance(data, dict) or not all(isinstance(t, torch.Tensor) for t in data.values()):
        raise CheckpointError(
            f"{path} must hold a dictionary of tensors, however: it holds a "
            f"{type(data).__name__}; save model.state_dict() instead"
        )
    return {str(key): tensor.detach() for key, tensor in data.items()}


def write_checkpoint(path: Path, state: State) -> None:
    """Write tensors as safetensors: the whole file or, if anything fails, none.

    Raises:
        CheckpointError: if the file cannot be written there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.suffix != SAFETENSORS:
        raise CheckpointError(f"a checkpoint is written as {SAFETENSORS}, however: {path}")
    if path.is_dir() or not path.parent.is_dir():
        raise CheckpointError(f"{path} must be a file in an existing folder, however: it is not")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    seen: set[int] = set()
    own: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():  # a tensor under two keys is written twice
        shared = tensor.untyped_storage().data_ptr() in seen
        own[key] = tensor.clone() if shared else tensor.contiguous()
        seen.add(own[key].untyped_storage().data_ptr())
    try:
        partial.touch()
        mode = partial.stat().st_mode  # of the user's umask: save_file makes files private
        save_file(own, partial)
        partial.chmod(mode)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} must be writable, however: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def build_architecture(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The module called ``name`` without storage for its tensors (device meta): a family of the
    zoo, a classifier of torchvision, or the user's own ``package.module:callable``.

    Raises:
        ValueError: if there is no such architecture, or it does not take these arguments.
    """
    build = _builder(name)
    try:
        with torch.device("meta"):
            module = build(**(arguments or {}))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"architecture {name} must be built from its arguments, however: {error}"
        ) from None
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"architecture {name} must return a torch.nn.Module, however: it returned a "
            f"{type(module).__name__}"
        )
    return module.eval()


def input_shape(name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the images that the architecture reads, from its arguments
    ``image_channels`` and ``size`` (torchvision: ``image_size``) or their defaults, 3 and 224."""
    try:
        parameters = inspect.signature(_builder(name)).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    known = {key: p.default for key, p in parameters.items() if isinstance(p.default, int)}
    known |= {"size": (arguments or {}).get("image_size", known.get("size", 224))}
    known |= dict(arguments or {})
    return known.get("image_channels", 3), known["size"], known["size"]


def trace_architecture(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    shape: Sequence[int] | None = None,
) -> tuple[nn.Module, PermutationSpec]:
    """The module of `build_architecture` and its permutation spec, traced on an input of ``shape``
    (default: `input_shape`) without its axis of images."""
    module = build_architecture(name, arguments)
    example = torch.empty(1, *(shape or input_shape(name, arguments)), device="meta")
    return module, trace(module, example)


def check_fits(module: nn.Module, state: State) -> None:
    """Raise CheckpointError, naming the keys, unless ``state`` loads into ``module`` strictly."""
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    problems = [
        ("missing", [key for key in wanted if key not in found]),
        ("unexpected", [key for key in found if key not in wanted]),
        (
            "of another shape",
            [
                f"{key} {found[key]} instead of {wanted[key]}"
                for key in wanted
                if key in found and found[key] != wanted[key]
            ],
        ),
    ]
    facts = [
        f"{what}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if keys[3:] else "")
        for what, keys in problems
        if keys
    ]
    if facts:
        raise CheckpointError(
            f"the checkpoint must fit the architecture, however: {'; '.join(facts)}; name another "
            "architecture or its arguments"
        )


def _builder(name: str) -> Callable[..., Any]:
    if name in FAMILIES:
        return FAMILIES[name]
    if ":" in name:
        return _import_callable(name)
    from weightnet.torchvision_import import load_torchvision

    models = load_torchvision().models
    if name in models.list_models(module=models):
        return lambda **arguments: models.get_model(name, weights=None, **arguments)
    raise ValueError(
        f"architecture must be one of {', '.join(sorted(FAMILIES))}, a classifier of torchvision, "
        f"or package.module:callable, however: architecture={name!r}"
    )


def _import_callable(name: str) -> Callable[..., Any]:
    """The user's own callable; modules of the working directory are found too."""
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"architecture {name} must be importable, however: {error}") from None
    if not callable(found):
        raise ValueError(f"architecture {name} must be callable, however: it is {found!r}")
    return found  # type: ignore[no-any-return]
