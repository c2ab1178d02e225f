"""Which canonical form networks are brought to before they become tokens: a choice in params."""

from __future__ import annotations

from typing import Literal

import torch

from weightnet.params import Params
from weightnet.randomness import torch_generator
from weightnet.symmetry.canonicalize import canonicalize_stack
from weightnet.symmetry.permute import State
from weightnet.symmetry.spec import PermutationSpec


class CanonicalForm(Params):
    """``order`` of the channels (none, sort, align), whether to fix their ``scale``, and whether
    to fold BatchNorms into the layers before them first.

    ``align`` matches every network to a random one of its architecture, drawn from the spec, so
    that a single checkpoint is aligned exactly as a zoo is.
    """

    order: Literal["none", "sort", "align"] = "sort"
    scale: bool = True
    fold_batchnorm: bool = False

    def apply(self, spec: PermutationSpec, state: State) -> dict[str, torch.Tensor]:
        """The canonical form of ``state``: the same function."""
        form = self.apply_stack(spec, {name: tensor[None] for name, tensor in state.items()})
        return {name: tensor[0] for name, tensor in form.items()}

    def apply_stack(self, spec: PermutationSpec, states: State) -> dict[str, torch.Tensor]:
        """`apply` for many networks of one spec at once: each tensor [networks, ...]."""
        reference = None
        if self.order == "align":
            generator = torch_generator("reference", spec.to_json())
            reference = {
                name: torch.randn(tensor.shape[1:], generator=generator).to(tensor.dtype)
                if tensor.is_floating_point()
                else tensor[0]
                for name, tensor in states.items()
            }
        return canonicalize_stack(
            spec,
            states,
            order=self.order,
            scale=self.scale,
            fold=self.fold_batchnorm,
            reference=reference,
        )
