"""A stack's folder is named after all that determines its networks."""

from __future__ import annotations

import sys
from types import ModuleType

from weightnet.zoo import stacks


def modules_of(module: ModuleType) -> set[str]:
    """The modules of the zoo whose parts a module uses."""
    named = [getattr(value, "__module__", None) or "" for value in vars(module).values()]
    named += [value.__name__ for value in vars(module).values() if isinstance(value, ModuleType)]
    return {name for name in named if name.startswith("weightnet.zoo.")}


def test_all_code_that_trains_and_measures_names_the_folder() -> None:
    named = {module.__name__ for module in stacks.CODE}
    assert "weightnet.zoo.first_layer" in named
    for name in named:
        assert modules_of(sys.modules[name]) <= named
