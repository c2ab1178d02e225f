"""Boosted trees evaluated from LightGBM's text by NumPy: importing LightGBM takes a second, most
of what a prediction takes. Predictions are LightGBM's, bit for bit.

The format is that of `Booster.model_to_string`, version v4, and the decisions are those of
`Tree::NumericalDecision` (https://github.com/microsoft/LightGBM, include/LightGBM/tree.h).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from weightnet.predictors.scaling import Array

_ZERO = float(np.float32(1e-35))  # LightGBM's: what is nearer to 0 is 0
_DEFAULT_LEFT = 2
_PLACES = 1 << 14  # places in trees that are followed at a time
_MISSING_ZERO, _MISSING_NAN = 1, 2


class Forest:
    """The trees of one model: nodes and leaves of all trees one after another. A place is the
    number of a node, or ``-1 - leaf``.

    Raises:
        ValueError: for a model that is not a sum of numerical decisions and constant leaves.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        head, *blocks = text.split("\nTree=")
        trees = [_fields(block) for block in blocks]
        if (
            _fields(head).get("objective") != "regression"
            or "\naverage_output" in head
            or any(tree["num_cat"] != "0" or tree["is_linear"] != "0" for tree in trees)
        ):
            raise ValueError(
                "trees must be a plain regression of LightGBM without categories, however: "
                f"{head[:200]!r}; train the predictor again"
            )
        leaves = np.array([int(tree["num_leaves"]) for tree in trees], np.int64)
        nodes = leaves - 1
        first_node, first_leaf = np.cumsum(nodes) - nodes, np.cumsum(leaves) - leaves

        def column(name: str, kind: type[np.generic]) -> NDArray[np.generic]:
            grown = [tree[name] for tree, count in zip(trees, nodes, strict=True) if count]
            return np.array(" ".join(grown).split()).astype(kind)

        def places(name: str) -> NDArray[np.int64]:
            within = column(name, np.int64).astype(np.int64)
            shift = np.where(
                within >= 0, np.repeat(first_node, nodes), -np.repeat(first_leaf, nodes)
            )
            return within + shift

        self._roots = np.where(nodes > 0, first_node, -1 - first_leaf)
        self._children = np.stack([places("right_child"), places("left_child")], axis=1)
        self._feature = column("split_feature", np.int64).astype(np.int64)
        self._threshold = column("threshold", np.float64).astype(np.float64)
        kinds = column("decision_type", np.int64).astype(np.int64)
        self._missing, self._default_left = kinds >> 2 & 3, (kinds & _DEFAULT_LEFT) > 0
        self._zeros_are_missing = bool((self._missing == _MISSING_ZERO).any())
        values = " ".join(tree["leaf_value"] for tree in trees).split()
        self._values = np.array(values).astype(np.float64)

    def predict(self, rows: Array) -> Array:
        """Of ``rows`` [B, F], [B]: the leaves summed in the order of the trees."""
        rows = np.where(np.abs(rows) <= _ZERO, 0.0, rows)
        trees = len(self._roots)
        place = np.tile(self._roots, len(rows))
        size = max(1, _PLACES // max(1, trees)) * trees  # of whole rows, for the cache's sake
        for first in range(0, len(place), max(1, size)):
            self._descend(rows, place[first : first + size], first // trees)
        place = place.reshape(len(rows), trees)
        total = np.zeros((len(rows), 1 + len(self._roots)))
        total[:, 1:] = self._values[-1 - place]
        return np.asarray(np.cumsum(total, axis=1)[:, -1])

    def _descend(self, rows: Array, place: NDArray[np.int64], first: int) -> None:
        """Replace the roots in ``place``, of all trees for each row from ``first`` on, by
        leaves."""
        going = np.flatnonzero(place >= 0)
        start, node = (first + going // len(self._roots)) * rows.shape[1], place.take(going)
        values, children = rows.reshape(-1), self._children.reshape(-1)
        while len(going):
            value = values.take(start + self._feature.take(node))
            node = children.take(2 * node + self._left(value, node))
            place[going] = node
            inside = np.flatnonzero(node >= 0)
            going, start, node = going.take(inside), start.take(inside), node.take(inside)

    def _left(self, value: Array, node: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where ``value`` goes to the left child of ``node``."""
        left = value <= self._threshold.take(node)
        absent = np.isnan(value)
        if self._zeros_are_missing or absent.any():
            missing = self._missing[node]
            value = np.where(absent & (missing != _MISSING_NAN), 0.0, value)
            default = (missing == _MISSING_NAN) & absent | (missing == _MISSING_ZERO) & (
                value == 0
            )
            left = np.where(default, self._default_left[node], value <= self._threshold[node])
        return np.asarray(left, bool)


def _fields(block: str) -> dict[str, str]:
    lines = block.split("\n\n")[0].splitlines()
    return {name: value for name, found, value in (line.partition("=") for line in lines) if found}
