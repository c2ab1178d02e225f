"""The audit finds nothing in an invariant predictor, and what another one reads of the order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from weightnet.evaluation.invariance import audit
from weightnet.symmetry import Axis, Layer, PermutationSpec, Segment, Space, canonicalize
from weightnet.tokens import Networks


def two_layers(hidden: int) -> PermutationSpec:
    """linear 3 -> hidden, ReLU, linear hidden -> 2."""
    fields = dict.fromkeys(("scale", "shift", "mean", "variance"))
    shape = {"kernel": (1, 1), "stride": (1, 1), "groups": 1}
    layers = (
        Layer(
            0,
            "a",
            "linear",
            "a.weight",
            "a.bias",
            **fields,
            **shape,
            activation="relu",
            inputs=(Segment(None, 3),),
            outputs=(Segment("h", hidden),),
        ),
        Layer(
            1,
            "b",
            "linear",
            "b.weight",
            "b.bias",
            **fields,
            **shape,
            activation="identity",
            inputs=(Segment("h", hidden),),
            outputs=(Segment(None, 2),),
        ),
    )
    axes = (Axis("a.weight", 0), Axis("a.bias", 0), Axis("b.weight", 1))
    return PermutationSpec((Space("h", hidden, axes, scalable=True),), layers)


@pytest.fixture
def networks() -> Networks:
    generator = torch.Generator().manual_seed(0)
    specs = [two_layers(4), two_layers(6)] * 4
    states = [
        {
            "a.weight": torch.randn(spec.spaces[0].size, 3, generator=generator),
            "a.bias": torch.randn(spec.spaces[0].size, generator=generator),
            "b.weight": torch.randn(2, spec.spaces[0].size, generator=generator),
            "b.bias": torch.randn(2, generator=generator),
        }
        for spec in specs
    ]
    frame = pd.DataFrame(
        {
            "run": [f"{i:016x}" for i in range(8)],
            "family": ["small", "large"] * 4,
            "property.test_accuracy": np.linspace(0.2, 0.9, 8),
            "property.test_loss": [np.nan, *np.linspace(0.2, 0.9, 7)],
        }
    )
    return Networks.from_states(frame, specs, states)


@dataclass(frozen=True)
class Estimate:
    properties: tuple[str, ...]
    mean: NDArray[np.float64]


class Reader:
    """Predicts from weights: the first neuron's, the sum of their squares, or the function."""

    def __init__(self, name: str) -> None:
        self.name = name

    def predict(self, networks: Networks) -> Estimate:
        values = [self.read(networks.state(i)) for i in range(len(networks))]
        return Estimate(("test_accuracy", "test_loss"), np.array(values)[:, None] * [[1.0, -2.0]])

    def read(self, state: dict[str, torch.Tensor]) -> float:
        one = {name: tensor.double() for name, tensor in state.items()}
        if self.name == "first":
            return float(one["a.weight"][0, 0])
        if self.name == "sum":
            return float(one["a.weight"].square().sum())
        hidden = torch.relu(one["a.weight"].sum(dim=1) + one["a.bias"])
        return float((one["b.weight"] @ hidden)[0])


def largest(table: pd.DataFrame, transformation: str) -> float:
    return float(table.loc[table["transformation"] == transformation, "largest"].max())


def run(name: str, networks: Networks, **options: object) -> pd.DataFrame:
    generator = torch.Generator().manual_seed(1)
    return audit(Reader(name), networks, split="iid", generator=generator, **options)


def test_a_function_of_the_output_is_invariant(networks: Networks) -> None:
    table = run("function", networks, batch=3)
    assert largest(table, "permuted") < 1e-5
    assert largest(table, "rescaled") < 1e-4
    assert (table["tau"] == table["tau_copies"]).all()


def test_what_is_not_invariant_is_found(networks: Networks) -> None:
    assert largest(run("first", networks), "permuted") > 0.1
    summed = run("sum", networks)
    assert largest(summed, "permuted") < 1e-5 and largest(summed, "rescaled") > 0.1


def test_copies_go_through_canonicalization(networks: Networks) -> None:
    def door(spec: PermutationSpec, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(canonicalize(spec, state, order="sort"))

    states = [door(networks.spec(i), networks.state(i)) for i in range(len(networks))]
    specs = [networks.spec(i) for i in range(len(networks))]
    canonical = Networks.from_states(networks.frame, specs, states)
    assert largest(run("first", canonical, canonicalize=door), "permuted") == 0.0


def test_rows_and_units(networks: Networks) -> None:
    table = run("first", networks, copies=1)
    assert len(table) == 2 * 3 * 2  # transformations x (all, two families) x properties
    whole = table[table["family"] == "all"]
    assert (whole["n"] == 8).all()
    spread = networks.frame["property.test_accuracy"].std(ddof=0)
    row = whole[(whole["property"] == "test_accuracy") & (whole["transformation"] == "permuted")]
    assert float(row["relative"].iloc[0]) == pytest.approx(float(row["largest"].iloc[0]) / spread)
    pd.testing.assert_frame_equal(table, run("first", networks, copies=1))
    with pytest.raises(ValueError, match="needs networks and copies"):
        run("first", networks, copies=0)
