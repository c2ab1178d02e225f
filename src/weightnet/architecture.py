"""Architectures by name: the zoo's families, torchvision's classifiers, the user's own modules.

Code of the user's runs for one reason only: that he names it (``package.module:callable``).
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightnet.symmetry import PermutationSpec, State, trace
from weightnet.zoo.architectures import FAMILIES

MAX_TENSORS = 100_000  # that a module may have
_USUAL = (224, 32, 28, 64, 14, 8, 96, 16, 128, 256, 299)
_SIZES = (*_USUAL, *(size for size in range(1, 65) if size not in _USUAL))  # of images, as tried
_SEARCH_SECONDS = 8.0
_BUILD_ERRORS = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    ImportError,
)


def build_architecture(
    name: str, arguments: Mapping[str, Any] | None = None, *, path: Path | None = None
) -> nn.Module:
    """The module called ``name`` without storage for its tensors (device meta): a family of the
    zoo, a classifier of torchvision, or the user's own ``package.module:callable``, importable
    from the working directory or from ``path``.

    Raises:
        ValueError: if there is no such architecture, or it does not take these arguments.
    """
    build = _builder(name, path)
    try:
        with importable(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initial weights, which nobody sees
            try:
                with torch.device("meta"):
                    module = build(**(arguments or {}))
            except NotImplementedError:  # it reads values while it is built
                module = build(**(arguments or {}))
                module = module.to("meta") if isinstance(module, nn.Module) else module
    except _BUILD_ERRORS as error:
        raise ValueError(
            f"architecture {name} must be built from its arguments, however: "
            f"{type(error).__name__}: {error}; correct architecture_args"
        ) from None
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"architecture {name} must return a torch.nn.Module, however: it returned a "
            f"{type(module).__name__}"
        )
    return module.eval()


def trace_architecture(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    shape: Sequence[int] | None = None,
    *,
    path: Path | None = None,
) -> tuple[nn.Module, PermutationSpec]:
    """The module of `build_architecture` and its permutation spec, traced on an input of ``shape``
    (without the axis of images; by default what `trace_module` finds)."""
    module = build_architecture(name, arguments, path=path)
    if shape is None and ":" not in name:
        shape = input_shape(name, arguments)
    spec, _ = trace_module(module, shape, arguments)
    return module, spec


def trace_module(
    module: nn.Module,
    shape: Sequence[int] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[PermutationSpec, tuple[int, ...]]:
    """The spec of ``module`` and the shape of one input that it was traced with: ``shape``, or the
    first that fits, with the channels of the first layer and usual sizes of images.

    Raises:
        ValueError: if no input can be traced.
    """
    shapes = [tuple(shape)] if shape is not None else list(_input_shapes(module, arguments or {}))
    device = next((p.device for p in module.parameters()), torch.device("meta"))
    first: ValueError | None = None
    for candidate in shapes:
        try:
            return trace(module, torch.empty(1, *candidate, device=device)), candidate
        except ValueError as error:
            first = first or error
    hint = "" if shape is not None else "; or give the shape of one input, such as --input 1,28,28"
    raise ValueError(f"{first}{hint}") from None


def input_shape(name: str, arguments: Mapping[str, Any] | None = None) -> tuple[int, int, int]:
    """Channels, height and width of the images that a family or a classifier of torchvision reads,
    from its arguments ``image_channels`` and ``size`` (torchvision: ``image_size``) or their
    defaults, 3 and 224."""
    try:
        parameters = dict(inspect.signature(_builder(name, None)).parameters)
    except (TypeError, ValueError):
        parameters = {}
    known = {key: p.default for key, p in parameters.items() if isinstance(p.default, int)}
    known |= {"size": (arguments or {}).get("image_size", known.get("size", 224))}
    known |= dict(arguments or {})
    return known.get("image_channels", 3), known["size"], known["size"]


def closest_architecture(state: State) -> tuple[str, float]:
    """The registered architecture whose keys agree best with those of ``state``, and the share of
    keys, of both together, that agree (shapes count half)."""
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    best, started = ("cnn", 0.0), time.monotonic()
    for name in _registered():
        try:
            module = build_architecture(name)
        except (ValueError, NotImplementedError):
            continue
        wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        shared = wanted.keys() & found.keys()
        same = sum(wanted[key] == found[key] for key in shared)
        score = (len(shared) + same) / 2 / max(1, len(wanted.keys() | found.keys()))
        best = max(best, (name, score), key=lambda pair: pair[1])
        if best[1] == 1.0 or time.monotonic() - started > _SEARCH_SECONDS:
            break
    return best


@contextmanager
def importable(path: Path | None) -> Iterator[None]:
    """Modules of ``path`` and of the working directory can be imported inside the block."""
    added = [str(path.resolve())] if path is not None else []
    added.append(str(Path.cwd()))
    before = list(sys.path)
    sys.path[:0] = added
    try:
        yield
    finally:
        sys.path[:] = before


def _registered() -> Iterator[str]:
    from weightnet.torchvision_import import load_torchvision

    yield from FAMILIES
    models = load_torchvision().models
    slow = ("vit_", "swin", "maxvit", "regnet", "efficientnet_b7", "efficientnet_v2_l")
    for name in models.list_models(module=models):
        if name not in FAMILIES and not name.startswith(slow):
            yield name


def _builder(name: str, path: Path | None) -> Callable[..., Any]:
    if name in FAMILIES:
        return FAMILIES[name]
    if ":" in name:
        return _import_callable(name, path)
    from weightnet.torchvision_import import load_torchvision

    models = load_torchvision().models
    known = models.list_models(module=models)
    if name in known:
        return lambda **arguments: models.get_model(name, weights=None, **arguments)
    import difflib

    near = difflib.get_close_matches(name, [*FAMILIES, *known], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"architecture must be one of {', '.join(sorted(FAMILIES))}, a classifier of torchvision, "
        f"or package.module:callable, however: architecture={name!r}{hint}"
    )


def _import_callable(name: str, path: Path | None) -> Callable[..., Any]:
    """The user's own callable."""
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise ValueError(
            f"architecture must be package.module:callable, however: architecture={name!r}"
        )
    try:
        with importable(path):
            found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (*_BUILD_ERRORS, SyntaxError) as error:
        raise ValueError(
            f"architecture {name} must be importable, however: {type(error).__name__}: {error}; "
            "run where the module lies, or give its folder with --path"
        ) from None
    if not callable(found):
        raise ValueError(f"architecture {name} must be callable, however: it is {found!r}")
    return found  # type: ignore[no-any-return]


def _input_shapes(module: nn.Module, arguments: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """Shapes that the first layer may read, likely ones first."""
    layers = (part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Linear))
    first = next(layers, None)
    sizes = [
        arguments[key] for key in ("size", "image_size") if isinstance(arguments.get(key), int)
    ]
    if isinstance(first, nn.Conv2d):
        for size in [*sizes, *_SIZES]:
            yield (first.in_channels, size, size)
    elif isinstance(first, nn.Linear):
        yield (first.in_features,)
        for channels in (1, 3):
            size = math.isqrt(first.in_features // channels)
            if channels * size * size == first.in_features:
                yield (channels, size, size)
    else:
        yield (3, *([sizes[0] if sizes else 224] * 2))
