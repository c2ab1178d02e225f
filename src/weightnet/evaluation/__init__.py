"""Judging predictors: which runs test them, metrics with intervals, and the invariance audit."""
