"""Randomness is passed in: generators derived from (seed, stage, id), never from global state.

The same names give the same stream on every machine and in every process, and two different names
give independent streams, so that work can be split and resumed without changing a result.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(*names: int | str) -> int:
    """A 63-bit seed from names such as (seed, stage, run)."""
    text = "\x1f".join(str(name) for name in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(*names: int | str) -> np.random.Generator:
    """A NumPy generator for these names."""
    return np.random.default_rng(derive_seed(*names))


def torch_generator(*names: int | str) -> torch.Generator:
    """A CPU torch generator for these names."""
    return torch.Generator().manual_seed(derive_seed(*names))
