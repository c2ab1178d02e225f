"""Predictors that are torch modules: a `Reader` makes batches of networks, one loop fits them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
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
from weightnet.predictors.folds import Fold, cut_folds
from weightnet.predictors.interface import Estimate, Log, Predictor, read_arrays, write_arrays
from weightnet.predictors.novelty import Novelty, has_embedding, view_networks
from weightnet.predictors.scaling import Array
from weightnet.randomness import derive_seed

if TYPE_CHECKING:
    from weightnet.tokens import Networks

Longs = NDArray[np.int64]


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
    """One or more modules (see ``fit.folds``) fitted on what ``reader`` reads; their average
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
        self.folds: list[Fold] = []
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
        batches = self.reader.batches(train, training=True)
        held_out = Examples(
            self.reader.batches(validation, training=False), torch.from_numpy(validation_targets)
        )
        self.modules = []
        self.folds = cut_folds(train.frame, targets, config.folds, seed=self.seed)
        for member, fold in enumerate(self.folds):
            with seeded(self.seed, "module", member):
                module = self.reader.module(len(self.properties))
            seen = np.flatnonzero(~fold)
            fit_module(
                module,
                Examples(batches.select(torch.from_numpy(seen)), torch.from_numpy(targets[seen])),
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

    def _estimate(self, networks: Networks) -> Estimate:
        return _average(self._ask_all(networks))

    def _ask_all(self, networks: Networks) -> list[Estimate]:
        batches = self.reader.batches(networks, training=False)
        everything = np.arange(len(networks))
        members = range(len(self.modules))
        return [self._ask(member, networks, batches, everything) for member in members]

    def _ask(self, member: int, networks: Networks, batches: Batches, chosen: Longs) -> Estimate:
        """What one member estimates of the ``chosen`` [n] of ``networks``, which ``batches``
        read."""
        own = batches.select(torch.from_numpy(chosen))
        mean, log_sigma = run_module(self.modules[member], own, self.fit_config)
        return Estimate(mean.numpy(), np.exp(log_sigma.numpy()))

    def _estimate_unseen(
        self, train: Networks, validation: Networks, validation_targets: Array
    ) -> Estimate | None:
        """Of each training network, by the member that was fitted without it; None if there is one
        member only.

        The average of all members errs less than one that was fitted on fewer networks, and tells
        so by another spread. How much less, in units of the spread, is seen on the validation
        networks, where both predict; the members' spread is enlarged by it, or intervals would be
        too wide.
        """
        if len(self.folds) == 1:
            return None
        batches = self.reader.batches(train, training=False)
        unseen = Estimate(*np.empty((2, len(train), len(self.properties))))
        for member, fold in enumerate(self.folds):
            if fold.any():
                unseen.mean[fold], unseen.spread[fold] = self._ask(
                    member, train, batches, np.flatnonzero(fold)
                )
        if len(validation) == 0:
            return unseen
        members = self._ask_all(validation)
        known = np.isfinite(validation_targets)
        errors = [
            np.where(known, np.abs(validation_targets - one.mean) / one.spread, 0.0).sum(axis=0)
            for one in [*members, _average(members)]
        ]
        least = np.finfo(np.float64).tiny
        ratio = (np.mean(errors[1:-1], axis=0) + least) / (errors[-1] + least)
        return Estimate(unseen.mean, unseen.spread * ratio)

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
        for member in range(len(list(folder.glob("member-*.safetensors")))):
            with seeded(self.seed, "module", member):
                module = self.reader.module(len(self.properties))
            arrays = read_arrays(folder / f"member-{member}.safetensors")
            module.load_state_dict(
                {name: torch.from_numpy(array) for name, array in arrays.items()}
            )
            self.modules.append(module.eval())
        self.novelty = Novelty.read(folder)


def _average(members: Sequence[Estimate]) -> Estimate:
    """Mean and standard deviation of the mixture of Gaussians."""
    means = np.stack([one.mean for one in members])
    variances = np.stack([one.spread**2 for one in members])
    return Estimate(means.mean(axis=0), np.sqrt(variances.mean(axis=0) + means.var(axis=0)))


def _member_log(log: Log | None, member: int) -> Log | None:
    """Log under plain names for the first member, whose curves all runs have."""
    if log is None or member == 0:
        return log
    return lambda metrics, step: log(
        {f"member-{member}/{name}": value for name, value in metrics.items()}, step
    )
