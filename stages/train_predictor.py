"""Train one predictor on one split, all seeds: data/predictors, data/predictions, data/curves."""

import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from dvclive.live import Live
from pydantic import Field

from weightnet.command import expect_only, load_names, load_section, reported
from weightnet.compute import default_jobs
from weightnet.evaluation.splits import SPLITS, SplitsConfig, assign
from weightnet.params import Params
from weightnet.predictors import Prediction, build, config_class
from weightnet.progress import Progress
from weightnet.tokens import Networks, read_networks

TOKENS = Path("data/tokens")
PREDICTORS = Path("data/predictors")
PREDICTIONS = Path("data/predictions")
CURVES = Path("data/curves")
CHECKPOINTS = Path("data/checkpoints")


class TrainConfig(Params):
    """The train_predictor.common section."""

    seeds: int = Field(ge=1)
    properties: list[str] = Field(min_length=1)
    splits: SplitsConfig


def train_seed(
    predictor: str,
    split: str,
    seed: int,
    config: TrainConfig,
    settings: Params,
    tell: Callable[[str], object],
) -> pd.DataFrame:
    """Fit, save and predict for one seed; return validation and test predictions, long format.

    ``tell`` is told of each epoch: it shows the progress, perhaps in another process.
    """
    torch.set_num_threads(1)
    networks = read_networks([TOKENS / family for family in load_names("families")])
    measured = [str(c)[9:] for c in networks.frame if str(c).startswith("property.")]
    unknown = sorted(set(config.properties) - set(measured))
    if unknown:
        raise ValueError(
            f"params key train_predictor.common.properties must name measured properties "
            f"({', '.join(measured)}), however: it has {', '.join(unknown)}"
        )
    parts = assign(networks.frame, split, seed=seed, config=config.splits)
    model = build(predictor, settings, config.properties, seed)
    accepted = model.accepts(networks)
    if not accepted[parts == "train"].any():
        raise ValueError(
            f"predictor {predictor} must accept a training network of split {split}, however: it "
            f"accepts none; leave it out of params key predictors"
        )
    networks, parts = networks.select(accepted), parts[accepted]
    where = f"{predictor}-{split}"
    train = networks.select((parts == "train").to_numpy())
    validation = networks.select((parts == "validation").to_numpy())
    checkpoint = CHECKPOINTS / where / f"seed{seed}"
    with Live(
        str(CURVES / where / f"seed{seed}"), report=None, save_dvc_exp=False, dvcyaml=None
    ) as live:

        def log(metrics: dict[str, float], step: int) -> None:
            live.step = step
            for name, value in metrics.items():
                live.log_metric(name, value, timestamp=False)
            live.make_summary()
            if "train/loss" in metrics:
                tau = metrics.get("validation/tau", float("nan"))
                loss = metrics["train/loss"]
                tell(f"seed {seed}: loss {loss:.3f}, validation tau {tau:.3f}")

        model.fit(train, validation, log=log, checkpoint=checkpoint)
    model.save(PREDICTORS / where / f"seed{seed}")
    shutil.rmtree(checkpoint, ignore_errors=True)
    test = networks.select((parts == "test").to_numpy())
    return pd.concat(
        [
            predict(model.predict(validation), validation, "validation"),
            predict(model.predict(test), test, "test"),
        ]
    ).assign(seed=seed)


def train_seeds(
    predictor: str, split: str, config: TrainConfig, settings: Params, bar: Progress
) -> list[pd.DataFrame]:
    """Train all seeds, in one single-threaded process each as far as there are cores."""
    jobs = min(default_jobs(), config.seeds)
    seeds = range(config.seeds)
    if jobs == 1:
        return [
            train_seed(
                predictor, split, seed, config, settings, lambda note: bar.advance(note=note)
            )
            for seed in seeds
        ]
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        told = manager.Queue()
        futures = [
            pool.submit(train_seed, predictor, split, seed, config, settings, told.put)
            for seed in seeds
        ]
        while not all(future.done() for future in futures):
            with suppress(Empty):
                bar.advance(note=told.get(timeout=0.2))
        return [future.result() for future in futures]


def predict(prediction: Prediction, networks: Networks, part: str) -> pd.DataFrame:
    """Predictions beside measurements, one row a network and property."""
    frames = []
    for p, name in enumerate(prediction.properties):
        frame = networks.frame[["run", "family", "task"]].copy()
        frame["part"], frame["property"] = part, name
        frame["measured"] = networks.frame[f"property.{name}"].astype(np.float64)
        for column in ("mean", "low", "high"):
            frame[column] = getattr(prediction, column)[:, p]
        frames.append(frame.rename(columns={"mean": "predicted"}))
    return pd.concat(frames)


def main(
    predictor: Annotated[str, typer.Argument(help="A predictor in params.yaml, e.g. weightnet.")],
    split: Annotated[str, typer.Argument(help=f"One of {', '.join(SPLITS)}.")],
) -> None:
    """Train one predictor on one split with every seed, and predict its test networks.

    Reads data/tokens and params.yaml (families, train_predictor.common,
    train_predictor.<predictor>); writes data/predictors/<predictor>-<split>/ (fitted predictors),
    data/curves/... (DVCLive) and data/predictions/<predictor>-<split>.parquet. An interrupted fit
    continues from its checkpoint. Environment: WEIGHTNET_JOBS, WEIGHTNET_DEVICE.
    """
    with reported():
        config = load_section(TrainConfig, "train_predictor", "common")
        settings = load_section(config_class(predictor), "train_predictor", predictor)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, however: {split=}")
        where = f"{predictor}-{split}"
        expect_only(TOKENS, load_names("families"), "tokenize_zoo")
        shutil.rmtree(CURVES / where, ignore_errors=True)
        epochs = settings.fit.epochs * settings.fit.members if hasattr(settings, "fit") else 1
        with Progress(f"train_predictor {where}", config.seeds * epochs, "steps") as bar:
            predictions = pd.concat(train_seeds(predictor, split, config, settings, bar))
            bar.finish()
        PREDICTIONS.mkdir(parents=True, exist_ok=True)
        temporary = PREDICTIONS / f".{where}.parquet"
        predictions.to_parquet(temporary, index=False)
        temporary.rename(PREDICTIONS / f"{where}.parquet")
        typer.echo(f"{where}: {config.seeds} seeds, {len(predictions)} predictions")


if __name__ == "__main__":
    typer.run(main)
