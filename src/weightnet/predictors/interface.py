"""What every predictor is: fit on networks, predict properties with intervals, save to and load
from a folder.

`Predictor` does what all have in common, once: it checks and standardizes the targets, calibrates
the intervals on networks that were not trained on, and writes folders atomically. A predictor adds
four steps: ``_train``, ``_estimate``, ``_write``, ``_read``. Targets may be missing (NaN: a
diverged run, an imported zoo without that property); each property uses the networks that have it,
and predictions are given for all networks.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from weightnet.durable import expect_digests, replace_folder, write_digests
from weightnet.params import Params
from weightnet.predictors.calibration import LEVEL, conformal_factors
from weightnet.predictors.scaling import Array, Standardizer

if TYPE_CHECKING:
    import pandas as pd

    from weightnet.tokens import Networks

Log = Callable[[dict[str, float], int], None]
"""Called with metrics by name and a step: the epoch, or the candidate of a search."""

FORMAT = 1
_LIMIT = 6.0  # training targets are limited to this many standard deviations
_SPREAD = 1e-6  # least spread, in standard deviations of the property


class Estimate(NamedTuple):
    """Mean and spread of properties [B, P], standardized."""

    mean: Array
    spread: Array


@dataclass(frozen=True)
class Prediction:
    """Predicted properties of B networks, float64 [B, P] each, in the units of the properties.

    ``low`` and ``high`` bound the 90% conformal interval. Nothing is clipped to a property's
    range: an accuracy may be predicted above 1, and with fewer than 9 networks to calibrate them
    intervals are infinite.
    """

    properties: tuple[str, ...]
    mean: Array
    low: Array
    high: Array


class Predictor(ABC):
    """A predictor of ``properties`` from networks; see the module docstring.

    Args:
        name: the name in the registry.
        config: its section of params.yaml.
        properties: the P properties to predict, without the prefix ``property.``.
        seed: makes everything random reproducible.

    Attributes:
        calibration: after `fit`, the table of the networks that calibrated the intervals, and what
            was predicted for them by what had not seen them; not saved.

    Raises:
        ValueError: if ``properties`` is empty or repeats a name.
    """

    calibration: tuple[pd.DataFrame, Prediction]

    def __init__(self, name: str, config: Params, properties: Sequence[str], seed: int) -> None:
        if not properties or len(set(properties)) != len(properties):
            raise ValueError(
                f"properties must be distinct names, at least one, "
                f"however: properties={list(properties)}"
            )
        self.name, self.config, self.properties, self.seed = name, config, tuple(properties), seed
        self._targets: Standardizer | None = None
        self._factors: Array = np.full(len(properties), np.inf)

    def fit(
        self,
        train: Networks,
        validation: Networks,
        *,
        log: Log | None = None,
        checkpoint: Path | None = None,
    ) -> Self:
        """Train on ``train``; tune and stop early on ``validation``; calibrate the intervals on
        ``validation``, or on ``train`` where parts of it are fitted without each other.

        Args:
            log: receives metrics as training goes; after a resume, those of before as well.
            checkpoint: folder for the state of unfinished training, for predictors that train
                long; a fit that finds its own state there continues as if it had never stopped.

        Raises:
            ValueError: if a property is unknown, or measured on no training network.
        """
        measured, held_out = self._measured(train), self._measured(validation)
        for name, count in zip(self.properties, np.isfinite(measured).sum(axis=0), strict=True):
            if count == 0:
                raise ValueError(
                    f"property {name} must be measured on at least one training network, "
                    f"however: it is missing on all {len(train)}; remove it from the properties, "
                    f"or choose another split"
                )
        self._targets = Standardizer.fit(measured, _LIMIT)
        held_out_targets = self._targets.transform(held_out)
        self._train(
            train,
            self._targets.transform(measured),
            validation,
            held_out_targets,
            log=log,
            checkpoint=checkpoint,
        )
        unseen = self._estimate_unseen(train, validation, held_out_targets)
        networks, known = (validation, held_out) if unseen is None else (train, measured)
        estimate = self._estimate_some(validation) if unseen is None else unseen
        self._factors = conformal_factors(known, *self._in_units(estimate), LEVEL)
        self.calibration = networks.frame, self._prediction(estimate)
        return self

    def predict(self, networks: Networks) -> Prediction:
        """Predict all properties of ``networks``, whether or not they were ever measured.

        Raises:
            ValueError: if the predictor was never fitted.
        """
        return self._prediction(self._estimate_some(networks))

    def accepts(self, networks: Networks) -> NDArray[np.bool_]:
        """Return which of ``networks`` can be fitted and predicted [B]; all, unless it says
        otherwise."""
        return np.ones(len(networks), dtype=bool)

    def save(self, folder: Path) -> None:
        """Write the fitted predictor to ``folder``, replacing it as a whole (JSON, safetensors,
        text).

        Raises:
            ValueError: if the predictor was never fitted.
        """
        targets = self._fitted()
        with replace_folder(folder) as temporary:
            described = {
                "format": FORMAT,
                "name": self.name,
                "properties": list(self.properties),
                "seed": self.seed,
                "config": self.config.model_dump(mode="json"),
            }
            write_json(temporary / "predictor.json", described)
            arrays = {"center": targets.center, "scale": targets.scale, "factors": self._factors}
            write_arrays(temporary / "calibration.safetensors", arrays)
            self._write(temporary)
            write_digests(temporary)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote; called on `Predictor`, any predictor.

        Raises:
            ValueError: if the folder holds no predictor, one of another format, or one of another
            class.
        """
        from weightnet.predictors.registry import build

        described = read_description(folder)
        loaded = build(
            described["name"], described["config"], described["properties"], described["seed"]
        )
        if not isinstance(loaded, cls):
            raise ValueError(f"{folder} must hold a {cls.__name__}, however: name={loaded.name}")
        try:
            arrays = read_arrays(folder / "calibration.safetensors")
            loaded._targets = Standardizer(arrays["center"], arrays["scale"], _LIMIT)
            loaded._factors = arrays["factors"]
            loaded._read(folder)
        except Exception as error:  # each predictor's own files, broken in whatever way
            raise ValueError(_damaged(folder, error)) from None
        return loaded

    @abstractmethod
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
        """Learn from standardized targets [B, P], NaN where missing."""

    def _estimate_unseen(
        self, train: Networks, validation: Networks, validation_targets: Array
    ) -> Estimate | None:
        """Estimate each network of ``train`` by what was fitted without it, after `_train`; None
        if all that was fitted saw it."""
        return None

    @abstractmethod
    def _estimate(self, networks: Networks) -> Estimate:
        """Estimate some networks, at least one; a predictor without spread returns ones."""

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Write what was learned into ``folder``; no file may depend on anything but that."""

    @abstractmethod
    def _read(self, folder: Path) -> None:
        """Read what `_write` wrote."""

    def _measured(self, networks: Networks) -> Array:
        frame = networks.frame
        missing = [name for name in self.properties if f"property.{name}" not in frame.columns]
        if missing:
            known = [
                c.removeprefix("property.") for c in frame.columns if c.startswith("property.")
            ]
            raise ValueError(
                f"properties must be among those measured ({', '.join(known)}), "
                f"however: {', '.join(missing)}"
            )
        columns = [f"property.{name}" for name in self.properties]
        values: Array = frame[columns].to_numpy(dtype=np.float64, na_value=np.nan)
        return np.where(np.isfinite(values), values, np.nan)

    def _fitted(self) -> Standardizer:
        if self._targets is None:
            raise ValueError(
                f"predictor {self.name} must be fitted or loaded first, however: it is new"
            )
        return self._targets

    def _estimate_some(self, networks: Networks) -> Estimate:
        self._fitted()
        if len(networks) == 0:
            return Estimate(*np.zeros((2, 0, len(self.properties))))
        return self._estimate(networks)

    def _in_units(self, estimate: Estimate) -> tuple[Array, Array]:
        """Mean and spread [B, P] in the units of the properties."""
        targets = self._fitted()
        spread = np.maximum(estimate.spread, _SPREAD) * targets.scale
        return targets.inverse(estimate.mean), spread

    def _prediction(self, estimate: Estimate) -> Prediction:
        mean, spread = self._in_units(estimate)
        reach = self._factors * spread
        return Prediction(self.properties, mean, mean - reach, mean + reach)


def read_description(folder: Path) -> dict[str, Any]:
    """Return name, properties, seed and config of the predictor saved in ``folder``.

    Raises:
        ValueError: if the folder holds no predictor, one of another format, or one that has
        changed since.
    """
    path = folder / "predictor.json"
    if not path.is_file():
        raise ValueError(f"{folder} must hold a saved predictor, however: {path} does not exist")
    try:
        described: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(_damaged(folder, error)) from None
    if described.get("format") != FORMAT:
        raise ValueError(
            f"{path} must have format {FORMAT}, however: format={described.get('format')}; "
            f"train it again"
        )
    missing = {"name", "properties", "seed", "config"} - set(described)
    if missing:
        raise ValueError(_damaged(folder, f"{path.name} lacks {', '.join(sorted(missing))}"))
    expect_digests(folder, "train it again")
    return described


def _damaged(folder: Path, fact: object) -> str:
    reason = fact if isinstance(fact, str) else f"{type(fact).__name__}: {fact}"
    return f"{folder} must hold a whole predictor, however: {reason}; train it again"


def write_json(path: Path, data: object) -> None:
    """Write ``data`` as JSON with a fixed layout."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays by name as safetensors."""
    from safetensors.numpy import save

    # not save_file: it makes a file that only its owner can read
    path.write_bytes(save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))


def read_arrays(path: Path) -> dict[str, Array]:
    """Read what `write_arrays` wrote.

    Raises:
        ValueError: if the file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} must be a safetensors file, however: {error}") from None
