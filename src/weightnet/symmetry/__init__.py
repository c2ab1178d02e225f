"""The symmetries of a network, traced from its module graph, and what can be done with them."""

from weightnet.symmetry.batchnorm import fold_batchnorm
from weightnet.symmetry.canonicalize import canonicalize, canonicalize_stack
from weightnet.symmetry.permute import (
    State,
    inverse,
    permute,
    random_permutation,
    random_scales,
    rescale,
    stack_parts,
)
from weightnet.symmetry.spec import Axis, Layer, PermutationSpec, Segment, Space
from weightnet.symmetry.trace import trace

__all__ = [
    "Axis",
    "Layer",
    "PermutationSpec",
    "Segment",
    "Space",
    "State",
    "canonicalize",
    "canonicalize_stack",
    "fold_batchnorm",
    "inverse",
    "permute",
    "random_permutation",
    "random_scales",
    "rescale",
    "stack_parts",
    "trace",
]
