"""Score every predictor on every split: metrics/."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import typer
from pydantic import Field

from weightnet import command
from weightnet.command import (
    conclude,
    expect_only,
    load_names,
    load_section,
    read_table,
    reported,
    writing,
)
from weightnet.compute import single_thread, spread_map
from weightnet.durable import replace_file, sweep, write_text
from weightnet.evaluation.interpretation import AGREEMENT, IMPORTANCE, interpret
from weightnet.evaluation.invariance import audit
from weightnet.evaluation.scores import Evaluation, ScoresConfig, summary
from weightnet.evaluation.splits import SplitsConfig, sizes
from weightnet.params import Params
from weightnet.predictors import PREDICTORS, Predictor, entry
from weightnet.probing import Prober
from weightnet.progress import Progress
from weightnet.randomness import numpy_generator, torch_generator
from weightnet.symmetry.form import CanonicalForm
from weightnet.tokens import Networks, ProbesConfig, read_networks

ZOO = Path("data/zoo")
TOKENS = Path("data/tokens")
FITTED = Path("data/predictors")
PREDICTIONS = Path("data/predictions")
METRICS = Path("metrics")


class AuditConfig(Params):
    """How many networks of each family are permuted and rescaled, and how often each."""

    networks_per_family: int = Field(ge=1)
    copies: int = Field(ge=1)


class EvaluateConfig(Params):
    """The evaluate section."""

    scores: ScoresConfig
    audit: AuditConfig


def read_predictions(predictors: list[str], splits: list[str]) -> pd.DataFrame:
    """The test predictions of all predictors on all splits."""
    frames = []
    for predictor in predictors:
        for split in splits:
            path = PREDICTIONS / f"{predictor}-{split}.parquet"
            made_by = f"train_predictor@{predictor}-{split}"
            table = read_table(path, made_by, command.PREDICTIONS)
            frames.append(table.assign(predictor=predictor, split=split))
    return pd.concat(frames, ignore_index=True)


def sample(networks: Networks, per_family: int) -> Networks:
    """A few networks of each family, drawn reproducibly, for the audit."""
    chosen: list[int] = []
    for family, rows in networks.frame.groupby("family"):
        generator = numpy_generator("audit", str(family))
        count = min(per_family, len(rows))
        chosen += sorted(generator.choice(rows.index.to_numpy(), count, replace=False))
    return networks.select(np.array(chosen))


@dataclass(frozen=True)
class Audit:
    """What is the same for the audits of all predictors, which are fitted on ``split``."""

    families: tuple[str, ...]
    split: str
    config: AuditConfig
    form: CanonicalForm
    probes: ProbesConfig

    @cached_property
    def prober(self) -> Prober:
        """Runs the copies."""
        return Prober(self.probes, ZOO)

    @cached_property
    def networks(self) -> Networks:
        """A sample, which each process reads for itself."""
        networks = read_networks([TOKENS / family for family in self.families])
        return sample(networks, self.config.networks_per_family).runnable(self.prober.modules)

    def of(self, name: str) -> pd.DataFrame:
        """The audit of one predictor."""
        fitted = Predictor.load(FITTED / f"{name}-{self.split}" / "seed0")
        return audit(
            fitted,
            self.networks.select(fitted.accepts(self.networks)),
            split=self.split,
            generator=torch_generator("audit", name),
            copies=self.config.copies,
            canonicalize=self.form.apply,
            build=self.prober.networks if PREDICTORS[name].needs_forward else None,
        )


def main() -> None:
    """Score the predictions of all predictors on all splits, with intervals, floors and controls.

    Reads data/predictions, data/tokens, data/predictors and params.yaml (families, predictors,
    splits, evaluate, ...), and writes metrics/: summary.json (what `dvc metrics diff` shows),
    scores.csv, differences.csv, splits.csv, audit.csv, importance.csv,
    agreement.csv.
    """
    with reported():
        config = load_section(EvaluateConfig, "evaluate")
        form = load_section(CanonicalForm, "tokenize_zoo", "canonical")
        divided = load_section(SplitsConfig, "train_predictor", "common", "splits")
        predictors, splits = load_names("predictors"), load_names("splits")
        for name in predictors:
            entry(name)
        families = load_names("families")
        expect_only(TOKENS, families, "tokenize_zoo")
        pairs = [f"{predictor}-{split}" for predictor in predictors for split in splits]
        expect_only(PREDICTIONS, pairs, "train_predictor")
        expect_only(FITTED, pairs, "train_predictor")
        networks = read_networks([TOKENS / family for family in families])
        predictions = read_predictions(predictors, splits)

        with writing(METRICS):
            sweep(METRICS)
            evaluation = Evaluation(predictions, networks.frame, config.scores)
            count = len(splits) * (len(predictors) + 1)  # and the ceiling
            with Progress("scores", count, "predictors on splits") as progress:
                scores = evaluation.scores(progress.advance)
            ours = [name for name in predictors if PREDICTORS[name].kind == "ours"]
            differences = evaluation.differences(ours)
            seeds = sorted(predictions["seed"].unique())

            audits = Audit(
                tuple(families),
                splits[0],
                config.audit,
                form,
                load_section(ProbesConfig, "tokenize_zoo", "probes"),
            )
            readers = [name for name in predictors if PREDICTORS[name].reads_weights]
            changes = []
            with (
                Progress("invariance audit", len(readers), "predictors") as progress,
                spread_map(len(readers)) as spread,
            ):
                for changed in spread(audits.of, readers):
                    changes.append(changed)
                    progress.advance()

            importance, agreement = (
                pd.DataFrame(columns=IMPORTANCE),
                pd.DataFrame(columns=AGREEMENT),
            )
            if ours:
                first, *others = (
                    Predictor.load(FITTED / f"{ours[0]}-{splits[0]}" / f"seed{seed}")
                    for seed in seeds[:2]
                )
                with Progress("importance", 2 + len(others), "maps") as progress:
                    importance, agreement = interpret(
                        first,
                        audits.networks,
                        other=next(iter(others), None),
                        advance=progress.advance,
                    )
            tables = {
                "scores": scores,
                "splits": sizes(networks.frame, splits, seeds, divided),
                "audit": pd.concat(changes),
                "differences": differences,
                "importance": importance,
                "agreement": agreement,
            }
            for name, table in tables.items():
                with replace_file(METRICS / f"{name}.csv") as temporary:
                    table.to_csv(temporary, index=False, float_format="%.6g")
            text = json.dumps(summary(scores), indent=1, sort_keys=True)
            write_text(METRICS / "summary.json", text + "\n")
        conclude(
            "evaluate",
            done=f"{len(scores)} scores of {len(predictors)} predictors on {len(splits)} splits",
            bad=f"{networks.frame['diverged'].sum()} diverged networks (kept)",
        )


if __name__ == "__main__":
    single_thread()
    typer.run(main)
