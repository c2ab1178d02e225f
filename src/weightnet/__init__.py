"""WeightNet reads a trained network's weights and predicts its properties, with an uncertainty."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightnet.estimator import WeightNet as WeightNet

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import `WeightNet` when it is first asked for: torch takes seconds."""
    if name == "WeightNet":
        from importlib import import_module

        return import_module("weightnet.estimator").WeightNet
    raise AttributeError(f"module 'weightnet' has no attribute {name!r}")
