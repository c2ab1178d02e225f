"""Probe responses of the networks of a zoo: their modules are built from the table of networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from weightnet.architecture import build_architecture
from weightnet.symmetry import PermutationSpec
from weightnet.tokens import Networks, ProbesConfig, probe_responses
from weightnet.tokens.tokenizer import Floats
from weightnet.zoo.imported import ADOPTED_CODE

ARCHITECTURE = ("architecture", "arguments", "input")  # columns: name, JSON, shape as JSON


class ModuleBuilder:
    """Builds modules from the table of networks, each architecture once (see `Modules`).

    Args:
        zoo: the folder of all families' stacks, where imported architectures keep their code.
    """

    def __init__(self, zoo: Path) -> None:
        self.zoo = zoo
        self._modules: dict[tuple[str, ...], nn.Module] = {}

    def __call__(self, row: Mapping[Any, Any]) -> nn.Module:
        """The module of the network of one row (``family`` and `ARCHITECTURE`)."""
        family, name, arguments = (str(row[key]) for key in ("family", *ARCHITECTURE[:2]))
        key = (family, name, arguments)
        if key not in self._modules:
            code = self.zoo / family / ADOPTED_CODE
            self._modules[key] = build_architecture(name, json.loads(arguments), path=code)
        return self._modules[key]


class Prober:
    """Runs networks on the probe inputs; what depends on the architecture alone is kept.

    Args:
        config: the probes.
        zoo: the folder of all families' stacks, where imported architectures keep their code.
    """

    def __init__(self, config: ProbesConfig, zoo: Path) -> None:
        self.config, self.modules = config, ModuleBuilder(zoo)
        self._inputs: dict[str, Tensor] = {}

    def responses(
        self, row: Mapping[Any, Any], spec: PermutationSpec, state: Mapping[str, Tensor]
    ) -> dict[int, Floats] | None:
        """Responses of the network of one row (``family`` and `ARCHITECTURE`); None without
        probes."""
        if not self.config.count:
            return None
        shape = str(row[ARCHITECTURE[2]])
        if shape not in self._inputs:
            self._inputs[shape] = self.config.inputs(json.loads(shape))
        return probe_responses(self.modules(row), spec, state, self._inputs[shape])

    def networks(
        self,
        frame: pd.DataFrame,
        specs: Mapping[str, PermutationSpec],
        states: Sequence[Mapping[str, Tensor]],
    ) -> Networks:
        """Tokenize networks in memory, with their responses."""
        found = [
            self.responses(row, specs[row["spec"]], state)
            for row, state in zip(frame.to_dict("records"), states, strict=True)
        ]
        given = [one for one in found if one is not None]
        networks = Networks.from_states(frame, specs, states, responses=given or None)
        return networks.runnable(self.modules)
