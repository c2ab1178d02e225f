"""Predictors that are torch modules: a `Reader` makes batches of networks, one loop fits them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import nn

from weightnet.params import Params
from weightnet.predictors.fitting import (
    Batches,
    Examples,
    FitConfig,
    fit_module,
    run_module,
    seeded,
)
from weightnet.predictors.interface import Log, Predictor, read_arrays, write_arrays
from weightnet.predictors.novelty import Novelty, has_embedding, view_networks
from weightnet.predictors.scaling import Array
from weightnet.randomness import derive_seed

if TYPE_CHECKING:
    from weightnet.tokens import Networks


class Reader(Protocol):
    """What a torch predictor knows about networks."""

    def prepare(self, train: Networks) -> None:
        """Measure on the training networks what batches need, such as the scale of features."""

    def batches(self, networks: Networks, *, training: bool) -> Batches:
        """Read ``networks``; ``training`` allows augmentation, drawn from torch's generator."""

    def module(self, properties: int) -> nn.Module:
        """Return a new module, drawn from torch's generator: batch -> mean, log_sigma [B, P]."""

    def write(self, folder: Path) -> None:
        """Write what `prepare` measured."""

    def read(self, folder: Path) -> None:
        """Read what `write` wrote."""


class ModulePredictor(Predictor):
    """One or more modules (``fit.members``) fitted on what ``reader`` reads; their average
    predicts.

    The spread is the standard deviation of the mixture of the members' Gaussians.
    """

    def __init__(
        self,
        name: str,
        config: Params,
        properties: Sequence[str],
        seed: int,
        *,
        reader: Reader,
        fit: FitConfig,
    ) -> None:
        super().__init__(name, config, properties, seed)
        self.reader, self.fit_config = reader, fit
        self.modules: list[nn.Module] = []
        self.novelty: Novelty | None = None

    def _train(
        self,
        train: Networks,
        targets: Array,
        validation: Networks,
        validation_targets: Array,
        *,
        log: Log | None,
        checkpoint: Path | None,
    ) -> None:
        config = self.fit_config
        self.reader.prepare(train)
        examples = Examples(self.reader.batches(train, training=True), torch.from_numpy(targets))
        held_out = Examples(
            self.reader.batches(validation, training=False), torch.from_numpy(validation_targets)
        )
        self.modules = []
        for member in range(config.members):
            with seeded(self.seed, "module", member):
                module = self.reader.module(len(self.properties))
            fit_module(
                module,
                examples,
                held_out,
                config,
                seed=derive_seed(self.seed, "fit", member),
                log=_member_log(log, member),
                checkpoint=checkpoint / f"member-{member}.safetensors" if checkpoint else None,
            )
            self.modules.append(module)
        self.calibrate_novelty(train, validation)

    def embed(self, networks: Networks) -> Array:
        """What the heads read of each network, float32 [B, D]: for search and clustering.

        Raises:
            ValueError: if the predictor was never fitted, or has no embedding.
        """
        return self._views(networks)["embedding"]

    def novelty_shares(self, networks: Networks) -> Array | None:
        """The share of validation networks at least as far from the training networks as each of
        ``networks`` [B] (see `Novelty`); None if the predictor cannot tell."""
        return None if self.novelty is None else self.novelty.shares(self._views(networks))

    def calibrate_novelty(self, train: Networks, validation: Networks) -> None:
        """Remember how far networks lie from those of training, if the modules have an
        embedding."""
        self.novelty = None
        if len(train) and len(validation) and has_embedding(self.modules[0]):
            self.novelty = Novelty.fit(self._views(train), self._views(validation))

    def _views(self, networks: Networks) -> dict[str, Array]:
        self._fitted()
        if not has_embedding(self.modules[0]):
            raise ValueError(f"a WeightNet must embed networks, however: it is {self.name}")
        batches = self.reader.batches(networks, training=False)
        return view_networks(self.modules[0], networks, batches, self.fit_config)

    def _estimate(self, networks: Networks) -> tuple[Array, Array]:
        batches = self.reader.batches(networks, training=False)
        runs = [run_module(module, batches, self.fit_config) for module in self.modules]
        means = np.stack([mean.numpy() for mean, _ in runs])
        variances = np.stack([np.exp(2 * log_sigma.numpy()) for _, log_sigma in runs])
        return means.mean(axis=0), np.sqrt(variances.mean(axis=0) + means.var(axis=0))

    def _write(self, folder: Path) -> None:
        self.reader.write(folder)
        for member, module in enumerate(self.modules):
            state = {name: value.cpu().numpy() for name, value in module.state_dict().items()}
            write_arrays(folder / f"member-{member}.safetensors", state)
        if self.novelty is not None:
            self.novelty.write(folder)

    def _read(self, folder: Path) -> None:
        self.reader.read(folder)
        self.modules = []
        for member in range(self.fit_config.members):
            with seeded(self.seed, "module", member):
                module = self.reader.module(len(self.properties))
            arrays = read_arrays(folder / f"member-{member}.safetensors")
            module.load_state_dict(
                {name: torch.from_numpy(array) for name, array in arrays.items()}
            )
            self.modules.append(module.eval())
        self.novelty = Novelty.read(folder)


def _member_log(log: Log | None, member: int) -> Log | None:
    """Log under plain names for the first member, whose curves all runs have."""
    if log is None or member == 0:
        return log
    return lambda metrics, step: log(
        {f"member-{member}/{name}": value for name, value in metrics.items()}, step
    )
