"""Checkpoint files: what users hand to the commands, read as data only.

safetensors, or PyTorch's format without its code-bearing parts (``weights_only``). Nothing in a
file can run code, and none makes more than `MAX_BYTES` of memory be used: sizes are checked before
anything is unpacked, and every tensor against its module before it is converted.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightnet.durable import replace_file
from weightnet.symmetry import State

PYTORCH = (".pt", ".pth", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
MAX_BYTES = 4 << 30  # of one checkpoint, on disk and unpacked
MAX_PICKLE = 256 << 20  # of the part of it that is no tensor
MAX_KEYS = 100_000

_PREFERRED = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_COUNTER = "num_batches_tracked"
_SAVE = (
    "in the program that made it, save the weights alone: torch.save(model.state_dict(), "
    '"weights.pt"), or safetensors.torch.save_file(model.state_dict(), "weights.safetensors")'
)


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one that does not fit its architecture."""


def read_checkpoint(
    path: Path, wanted: Collection[str] = (), *, notes: list[str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a file by their state-dict keys, on the CPU, as they are.

    A training state is searched for the state dict inside. ``wanted`` are the keys of the module
    that the checkpoint belongs to, if it is known: they tell which of several dictionaries is
    meant, and whether a prefix such as ``module.`` must be stripped. What was done of this is
    added to ``notes``.

    Raises:
        CheckpointError: if the file is missing, broken, too large, or holds no dictionary of
            dense tensors.
    """
    notes = [] if notes is None else notes
    if not path.is_file():
        raise CheckpointError(f"{path} must be a checkpoint file, however: there is no such file")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} must be a checkpoint file, however: it is empty")
    _check_bytes(path, size)
    if path.suffix == SAFETENSORS:
        found = _read_safetensors(path)
    elif path.suffix in PYTORCH:
        found = _choose_state(path, _read_pytorch(path), wanted, notes)
    else:
        raise CheckpointError(
            f"a checkpoint must end in {SAFETENSORS}, {' or '.join(PYTORCH)}, however: {path}"
        )
    if not found:
        raise CheckpointError(f"{path} must hold tensors, however: it holds none")
    for key, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            kind = (
                "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            )
            kind = "without data" if tensor.is_meta else kind
            raise CheckpointError(
                f"{path} must hold dense tensors, however: {key} is {kind}; convert it before "
                "saving"
            )
    _check_bytes(path, sum(tensor.numel() * tensor.element_size() for tensor in found.values()))
    return _strip_prefixes(found, wanted, notes)


def read_state(path: Path, module: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The checkpoint ``path`` of ``module``: its floating-point tensors in float32 (float64 stays)
    and BatchNorm's counters; and notes on what was changed to read it.

    Raises:
        CheckpointError: if the file cannot be read, does not fit the module, or holds NaN or
            infinite weights.
    """
    notes: list[str] = []
    found = read_checkpoint(path, module.state_dict().keys(), notes=notes)
    return fit_state(found, module, notes), notes


def fit_state(found: State, module: nn.Module, notes: list[str]) -> dict[str, torch.Tensor]:
    """The tensors ``found`` as `read_state` returns them; what was converted is added to
    ``notes``."""
    expected = module.state_dict()
    counters = [key for key in expected if key.endswith(_COUNTER) and key not in found]
    wanted = {key: tensor for key, tensor in expected.items() if key not in counters}
    check_fits(wanted, found)
    state: dict[str, torch.Tensor] = {}
    converted: set[str] = set()
    for key, model in wanted.items():
        tensor = found[key]
        if not model.is_floating_point():
            if key.endswith(_COUNTER):
                state[key] = tensor.to(torch.int64)
            continue
        check_real({key: tensor})
        if tensor.dtype not in (torch.float32, torch.float64):
            converted.add(str(tensor.dtype).removeprefix("torch."))
            tensor = tensor.to(device="cpu", dtype=torch.float32)
        state[key] = tensor.detach().cpu().contiguous()
    if converted:
        notes.append(f"read {' and '.join(sorted(converted))} weights as float32")
    return state


def check_real(state: State) -> None:
    """Raise CheckpointError, naming the first, if weights are complex, NaN or infinite."""
    for key, tensor in state.items():
        if tensor.is_complex():
            raise CheckpointError(f"weights must be real numbers, however: {key} is complex")
        full = tensor if tensor.dtype == torch.float64 else tensor.float()
        bad = int(tensor.numel() - torch.isfinite(full).sum())
        if bad:
            raise CheckpointError(
                f"weights must be finite, however: {bad} of {tensor.numel()} in {key} are NaN or "
                "infinite; training diverged, or the file is damaged"
            )


def check_fits(module: nn.Module | Mapping[str, torch.Tensor], state: State) -> None:
    """Raise CheckpointError, naming the first keys, unless ``state`` loads into ``module`` (or a
    dictionary with tensors of its shapes) strictly."""
    expected = module.state_dict() if isinstance(module, nn.Module) else module
    wanted = {key: tuple(tensor.shape) for key, tensor in expected.items()}
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
            f"the checkpoint must fit the architecture, however: {'; '.join(facts)}; "
            f"{_advice(state, wanted)}"
        )


def _advice(state: State, wanted: Mapping[str, Any]) -> str:
    from weightnet.architecture import closest_architecture

    name, share = closest_architecture(state)
    if wanted.keys() == state.keys():
        return "the keys agree, so give the architecture's arguments (widths, classes)"
    if share > 0.3:
        return f"the closest registered architecture is {name} ({share:.0%} of keys and shapes)"
    return "no registered architecture is close; name your own as package.module:callable"


def _check_bytes(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise CheckpointError(
            f"a checkpoint must have at most {MAX_BYTES >> 30} GiB, however: {path} has "
            f"{size / (1 << 30):.1f}; save the weights alone"
        )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0] or "it is broken"
        raise CheckpointError(f"{path} must be a safetensors file, however: {reason}") from None


def _read_pytorch(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04":
            _check_archive(path)
        elif start[:1] != b"\x80":  # the older format is a plain pickle
            raise CheckpointError(
                f"{path} must be a PyTorch checkpoint, however: it is neither a zip archive nor a "
                "pickle"
            )
        elif path.stat().st_size > MAX_BYTES // 2:
            raise CheckpointError(
                f"{path} must be in PyTorch's zip format when it is that large, however: it is in "
                "the older one; save it again"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of the file is an error here
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = str(error).rpartition("WeightsUnpickler error:")[2]  # before it: general advice
        named = re.search(r"GLOBAL ([\w.]+)", found) or re.search(r"`([\w.]+)`", found)
        what = f"such as {named[1]}" if named else "or is broken"
        raise CheckpointError(
            f"{path} must hold tensors only, however: it holds other objects, {what}, which are "
            f"not loaded because that could run code; {_SAVE}"
        ) from None
    except CheckpointError:
        raise
    except MemoryError:
        raise CheckpointError(
            f"{path} must fit into memory, however: it claims to be larger"
        ) from None
    except Exception as error:  # a hostile pickle can make the reader fail in any way
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "TorchScript" in str(error):
            reason = 'it is TorchScript; save torch.jit.load("model.pt").state_dict() instead'
        raise CheckpointError(f"{path} must be a PyTorch checkpoint, however: {reason}") from None


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than it may."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} must be a whole zip archive, however: {error}; it was cut off or damaged"
        ) from None
    _check_bytes(path, sum(entry.file_size for entry in entries))
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path} must hold its tensors uncompressed, as torch.save writes them, however: it "
            "is compressed; save it again"
        )
    pickled = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    if pickled > MAX_PICKLE or len(entries) > MAX_KEYS:
        raise CheckpointError(
            f"{path} must have at most {MAX_PICKLE >> 20} MiB besides tensors and {MAX_KEYS} "
            f"entries, however: {pickled >> 20} MiB and {len(entries)}; save the weights alone"
        )


def _choose_state(
    path: Path, data: Any, wanted: Collection[str], notes: list[str]
) -> dict[str, torch.Tensor]:
    """The state dict in what a file held."""
    if isinstance(data, torch.Tensor):
        raise CheckpointError(
            f"{path} must hold a dictionary of tensors, however: it holds one tensor; {_SAVE}"
        )
    found = list(_state_dicts(data))
    if not found:
        keys = ", ".join(map(str, list(data)[:12])) if isinstance(data, Mapping) else ""
        what = f"a {type(data).__name__}" + (f" with the keys {keys}" if keys else "")
        raise CheckpointError(
            f"{path} must hold a dictionary of tensors, however: it holds {what[:300]}; {_SAVE}"
        )

    def rank(entry: tuple[str, dict[str, torch.Tensor]]) -> tuple[float, int]:
        name, state = entry
        keys = set(_strip_prefixes(state, wanted, []))
        last = name.rpartition(".")[2]
        preferred = len(_PREFERRED) - _PREFERRED.index(last) if last in _PREFERRED else 0
        return len(keys & set(wanted)) / len(keys | set(wanted)), preferred

    scores = [rank(entry) for entry in found]
    best = max(scores)
    if best <= (0.0, 0) and len(found) > 1:
        names = ", ".join(name for name, _ in found[:12])
        raise CheckpointError(
            f"{path} must hold one state dict, however: it holds several, {names}; save the "
            "weights alone"
        )
    name, state = found[scores.index(best)]
    if name:
        notes.append(f"took the state dict under {name!r}")
    return state


def _state_dicts(data: Any) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every dictionary of tensors by text keys inside ``data``, by its path of keys."""
    waiting, seen = [("", data, 0)], {id(data)}
    while waiting and len(seen) < MAX_KEYS:
        name, value, depth = waiting.pop(0)
        if not isinstance(value, Mapping):
            continue
        tensors = {
            str(key): tensor.detach()
            for key, tensor in value.items()
            if isinstance(key, str) and isinstance(tensor, torch.Tensor)
        }
        if tensors and len(tensors) == len(value):
            yield name, tensors
        elif depth < 4:
            for key, inner in value.items():
                if isinstance(inner, Mapping) and id(inner) not in seen:
                    seen.add(id(inner))
                    waiting.append((f"{name}.{key}" if name else str(key), inner, depth + 1))


def _strip_prefixes(
    state: dict[str, torch.Tensor], wanted: Collection[str], notes: list[str]
) -> dict[str, torch.Tensor]:
    """Take prefixes that wrappers (DataParallel, torch.compile, Lightning) put before every key
    off, unless the module's own keys begin with them."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            own = any(key.startswith(prefix) for key in wanted)
            if (prefix == "model." and not wanted) or own:
                continue
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
                notes.append(f"stripped the prefix {prefix!r} from every key")
                stripped = True
    return state


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
    seen: set[int] = set()
    own: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():  # a tensor under two keys is written twice
        shared = tensor.untyped_storage().data_ptr() in seen
        own[key] = tensor.clone() if shared else tensor.contiguous()
        seen.add(own[key].untyped_storage().data_ptr())
    try:
        with replace_file(path) as partial:
            partial.touch()
            mode = partial.stat().st_mode  # of the user's umask: save_file makes files private
            save_file(own, partial)
            partial.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} must be writable, however: {error}") from None
