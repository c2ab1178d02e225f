"""A made-up evaluation, as the plot stage would read it: networks, predictions, scores, audit,
curves."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from weightnet.evaluation.scores import Evaluation, ScoresConfig
from weightnet.report.names import PredictorInfo

PREDICTORS = (
    PredictorInfo("weightnet", "ours", "attention over neuron tokens"),
    PredictorInfo("weightnet_probe", "ours", "with probe responses", needs_forward=True),
    PredictorInfo("mlp", "baseline", "MLP on flat canonical weights"),
    PredictorInfo("gbm", "baseline", "LightGBM on weight statistics"),
    PredictorInfo("mean", "floor", "mean of the training networks", reads_weights=False),
    PredictorInfo("hyperparameters", "floor", "LightGBM on the recipe", reads_weights=False),
    PredictorInfo("shuffled", "control", "gbm trained on permuted labels"),
)
NOISE = {
    "weightnet": 0.08,
    "weightnet_probe": 0.05,
    "mlp": 0.3,
    "gbm": 0.12,
    "hyperparameters": 0.15,
    "shuffled": 5.0,
}
FAMILIES = ("cnn", "resnet18", "vgg11", "densenet121")


@dataclass(frozen=True)
class Results:
    """Everything that figures, tables and the report take."""

    networks: pd.DataFrame
    predictions: pd.DataFrame
    scores: pd.DataFrame
    differences: pd.DataFrame
    audit: pd.DataFrame
    curves: pd.DataFrame
    importance: pd.DataFrame
    agreement: pd.DataFrame
    sizes: pd.DataFrame
    predictors: tuple[PredictorInfo, ...] = PREDICTORS


def make_networks(count: int) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    family = generator.choice(FAMILIES, count, p=[0.7, 0.1, 0.1, 0.1])
    test = np.clip(generator.beta(2.0, 1.2, count), 0.08, 0.96)
    gap = generator.beta(1.0, 4.0, count) * (1.0 - test)
    properties = {
        "test_accuracy": test,
        "train_accuracy": test + gap,
        "generalization_gap": gap,
        "test_loss": -np.log(test) * 1.5,
        "noise_accuracy": test * generator.uniform(0.5, 1.0, count),
        "adversarial_accuracy": test * generator.uniform(0.1, 0.9, count),
        "calibration_error": gap * 0.7 + 0.02,
    }
    diverged = generator.uniform(size=count) < 0.03
    frame = pd.DataFrame(
        {
            "run": [f"{i:016x}" for i in range(count)],
            "family": family,
            "task": generator.choice(["digits", "fashion"], count),
            "width": generator.choice([0.25, 0.5, 1.0], count),
            "diverged": diverged,
        }
    )
    for name, values in properties.items():
        frame[f"property.{name}"] = np.where(diverged & (name == "test_loss"), np.nan, values)
        for half in ("half_a", "half_b"):
            frame[f"{half}.{name}"] = frame[f"property.{name}"] + 0.01 * generator.normal(
                size=count
            )
    return frame


def make_predictions(networks: pd.DataFrame) -> pd.DataFrame:
    tests = {
        "iid": lambda s: np.arange(len(networks)) % 5 == s,
        "unseen_architecture": lambda _: (
            networks["family"].isin(["vgg11", "densenet121"]).to_numpy()
        ),
        "unseen_task": lambda _: (networks["task"] == "fashion").to_numpy(),
        "unseen_width": lambda _: (networks["width"] == 1.0).to_numpy(),
    }
    tables = []
    for info in PREDICTORS:
        for split, chosen in tests.items():
            for seed in range(3):
                part = networks[chosen(seed)]
                generator = np.random.default_rng([seed, zlib.crc32((info.name + split).encode())])
                for column in [c for c in networks if c.startswith("property.")]:
                    measured = part[column].to_numpy()
                    spread = float(np.nanstd(networks[column]))
                    noise = NOISE.get(info.name, 0.0) * (1.0 if split == "iid" else 1.8) * 3
                    if info.name == "mean":
                        predicted = np.full(len(part), float(np.nanmean(networks[column])))
                    elif info.name == "shuffled":
                        predicted = generator.normal(size=len(part)) * spread
                    else:
                        predicted = np.nan_to_num(measured, nan=1.0)
                        predicted = predicted + noise * spread * generator.normal(size=len(part))
                    half = 1.645 * max(noise, 0.5) * spread
                    tables.append(
                        pd.DataFrame(
                            {
                                "predictor": info.name,
                                "split": split,
                                "seed": seed,
                                "run": part["run"],
                                "family": part["family"],
                                "task": part["task"],
                                "part": "test",
                                "property": column.removeprefix("property."),
                                "measured": measured,
                                "predicted": predicted,
                                "low": predicted - half,
                                "high": predicted + half,
                            }
                        )
                    )
    return pd.concat(tables, ignore_index=True)


def make_audit(networks: pd.DataFrame) -> pd.DataFrame:
    size = {"weightnet": 3e-7, "weightnet_probe": 2e-6, "mlp": 0.4, "gbm": 1e-4}
    rows = []
    for info in PREDICTORS:
        for family in ["all", *FAMILIES]:
            for change in ("permuted", "rescaled"):
                for i, column in enumerate(c for c in networks if c.startswith("property.")):
                    largest = size.get(info.name, 0.0) * (30.0 if change == "rescaled" else 1.0)
                    rows.append(
                        {
                            "predictor": info.name,
                            "split": "iid",
                            "family": family,
                            "transformation": change,
                            "property": column.removeprefix("property."),
                            "largest": 0.2 * largest * (i + 1),
                            "relative": largest * (i + 1),
                            "tau": 0.8,
                            "tau_copies": 0.8 - min(largest, 0.3),
                            "n": 10,
                        }
                    )
    return pd.DataFrame(rows)


def make_curves() -> pd.DataFrame:
    rows = []
    for name, rate in (("weightnet", 0.08), ("weightnet_probe", 0.1), ("mlp", 0.05)):
        for seed in range(3):
            for epoch in range(40):
                wave = 0.02 * np.sin(epoch * 1.3 + seed)
                key = {"predictor": name, "split": "iid", "seed": seed, "epoch": epoch}
                loss, tau = np.exp(-rate * epoch) + 0.05, 0.85 * (1 - np.exp(-rate * epoch * 2))
                rows.append({**key, "metric": "train/loss", "value": loss + abs(wave)})
                rows.append({**key, "metric": "validation/tau", "value": tau + wave})
    return pd.DataFrame(rows)


def make_importance(networks: pd.DataFrame) -> pd.DataFrame:
    generator = np.random.default_rng(1)
    rows = []
    for run, family in networks[["run", "family"]].iloc[:40].to_numpy():
        for model in ("trained", "randomized"):
            for view in ("depth", "norm"):
                for position in (np.arange(8) + 0.5) / 8:
                    share = (0.2 + position if model == "trained" else 0.7) / 8
                    rows.append(
                        {
                            "run": run,
                            "family": family,
                            "model": model,
                            "property": "test_accuracy",
                            "view": view,
                            "position": position,
                            "importance": share * generator.uniform(0.5, 1.5),
                        }
                    )
    return pd.DataFrame(rows)


def make_agreement(networks: pd.DataFrame) -> pd.DataFrame:
    generator = np.random.default_rng(2)
    correlations = {"trained": np.nan, "retrained": 0.6, "randomized": 0.1}
    rows = [
        {
            "run": run,
            "family": family,
            "model": model,
            "property": "test_accuracy",
            "correlation": correlation + 0.1 * generator.normal(),
            "top_tenth": 0.4,
        }
        for run, family in networks[["run", "family"]].iloc[:40].to_numpy()
        for model, correlation in correlations.items()
    ]
    return pd.DataFrame(rows)


def make_results(count: int, draws: int) -> Results:
    networks = make_networks(count)
    predictions = make_predictions(networks)
    evaluation = Evaluation(predictions, networks, ScoresConfig(draws=draws))
    sizes = pd.DataFrame(
        [
            {
                "split": split,
                "seed": seed,
                "train": 60,
                "validation": 10,
                "test": 30,
                "unused": 0,
                "hash": "0123456789ab",
            }
            for split in evaluation.splits
            for seed in range(3)
        ]
    )
    return Results(
        networks,
        predictions,
        evaluation.scores(),
        evaluation.differences(["weightnet", "weightnet_probe"]),
        make_audit(networks),
        make_curves(),
        make_importance(networks),
        make_agreement(networks),
        sizes,
    )


@pytest.fixture(scope="session")
def results() -> Results:
    return make_results(120, 20)
