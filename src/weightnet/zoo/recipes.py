"""Recipes: everything that determines one training run, drawn reproducibly, each a row with a
hash id.

Shapes (task, architecture, batch size) are drawn first, then several recipes for each, so that
the runs of a shape form one full stack. Shape k and recipe j of a family depend on (seed, family,
k, j) alone: a longer zoo begins with the shorter one.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, field_validator, model_validator

from weightnet.params import Params, parse
from weightnet.randomness import numpy_generator
from weightnet.tasks import TASKS, load_task
from weightnet.zoo.architectures import FAMILIES, build

Optimizer = Literal["sgd", "adamw"]
Initialization = Literal["kaiming", "xavier", "orthogonal"]
Scalar = bool | int | float | str
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


def _check_range(low_high: list[float], name: str) -> None:
    if len(low_high) != 2 or not low_high[0] <= low_high[1]:
        raise ValueError(f"{name} must be [low, high] with low <= high")


class Sometimes(Params):
    """A quantity that is 0 with probability ``1 - probability`` and else uniform over
    ``range``."""

    probability: float = Field(ge=0, le=1)
    range: list[float]

    @model_validator(mode="after")
    def _ordered(self) -> Sometimes:
        _check_range(self.range, "range")
        if not 0 <= self.range[0] <= self.range[1] < 1:
            raise ValueError("range must lie inside [0, 1)")
        return self


class RecipeConfig(Params):
    """Ranges from which every family's recipes are drawn (two-element lists are log-uniform
    ranges)."""

    seed: int = Field(ge=0)
    tasks: list[str] = Field(min_length=1)
    optimizers: list[Optimizer] = Field(min_length=1)
    learning_rate: dict[Optimizer, list[Positive]]
    weight_decay: Sometimes
    dropout: Sometimes
    label_noise: Sometimes
    augmentation: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    train_images: list[Count]
    initialization: list[Initialization] = Field(min_length=1)
    initialization_scale: list[Positive]

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"every task must be one of {', '.join(TASKS)}; {task!r} is not")
        return tasks

    @model_validator(mode="after")
    def _ranges(self) -> RecipeConfig:
        for optimizer in self.optimizers:
            if optimizer not in self.learning_rate:
                raise ValueError(f"learning_rate must have a range for {optimizer}")
        for optimizer, low_high in self.learning_rate.items():
            _check_range(low_high, f"learning_rate.{optimizer}")
        _check_range([float(n) for n in self.train_images], "train_images")
        _check_range(self.initialization_scale, "initialization_scale")
        return self


class FamilyConfig(Params):
    """How many runs of a family, in stacks of how many, over which architectures and training
    lengths.

    ``arguments`` are keyword arguments of the family's function, each a list of values to draw
    from.
    """

    runs: int = Field(ge=1)
    runs_per_shape: int = Field(ge=1)
    batch_size: list[Count] = Field(min_length=1)
    steps: list[Count]
    arguments: dict[str, list[Scalar]]
    ranges: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _possible(self) -> FamilyConfig:
        _check_range([float(n) for n in self.steps], "steps")
        for name, values in self.arguments.items():
            if not values:
                raise ValueError(f"arguments.{name} must list at least one value")
        for width in self.arguments.get("width", []):
            if isinstance(width, bool) or not isinstance(width, int | float) or width <= 0:
                raise ValueError(f"arguments.width must hold positive numbers; {width!r} is not")
        return self


def sample_recipes(family: str, config: FamilyConfig, ranges: RecipeConfig) -> pd.DataFrame:
    """Draw a family's recipes: one row a run, columns of one type each, in stack order.

    Columns: ``run`` (16 hex digits of the SHA-256 of the row), ``family``, ``task``, ``stack``
    (hash of the shape and its number), ``arguments`` (JSON of the module's keyword arguments),
    ``width``, ``batch_size``, the drawn arguments as ``architecture.<name>``, and the
    hyper-parameters.

    Raises:
        ValueError: if the family is unknown or does not take the arguments.
    """
    if family not in FAMILIES:
        raise ValueError(
            f"family must be one of {', '.join(sorted(FAMILIES))}, however: {family=}"
        )
    if config.ranges:
        changed = {**ranges.model_dump(), **config.ranges}
        ranges = parse(RecipeConfig, changed, f"generate_zoo.families.{family}.ranges")
    rows: list[dict[str, Any]] = []
    shapes = -(-config.runs // config.runs_per_shape)
    for k in range(shapes):
        shape = _sample_shape(family, k, config, ranges)
        for j in range(min(config.runs_per_shape, config.runs - len(rows))):
            row = {**shape, **_sample_recipe(family, k, j, shape, config, ranges)}
            rows.append({"run": _digest(row), **row})
    return pd.DataFrame(rows)


def _digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _choose(generator: np.random.Generator, values: list[Any]) -> Any:
    return values[int(generator.integers(len(values)))]


def _log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    # NumPy's own exp and log round otherwise where the processor has AVX-512: runs had other ids
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def _sometimes(generator: np.random.Generator, config: Sometimes) -> float:
    low, high = config.range
    present, value = generator.random() < config.probability, generator.uniform(low, high)
    return round(float(value), 4) if present else 0.0


def _sample_shape(
    family: str, k: int, config: FamilyConfig, ranges: RecipeConfig
) -> dict[str, Any]:
    generator = numpy_generator(ranges.seed, "shape", family, k)
    task = load_task(ranges.tasks[k % len(ranges.tasks)])
    drawn = {name: _choose(generator, values) for name, values in config.arguments.items()}
    fixed = {"image_channels": task.channels, "classes": task.classes, "size": task.size}
    build(family, **drawn, **fixed)  # refuses impossible arguments before anything is written
    shape = {
        "family": family,
        "task": task.name,
        "arguments": json.dumps({**drawn, **fixed}, sort_keys=True),
        "width": float(drawn.get("width", 1.0)),
        "batch_size": _choose(generator, config.batch_size),
        **{
            f"architecture.{name}": value
            for name, value in drawn.items()
            if len(config.arguments[name]) > 1
        },
    }
    return {"stack": _digest({"number": k, **shape}), **shape}


def _sample_recipe(
    family: str, k: int, j: int, shape: dict[str, Any], config: FamilyConfig, ranges: RecipeConfig
) -> dict[str, Any]:
    generator = numpy_generator(ranges.seed, "recipe", family, k, j)
    available = len(load_task(shape["task"]).train_labels)
    optimizer = _choose(generator, list(ranges.optimizers))
    low, high = (min(n, available) for n in ranges.train_images)
    train_images = round(_log_uniform(generator, low, high))
    steps = round(_log_uniform(generator, *config.steps))
    return {
        "optimizer": optimizer,
        "learning_rate": _log_uniform(generator, *ranges.learning_rate[optimizer]),
        "weight_decay": _sometimes(generator, ranges.weight_decay),
        "dropout": _sometimes(generator, ranges.dropout),
        "label_noise": _sometimes(generator, ranges.label_noise),
        "augmentation": _choose(generator, list(ranges.augmentation)),
        "train_images": train_images,
        "train_fraction": train_images / available,
        "steps": steps,
        "epochs": steps * shape["batch_size"] / train_images,
        "initialization": _choose(generator, list(ranges.initialization)),
        "initialization_scale": _log_uniform(generator, *ranges.initialization_scale),
        "seed": int(generator.integers(2**31)),
    }
