"""Large arrays in temporary files, so that memory holds a batch and not a zoo.

An array above `LIMIT` bytes is a memory-mapped file without a name: the system writes its pages
out when it needs the room, and frees the file with the array. Smaller ones are plain arrays. The
files lie in the folder of `tempfile`, which TMPDIR changes; values are the same either way.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LIMIT = 1 << 25  # bytes above which an array is a file
BLOCK = 1 << 20  # values that are held at a time when such an array is passed over


def scratch_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """A new array of zeros, in a temporary file if it is large.

    Raises:
        OSError: if the disk has not the room.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if fits(size):
        return np.zeros(shape, dtype)
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk must be an error now, no signal later
            os.posix_fallocate(file.fileno(), 0, size)
        return np.asarray(np.memmap(file, dtype, "r+", shape=shape))


def take(values: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
    """``values[rows]`` as a new array, in a temporary file if it is large."""
    out = scratch_zeros((len(rows), *values.shape[1:]), values.dtype)
    for some in blocks(len(rows), values[:1].size):
        out[some] = values[rows[some]]
    return out


def fits(size: int) -> bool:
    """Whether an array of ``size`` bytes is held in memory."""
    return size <= LIMIT


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive slices of ``rows`` rows, of `BLOCK` values at most or of one row."""
    size = max(1, BLOCK // max(1, columns))
    for first in range(0, rows, size):
        yield slice(first, min(rows, first + size))
