"""Is a network like those that a predictor was trained on?

It is looked at in several views: its embedding (what the predictor's heads read), the statistics
that the predictor reads, and its size. In each, its distance is the mean distance to the nearest
training networks, in units of the distance that all but a tenth of those keep from each other; the
greatest of the views counts. It is judged by the distances of the validation networks, which
training did not see: the share of them that are at least as far is a conformal p-value (Bates et
al. 2023, https://arxiv.org/abs/2104.08279). A network with a share of at most `LEVEL` is outside;
so is one in twenty of the networks that are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from weightnet.compute import default_device
from weightnet.predictors.fitting import Batches, FitConfig
from weightnet.predictors.interface import read_arrays, write_arrays
from weightnet.predictors.scaling import Array

if TYPE_CHECKING:
    from weightnet.tokens import Networks

LEVEL = 0.05
NEIGHBOURS = 5
MOST = 2000  # training networks that are remembered
FILE = "novelty.safetensors"

Views = Mapping[str, Array]
"""By name an array [B, D] of the same networks."""


@dataclass(frozen=True)
class View:
    """``center``, ``scale`` [D] and standardized ``references`` [N, D] of the training networks;
    ``unit`` [1], the distance that nine tenths of them keep from the others."""

    center: Array
    scale: Array
    references: Array
    unit: Array

    @classmethod
    def fit(cls, values: Array) -> Self:
        """Remember the training networks ``values`` [N, D]."""
        center, scale = values.mean(axis=0), values.std(axis=0)
        scale = np.where(scale > 1e-6 * (np.abs(center) + 1e-6), scale, 1.0)
        chosen = np.linspace(0, len(values) - 1, min(MOST, len(values))).round().astype(np.int64)
        references = ((values[chosen] - center) / scale).astype(np.float32)
        new = cls(center, scale, references, np.ones(1))
        own = np.quantile(new.distances(values[chosen], skip=1), 0.9)
        return cls(center, scale, references, np.array([max(own, 1e-3)]))

    def distances(self, values: Array, skip: int = 0) -> Array:
        """The distance of each of ``values`` [B, D] -> [B]; the ``skip`` nearest references are
        left out."""
        scaled = ((values - self.center) / self.scale).astype(np.float64)
        references = self.references.astype(np.float64)
        last = min(NEIGHBOURS + skip, len(references))
        found = np.zeros(len(scaled))
        for row, value in enumerate(scaled):
            squares = np.square(references - value).mean(axis=1)
            nearest = np.sort(np.partition(squares, last - 1)[:last])[skip:]
            found[row] = np.sqrt(nearest).mean() if len(nearest) else 0.0
        return found / float(self.unit[0])


@dataclass(frozen=True)
class Novelty:
    """The views of the training networks, and ``calibration`` [V], the sorted distances of the
    validation networks."""

    views: dict[str, View]
    calibration: Array

    @classmethod
    def fit(cls, train: Views, validation: Views) -> Self:
        """Remember the training networks; calibrate on the validation networks."""
        new = cls({name: View.fit(values) for name, values in train.items()}, np.zeros(0))
        return cls(new.views, np.sort(new.distances(validation)))

    def distances(self, networks: Views) -> Array:
        """The greatest distance of each network over the views [B]."""
        return np.max([view.distances(networks[n]) for n, view in self.views.items()], axis=0)

    def shares(self, networks: Views) -> Array:
        """The share of validation networks at least as far as each network, itself counted among
        them [B]."""
        below = np.searchsorted(self.calibration, self.distances(networks), side="left")
        count = len(self.calibration)
        shares: Array = (count - below + 1) / (count + 1)
        return shares

    def write(self, folder: Path) -> None:
        """Write it to ``folder``."""
        arrays = {
            f"{name}.{field}": array
            for name, view in self.views.items()
            for field, array in vars(view).items()
        }
        write_arrays(folder / FILE, {"calibration": self.calibration, **arrays})

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read what `write` wrote; None if there is nothing."""
        if not (folder / FILE).is_file():
            return None
        arrays = read_arrays(folder / FILE)
        calibration = arrays.pop("calibration")
        views: dict[str, dict[str, Array]] = {}
        for key, array in arrays.items():
            name, _, field = key.partition(".")
            views.setdefault(name, {})[field] = array
        return cls({name: View(**fields) for name, fields in sorted(views.items())}, calibration)


def has_embedding(module: nn.Module) -> bool:
    """Whether a module has heads that read an embedding."""
    return isinstance(getattr(module, "hidden", None), nn.Module)


def view_networks(
    module: nn.Module, networks: Networks, batches: Batches, config: FitConfig
) -> dict[str, Array]:
    """The views of ``networks``, whose ``batches`` they are: ``embedding``, what the heads of
    ``module`` read, averaged over properties; ``statistics``, if batches have them; ``size``."""
    device = default_device()
    module.to(device).eval()
    seen: dict[str, list[Array]] = {"embedding": [], "statistics": []}

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["embedding"].append(inputs[0].float().mean(dim=1).cpu().numpy())

    handle = module.get_submodule("hidden").register_forward_pre_hook(keep)
    try:
        with torch.inference_mode():
            for indices in batches.cut(torch.arange(batches.count), config):
                batch: Any = batches.collate(indices).to(device)
                module(batch)
                if hasattr(batch, "statistics"):
                    seen["statistics"].append(batch.statistics.float().cpu().numpy())
    finally:
        handle.remove()
    views = {name: np.concatenate(parts) for name, parts in seen.items() if parts}
    return {**views, "size": _sizes(networks)}


def _sizes(networks: Networks) -> Array:
    """Logarithms of the number of layers, neurons and weights, and of the greatest width and
    fan-in [B, 5]."""
    rows = [
        (
            len(layout.layers),
            layout.tokens,
            layout.values,
            max((one.outputs for one in layout.layers), default=0),
            max((one.fan_in for one in layout.layers), default=0),
        )
        for layout in networks.layouts()
    ]
    return np.log1p(np.array(rows, dtype=np.float64).reshape(len(rows), 5))
