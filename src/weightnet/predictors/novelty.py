"""Is a network like those that a predictor was trained on? Its embedding is compared with theirs.

The embedding is what the predictor's heads read. Its distance is the mean distance to the nearest
training embeddings, in units of their spread; it is judged by the distances of the validation
networks, which training did not see: the share of them that lie at least as far is a conformal
p-value (Bates et al. 2023, https://arxiv.org/abs/2104.08279). A network with a share of at most
`LEVEL` is outside; so is one in twenty of the networks that are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from weightnet.compute import default_device
from weightnet.predictors.fitting import Batches, FitConfig
from weightnet.predictors.interface import read_arrays, write_arrays
from weightnet.predictors.scaling import Array

LEVEL = 0.05
NEIGHBOURS = 5
MOST = 4000  # training embeddings that are kept
FILE = "novelty.safetensors"


@dataclass(frozen=True)
class Novelty:
    """``center``, ``scale`` [D] and ``references`` [N, D], standardized, of the training networks;
    ``calibration`` [V], the sorted distances of the validation networks."""

    center: Array
    scale: Array
    references: Array
    calibration: Array

    @classmethod
    def fit(cls, train: Array, validation: Array) -> Self:
        """Remember the embeddings [N, D] of training networks; calibrate on [V, D]."""
        center, scale = train.mean(axis=0), train.std(axis=0)
        scale = np.where(scale > 1e-6 * (np.abs(center) + 1e-6), scale, 1.0)
        chosen = np.linspace(0, len(train) - 1, min(MOST, len(train))).round().astype(np.int64)
        references = ((train[chosen] - center) / scale).astype(np.float32)
        new = cls(center, scale, references, np.zeros(0))
        return cls(center, scale, references, np.sort(new.distances(validation)))

    def distances(self, embeddings: Array) -> Array:
        """The distance of each of ``embeddings`` [B, D] -> [B], float64."""
        scaled = ((embeddings - self.center) / self.scale).astype(np.float64)
        references = self.references.astype(np.float64)
        nearest = min(NEIGHBOURS, len(references))
        found = np.empty(len(scaled))
        for row, embedding in enumerate(scaled):
            squares = np.square(references - embedding).mean(axis=1)
            found[row] = np.sqrt(np.partition(squares, nearest - 1)[:nearest]).mean()
        return found

    def shares(self, embeddings: Array) -> Array:
        """The share of validation networks at least as far away as each of ``embeddings`` [B, D],
        itself counted among them -> [B]."""
        below = np.searchsorted(self.calibration, self.distances(embeddings), side="left")
        count = len(self.calibration)
        shares: Array = (count - below + 1) / (count + 1)
        return shares

    def write(self, folder: Path) -> None:
        """Write it to ``folder``."""
        write_arrays(folder / FILE, dict(vars(self)))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read what `write` wrote; None if there is nothing."""
        return cls(**read_arrays(folder / FILE)) if (folder / FILE).is_file() else None


def embed_batches(module: nn.Module, batches: Batches, config: FitConfig) -> Array | None:
    """What the heads of ``module`` read of each network, averaged over properties, float32 [B, D];
    None for a module without heads (``hidden``)."""
    heads = getattr(module, "hidden", None)
    if not isinstance(heads, nn.Module):
        return None
    device = default_device()
    module.to(device).eval()
    seen: list[Array] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].float().mean(dim=1).cpu().numpy())

    handle = heads.register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            for indices in batches.cut(torch.arange(batches.count), config):
                module(batches.collate(indices).to(device))
    finally:
        handle.remove()
    return np.concatenate(seen) if seen else None
