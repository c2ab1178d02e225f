"""WeightNet from Python: load or fit, predict, embed, with scikit-learn's habits.

    from weightnet import WeightNet

    WeightNet.load().predict(module)                            # one torch.nn.Module
    WeightNet.load().predict(state, architecture="resnet18")    # a state dict, or a file

Networks go the way of the pipeline's: traced, brought to canonical form, tokenized.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import torch
from torch import nn

from weightnet.architecture import build_architecture, input_shape, trace_module
from weightnet.checkpoint import CheckpointError, fit_state, read_state
from weightnet.durable import replace_folder, write_digests
from weightnet.params import parse
from weightnet.predictors import Predictor, build, entry
from weightnet.predictors.folds import groups
from weightnet.predictors.interface import read_description, write_json
from weightnet.predictors.learned import ModulePredictor
from weightnet.predictors.novelty import LEVEL
from weightnet.predictors.scaling import Array
from weightnet.randomness import numpy_generator
from weightnet.symmetry import PermutationSpec
from weightnet.symmetry.form import CanonicalForm
from weightnet.tokens import Networks

PIPELINE = Path("data/predictors/weightnet-iid")
REFERENCE = Path(__file__).with_name("reference")
PREPARATION = "preparation.json"

Network = nn.Module | Mapping[str, torch.Tensor] | str | Path
"""A module, a state dict, or a checkpoint file; the latter two need an architecture."""


@dataclass(frozen=True)
class Prepared:
    """One network as the pipeline sees it."""

    name: str
    family: str
    module: nn.Module
    spec: PermutationSpec
    shape: tuple[int, ...]
    state: dict[str, torch.Tensor]
    notes: tuple[str, ...] = ()


class WeightNet:
    """Predicts properties of networks from their weights.

    Args:
        predictor: a predictor of the registry.
        properties: what to predict; by default all that the zoo has.
        config: the predictor's section of params.yaml, as a dictionary; by default its defaults.
        preparation: ``canonical`` and, if the predictor reads them, ``probes``, as in the section
            tokenize_zoo of params.yaml.
        validation_fraction: the share of the runs that `fit` keeps from training, to stop early
            and to calibrate, where the zoo has no validation split of its own.
        seed: makes everything random reproducible.

    The constructor only remembers these; `fit` or `load` do the work. The fitted predictor is
    ``predictor_``.
    """

    predictor_: Predictor
    place: Path | None = None

    def __init__(
        self,
        predictor: str = "weightnet",
        *,
        properties: Sequence[str] | None = None,
        config: Mapping[str, Any] | None = None,
        preparation: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        self.predictor = predictor
        self.properties = properties
        self.config = config
        self.preparation = preparation
        self.validation_fraction = validation_fraction
        self.seed = seed

    @classmethod
    def load(cls, folder: str | Path | None = None) -> Self:
        """Read a fitted predictor: from ``folder``, or the pipeline's (data/predictors/
        weightnet-iid in the working directory), or the reference that comes with the package.

        Raises:
            ValueError: if the folder holds no predictor.
        """
        place = find_predictor(None if folder is None else Path(folder))
        described = read_description(place)
        new = cls(
            described["name"],
            properties=tuple(described["properties"]),
            config=described["config"],
            preparation=_read_preparation(place),
            seed=described["seed"],
        )
        new.predictor_ = Predictor.load(place)
        new.place = place
        return new

    def save(self, folder: str | Path) -> None:
        """Write the fitted predictor; `load` reads it back."""
        fitted = self._fitted()
        with replace_folder(Path(folder)) as temporary:
            fitted.save(temporary)
            write_json(temporary / PREPARATION, dict(self.preparation or {}))
            write_digests(temporary)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        del deep
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Change the constructor's arguments.

        Raises:
            ValueError: if there is no such argument.
        """
        unknown = sorted(set(params) - set(self._names()))
        if unknown:
            raise ValueError(
                f"parameters must be among {', '.join(self._names())}, however: {unknown[0]}"
            )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(predictor={self.predictor!r}, seed={self.seed})"

    def fit(
        self,
        zoo: str | Path | Networks | Sequence[Network],
        measured: pd.DataFrame | None = None,
        **architecture: Any,
    ) -> Self:
        """Train on a zoo.

        Args:
            zoo: a folder with metadata.csv (docs/OWN_NETWORKS.md), tokenized `Networks`, or a list
                of networks.
            measured: for a list of networks, a table with a row for each: properties, and perhaps
                the columns ``run`` and ``split``.
            architecture: for a list of state dicts or files, as in `predict`.

        Raises:
            ValueError: if the zoo cannot be read, or has no such property.
        """
        if isinstance(zoo, str | Path):
            networks = self._read_zoo(Path(zoo), architecture.get("path"))
        elif isinstance(zoo, Networks):
            networks = zoo
        else:
            if measured is None or len(measured) != len(zoo):
                raise ValueError(
                    "measured must be a table with a row for each network, however: it has "
                    f"{0 if measured is None else len(measured)} for {len(zoo)}"
                )
            networks = self._tokenize(prepare(zoo, **architecture))
            table = measured.reset_index(drop=True)
            if "run" in table:
                table = table.rename(columns={"run": "group"}).astype({"group": str})
            for name in table:
                kept = name in ("group", "split")
                networks.frame[name if kept else f"property.{name}"] = table[name]
        known = [c.removeprefix("property.") for c in networks.frame if c.startswith("property.")]
        properties = list(self.properties or known)
        train, validation = self._divide(networks)
        model = build(self.predictor, self.config, properties, self.seed)
        self.predictor_ = model.fit(networks.select(train), networks.select(validation))
        return self

    def predict(self, networks: Network | Sequence[Network], **architecture: Any) -> pd.DataFrame:
        """Predict all properties: one row a network.

        Args:
            networks: a module, a state dict, a checkpoint file, or a list of these.
            architecture: for state dicts and files ``architecture`` (a registered name, a module,
                or ``package.module:callable``) and ``arguments``; ``shape`` of one input, where it
                cannot be told, or matters (probes have it); ``path``, a folder of your
                modules; ``names`` of the rows.

        Returns:
            Columns ``<property>``, ``<property>_low``, ``<property>_high`` (90% interval),
            ``novelty`` (the share of validation networks at least as far from the training
            networks) and ``outside`` (that share is 5% or less), where the predictor tells.

        Raises:
            ValueError: if a network cannot be read or traced, or nothing was fitted.
        """
        return self.predict_prepared(prepare(networks, **architecture))

    def predict_prepared(self, prepared: Sequence[Prepared]) -> pd.DataFrame:
        """`predict` for networks that are prepared already."""
        model = self._fitted()
        networks = self._tokenize(prepared)
        predicted = model.predict(networks)
        columns: dict[str, Array] = {}
        for place, name in enumerate(predicted.properties):
            columns[name] = predicted.mean[:, place]
            columns[f"{name}_low"] = predicted.low[:, place]
            columns[f"{name}_high"] = predicted.high[:, place]
        shares = model.novelty_shares(networks) if isinstance(model, ModulePredictor) else None
        if shares is not None:
            columns["novelty"], columns["outside"] = shares, shares <= LEVEL
        return pd.DataFrame(columns, index=pd.Index(networks.frame["run"], name="network"))

    def embed(self, networks: Network | Sequence[Network], **architecture: Any) -> pd.DataFrame:
        """The embedding of each network, [B, D]: what the predictor's heads read. For search and
        clustering; near networks are alike to the predictor.

        Raises:
            ValueError: as `predict`, or if the predictor has no embedding.
        """
        model = self._fitted()
        if not isinstance(model, ModulePredictor):
            raise ValueError(f"a WeightNet must embed networks, however: it is {model.name}")
        tokenized = self._tokenize(prepare(networks, **architecture))
        index = pd.Index(tokenized.frame["run"], name="network")
        return pd.DataFrame(model.embed(tokenized), index=index)

    def _fitted(self) -> Predictor:
        if not hasattr(self, "predictor_"):
            raise ValueError("WeightNet must be fitted or loaded first, however: it is new")
        return self.predictor_

    @classmethod
    def _names(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def _tokenize(self, prepared: Sequence[Prepared]) -> Networks:
        section = dict(self.preparation or {})
        form = parse(CanonicalForm, section.get("canonical", {}), "preparation.canonical")
        states = [form.apply(one.spec, one.state) for one in prepared]
        responses = None
        if entry(self.predictor).needs_forward:
            responses = [
                _responses(one, state, section.get("probes", {}))
                for one, state in zip(prepared, states, strict=True)
            ]
        frame = pd.DataFrame({"run": [one.name for one in prepared]})
        frame["family"], frame["task"] = [one.family for one in prepared], ""
        frame["width"], frame["diverged"] = np.nan, False
        frame["input"] = [json.dumps(list(one.shape)) for one in prepared]
        frame["prepared"] = range(len(prepared))
        networks = Networks.from_states(
            frame, [one.spec for one in prepared], states, responses=responses
        )
        return networks.runnable(lambda row: prepared[row["prepared"]].module)

    def _read_zoo(self, folder: Path, path: str | Path | None) -> Networks:
        from weightnet.importing import check_zoo

        zoo = check_zoo(folder, "zoo", path=None if path is None else Path(path))
        if zoo.problems:
            first = zoo.problems[0]
            raise ValueError(
                f"every row of {folder} must be good, however: {len(zoo.problems)} problems, the "
                f"first in row {first.row}, {first.file}: {first.fact}"
            )
        rows = zoo.rows
        prepared = []
        for row in rows.to_dict("records"):
            (one,) = prepare(
                folder / row["file"],
                architecture=row["architecture"],
                arguments=json.loads(row["architecture_args"] or "{}"),
                shape=json.loads(row["input"]),
                path=path,
            )
            prepared.append(one)
        networks = self._tokenize(prepared)
        networks.frame["run"] = rows["file"]
        networks.frame["group"] = rows["run"]
        for column in rows:
            if column == "split" or column.startswith(("property.", "recipe.")):
                networks.frame[column] = rows[column]
        return networks

    def _divide(self, networks: Networks) -> tuple[Array, Array]:
        """Which networks train and which validate; runs are not divided."""
        frame = networks.frame
        split = frame["split"] if "split" in frame else pd.Series("train", index=frame.index)
        split = split.fillna("train")
        if not (split == "validation").any():
            runs = groups(frame)
            train = sorted(set(runs[split == "train"]))
            if len(train) < 2:
                raise ValueError(
                    f"a zoo must have at least two training runs, however: it has {len(train)}"
                )
            order = numpy_generator(self.seed, "validation").permutation(len(train))
            count = min(max(1, round(self.validation_fraction * len(train))), len(train) - 1)
            chosen = {train[place] for place in order[:count]}
            split = split.mask(runs.isin(chosen) & (split == "train"), "validation")
        return (split == "train").to_numpy(), (split == "validation").to_numpy()


def prepare(
    networks: Network | Sequence[Network],
    *,
    architecture: str | nn.Module | None = None,
    arguments: Mapping[str, Any] | None = None,
    shape: Sequence[int] | None = None,
    path: str | Path | None = None,
    names: Sequence[str] | None = None,
) -> list[Prepared]:
    """Read and trace networks; see `WeightNet.predict`.

    Raises:
        ValueError: if one cannot be read or traced; its file is named.
    """
    one = isinstance(networks, nn.Module | Mapping | str | Path)
    listed: list[Network] = [networks] if one else list(networks)  # type: ignore[list-item, arg-type]
    prepared: list[Prepared] = []
    traced: dict[object, tuple[nn.Module, PermutationSpec, tuple[int, ...]]] = {}
    for number, network in enumerate(listed):
        label = str(network) if isinstance(network, str | Path) else f"network {number}"
        label = names[number] if names is not None else label
        if isinstance(network, nn.Module):
            module = network
            family = type(module).__name__
            spec, used = trace_module(module, shape, arguments)
            state = fit_state(module.state_dict(), module, [])
            prepared.append(Prepared(label, family, module, spec, used, state))
            continue
        if architecture is None:
            raise ValueError(
                f"architecture must be given for a state dict or a file, however: {label} has none"
            )
        if "module" not in traced:
            traced["module"] = _build(architecture, arguments, shape, path)
        module, spec, used = traced["module"]
        family = architecture if isinstance(architecture, str) else type(architecture).__name__
        notes: list[str] = []
        try:
            if isinstance(network, str | Path):
                state, notes = read_state(Path(network), module)
            else:
                state = fit_state(network, module, notes)
        except CheckpointError as error:
            text = str(error)
            raise CheckpointError(text if label in text else f"{label}: {text}") from None
        prepared.append(Prepared(label, family, module, spec, used, state, tuple(notes)))
    return prepared


def find_predictor(folder: Path | None) -> Path:
    """The folder of a saved predictor: ``folder`` (or its seed0), the pipeline's, or the
    reference.

    Raises:
        ValueError: if there is none.
    """
    places = [folder] if folder is not None else [PIPELINE, REFERENCE]
    for place in places:
        for candidate in (place, place / "seed0"):
            if (candidate / "predictor.json").is_file():
                return candidate
    raise ValueError(
        f"{places[-1]} must hold a saved predictor, however: it does not; run `dvc repro "
        "train_predictor@weightnet-iid`"
    )


def _build(
    architecture: str | nn.Module,
    arguments: Mapping[str, Any] | None,
    shape: Sequence[int] | None,
    path: str | Path | None,
) -> tuple[nn.Module, PermutationSpec, tuple[int, ...]]:
    module = architecture
    if isinstance(module, str):
        module = build_architecture(module, arguments, path=None if path is None else Path(path))
        if shape is None and ":" not in str(architecture):
            shape = input_shape(str(architecture), arguments)
    spec, used = trace_module(module, shape, arguments)
    return module, spec, used


def _read_preparation(place: Path) -> dict[str, Any]:
    """How the networks were prepared that a predictor was trained on: beside it, or in the
    params.yaml above it."""
    if (place / PREPARATION).is_file():
        found: dict[str, Any] = json.loads((place / PREPARATION).read_text(encoding="utf-8"))
        return found
    from weightnet.params import read_params

    for folder in place.resolve().parents:
        if (folder / "params.yaml").is_file():
            section = read_params(folder / "params.yaml").get("tokenize_zoo", {})
            return {key: section[key] for key in ("canonical", "probes") if key in section}
    return {}


def _responses(one: Prepared, state: dict[str, torch.Tensor], section: Mapping[str, Any]) -> Any:
    from weightnet.tokens.probes import ProbesConfig, probe_responses

    config = parse(ProbesConfig, section, "preparation.probes")
    inputs = config.inputs(one.shape)
    return probe_responses(one.module, one.spec, state, inputs)
