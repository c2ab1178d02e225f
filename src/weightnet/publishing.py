"""The reference predictor that the package ships: a trained predictor with its model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from weightnet.durable import replace_folder, write_digests
from weightnet.estimator import PREPARATION, WeightNet, find_predictor
from weightnet.params import read_params
from weightnet.predictors.interface import write_json
from weightnet.predictors.learned import ModulePredictor
from weightnet.predictors.novelty import LEVEL

MOST = 10 << 20  # bytes
CARD = "MODEL_CARD.md"


def publish(source: Path, params: Path, metrics: Path, target: Path) -> int:
    """Copy the first seed of the predictor in ``source`` to ``target``, as a whole, with how
    networks are prepared for it and a model card filled from ``metrics``; return its bytes.

    Raises:
        ValueError: if something is missing, or it is larger than `MOST`.
    """
    for path in (metrics / "scores.csv", metrics / "splits.csv"):
        if not path.is_file():
            raise ValueError(f"{path} must exist, however: it does not; run `dvc repro evaluate`")
    model = WeightNet.load(source)
    place = find_predictor(source)
    fitted = model.predictor_
    if not isinstance(fitted, ModulePredictor) or fitted.novelty is None:
        raise ValueError(
            f"{place} must tell how far a network lies from those of training, however: it does "
            "not; train it again"
        )
    files = sorted(path for path in place.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    if size > MOST:
        raise ValueError(f"a reference must have at most {MOST} bytes, however: {size}")
    content = read_params(params)
    name, _, split = source.name.partition("-")
    card = write_card(model, content, metrics, predictor=name, split=split or "iid", size=size)
    with replace_folder(target) as temporary:
        shutil.copytree(place, temporary, dirs_exist_ok=True)
        write_json(temporary / PREPARATION, dict(model.preparation or {}))
        (temporary / CARD).unlink(missing_ok=True)  # of a source that is a reference itself
        write_digests(temporary)  # of what is read; the card may be edited
        (temporary / CARD).write_text(card, encoding="utf-8")
    return size


def write_card(
    model: WeightNet,
    params: dict[str, Any],
    metrics: Path,
    *,
    predictor: str,
    split: str,
    size: int,
) -> str:
    """The model card: what it is, data, splits, figures, limits."""
    scores = pd.read_csv(metrics / "scores.csv")
    sizes = pd.read_csv(metrics / "splits.csv")
    families, zoo = params["families"], params["generate_zoo"]
    own = sizes[(sizes["split"] == split) & (sizes["seed"] == 0)].iloc[0]
    rows = ", ".join(
        f"{name} {zoo['families'][name].get('runs', '(imported)')}" for name in families
    )
    held_out = params["train_predictor"]["common"]["splits"]["held_out_families"]
    tasks = " and ".join(zoo["ranges"]["tasks"])
    return f"""# The reference predictor

`weightnet predict` and `WeightNet.load()` use it where no pipeline was run. It is `{predictor}`,
seed 0, trained on the split `{split}` by the pipeline of this repository at its default scale;
{size / 1e6:.1f} MB of safetensors and JSON. `weightnet reference` made this folder.

## Data

Networks trained from scratch by this project, small or with every hidden width multiplied
({rows} runs),
on the tasks {tasks} (small grey images, 10 classes), over the recipes in
`params.yaml`. Properties were measured on held-out images:
{", ".join(model.properties or ())}.

## Splits

Runs are divided by a hash of their id. Of seed 0 of `{split}`, {own["train"]} networks trained
it, {own["validation"]} stopped the training and calibrate the warning, and {own["test"]} test it.
The intervals are calibrated on networks that what predicts them was not trained on.

## Figures

Kendall's tau-b between predicted and measured, the mean absolute error and the coverage of the 90%
interval, with 95% bootstrap intervals over runs, over all seeds of the split `{split}`. The floor
`hyperparameters` sees the training recipe, not the weights.

{_own_table(scores, predictor, split)}

Tau on networks unlike those of training ({", ".join(held_out)} held out; another task; greater
widths), of predictors trained for these splits:

{_shift_table(scores, predictor)}

## Limits

- It knows small image classifiers with 10 classes, trained for minutes. Of a full-size network
  trained on photographs its numbers say nothing.
- The warning compares the network's embedding with those of training. It fires for about
  {LEVEL:.0%} of the networks that are like them, and may stay silent for one that is not.
- Intervals cover 90% of networks drawn like those of training, and promise nothing for others.
  They are not clipped: an accuracy may be predicted above 1.
- A prediction is no measurement: do not accept or reject a network by it.
- A network made to deceive it can do so: it was not trained against that.
"""


def _own_table(scores: pd.DataFrame, predictor: str, split: str) -> str:
    chosen = scores[(scores["split"] == split) & (scores["subset"] == "all")]
    lines = []
    for name in chosen["property"].unique():
        cells = [
            _cell(chosen, who, name, metric)
            for who, metric in (
                (predictor, "tau"),
                ("hyperparameters", "tau"),
                (predictor, "mae"),
                (predictor, "coverage"),
            )
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head = "| property | tau | tau of hyperparameters | error | coverage of the 90% interval |"
    return "\n".join([head, "| :--- | ---: | ---: | ---: | ---: |", *lines])


def _shift_table(scores: pd.DataFrame, predictor: str) -> str:
    chosen = scores[scores["subset"] == "all"]
    splits = [split for split in chosen["split"].unique() if split != "iid"]
    lines = []
    for name in chosen["property"].unique():
        cells = [
            _cell(chosen[chosen["split"] == split], predictor, name, "tau") for split in splits
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    head = f"| property | {' | '.join(split.replace('_', ' ') for split in splits)} |"
    return "\n".join([head, f"| :--- |{' ---: |' * len(splits)}", *lines])


def _cell(scores: pd.DataFrame, predictor: str, name: str, metric: str) -> str:
    found = scores[
        (scores["predictor"] == predictor)
        & (scores["property"] == name)
        & (scores["metric"] == metric)
    ]
    if found.empty:
        return "-"
    row = found.iloc[0]
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
