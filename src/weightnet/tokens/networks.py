"""Networks: a table of networks with their tokens, selectable, and dense views of them.

All networks of one spec have the same tokens, so they are looked at together as dense arrays
(`Stack`): whatever is computed from weights is plain numpy over [networks, outputs, fan-in].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from weightnet.symmetry.spec import PermutationSpec
from weightnet.tokens.layout import LayerLayout, Layout, Rows, layout, rows, spec_id
from weightnet.tokens.scratch import scratch_zeros
from weightnet.tokens.tokenizer import Floats, ListColumn, TokensConfig, detokenize, tokenize

STACK_VALUES = 1 << 24  # weights that a stack holds at most, unless one network alone has more

Modules = Callable[[Mapping[str, Any]], nn.Module]
"""Builds the module of a network from its row of the table, in eval mode, its weights unset."""


class TokenPart:
    """The tokens of some networks, one after another; loaded when they are first looked at."""

    def __init__(
        self, load: Callable[[], pa.Table], starts: NDArray[np.int64], max_row: int
    ) -> None:
        self._load = load
        self.starts = starts
        self.max_row = max_row
        self._scalars: dict[str, NDArray[np.float32]] = {}

    @functools.cached_property
    def table(self) -> pa.Table:
        """All rows."""
        return self._load()

    @functools.cached_property
    def weights(self) -> ListColumn:
        """Incoming weights, by row."""
        return ListColumn(self.table.column("weight"))

    @functools.cached_property
    def responses(self) -> ListColumn | None:
        """Probe responses, by row; None if the tokens carry none."""
        if "response" not in self.table.column_names:
            return None
        return ListColumn(self.table.column("response"))

    def scalar(self, name: str) -> NDArray[np.float32]:
        """One of the columns bias, scale, shift, mean, variance; NaN where null."""
        if name not in self._scalars:
            column = self.table.column(name)
            kept = self._scalars[name] = scratch_zeros((len(column),), np.float32)
            first = 0
            for chunk in column.chunks:
                kept[first : first + len(chunk)] = chunk.to_numpy(zero_copy_only=False)
                first += len(chunk)
        return self._scalars[name]


@dataclass(frozen=True, eq=False)
class Networks:
    """Networks in a table.

    ``frame`` has one row per network (columns: docs/SHARDS.md, networks.parquet), index 0 .. B-1;
    ``specs`` maps its column ``spec`` to the permutation spec. ``parts`` and ``places`` [B, 2]
    (part, number within it) say where the tokens lie; selections share them. ``modules`` builds
    the modules, for those who run the networks; tokens and weights are read without. ``origin``,
    of selections of `read_together`: the networks from which they were selected, and at which
    positions.
    """

    frame: pd.DataFrame
    specs: Mapping[str, PermutationSpec]
    parts: tuple[TokenPart, ...]
    places: NDArray[np.int64]
    modules: Modules | None = None
    origin: tuple[Networks, NDArray[np.int64]] | None = None

    @classmethod
    def from_states(
        cls,
        frame: pd.DataFrame,
        specs: Mapping[str, PermutationSpec] | Sequence[PermutationSpec],
        states: Sequence[Mapping[str, torch.Tensor]],
        *,
        responses: Sequence[Mapping[int, Floats]] | None = None,
        config: TokensConfig | None = None,
    ) -> Networks:
        """Tokenize ``states`` in memory. ``specs`` is one spec per network, or maps the frame's
        column ``spec`` to them.

        Raises:
            ValueError: if the counts differ, or a state does not fit its spec.
        """
        config = config or TokensConfig()
        if isinstance(specs, Mapping):
            each = [specs[name] for name in frame["spec"]]
        else:
            each = list(specs)
        if not len(frame) == len(each) == len(states):
            raise ValueError(
                f"frame, specs and states must be as many, however: {len(frame)}, {len(each)}, "
                f"{len(states)}"
            )
        names = {id(spec): spec_id(spec) for spec in each}
        frame = frame.assign(spec=[names[id(spec)] for spec in each]).reset_index(drop=True)
        known = {names[id(spec)]: spec for spec in each}
        given: Sequence[Mapping[int, Floats] | None] = responses or [None] * len(each)
        tables = [
            tokenize(spec, state, config=config, responses=response)
            for spec, state, response in zip(each, states, given, strict=True)
        ]
        starts = np.cumsum([0, *(table.num_rows for table in tables)])
        tables = tables or [tokenize(PermutationSpec((), ()), {}, config=config)]
        part = TokenPart(lambda: pa.concat_tables(tables), starts, config.max_row)
        places = np.stack([np.zeros(len(each), np.int64), np.arange(len(each))], axis=1)
        return cls(frame, known, (part,), places)

    def __len__(self) -> int:
        return len(self.frame)

    def select(self, where: ArrayLike) -> Networks:
        """The networks at these positions, or where this mask is true; tokens are shared, not
        copied."""
        chosen = np.asarray(where)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(
                    f"a mask must have one entry per network, however: {chosen.shape} for "
                    f"{len(self)}"
                )
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64)
        frame = self.frame.iloc[chosen].reset_index(drop=True)
        origin = self.origin and (self.origin[0], self.origin[1][chosen])
        return replace(self, frame=frame, places=self.places[chosen], origin=origin)

    def read_together(self) -> Networks:
        """The same networks, for those who have several selections of them read: what computes
        much from weights then computes it once, of all of them."""
        return replace(self, origin=(self, np.arange(len(self))))

    def runnable(self, modules: Modules) -> Networks:
        """The same networks, which can also be run."""
        return replace(self, modules=modules)

    def module(self, position: int) -> nn.Module:
        """The module of one network, shared with others of its architecture.

        Raises:
            ValueError: if the networks came without modules.
        """
        if self.modules is None:
            raise ValueError(
                "networks must come with their modules to be run, however: they are tokens alone; "
                "call networks.runnable(modules)"
            )
        row = self.frame.iloc[position]
        return self.modules({str(name): value for name, value in row.items()})

    def spec(self, position: int) -> PermutationSpec:
        """The spec of one network."""
        return self.specs[self.frame["spec"].iat[position]]

    def table(self, position: int) -> pa.Table:
        """The tokens of one network."""
        part, start, stop = self._rows(position)
        return part.table.slice(start, stop - start)

    def state(self, position: int) -> dict[str, torch.Tensor]:
        """The state dict of one network, as it was tokenized."""
        return detokenize(self.spec(position), self.table(position))

    def stacks(self, max_values: int = STACK_VALUES) -> Iterator[Stack]:
        """Dense views that cover every network once: equal specs together, ``max_values`` weights
        at most."""
        codes, names = pd.factorize(self.frame["spec"])
        for code, name in enumerate(names):
            spec = self.specs[name]
            members = np.flatnonzero(codes == code)
            size = max(1, max_values // max(1, layout(spec).values))
            for first in range(0, len(members), size):
                yield Stack(self, spec, members[first : first + size])

    @functools.cached_property
    def token_offsets(self) -> NDArray[np.int64]:
        """Of all tokens, one network after another, those of network b are token_offsets[b] ..
        [b + 1] [B + 1]."""
        counts = [plan.tokens for plan in self.layouts()]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def layouts(self) -> list[Layout]:
        """The layout of every network."""
        plans = {name: layout(self.specs[name]) for name in self.frame["spec"].unique()}
        return [plans[name] for name in self.frame["spec"]]

    def _rows(self, position: int) -> tuple[TokenPart, int, int]:
        number, place = self.places[position]
        part = self.parts[number]
        return part, int(part.starts[place]), int(part.starts[place + 1])


@dataclass(frozen=True, eq=False)
class Stack:
    """Networks of one spec as dense arrays. ``members`` [n] are their positions in
    ``networks``."""

    networks: Networks
    spec: PermutationSpec
    members: NDArray[np.int64]

    @functools.cached_property
    def layout(self) -> Layout:
        """The layout that they share."""
        return layout(self.spec)

    def __len__(self) -> int:
        return len(self.members)

    @functools.cached_property
    def tokens(self) -> NDArray[np.int64]:
        """Where the tokens stand among those of all ``networks`` [n, tokens]."""
        return self.networks.token_offsets[self.members][:, None] + np.arange(self.layout.tokens)

    def weight(self, one: LayerLayout) -> Floats:
        """A layer's weights [n, outputs, fan-in] in float32; a single network's are not copied."""
        pieces = []
        for part, start, order in self._places():
            first, stop = order.layer_first[one.layer.index : one.layer.index + 2]
            pieces.append(part.weights.values(int(start + first), int(start + stop)))
        stacked = pieces[0] if len(pieces) == 1 else np.stack(pieces)
        return stacked.reshape(len(self), one.outputs, one.fan_in).astype(np.float32, copy=False)

    def scalar(self, name: str) -> Floats:
        """One of bias, scale, shift, mean, variance [n, tokens]; NaN where the layer has none."""
        return np.stack(
            [part.scalar(name)[start + order.first] for part, start, order in self._places()]
        )

    def responses(self) -> Floats | None:
        """Probe responses [n, tokens, probes], or None if some network carries none."""
        pieces = []
        for part, start, order in self._places():
            if part.responses is None:
                return None
            values = part.responses.values(int(start), int(start + order.count))
            pieces.append(values.reshape(self.layout.tokens, -1))
        return np.stack(pieces)

    def _places(self) -> Iterator[tuple[TokenPart, int, Rows]]:
        for member in self.members:
            part, start, _ = self.networks._rows(int(member))
            yield part, start, self._order[part.max_row]

    @functools.cached_property
    def _order(self) -> dict[int, Rows]:
        """The rows by ``max_row``: finding them hashes the whole spec, once a stack is enough."""
        return {size: rows(self.spec, size) for size in {p.max_row for p in self.networks.parts}}
