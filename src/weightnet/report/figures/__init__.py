"""Figures: each takes tables and returns a matplotlib Figure; `save` alone writes.

Every figure can be read in black and white: what colour tells, a marker, hatch or number tells
too. Missing values (NaN) leave a gap or a dash, never an error.
"""

from weightnet.report.figures.ablations import ablations
from weightnet.report.figures.canvas import save
from weightnet.report.figures.interpretation import importance
from weightnet.report.figures.scores import (
    error_by_family,
    heatmap,
    invariance,
    predicted_against_measured,
    tau_with_intervals,
)
from weightnet.report.figures.training import training_curves
from weightnet.report.figures.zoo import ceilings, zoo_distributions

__all__ = [
    "ablations",
    "ceilings",
    "error_by_family",
    "heatmap",
    "importance",
    "invariance",
    "predicted_against_measured",
    "save",
    "tau_with_intervals",
    "training_curves",
    "zoo_distributions",
]
