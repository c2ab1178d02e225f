"""Predictors of networks' properties behind one interface: WeightNet, rivals, floors, controls."""

from weightnet.predictors.interface import Prediction, Predictor
from weightnet.predictors.registry import PREDICTORS, Entry, build, config_class, entry

__all__ = ["PREDICTORS", "Entry", "Prediction", "Predictor", "build", "config_class", "entry"]
