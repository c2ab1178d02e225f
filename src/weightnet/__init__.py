"""WeightNet reads a trained network's weights and predicts its properties, with an uncertainty."""

__version__ = "0.1.0"
