"""The work unit of zoo training: one stack, from its recipes to its folder; and the executor that
runs them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils import deterministic

from weightnet.compute import default_device, default_jobs, worker_pool
from weightnet.tasks import load_task
from weightnet.zoo import (
    batched,
    dropout,
    first_layer,
    fused,
    grouped,
    properties,
    stacked,
    training,
    vectors,
)
from weightnet.zoo.architectures import build
from weightnet.zoo.properties import PropertyConfig, measure_properties
from weightnet.zoo.stacked import graph_text, stack_on
from weightnet.zoo.store import write_stack
from weightnet.zoo.training import train_stack

MODULES = (training, stacked, batched, dropout, fused, first_layer, grouped, vectors, properties)
CODE = [Path(str(module.__file__)) for module in MODULES]  # what trains and measures
CODE.append(Path(str(batched.__file__)).with_name("triton_kernels.py"))  # needs Triton


@dataclass(frozen=True)
class Stack:
    """S recipes of one shape, what to measure of them, and where the result goes."""

    recipes: pd.DataFrame
    properties: tuple[str, ...]
    config: PropertyConfig
    folder: Path

    def train(self) -> None:
        """Train, measure and write the stack. The same stack gives the same bytes."""
        first = self.recipes.iloc[0]
        task = load_task(first["task"])
        module = build(first["family"], **json.loads(first["arguments"]))
        device = str(default_device())
        trained = train_stack(module, self.recipes, task, device)
        stack = stack_on(device, module, len(self.recipes))
        stack.load(trained.states)
        measured = measure_properties(
            stack, self.recipes, task, list(self.properties), self.config
        )
        networks = self.recipes[["run"]].reset_index(drop=True)
        networks["diverged_at"] = trained.diverged_at
        write_stack(self.folder, pd.concat([networks, measured], axis=1), trained.states)


def plan_stacks(
    recipes: pd.DataFrame, properties: list[str], config: PropertyConfig, folder: Path
) -> list[Stack]:
    """Group a family's recipes into stacks whose folder names are the hash of all that determines
    them: recipes, traced architecture, task data, properties, and the code that trains and
    measures."""
    stacks = []
    for _, rows in recipes.groupby("stack", sort=False):
        first = rows.iloc[0]
        content = [
            rows.to_json(orient="records", double_precision=15),
            graph_text(build(first["family"], **json.loads(first["arguments"]))),
            load_task(first["task"]).digest(),
            json.dumps([properties, config.model_dump()], sort_keys=True),
            *(path.read_text() for path in CODE),
        ]
        key = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
        stacks.append(Stack(rows.reset_index(drop=True), tuple(properties), config, folder / key))
    return stacks


Results = Generator[tuple[Stack, Exception | None], None, None]
Executor = Callable[[list[Stack]], Results]
"""Runs stacks anywhere, in any order, and yields each as it is done, with its error if it failed.
A cluster engine plugs in by one more entry in EXECUTORS."""


def run_local(stacks: list[Stack]) -> Results:
    """Run stacks in one single-threaded process per core (environment variable WEIGHTNET_JOBS
    overrides).

    Small kernels gain nothing from two threads; two processes use two cores fully.
    """
    jobs = min(default_jobs(), len(stacks))
    if jobs == 1:
        yield from _run_here(stacks)
        return
    with worker_pool(jobs) as (pool, _):
        futures = {pool.submit(_train_here, stack): stack for stack in stacks}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool) or not isinstance(error, Exception | None):
                raise error  # it is not the stack's
            yield futures[future], error


def _run_here(stacks: list[Stack]) -> Results:
    for stack in stacks:
        try:
            _train_here(stack)
        except Exception as error:
            yield stack, error
        else:
            yield stack, None


def _train_here(stack: Stack) -> None:
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    memory: Any = deterministic
    fills, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False  # slow
    try:
        stack.train()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
        memory.fill_uninitialized_memory = fills


EXECUTORS: dict[str, Executor] = {"local": run_local}


def default_executor() -> Executor:
    """The executor named by the environment variable WEIGHTNET_EXECUTOR (default: local)."""
    name = os.environ.get("WEIGHTNET_EXECUTOR", "local")
    if name not in EXECUTORS:
        raise ValueError(
            f"WEIGHTNET_EXECUTOR must be one of {', '.join(EXECUTORS)}, however: {name!r}"
        )
    return EXECUTORS[name]
