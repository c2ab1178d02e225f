"""The fit loop: exact resume, determinism, early stopping, masked loss, batches."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from weightnet.compute import default_device
from weightnet.predictors.fitting import (
    Batches,
    Examples,
    FitConfig,
    fit_module,
    gaussian_nll,
    run_module,
    seeded,
)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


CPU = torch.device("cpu")
CONFIG = FitConfig(
    epochs=12, learning_rate=0.01, batch_size=16, ema_decay=0.9, checkpoint_epochs=2
)


class Small(nn.Module):
    """Has all that makes resuming hard: dropout, buffers, an integer counter, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8)
        self.drop, self.second = nn.Dropout(0.2), nn.Linear(8, 8)
        self.tied, self.head = self.second, nn.Linear(8, 4)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.drop(torch.relu(self.norm(self.first(rows))))
        mean, log_sigma = self.head(self.tied(torch.relu(self.second(hidden)))).chunk(2, dim=-1)
        return mean, log_sigma


def make_module(seed: int = 0) -> Small:
    with seeded(seed):
        return Small()


def make_examples(count: int, seed: int) -> Examples:
    with seeded(seed):
        rows = torch.randn(count, 3)
        targets = torch.stack([rows[:, 0] - rows[:, 1], rows.sum(dim=1)], dim=1)
        targets[torch.rand(count, 2) < 0.2] = math.nan
    return Examples(Batches(lambda indices: rows[indices], count), targets)


TRAIN, VALIDATION = make_examples(100, 1), make_examples(40, 2)


def fit(
    seed: int = 0, config: FitConfig = CONFIG, **options: object
) -> tuple[Small, list[object]]:
    module, curve = make_module(), []
    options.setdefault("log", lambda metrics, epoch: curve.append((epoch, metrics)))
    fit_module(module, TRAIN, VALIDATION, config, seed=seed, device=CPU, **options)  # type: ignore[arg-type]
    return module, curve


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("epoch", [0, 1, 2, 7, 11])
def test_a_resumed_fit_equals_an_undisturbed_one(epoch: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint" / "fit.safetensors"

    def interrupt(metrics: dict[str, float], current: int) -> None:
        if current == epoch:
            raise Interrupted

    undisturbed, curve = fit()
    with pytest.raises(Interrupted):
        fit(checkpoint=path, log=interrupt)
    torch.rand(7)  # whatever happens in between
    resumed, resumed_curve = fit(checkpoint=path)
    assert same(undisturbed.state_dict(), resumed.state_dict())
    assert curve == resumed_curve
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_of_another_fit_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    fit(checkpoint=path)
    for config, seed in ((CONFIG, 1), (CONFIG.model_copy(update={"learning_rate": 0.02}), 0)):
        expected, _ = fit(seed, config)
        found, _ = fit(seed, config, checkpoint=path)
        assert same(expected.state_dict(), found.state_dict())
    path.write_bytes(b"not a checkpoint")
    found, _ = fit(checkpoint=path)
    assert same(fit()[0].state_dict(), found.state_dict())


def test_fits_are_reproducible_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, curve = fit()
    assert torch.equal(before, torch.get_rng_state())
    second, again = fit()
    assert same(first.state_dict(), second.state_dict()) and curve == again
    other, _ = fit(seed=1)
    assert not same(first.state_dict(), other.state_dict())


def test_keeps_the_best_weights_and_stops() -> None:
    config = FitConfig(epochs=200, patience=3, learning_rate=0.05, batch_size=8)
    module, curve = make_module(), []
    done = fit_module(
        module,
        TRAIN,
        VALIDATION,
        config,
        seed=0,
        device=CPU,
        log=lambda metrics, _: curve.append(metrics["validation/mse"]),
    )
    assert len(curve) == done.epochs == done.best_epoch + 1 + config.patience < 200
    assert done.best_value == min(curve) == curve[done.best_epoch]
    mean, _ = run_module(module, VALIDATION.batches, config, device=CPU)
    known = torch.isfinite(VALIDATION.targets)
    error = torch.square(mean - VALIDATION.targets)[known].mean().item()
    assert error == pytest.approx(done.best_value)


@pytest.mark.parametrize("monitor", ["mse", "nll", "tau"])
def test_learns_by_each_monitor(monitor: str) -> None:
    config = FitConfig(epochs=40, learning_rate=0.02, batch_size=16, monitor=monitor)  # type: ignore[arg-type]
    _, curve = fit(config=config)
    assert max(metrics["validation/tau"] for _, metrics in curve) > 0.7  # type: ignore[misc, attr-defined]


def test_without_validation_targets_the_last_weights_are_kept() -> None:
    blank = Examples(VALIDATION.batches, torch.full_like(VALIDATION.targets, math.nan))
    config = FitConfig(epochs=4, patience=1)
    done = fit_module(make_module(), TRAIN, blank, config, seed=0, device=CPU)
    assert (done.epochs, done.best_epoch) == (4, 3)


def test_gradients_that_explode_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"gradients must be finite.*lower learning_rate=0\.01"):
        fit(loss=lambda mean, log_sigma, targets: (mean * math.inf).sum())


def test_loss_is_gaussian_and_masks_missing_targets() -> None:
    mean = torch.tensor([[1.0, 5.0]], requires_grad=True)
    log_sigma = torch.tensor([[math.log(2.0), 0.5]], requires_grad=True)
    value = gaussian_nll(mean, log_sigma, torch.tensor([[2.0, math.nan]]))
    expected = -torch.distributions.Normal(1.0, 2.0).log_prob(torch.tensor(2.0))
    assert value.item() == pytest.approx(expected.item() - 0.5 * math.log(2 * math.pi))
    value.backward()
    assert mean.grad is not None and log_sigma.grad is not None
    assert mean.grad[0, 1] == 0 and log_sigma.grad[0, 1] == 0
    # beta = 1: the gradient of half the squared error
    mean.grad = None
    gaussian_nll(mean, log_sigma, torch.tensor([[2.0, math.nan]]), beta=1.0).backward()
    assert mean.grad[0].tolist() == pytest.approx([-1.0, 0.0])
    assert gaussian_nll(mean, log_sigma, torch.full((1, 2), math.nan)).item() == 0


def test_batches_hold_every_example_once_within_bounds() -> None:
    order = torch.randperm(50)
    plain = Batches(lambda indices: indices, 50).cut(order, FitConfig(batch_size=16))
    assert sorted(len(piece) for piece in plain) == [12, 12, 13, 13]
    assert torch.equal(torch.cat(plain), order)
    cost = torch.arange(50)
    config = FitConfig(batch_size=16, batch_cost=100)
    bounded = Batches(lambda indices: indices, 50, cost).cut(order, config)
    assert torch.equal(torch.cat(bounded), order)
    assert all(len(piece) <= 16 and cost[piece].sum() <= 100 for piece in bounded)
    huge = Batches(lambda indices: indices, 2, torch.tensor([1000, 1])).cut(
        torch.arange(2), config
    )
    assert [len(piece) for piece in huge] == [1, 1]


def test_the_device_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTNET_DEVICE", "cpu")
    assert default_device() == CPU
    monkeypatch.setenv("WEIGHTNET_DEVICE", "abacus")
    with pytest.raises(ValueError, match="WEIGHTNET_DEVICE=abacus"):
        default_device()


def test_folds_are_averaged(parts: object) -> None:
    from weightnet.predictors import build

    train, validation, test = parts  # type: ignore[misc]
    names: set[str] = set()
    predictor = build("stats", {"fit": {"epochs": 2, "folds": 2}}, ("test_loss",), 0)
    predictor.fit(train, validation, log=lambda metrics, _: names.update(metrics))
    assert {"validation/tau", "member-1/validation/tau"} <= names
    assert np.isfinite(predictor.predict(test).high).all()
