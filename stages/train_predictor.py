"""Train one predictor on one split, all seeds: data/predictors, data/predictions, data/curves."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import typer
from dvclive.live import Live
from pydantic import Field

from weightnet.command import (
    conclude,
    expect_only,
    load_names,
    load_section,
    reported,
    write_table,
    writing,
)
from weightnet.compute import default_jobs, single_thread, tell, worker_pool
from weightnet.durable import expect_writable, replace_folder, sweep
from weightnet.evaluation.splits import SPLITS, SplitsConfig, assign
from weightnet.params import Params
from weightnet.predictors import Prediction, build, config_class, entry
from weightnet.probing import ModuleBuilder
from weightnet.progress import Progress
from weightnet.tokens import Networks, read_networks

TOKENS = Path("data/tokens")
ZOO = Path("data/zoo")
PREDICTORS = Path("data/predictors")
PREDICTIONS = Path("data/predictions")
CURVES = Path("data/curves")
CHECKPOINTS = Path("data/checkpoints")


class TrainConfig(Params):
    """The train_predictor.common section."""

    seeds: int = Field(ge=1)
    properties: list[str] = Field(min_length=1)
    splits: SplitsConfig


@dataclass(frozen=True)
class Training:
    """What is trained, on what, and how: params.yaml is read once, by `main`."""

    predictor: str
    split: str
    families: list[str]
    config: TrainConfig
    settings: Params
    curves: Path  # the folder, not in its place yet


class Trained(NamedTuple):
    """Of one seed: its predictions, and how many networks were left out, or diverged in training
    and so have properties missing."""

    predictions: pd.DataFrame
    refused: int
    diverged: int


def train_some(
    training: Training, seeds: Sequence[int], tell: Callable[[str], object]
) -> list[Trained]:
    """Train some seeds, one after another; the networks are read once.

    ``tell`` is told of each epoch: it shows the progress, perhaps in another process. The
    checkpoints stay until all seeds are done, so that a finished one is not fitted again.
    """
    single_thread()
    networks = read_networks([TOKENS / family for family in training.families]).read_together()
    return [train_seed(training, networks, seed, tell) for seed in seeds]


def train_seed(
    training: Training, networks: Networks, seed: int, tell: Callable[[str], object]
) -> Trained:
    """Fit, save and predict for one seed; return predictions of the networks that calibrated the
    intervals and of the test networks, long format."""
    predictor, split, config = training.predictor, training.split, training.config
    if entry(predictor).needs_forward:
        networks = networks.runnable(ModuleBuilder(ZOO))
    measured = [str(c)[9:] for c in networks.frame if str(c).startswith("property.")]
    unknown = sorted(set(config.properties) - set(measured))
    if unknown:
        raise ValueError(
            f"params key train_predictor.common.properties must name measured properties "
            f"({', '.join(measured)}), however: it has {', '.join(unknown)}"
        )
    parts = assign(networks.frame, split, seed=seed, config=config.splits)
    model = build(predictor, training.settings, config.properties, seed)
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
        str(training.curves / f"seed{seed}"), report=None, save_dvc_exp=False, dvcyaml=None
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
    test = networks.select((parts == "test").to_numpy())
    predictions = pd.concat(
        [
            predict(*model.calibration, "calibration"),
            predict(test.frame, model.predict(test), "test"),
        ]
    ).assign(seed=seed)
    diverged = int(networks.frame["diverged"].sum())
    return Trained(predictions, int((~accepted).sum()), diverged)


def train_seeds(training: Training, bar: Progress) -> list[Trained]:
    """Train all seeds, in one single-threaded process each as far as there are cores."""
    seeds = range(training.config.seeds)
    jobs = min(default_jobs(), len(seeds))
    if jobs == 1:
        return train_some(training, seeds, lambda note: bar.advance(note=note))
    shares = [seeds[first::jobs] for first in range(jobs)]
    with worker_pool(jobs) as (pool, notes):
        futures = [pool.submit(train_some, training, share, tell) for share in shares]
        while not all(future.done() for future in futures):
            with suppress(Empty):
                bar.advance(note=notes.get(timeout=0.2))
            for future in futures:
                if future.done():
                    future.result()  # one that failed ends the others
        trained: dict[int, Trained] = {}
        for share, future in zip(shares, futures, strict=True):
            trained |= zip(share, future.result(), strict=True)
        return [trained[seed] for seed in seeds]


def predict(networks: pd.DataFrame, prediction: Prediction, part: str) -> pd.DataFrame:
    """Predictions beside measurements, one row a network and property."""
    frames = []
    for p, name in enumerate(prediction.properties):
        frame = networks[["run", "family", "task"]].copy()
        frame["part"], frame["property"] = part, name
        frame["measured"] = networks[f"property.{name}"].astype(np.float64)
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
        families = load_names("families")
        expect_only(TOKENS, families, "tokenize_zoo")
        epochs = settings.fit.epochs * settings.fit.members if hasattr(settings, "fit") else 1
        with writing(PREDICTORS / where):
            for folder in (PREDICTORS / where, PREDICTIONS, CHECKPOINTS / where):
                expect_writable(folder)
            sweep(PREDICTORS / where)
            sweep(PREDICTIONS, f"{where}.parquet")
            sweep(CURVES, where)
            begun = sum(1 for seed in (CHECKPOINTS / where).glob("seed*") if any(seed.iterdir()))
            with (
                replace_folder(CURVES / where) as curves,
                Progress(f"train_predictor {where}", config.seeds * epochs, "steps") as bar,
            ):
                training = Training(predictor, split, families, config, settings, curves)
                trained = train_seeds(training, bar)
                bar.finish()
            predictions = pd.concat(one.predictions for one in trained)
            write_table(predictions, PREDICTIONS / f"{where}.parquet")
        shutil.rmtree(CHECKPOINTS / where, ignore_errors=True)
        conclude(
            f"train_predictor {where}",
            done=f"{config.seeds} seeds, {len(predictions)} predictions",
            reused=f"checkpoints of {begun} seeds",
            skipped=f"{trained[0].refused} networks that {predictor} does not accept",
            bad=f"{trained[0].diverged} diverged networks (kept)",
        )


if __name__ == "__main__":
    typer.run(main)
