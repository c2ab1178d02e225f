"""What is in a checkpoint: its layers in numbers and as a picture."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from weightnet.symmetry import PermutationSpec, State
from weightnet.tokens import layout

DEAD = 1e-6  # of the layer's largest: neurons with smaller incoming weights do nothing
_BINS = 61
_COLUMNS = 5


def describe_layers(spec: PermutationSpec, state: State) -> pd.DataFrame:
    """One row a layer: name, kind, shape of the weight, activation, neurons (tokens), parameters,
    the Frobenius norm and standard deviation of the weight, and dead neurons: those whose incoming
    weights, or BatchNorm scale, are at most `DEAD` of the layer's largest."""
    rows = []
    for one in layout(spec).layers:
        layer = one.layer
        names = [layer.weight, layer.bias, layer.scale, layer.shift]
        learned = [state[name] for name in names if name is not None]
        weight, largest = None, 1.0
        if layer.weight is not None:  # divided by its largest, so that no square overflows
            weight = state[layer.weight].double()
            largest = float(weight.abs().max()) if weight.numel() else 0.0
            weight = weight / (largest or 1.0)
        dead = torch.zeros(one.outputs, dtype=torch.bool)
        if weight is not None:
            dead |= _negligible(weight.flatten(1).norm(dim=1))
        if layer.scale is not None:
            dead |= _negligible(state[layer.scale].double().abs())
        rows.append(
            {
                "layer": layer.name,
                "kind": layer.kind,
                "shape": "x".join(map(str, one.weight_shape)) if weight is not None else "-",
                "activation": layer.activation,
                "tokens": one.outputs,
                "parameters": sum(tensor.numel() for tensor in learned),
                "norm": largest * float(weight.norm()) if weight is not None else float("nan"),
                "spread": largest * float(weight.std(correction=0))
                if weight is not None
                else float("nan"),
                "dead": int(dead.sum()),
            }
        )
    return pd.DataFrame(rows)


def summarize(spec: PermutationSpec, layers: pd.DataFrame) -> str:
    """The network in one line."""
    channels = sum(space.size for space in spec.spaces)
    parameters = int(layers["parameters"].sum())
    return (
        f"{len(layers)} layers, {parameters:,} parameters, {len(spec.spaces)} channel spaces "
        f"with {channels:,} channels, {int(layers['tokens'].sum()):,} tokens, "
        f"{int(layers['dead'].sum())} dead neurons"
    )


def save_histogram(spec: PermutationSpec, state: State, path: Path) -> None:
    """Draw a histogram of each layer's weights to a .png file.

    Raises:
        ValueError: if it cannot be written there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path.suffix != ".png":
        raise ValueError(f"--histogram must end in .png, however: {path}")
    layers = [layer for layer in spec.layers if layer.weight is not None]
    rows = max(1, -(-len(layers) // _COLUMNS))
    figure = Figure(figsize=(2.2 * _COLUMNS, 1.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis, layer in zip(axes, layers, strict=False):
        values = state[str(layer.weight)].flatten().double().numpy()
        reach = float(np.quantile(np.abs(values), 0.999)) or 1.0
        axis.hist(values, bins=_BINS, range=(-reach, reach), color="0.3")
        axis.set_title(layer.name, fontsize=6)
        axis.tick_params(labelsize=5)
        axis.set_yticks([])
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    figure.supxlabel("weight", fontsize=7)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})
        partial.replace(path)
    except OSError as error:
        raise ValueError(f"{path} must be writable, however: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _negligible(sizes: torch.Tensor) -> torch.Tensor:
    return sizes <= DEAD * sizes.max() if len(sizes) else sizes.bool()
