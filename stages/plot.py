"""Draw the figures and write the report: plots/, results/results.md, the table in README.md."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import typer
from matplotlib.figure import Figure

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
from weightnet.durable import replace_file, sweep, write_text
from weightnet.params import Params
from weightnet.predictors import PREDICTORS
from weightnet.progress import Progress
from weightnet.report import figures
from weightnet.report.evidence import Evidence, Picture
from weightnet.report.names import PredictorInfo, arrange
from weightnet.report.tables import headline_table, inject
from weightnet.report.text import write_report
from weightnet.tokens import read_networks

TOKENS = Path("data/tokens")
PREDICTIONS = Path("data/predictions")
CURVES = Path("data/curves")
METRICS = Path("metrics")
PLOTS = Path("plots")
RESULTS = Path("results")
README = Path("README.md")


class PlotConfig(Params):
    """The plot section."""

    properties: list[str]


def read_curves(predictors: list[str], splits: list[str]) -> pd.DataFrame:
    """The curves of all fits, long format: predictor, split, seed, epoch, metric, value."""
    frames = []
    for predictor in predictors:
        for split in splits:
            for path in sorted(
                (CURVES / f"{predictor}-{split}").glob("seed*/plots/metrics/**/*.tsv")
            ):
                seed, _, _, *metric = path.relative_to(CURVES / f"{predictor}-{split}").parts
                curve = pd.read_csv(path, sep="\t")
                frames.append(
                    pd.DataFrame(
                        {
                            "predictor": predictor,
                            "split": split,
                            "seed": int(seed.removeprefix("seed")),
                            "epoch": curve["step"],
                            "metric": "/".join(metric).removesuffix(".tsv"),
                            "value": curve.iloc[:, -1],
                        }
                    )
                )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=_CURVE)


def read_ablations() -> pd.DataFrame | None:
    """What `weightnet ablate` measured; None if it never ran."""
    path = METRICS / "ablations.csv"
    return pd.read_csv(path).fillna({"changes": ""}) if path.exists() else None


_CURVE = ["predictor", "split", "seed", "epoch", "metric", "value"]


def main() -> None:
    """Draw every figure, write the report, and put the headline table into README.md.

    Reads metrics/, data/tokens, data/predictions, data/curves and params.yaml; writes plots/,
    results/results.md and the part of README.md between the headline markers.
    """
    with reported():
        config = load_section(PlotConfig, "plot")
        predictors, splits = load_names("predictors"), load_names("splits")
        families = load_names("families")
        pairs = [f"{predictor}-{split}" for predictor in predictors for split in splits]
        expect_only(TOKENS, families, "tokenize_zoo")
        expect_only(PREDICTIONS, pairs, "train_predictor")
        expect_only(CURVES, pairs, "train_predictor")
        networks = read_networks([TOKENS / family for family in families]).frame
        scores = read_table(METRICS / "scores.csv", "evaluate", command.SCORES)
        unknown = sorted(set(config.properties) - set(scores["property"]))
        if unknown:
            raise ValueError(
                f"params key plot.properties must name scored properties, however: it has "
                f"{', '.join(unknown)}"
            )
        audit = read_table(METRICS / "audit.csv", "evaluate", command.AUDIT)
        sizes = read_table(METRICS / "splits.csv", "evaluate", command.SIZES)
        differences, importance, agreement = (
            read_table(METRICS / f"{name}.csv", "evaluate", columns, empty=True)
            for name, columns in (
                ("differences", command.DIFFERENCES),
                ("importance", command.IMPORTANCE),
                ("agreement", command.AGREEMENT),
            )
        )
        predictions = pd.concat(
            read_table(
                PREDICTIONS / f"{name}-{split}.parquet",
                f"train_predictor@{name}-{split}",
                command.PREDICTIONS,
            ).assign(predictor=name, split=split)
            for name in predictors
            for split in splits
        )
        curves = read_curves(predictors, splits)
        infos = [describe(name) for name in predictors]
        ours = [info.name for info in infos if info.kind == "ours"]
        explained, ablations = importance["property"].unique(), read_ablations()
        count = 3 + 2 * len(config.properties) + (len(ours) + 2) * len(splits) + len(explained)
        count += ablations is not None and len(ablations) > 0
        with writing(PLOTS), Progress("plot", count, "figures") as progress:
            sweep(PLOTS)
            pictures: list[Picture] = []

            def show(figure: Figure, kind: str, name: str = "", **of: str) -> None:
                name = name or kind
                figures.save(figure, PLOTS / f"{name}.png")
                pictures.append(Picture(kind, f"../plots/{name}.png", **of))
                progress.advance()

            show(figures.zoo_distributions(networks), "zoo_distributions")
            show(figures.ceilings(networks, scores), "ceilings")
            for of in config.properties:
                tau = figures.tau_with_intervals(scores, infos, property=of)
                show(tau, "tau_with_intervals", f"tau_{of}", property=of)
                heat = figures.heatmap(scores, infos, property=of)
                show(heat, "heatmap", f"heatmap_{of}", property=of)
            for name in ours:
                for split in splits:
                    figure = figures.predicted_against_measured(
                        predictions, networks, predictor=name, split=split, scores=scores
                    )
                    label = f"predicted_{name}_{split}"
                    show(figure, "predicted_against_measured", label, predictor=name, split=split)
            for split in splits:
                of = config.properties[0]
                figure = figures.error_by_family(
                    predictions, networks, infos, property=of, split=split
                )
                show(figure, "error_by_family", f"error_{split}", split=split, property=of)
                show(
                    figures.training_curves(curves, split=split),
                    "training_curves",
                    f"curves_{split}",
                    split=split,
                )
            for of in explained:
                figure = figures.importance(importance, agreement, property=of)
                show(figure, "importance", f"importance_{of}", predictor=ours[0], property=of)
            show(figures.invariance(audit, infos), "invariance")

            write_csv(curves, PLOTS / "curves.csv")
            shown = predictions[
                (predictions["predictor"].isin(ours))
                & (predictions["part"] == "test")
                & (predictions["property"] == config.properties[0])
            ]
            columns = ["predictor", "split", "seed", "run", "measured", "predicted", "low", "high"]
            write_csv(shown[columns], PLOTS / "predicted.csv")

            headline = scores[
                (scores["metric"] == "tau")
                & (scores["subset"] == "all")
                & (scores["property"] == config.properties[0])
            ]
            label = headline["split"] + " " + headline["predictor"]
            tau = pd.DataFrame({"predictor": label, "tau": headline["value"]})
            write_csv(tau, PLOTS / "tau.csv")

            evidence = Evidence(
                networks=networks,
                scores=scores,
                predictors=arrange(predictors, infos),
                differences=differences,
                sizes=sizes,
                audit=audit,
                agreement=agreement,
                ablations=ablations,
                pictures=pictures,
            )
            if len(evidence.comparable_ablations):
                show(
                    figures.ablations(
                        evidence.comparable_ablations, properties=config.properties[:2]
                    ),
                    "ablations",
                )
            write_text(RESULTS / "results.md", write_report(evidence))
            if README.exists():
                text = README.read_text(encoding="utf-8")
                write_text(README, inject(text, headline_table(scores, infos)))
        absent = "none" if len(evidence.comparable_ablations) else "ablations (none has run)"
        conclude("plot", done=f"{len(pictures)} figures and the report", skipped=absent)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write one table beside the figures, six digits."""
    with replace_file(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")


def describe(name: str) -> PredictorInfo:
    """What the registry says about a predictor, for tables."""
    entry = asdict(PREDICTORS[name])
    told = ("kind", "description", "reads_weights", "needs_forward")
    return PredictorInfo(name, **{key: entry[key] for key in told})


if __name__ == "__main__":
    typer.run(main)
