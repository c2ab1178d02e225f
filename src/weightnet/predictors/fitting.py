"""The only fit loop: AdamW, cosine schedule, early stopping, checkpoints that resume exactly.

A module maps a batch to ``(mean, log_sigma)``, both [B, P], in standardized units; targets [B, P]
may be NaN where missing. Everything random in an epoch (order, dropout) is drawn from the seed and
the epoch's number, and the learning rate is a function of the examples seen, so a checkpoint needs
no generator or scheduler state, and a resumed fit equals an undisturbed one bit for bit (on CPU;
some CUDA sums have no fixed order).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from weightnet.compute import default_device
from weightnet.params import Params
from weightnet.predictors.checkpoints import FitState, read_checkpoint, save_checkpoint
from weightnet.predictors.interface import Log
from weightnet.predictors.ranks import mean_tau
from weightnet.randomness import derive_seed

LOG_SIGMA = (-6.0, 3.0)  # bounds of the predicted log standard deviation


class FitConfig(Params):
    """How a module is fitted.

    ``batch_cost`` bounds the sum of the examples' costs (see `Batches`) in a batch, 0 for no
    bound. ``patience`` is the number of epochs without a better ``monitor`` (on validation: mean
    squared error, Gaussian negative log-likelihood or mean tau-b) after which the fit stops.
    ``ema_decay`` above 0 evaluates and keeps an exponential moving average of the weights.
    ``beta`` is that of the loss. With ``folds`` above 1 so many modules more are fitted, each
    without another part of the training networks (see `cut_folds`), and all are averaged.
    """

    epochs: int = Field(default=100, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=32, gt=0)
    batch_cost: int = Field(default=0, ge=0)
    patience: int = Field(default=20, gt=0)
    monitor: Literal["mse", "nll", "tau"] = "mse"
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    beta: float = Field(default=0.5, ge=0, le=1)
    folds: int = Field(default=1, gt=0)
    checkpoint_epochs: int = Field(default=10, gt=0)

    @property
    def members(self) -> int:
        """How many modules are fitted, unless networks are too few for ``folds``."""
        return 1 if self.folds == 1 else self.folds + 1


class Batch(Protocol):
    """Whatever a module reads; a Tensor is one."""

    def to(self, device: torch.device) -> Self:
        """Return the batch on ``device``."""
        ...


@dataclass(frozen=True)
class Batches:
    """``count`` examples: ``collate`` makes the batch of the examples at int64 indices [B].

    ``cost`` [count] is what each adds to a batch's memory, such as its number of tokens.
    """

    collate: Callable[[Tensor], Batch]
    count: int
    cost: Tensor | None = None

    def cut(self, order: Tensor, config: FitConfig) -> list[Tensor]:
        """Cut ``order`` into batches of nearly equal size within the bounds of ``config``."""
        if self.cost is None or not config.batch_cost:
            parts = max(1, math.ceil(len(order) / config.batch_size))
            return list(torch.tensor_split(order, parts)) if len(order) else []
        pieces: list[list[int]] = []
        total = 0.0
        for index, cost in zip(order.tolist(), self.cost[order].tolist(), strict=True):
            full = (
                not pieces
                or len(pieces[-1]) >= config.batch_size
                or total + cost > config.batch_cost
            )
            if full:
                pieces.append([])
                total = 0.0
            pieces[-1].append(index)
            total += cost
        return [torch.tensor(piece) for piece in pieces]

    def select(self, chosen: Tensor) -> Batches:
        """The examples at ``chosen`` [n] alone."""
        cost = None if self.cost is None else self.cost[chosen]
        return Batches(lambda indices: self.collate(chosen[indices]), len(chosen), cost)


@dataclass(frozen=True)
class Examples:
    """Batches and their targets [count, P], standardized, NaN where missing."""

    batches: Batches
    targets: Tensor


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of mean, log_sigma and targets, all [B, P]."""


def gaussian_nll(mean: Tensor, log_sigma: Tensor, targets: Tensor, beta: float = 0.0) -> Tensor:
    """Mean Gaussian negative log-likelihood, up to a constant, of the known targets; all [B, P].

    With ``beta`` above 0 each term is weighted by ``sigma ** (2 * beta)``, held constant: 0.5
    keeps the mean from being neglected where sigma is large, 1 has the gradient of the squared
    error for the mean (Seitzer et al. 2022, https://arxiv.org/abs/2203.09168).
    """
    known = torch.isfinite(targets)
    log_sigma = log_sigma.clamp(*LOG_SIGMA)
    error = torch.where(known, targets - mean, 0.0)
    terms = log_sigma + 0.5 * (error * torch.exp(-log_sigma)) ** 2
    if beta:
        terms = terms * torch.exp(2 * beta * log_sigma).detach()
    return (terms * known).sum() / known.sum().clamp(min=1)


@dataclass(frozen=True)
class Fit:
    """How a fit went: epochs run, the best of them (from 0) and its monitored value."""

    epochs: int
    best_epoch: int
    best_value: float


@contextmanager
def seeded(*names: int | str) -> Iterator[None]:
    """Run a block with torch's generators seeded by ``names``; then restore them."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(derive_seed(*names))
        yield


def fit_module(
    module: nn.Module,
    train: Examples,
    validation: Examples,
    config: FitConfig,
    *,
    seed: int,
    loss: Loss | None = None,
    device: torch.device | None = None,
    log: Log | None = None,
    checkpoint: Path | None = None,
) -> Fit:
    """Fit ``module`` in place and leave it with its best weights, in evaluation mode.

    Args:
        loss: by default `gaussian_nll` with the ``beta`` of ``config``.
        device: by default `default_device`.
        log: receives ``train/loss``, ``learning_rate`` and, if there are validation targets,
            ``validation/nll``, ``validation/mse`` and ``validation/tau`` with the epoch; after a
            resume, first those of the epochs before it.
        checkpoint: file for the state of the fit, written every ``checkpoint_epochs`` epochs and
            at the end. One that exists is continued if it belongs to the same fit (recognized by
            config, seed, shapes, targets and the initial validation error), otherwise replaced.

    Raises:
        ValueError: if there is nothing to train on, or no gradient of an epoch is finite.
    """
    if not train.batches.count:
        raise ValueError("train must hold examples, however: it holds none")
    device = device or default_device()
    module.to(device)
    optimizer = _optimizer(module, config)
    state = FitState()
    if config.ema_decay:
        state.average = _copy(module.state_dict())
    mark = ""
    if checkpoint is not None:
        initial = _evaluate(module, state, validation, config, device)
        mark = _fingerprint(module, config, seed, train, validation, initial)
        state = read_checkpoint(checkpoint, mark, module, optimizer) or state
    if log is not None:
        for epoch, metrics in enumerate(state.history):
            log(dict(metrics), epoch)
    with seeded(seed):
        while state.epoch < config.epochs and not _exhausted(state, config):
            epoch = state.epoch
            torch.manual_seed(derive_seed(seed, "epoch", epoch))
            metrics = _train_epoch(module, optimizer, state, train, config, loss, device)
            found = _evaluate(module, state, validation, config, device)
            metrics |= {f"validation/{name}": value for name, value in found.items()}
            _keep_best(state, module, found, config)
            state.history.append(metrics)
            state.epoch += 1
            ended = state.epoch == config.epochs or _exhausted(state, config)
            if checkpoint is not None and (ended or state.epoch % config.checkpoint_epochs == 0):
                save_checkpoint(checkpoint, mark, state, module, optimizer)
            if log is not None:
                log(dict(metrics), epoch)
    module.load_state_dict(state.best)
    module.eval()
    return Fit(state.epoch, state.best_epoch, state.best_value)


def run_module(
    module: nn.Module, batches: Batches, config: FitConfig, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and log_sigma, float64 [count, P] on the CPU, of all examples in order."""
    device = device or default_device()
    module.to(device).eval()
    with torch.inference_mode():
        return _run(module, batches, config, device)


def _run(
    module: Callable[[Batch], tuple[Tensor, Tensor]],
    batches: Batches,
    config: FitConfig,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    means, log_sigmas = [], []
    for indices in batches.cut(torch.arange(batches.count), config):
        mean, log_sigma = module(batches.collate(indices).to(device))
        means.append(mean.double().cpu())
        log_sigmas.append(log_sigma.double().clamp(*LOG_SIGMA).cpu())
    return torch.cat(means), torch.cat(log_sigmas)


def _train_epoch(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: FitState,
    train: Examples,
    config: FitConfig,
    loss: Loss | None,
    device: torch.device,
) -> dict[str, float]:
    module.train()
    seen, used, total, rate = 0, 0, 0.0, 0.0
    count = train.batches.count
    for indices in train.batches.cut(torch.randperm(count), config):
        seen += len(indices)
        rate = config.learning_rate * _schedule(
            (state.epoch + seen / count) / config.epochs, config
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        mean, log_sigma = module(train.batches.collate(indices).to(device))
        targets = train.targets[indices].to(device=device, dtype=mean.dtype)
        if loss is None:
            value = gaussian_nll(mean, log_sigma, targets, config.beta)
        else:
            value = loss(mean, log_sigma, targets)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clip)
        if not torch.isfinite(norm):  # one bad batch must not spoil the weights
            continue
        optimizer.step()
        state.step += 1
        used += len(indices)
        total += value.item() * len(indices)
        if state.average:
            _update_average(state, module, config.ema_decay)
    if not used:
        raise ValueError(
            f"gradients must be finite, however: none was in epoch {state.epoch}; "
            f"lower learning_rate={config.learning_rate}"
        )
    return {"train/loss": total / used, "learning_rate": rate}


def _evaluate(
    module: nn.Module,
    state: FitState,
    validation: Examples,
    config: FitConfig,
    device: torch.device,
) -> dict[str, float]:
    """Return nll, mse and tau of the (averaged) weights on validation; nothing if unmeasured."""
    targets = validation.targets.double()
    known = torch.isfinite(targets)
    if not known.any():
        return {}
    module.eval()

    def averaged(batch: Batch) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor]
        found = torch.func.functional_call(module, state.average, (batch,), tie_weights=False)
        return found

    forward = averaged if state.average else module
    with torch.inference_mode():
        mean, log_sigma = _run(forward, validation.batches, config, device)
        return {
            "nll": gaussian_nll(mean, log_sigma, targets).item(),
            "mse": torch.square(mean - targets)[known].mean().item(),
            "tau": mean_tau(mean.numpy(), targets.numpy()),
        }


def _keep_best(
    state: FitState, module: nn.Module, found: dict[str, float], config: FitConfig
) -> None:
    """Keep the weights if their monitored value is the best, or if nothing is measured."""
    value = found.get(config.monitor, math.nan)
    value = -value if config.monitor == "tau" else value
    if value < state.best_value or not found or state.best_epoch < 0:
        state.best_value = value if math.isfinite(value) else math.inf
        state.best_epoch = state.epoch
        state.best = _copy(state.average or module.state_dict())


def _schedule(progress: float, config: FitConfig) -> float:
    """Factor of the learning rate at ``progress`` in [0, 1]: linear warm-up, half a cosine."""
    warmup = config.warmup_fraction
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _exhausted(state: FitState, config: FitConfig) -> bool:
    return state.epoch - 1 - state.best_epoch >= config.patience


def _optimizer(module: nn.Module, config: FitConfig) -> torch.optim.Optimizer:
    """AdamW without decay on biases, gains and other vectors."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def _update_average(state: FitState, module: nn.Module, decay: float) -> None:
    decay = min(decay, (1 + state.step) / (10 + state.step))  # the start is forgotten sooner
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                state.average[name].lerp_(value, 1 - decay)
            else:
                state.average[name].copy_(value)


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _fingerprint(
    module: nn.Module,
    config: FitConfig,
    seed: int,
    train: Examples,
    validation: Examples,
    initial: dict[str, float],
) -> str:
    described: list[Any] = [
        config.model_dump(mode="json", exclude={"checkpoint_epochs"}),
        seed,
        [[name, list(value.shape)] for name, value in module.state_dict().items()],
        # stands for the inputs, as far as the rounding of another machine lets one tell
        f"{initial.get('mse', 0.0):.3g}",
    ]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for targets in (train.targets, validation.targets):
        digest.update(targets.double().cpu().numpy().tobytes())
    return digest.hexdigest()
