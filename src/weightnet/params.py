"""Strict, frozen parameters: params.yaml sections become models; each room defines its own beside
its code.

YAML is read as YAML 1.2, so that ``1e-05`` (which `dvc exp run -S x=0.00001` writes) is a number.
An unknown key, a wrong type or an impossible value raises ValueError with the full path of the
key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Params(BaseModel):
    """Base of every configuration: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Model = TypeVar("Model", bound=Params)


def read_params(path: Path) -> dict[str, Any]:
    """Return the whole of a params.yaml as plain data.

    Raises:
        ValueError: if the file is missing, not YAML, or not a mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not path.is_file():
        raise ValueError(f"{path} must exist, however: no such file; run from the repository root")
    try:
        data = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML 1.2, however: {error}; correct the file") from None
    except RecursionError:
        raise ValueError(
            f"{path} must be YAML 1.2, however: it is nested too deeply; correct the file"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} must be a mapping of sections, however: it is {type(data).__name__}"
        )
    return data


def parse(model: type[Model], data: object, where: str) -> Model:
    """Validate ``data`` (the section ``where`` of params.yaml) as ``model``.

    Raises:
        ValueError: one line per wrong key: its full path, what is required, what was found.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join([where, *(str(part) for part in problem["loc"])])
            if problem["type"] == "extra_forbidden":
                known = ", ".join(sorted(model.model_fields))
                lines.append(f"params key {key} is unknown (known in {where}: {known})")
            elif problem["type"] == "missing":
                lines.append(f"params key {key} is required, however: it is missing")
            else:
                message = problem["msg"].removeprefix("Value error, ")
                lines.append(f"params key {key}: {message}, however: {key}={problem['input']!r}")
        raise ValueError("\n".join(lines)) from None
