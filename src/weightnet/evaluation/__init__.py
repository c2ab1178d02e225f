"""Judging predictors: which runs test them, metrics with intervals, and the invariance audit."""

from weightnet.evaluation.scores import CEILING, Evaluation, ScoresConfig, scores, summary
from weightnet.evaluation.splits import PARTS, SPLITS, SplitsConfig, assign, sizes, split_hash

__all__ = [
    "CEILING",
    "PARTS",
    "SPLITS",
    "Evaluation",
    "ScoresConfig",
    "SplitsConfig",
    "assign",
    "scores",
    "sizes",
    "split_hash",
    "summary",
]
