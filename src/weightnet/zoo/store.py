"""Trained stacks on disk: one folder each, keyed by everything that determines its content.

    data/zoo/F/<key>/weights.safetensors    every state tensor as [S, ...]
    data/zoo/F/<key>/networks.parquet       run, properties, divergence: S rows in the same order
    data/zoo/F/<key>/manifest.json          SHA-256 of both

A folder appears whole, by a rename, or not at all; one that does not match its manifest is not
accepted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from weightnet.durable import digest, replace_folder
from weightnet.zoo.stacked import State

_FILES = ("weights.safetensors", "networks.parquet")


@dataclass(frozen=True)
class StoredStack:
    """S trained networks of one shape: ``networks`` has S rows, ``weights`` tensors [S, ...]."""

    networks: pd.DataFrame
    weights: dict[str, Tensor]

    def state(self, index: int) -> State:
        """The state dict of one network (floating-point tensors)."""
        return {name: tensor[index] for name, tensor in self.weights.items()}


def write_stack(folder: Path, networks: pd.DataFrame, states: list[State]) -> None:
    """Write a stack to ``folder``, atomically; an older one is replaced."""
    stacked = {n: torch.stack([state[n] for state in states]).contiguous() for n in states[0]}
    with replace_folder(folder) as temporary:
        (temporary / _FILES[0]).write_bytes(save(stacked))
        networks.to_parquet(temporary / _FILES[1], index=False)
        manifest = {name: digest(temporary / name) for name in _FILES}
        (temporary / "manifest.json").write_text(json.dumps(manifest, sort_keys=True))


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds a whole stack that agrees with its checksums."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(manifest.get(name) == digest(folder / name) for name in _FILES)
    except (OSError, ValueError, AttributeError):
        return False


def read_stack(folder: Path) -> StoredStack:
    """Read a stack back.

    Raises:
        ValueError: if it is not complete.
    """
    if not is_complete(folder):
        raise ValueError(
            f"{folder} must be a whole stack, however: it is damaged; run `dvc repro train_zoo`"
        )
    return StoredStack(pd.read_parquet(folder / _FILES[1]), load_file(folder / _FILES[0]))


def read_zoo(folder: Path) -> Iterator[StoredStack]:
    """Read a family's stacks one by one, in the order of their keys.

    Raises:
        ValueError: if there is none.
    """
    stacks = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    if not stacks:
        raise ValueError(f"no trained stacks in {folder}; run `dvc repro train_zoo`")
    return (read_stack(path) for path in stacks)


def prune(folder: Path, keep: set[str]) -> list[str]:
    """Remove from a family's folder what is not in ``keep`` (stale stacks, leftovers); return the
    names."""
    stale = [path for path in sorted(folder.iterdir()) if path.name not in keep]
    for path in stale:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in stale]


def adopt(source: Path, folder: Path, names: list[str]) -> tuple[int, int]:
    """Copy the stacks called ``names`` from ``source`` into ``folder``, those that are there and
    whole excepted; return how many were copied and kept.

    Raises:
        ValueError: if a stack of ``source`` is missing or damaged.
    """
    missing = [name for name in names if not is_complete(folder / name)]
    for name in missing:
        if not is_complete(source / name):
            raise ValueError(
                f"{source / name} must be a whole stack, however: it is missing or damaged; "
                "import the zoo again with `weightnet import`"
            )
        with replace_folder(folder / name) as temporary:
            shutil.copytree(source / name, temporary, dirs_exist_ok=True)
    return len(missing), len(names) - len(missing)
