"""The generated report, results/results.md: every sentence follows from the tables that it is
given.

It is written for someone who has never seen the project, and it says where WeightNet does not win
in the same words as where it does. A table that is missing (no audit was run, say) leaves its
section out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from weightnet.report.captions import CAPTIONS
from weightnet.report.evidence import (
    BASELINES,
    HEADLINE,
    RIVALS,
    Evidence,
    enumerate_words,
    lead,
    where,
)
from weightnet.report.names import (
    CEILING,
    KIND_NAMES,
    MARKS,
    METRIC_NAMES,
    SPLIT_MEANINGS,
    PredictorInfo,
    arrange,
    property_name,
    split_name,
)
from weightnet.report.tables import (
    bounds,
    difference_table,
    markdown,
    mean_with_interval,
    number,
    score_table,
    verdict,
    with_interval,
)

LEAST_CEILING = 0.8
NOMINAL = 0.9
SAME_MAP = 0.7


def write_report(evidence: Evidence) -> str:
    """Return the report as Markdown, ending with a newline.

    Raises:
        ValueError: if nothing was scored.
    """
    if evidence.scores.empty:
        raise ValueError("a report needs scores, however: the table is empty; rerun evaluate")
    parts = [
        _opening(evidence),
        _zoo(evidence),
        _judging(evidence),
        _results(evidence),
        _against_rivals(evidence),
        _other_views(evidence),
        _intervals(evidence),
        _controls(evidence),
        _audit(evidence),
        _interpretation(evidence),
        _pictures(evidence, "Training", ["training_curves"]),
        _ablations(evidence),
        *(f"## {title}\n\n{text.strip()}" for title, text in evidence.sections.items()),
        _predictors(evidence),
        _reproduce(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(evidence: Evidence) -> str:
    networks = evidence.networks
    families, tasks = (sorted(set(networks[c])) for c in ("family", "task"))
    lines = [
        "# Results",
        "Generated from `metrics/` and `data/predictions/` by the stage `plot`; nothing here is "
        "written by hand.",
        f"A **model zoo** is a set of trained networks. This one has {len(networks)} of "
        f"{_count(len(families), 'family', 'families')} ({', '.join(families)}), trained on "
        f"{_count(len(tasks), 'task', 'tasks')} ({', '.join(tasks)}), each with measured "
        "properties. A **predictor** is shown a network that it has never seen - its weights, "
        "not its data - and predicts the properties. The question is how well it ranks networks, "
        "measured by Kendall's tau-b: 1 is perfect order, 0 is no relation. Square brackets are "
        "95% bootstrap intervals over runs.",
    ]
    bullets = []
    for split in evidence.splits:
        said = [_headline_sentence(evidence, info, split) for info in evidence.ours]
        if any(said):
            bullets.append(
                f"- **{split_name(split).capitalize()}.** {' '.join(filter(None, said))}"
            )
    if bullets:
        lines += [f"In short, for {property_name(HEADLINE).title}:", "\n".join(bullets)]
    return "\n\n".join(lines)


def _headline_sentence(evidence: Evidence, info: PredictorInfo, split: str) -> str:
    row = where(
        evidence.scores,
        predictor=info.name,
        split=split,
        property=HEADLINE,
        subset="all",
        metric="tau",
    )
    if row.empty:
        return ""
    own = with_interval(*bounds(row.set_index("predictor"), info.name))
    comparison = _comparison(evidence, info.name, split, HEADLINE)
    return f"`{info.name}` reaches tau {own}. {comparison}".strip()


def _comparison(evidence: Evidence, predictor: str, split: str, property: str) -> str:
    found = lead(evidence, predictor, split, property)
    if found is None:
        return ""
    rival, value, low, high = found
    said = verdict(low, high)
    ends = (low, high) if value > 0 else (-high, -low)
    size = with_interval(abs(value), *ends)
    if said == "better":
        return f"That is better than the strongest rival, `{rival}`, by {size}."
    if said == "worse":
        return f"That is **worse** than the strongest rival, `{rival}`, by {size}."
    return (
        f"It cannot be told apart from the strongest rival, `{rival}`: the difference is "
        f"{with_interval(value, low, high)}, an interval that includes 0."
    )


def _zoo(evidence: Evidence) -> str:
    networks = evidence.networks
    rows = []
    for family, own in networks.groupby("family"):
        diverged = str(int(own["diverged"].sum())) if "diverged" in own else "-"
        spreads = [_spread(own, name) for name in (HEADLINE, "generalization_gap")]
        tasks = ", ".join(
            f"{task} {n}" for task, n in own["task"].value_counts().sort_index().items()
        )
        rows.append([str(family), str(len(own)), tasks, diverged, *spreads])
    header = ["family", "networks", "by task", "diverged", "test accuracy", "generalization gap"]
    lines = [
        "## The zoo",
        "Networks differ in architecture, width, optimizer, learning rate, regularization, label "
        "noise, training images and length of training, so that some are good and some are not. "
        "Ranges are 5% to 95% of the networks, with the median between. Diverged runs are kept: "
        "a network that failed is a network.",
        markdown(rows, header, left=1),
        "Each property is also measured on two disjoint halves of the images. The tau between "
        "the halves is the **ceiling**: a predictor cannot be expected to rank networks better "
        "than their own measurement repeats itself (each half has half the images, so the "
        "ceiling of the full measurement is a little higher).",
    ]
    table, below = [], []
    ceiling = where(
        evidence.scores, predictor=CEILING, split=evidence.splits[0], subset="all", metric="tau"
    )
    for name in evidence.properties:
        row = ceiling[ceiling["property"] == name].set_index("property")
        cell = with_interval(*bounds(row, name)) if len(row) else "-"
        if len(row) and bounds(row, name)[0] < LEAST_CEILING:
            below.append(property_name(name).title)
        info = property_name(name)
        table.append([info.title, info.meaning, _spread(networks, name), cell])
    lines.append(
        markdown(table, ["property", "meaning", "5% / median / 95%", "ceiling (tau)"], left=2)
    )
    if below:
        lines.append(
            f"**Noisy measurements:** the ceiling of {enumerate_words(below)} is below "
            f"{number(LEAST_CEILING, 1)}; what looks like a poor prediction there is in part a "
            "poor measurement."
        )
    elif len(ceiling):
        lines.append(f"Every ceiling is at least {number(float(ceiling['value'].min()), 2)}.")
    return "\n\n".join([*lines, *_shown(evidence, ["zoo_distributions", "ceilings"])])


def _judging(evidence: Evidence) -> str:
    lines = [
        "## How predictors are judged",
        "Networks are divided by run, from a hash of the run's id, so that nothing of a tested "
        "run is ever trained on. Validation networks choose settings and stop the training; test "
        "networks only test. A value is the mean over seeds of the metric on each seed's test "
        "networks.",
    ]
    sizes = evidence.sizes
    if sizes is not None and len(sizes):
        rows = []
        for split, own in sizes.groupby("split", sort=False):
            counts = [_range(own[part]) for part in ("train", "validation", "test")]
            hashes = ", ".join(f"`{h}`" for h in dict.fromkeys(own["hash"]))
            meaning = SPLIT_MEANINGS.get(str(split), "")
            rows.append([split_name(str(split)), meaning, *counts, str(len(own)), hashes])
        header = [
            "split",
            "what it asks",
            "train",
            "validation",
            "test",
            "seeds",
            "test networks (hash)",
        ]
        lines.append(markdown(rows, header, left=2))
        lines.append("Results may be compared only where the hash is the same.")
    return "\n\n".join(lines)


def _results(evidence: Evidence) -> str:
    lines = [
        f"## Ranking by {property_name(HEADLINE).title}",
        "Best of each column in bold, the control and the ceiling aside.",
        score_table(evidence.scores, evidence.predictors, property=HEADLINE),
        *_shown(evidence, ["tau_with_intervals"]),
        "## All properties, in distribution" if "iid" in evidence.splits else "## All properties",
        score_table(
            evidence.scores, evidence.predictors, columns="property", split=evidence.splits[0]
        ),
        *_shown(evidence, ["heatmap", "predicted_against_measured", "error_by_family"]),
    ]
    return "\n\n".join(lines)


def _against_rivals(evidence: Evidence) -> str:
    if evidence.differences is None or evidence.differences.empty or not evidence.ours:
        return ""
    lines = [
        "## Against the strongest rival",
        "The lead in tau over the strongest rival of each cell, chosen by its tau on the same "
        "test networks, which favours the rival. The interval is that of the paired difference: "
        "both predictors are resampled on the same runs. Cells without a word are undecided: the "
        "interval includes 0.",
    ]
    for info in evidence.ours:
        lines.append(f"### {info.label}")
        lines += _lead_table(evidence, info, BASELINES, "Over the baselines, which read weights")
        lines += _lead_table(evidence, info, RIVALS, "Over baselines and floors, the recipe too")
    lines.append(f"The lead over every rival, for {property_name(HEADLINE).title}:")
    for info in evidence.ours:
        own = where(
            evidence.differences,
            predictor=info.name,
            property=HEADLINE,
            subset="all",
            metric="tau",
        )
        lines += [f"`{info.name}` less", difference_table(own, evidence.predictors)]
    return "\n\n".join(lines)


def _lead_table(
    evidence: Evidence, info: PredictorInfo, kinds: Sequence[str], title: str
) -> list[str]:
    """The lead over the strongest rival of ``kinds`` in every cell, and a count of the cells."""
    rows, counts = [], {"better": 0, "worse": 0, "": 0}
    losses, ties = [], []
    for name in evidence.properties:
        cells = [property_name(name).title]
        for split in evidence.splits:
            found = lead(evidence, info.name, split, name, kinds=kinds)
            if found is None:
                cells.append("-")
                continue
            rival, value, low, high = found
            said = verdict(low, high)
            counts[said] += 1
            place = f"{property_name(name).title} ({split_name(split)}, against `{rival}`)"
            if said == "worse":
                losses.append(place)
            elif said == "":
                ties.append(place)
            lead_text = with_interval(value, low, high)
            cells.append(f"{lead_text} {said} than {rival}" if said else f"{lead_text} {rival}")
        rows.append(cells)
    if not sum(counts.values()):
        return []
    lines = [
        f"{title}:",
        markdown(rows, ["property", *(split_name(split) for split in evidence.splits)]),
        f"Of {_count(sum(counts.values()), 'cell', 'cells')}, `{info.name}` is better in "
        f"{counts['better']}, worse in {counts['worse']} and undecided in {counts['']}.",
    ]
    if losses:
        lines.append(f"It **loses** on {enumerate_words(losses)}.")
    if ties:
        lines.append(f"No difference can be shown on {enumerate_words(ties)}.")
    if losses or ties:
        lines.append("What was tried there is in [the research log](../docs/LOG.md#missed).")
    return lines


def _other_views(evidence: Evidence) -> str:
    lines = [
        "## The same, without what inflates it",
        "Knowing a network's family, or that it never learned, already orders a zoo. **Within "
        "family** is the mean over families of the tau inside each; **above chance** leaves out "
        "networks at chance.",
    ]
    for subset, title in (("within_family", "Within family"), ("above_chance", "Above chance")):
        scores, first = evidence.scores, evidence.splits[0]
        table = score_table(scores, evidence.predictors, property=HEADLINE, subset=subset)
        lines += [f"**{title}**, {property_name(HEADLINE).title}:", table]
        table = score_table(
            scores, evidence.predictors, columns="property", split=first, subset=subset
        )
        lines += [f"**{title}**, all properties, {split_name(first)}:", table]
    rows = []
    first = evidence.splits[0]
    measures = [m for m in METRIC_NAMES if m != "coverage"]
    for info in evidence.ours:
        for name in evidence.properties:
            own = where(
                evidence.scores, predictor=info.name, split=first, property=name, subset="all"
            ).set_index("metric")
            cells = [with_interval(*bounds(own, m)) if m in own.index else "-" for m in measures]
            rows.append([info.label, property_name(name).axis, *cells])
    if rows:
        header = ["predictor", "property (unit)", *(METRIC_NAMES[m] for m in measures)]
        lines += [f"Every metric, {split_name(first)}:", markdown(rows, header, left=2)]
    return "\n\n".join(lines)


def _intervals(evidence: Evidence) -> str:
    covered = where(evidence.scores, subset="all", metric="coverage")
    names = [one.name for one in evidence.ours]
    covered = covered[covered["predictor"].isin(names)]
    if covered.empty:
        return ""
    lines = [
        "## Are the intervals honest?",
        "Each prediction comes with an interval that should hold the measured value "
        f"{NOMINAL:.0%} of the time. It is calibrated on networks that what predicts them was "
        "not trained on: parts of the training networks that are left out in turn, or validation "
        "networks. That promises this share only where test networks are like them: in "
        "distribution. Elsewhere, too small a share is the price of an unfamiliar network. The "
        "square brackets say what other networks to calibrate and to test would have given: both "
        "are resampled.",
    ]
    for name in names:
        own = covered[covered["predictor"] == name]
        if own.empty:
            continue
        cells = {
            (str(row.property), str(row.split)): with_interval(row.value, row.low, row.high)
            for row in own.itertuples()
        }
        rows = [
            [property_name(p).title, *(cells.get((p, split), "-") for split in evidence.splits)]
            for p in evidence.properties
        ]
        lines += [
            f"Coverage of `{name}`:",
            markdown(rows, ["property", *(split_name(split) for split in evidence.splits)]),
            " ".join(
                _coverage_sentence(split, own[own["split"] == split]) for split in evidence.splits
            ),
        ]
    return "\n\n".join(lines)


def _coverage_sentence(split: str, rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    values = rows["value"]
    faults = []
    for fault, outside in (
        ("narrow", rows["high"] < NOMINAL),
        ("wide", rows["low"] > NOMINAL),
    ):
        if outside.any():
            faults.append(f"too {fault} for {outside.sum()} of {len(rows)} properties")
    said = f"they are {enumerate_words(faults)}" if faults else "as promised"
    return f"{split_name(split).capitalize()}: {values.min():.0%} to {values.max():.0%}; {said}."


def _controls(evidence: Evidence) -> str:
    infos = arrange(evidence.scores["predictor"], evidence.predictors)
    names = [one.name for one in infos if one.kind == "control"]
    rows = where(evidence.scores, subset="all", metric="tau")
    lines = []
    for name in names:
        own = rows[rows["predictor"] == name]
        if own.empty:
            continue
        outside = own[(own["low"] > 0) | (own["high"] < 0)]
        expected = 0.05 * len(own)
        largest = own.loc[own["value"].abs().idxmax()]
        cell = (
            f"{property_name(str(largest['property'])).title}, {split_name(str(largest['split']))}"
        )
        text = (
            f"`{name}` learns from shuffled labels and must find nothing. Its largest tau in "
            f"absolute value, of {_count(len(own), 'cell', 'cells')}, is "
            f"{number(float(largest['value']))} ({cell}). "
            f"{_count(len(outside), 'interval excludes', 'intervals exclude')} 0 (about "
            f"{expected:.0f} would by chance alone, were the cells independent)."
        )
        lines.append(text)
    return "\n\n".join(["## Controls", *lines]) if lines else ""


def _audit(evidence: Evidence) -> str:
    if evidence.audit is None or evidence.audit.empty:
        return ""
    audit = where(evidence.audit, family="all")
    kinds = list(dict.fromkeys(audit["transformation"]))
    rows = []
    for info in arrange(audit["predictor"], evidence.predictors):
        cells = [info.label]
        for kind in kinds:
            own = where(audit, predictor=info.name, transformation=kind)
            drop = (own["tau"] - own["tau_copies"]).max()
            cells += [_scientific(float(own["relative"].max())), number(float(drop), 4)]
        rows.append(cells)
    header = ["predictor"]
    for kind in kinds:
        header += [f"{kind}: largest change (sd)", f"{kind}: largest drop of tau"]
    lines = [
        "## Invariance",
        "Reordering a network's hidden neurons, or scaling the two sides of a ReLU by inverse "
        "factors, changes its weights and not what it computes. A prediction must not change "
        "either. The table gives the largest change seen over networks and properties, in "
        "standard deviations of the property, and the largest loss of tau; copies go through "
        "canonicalization and tokenization like any network.",
        markdown(rows, header),
    ]
    for info in evidence.ours:
        for kind in kinds:
            own = where(audit, predictor=info.name, transformation=kind)
            if own.empty:
                continue
            worst, drop = (
                float(own["relative"].max()),
                float((own["tau"] - own["tau_copies"]).max()),
            )
            said = "rounding" if worst < 1e-4 else "little, but more than rounding"
            if worst >= 1e-2:
                said = "far more than rounding: **it is not invariant**"
            lines.append(
                f"`{info.name}` on {kind} copies: at most {_scientific(worst)} standard "
                f"deviations, {said}; tau drops by at most {number(max(drop, 0.0), 4)}."
            )
    return "\n\n".join([*lines, *_shown(evidence, ["invariance"])])


def _interpretation(evidence: Evidence) -> str:
    table = evidence.agreement
    if table is None or table.empty:
        return ""
    others = [model for model in ("retrained", "randomized") if model in set(table["model"])]
    rows, same, repeated = [], [], []
    for name in (one for one in evidence.properties if one in set(table["property"])):
        own = where(table, property=name)
        trained = mean_with_interval(where(own, model="trained")["top_tenth"])
        cells = [property_name(name).title, with_interval(*trained)]
        found = {m: mean_with_interval(where(own, model=m)["correlation"]) for m in others}
        rows.append([*cells, *(with_interval(*found[model]) for model in others)])
        if not found["randomized"][2] < SAME_MAP:
            same.append(property_name(name).title)
        if "retrained" in found and found["retrained"][1] > max(0, found["randomized"][2]):
            repeated.append(property_name(name).title)
    names = {
        "retrained": "rank correlation with another seed's map",
        "randomized": "rank correlation with a randomized model's map",
    }
    header = ["property", "share of the most important tenth of neurons"]
    said = (
        f"The check fails for {enumerate_words(same)}: there the map says little about what was "
        "learned."
        if same
        else "The check holds for every property: a randomized model gives another map."
    )
    if "retrained" in others:
        every = len(repeated) == len(rows)
        said += (
            " Another seed's map correlates with the trained one, and more than the randomized "
            f"one, for {'every property' if every else enumerate_words(repeated)}; read "
            f"{'what differs' if every else 'the others'} as the maps of one model, not as facts "
            "about networks."
            if repeated
            else " Another seed's map correlates with the trained one no more than the randomized "
            "one: read these maps as those of one model, not as facts about networks."
        )
    lines = [
        "## Where the prediction comes from",
        "A neuron's attribution is the gradient of the prediction times the neuron's features, "
        "averaged on the way from an average neuron to this one (integrated gradients). Shares "
        "are of absolute values; maps are compared with their signs: what raises a prediction and "
        "what lowers it. What the predictor reads of the network as a whole is not "
        "shared out. Sanity check: the map of the same model with random weights must be another "
        f"one (the interval of the rank correlation over all neurons below {SAME_MAP:g}); another "
        "seed's map shows how well a map repeats itself. Values are means over networks.",
        markdown(rows, [*header, *(names[model] for model in others)]),
        said,
    ]
    return "\n\n".join([*lines, *_shown(evidence, ["importance"])])


def _ablations(evidence: Evidence) -> str:
    table = evidence.ablations
    if table is None or table.empty:
        return ""
    lines = ["## Ablations"]
    same = evidence.comparable_ablations
    if len(same) < len(table):
        lines.append(
            f"**Refused:** {_count(len(table) - len(same), 'row', 'rows')} of "
            "`metrics/ablations.csv` were measured on other test networks (another split hash); "
            "run `weightnet ablate` again."
        )
    shown = [p for p in (HEADLINE, "generalization_gap") if p in set(same["property"])]
    for split in same["split"].unique() if shown else ():
        own = where(same, split=split, metric="tau")
        rows = []
        for name in own["ablation"].unique():
            for predictor, one in where(own, ablation=name).groupby("predictor", sort=False):
                one = one.set_index("property")
                cells = [str(one["group"].iloc[0]), f"{name}", str(predictor)]
                cells.append(f"`{changes}`" if (changes := one["changes"].iloc[0]) else "-")
                for of in shown:
                    if of not in one.index:
                        cells += ["-", "-"]
                        continue
                    cells.append(with_interval(*bounds(one, of)))
                    ends = ["difference", "difference_low", "difference_high"]
                    lead_of = one.loc[of, ends].to_numpy(dtype=float)
                    said = verdict(lead_of[1], lead_of[2])
                    cells.append(f"{with_interval(*lead_of)} {said}".rstrip())
                rows.append(cells)
        header = ["group", "ablation", "predictor", "changed"]
        for of in shown:
            header += [f"tau, {property_name(of).title}", "difference to unchanged"]
        lines += [
            f"Each row trains one predictor with changed parameters ({split_name(str(split))}, "
            f"{int(own['n'].max())} test networks, hash `{own['hash'].iloc[0]}`) and compares it "
            "with the same predictor unchanged, by paired resamples of the same runs.",
            *_moved(evidence, own),
            markdown(rows, header, left=4),
        ]
    return "\n\n".join([*lines, *_shown(evidence, ["ablations"])])


def _moved(evidence: Evidence, ablations: pd.DataFrame) -> list[str]:
    """What unchanged predictors had when the ablations ran, if the tables now say otherwise."""
    then = where(ablations, ablation="base", property=HEADLINE).set_index("predictor")
    now = where(evidence.scores, property=HEADLINE, subset="all", metric="tau").set_index(
        ["predictor", "split"]
    )["value"]
    changed = [
        f"`{name}` {number(then.at[name, 'value'])} then, {number(now[name, split])} in the "
        "tables above"
        for name, split in then["split"].items()
        if (name, split) in now.index and abs(now[name, split] - then.at[name, "value"]) > 1e-3
    ]
    if not changed:
        return []
    return [
        "The ablations and what they are compared with are of an earlier run: of the predictors "
        "as they were then, or of another training of the same recipes (another kind of processor "
        "rounds otherwise, and training enlarges that). Unchanged, "
        f"{'; '.join(changed)}."
    ]


def _predictors(evidence: Evidence) -> str:
    rows = [
        [info.label, KIND_NAMES[info.kind], info.description or "-"]
        for info in arrange(evidence.scores["predictor"], evidence.predictors)
    ]
    return "\n\n".join(
        ["## The predictors", markdown(rows, ["predictor", "kind", "what it is"], left=3), MARKS]
    )


def _reproduce() -> str:
    return """## How to reproduce

```
make repro                    # environment, then every stage whose inputs changed
dvc repro evaluate plot       # scores, figures and this report only
dvc metrics diff              # what changed against the last commit
```

`metrics/scores.csv` has every number of this report and more (predictor, split, property, subset,
metric, value, low, high, n), `metrics/differences.csv` the paired differences,
`data/predictions/` each prediction."""


def _pictures(evidence: Evidence, title: str, kinds: Sequence[str]) -> str:
    shown = _shown(evidence, kinds)
    return "\n\n".join([f"## {title}", *shown]) if shown else ""


def _shown(evidence: Evidence, kinds: Sequence[str]) -> list[str]:
    """Return each picture of these kinds with its caption."""
    shown = []
    for kind in kinds:
        for picture in (one for one in evidence.pictures if one.kind == kind):
            caption = CAPTIONS[kind](evidence, picture)
            shown.append(f"![{kind.replace('_', ' ')}]({picture.path})\n\n*{caption}*")
    return shown


def _spread(networks: pd.DataFrame, name: str) -> str:
    column = f"property.{name}"
    if column not in networks or networks[column].notna().sum() == 0:
        return "-"
    values = networks[column].dropna().to_numpy(dtype=np.float64)
    return " / ".join(number(float(v), 2) for v in np.percentile(values, [5, 50, 95]))


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _scientific(value: float) -> str:
    if not np.isfinite(value):
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"
