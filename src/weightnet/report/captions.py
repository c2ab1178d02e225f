"""What stands under each figure: what it shows, and what one reads in it (from the numbers)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from weightnet.report.evidence import (
    HEADLINE,
    Evidence,
    Picture,
    contenders,
    enumerate_words,
    tau_by_predictor,
    where,
)
from weightnet.report.names import CEILING, property_name, split_name
from weightnet.report.tables import number


def _zoo(evidence: Evidence, picture: Picture) -> str:
    networks = evidence.networks
    text = (
        "How the properties spread, by family and task; last panel: test against train accuracy, "
        "equal on the dashed line."
    )
    if {f"property.{HEADLINE}", "property.generalization_gap"} <= set(networks):
        accuracy, gap = networks[f"property.{HEADLINE}"], networks["property.generalization_gap"]
        text += (
            f" Test accuracy runs from {accuracy.min():.0%} to {accuracy.max():.0%}, the "
            f"generalization gap from {number(float(gap.min()), 2)} to "
            f"{number(float(gap.max()), 2)}."
        )
    return text


def _ceilings(evidence: Evidence, picture: Picture) -> str:
    rows = where(
        evidence.scores, predictor=CEILING, split=picture.split, subset="all", metric="tau"
    )
    text = (
        "Each network's property on one half of the images against the other half; noise is the "
        "spread off the line."
    )
    if len(rows):
        worst = rows.loc[rows["value"].idxmin()]
        name = property_name(str(worst["property"])).title
        value = number(float(worst["value"]), 2)
        text += f" The noisiest is {name}, with a tau of {value} between halves."
    return text


def _tau(evidence: Evidence, picture: Picture) -> str:
    text = (
        f"Tau of every predictor for {property_name(picture.property).title} with its 95% "
        "interval; dashed: the ceiling that measurement noise sets."
    )
    best = {}
    for split in evidence.splits:
        taus = tau_by_predictor(evidence.scores, split=split, property=picture.property)
        taus = contenders(evidence, taus)
        if len(taus):
            best[split] = str(taus.idxmax())
    if not best:
        return text
    if len(set(best.values())) == 1 < len(best):
        return f"{text} Highest on every split: {best[evidence.splits[0]]}."
    highest = [f"{name} ({split_name(split)})" for split, name in best.items()]
    return f"{text} Highest: {enumerate_words(highest)}."


def _heatmap(evidence: Evidence, picture: Picture) -> str:
    text = (
        f"Tau for {property_name(picture.property).title}: rows predictors, columns splits, "
        "brightness the value, intervals below it."
    )
    drops = []
    for info in evidence.ours:
        own = where(
            evidence.scores,
            predictor=info.name,
            property=picture.property,
            subset="all",
            metric="tau",
        ).set_index("split")["value"]
        others = own.drop("iid", errors="ignore")
        if "iid" in own and len(others):
            drop = number(float(own["iid"] - others.min()), 2)
            drops.append(
                f"{info.name} loses {drop} from iid to {split_name(str(others.idxmin()))}"
            )
    return f"{text} At worst, {enumerate_words(drops)}." if drops else text


def _predicted(evidence: Evidence, picture: Picture) -> str:
    text = (
        f"What {picture.predictor} predicts for each test network against what was measured "
        f"({split_name(picture.split)}); grey lines are 90% intervals."
    )
    rows = where(
        evidence.scores,
        predictor=picture.predictor,
        split=picture.split,
        subset="all",
        metric="tau",
    )
    if len(rows):
        low, high = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]
        text += (
            f" Ranked best: {property_name(str(high['property'])).title} (tau "
            f"{number(float(high['value']), 2)}); worst: "
            f"{property_name(str(low['property'])).title} ({number(float(low['value']), 2)})."
        )
    return text


def _errors(evidence: Evidence, picture: Picture) -> str:
    text = (
        f"Absolute error in {property_name(picture.property).title} "
        f"({split_name(picture.split)}) by family: boxes hold the middle half of the networks, "
        "whiskers 5% to 95%; controls may run off the scale."
    )
    if not evidence.ours:
        return text
    name = evidence.ours[0].name
    rows = where(
        evidence.scores,
        predictor=name,
        split=picture.split,
        property=picture.property,
        metric="mae",
    )
    rows = rows[rows["subset"].isin(set(evidence.networks["family"]))]
    if len(rows) > 1:
        worst, best = rows.loc[rows["value"].idxmax()], rows.loc[rows["value"].idxmin()]
        text += (
            f" {name} errs least on {best['subset']} (mean {number(float(best['value']))}) and "
            f"most on {worst['subset']} ({number(float(worst['value']))})."
        )
    return text


def _curves(evidence: Evidence, picture: Picture) -> str:
    return (
        f"Training loss and validation tau by epoch ({split_name(picture.split)}), one thin line "
        "for each seed; lines end where early stopping ended them."
    )


def _importance(evidence: Evidence, picture: Picture) -> str:
    return (
        f"What carries the prediction of {property_name(picture.property).title}: by depth, for "
        "each family; by the rank of the neuron's incoming weights in its layer, smallest norm to "
        "largest; and how the map of all neurons correlates with other models' maps, one box over "
        "networks for each. Dashed: a randomized predictor; where it agrees, the picture shows "
        "the architecture and not what was learned."
    )


def _ablations(evidence: Evidence, picture: Picture) -> str:
    return (
        "Tau of each ablation less that of the same predictor unchanged, on the same test "
        "networks; bars are 95% intervals of the paired difference."
    )


def _invariance(evidence: Evidence, picture: Picture) -> str:
    return (
        "Largest change of a prediction for equivalent copies, one mark for each property, on a "
        "logarithmic scale; left of the dotted line is rounding."
    )


CAPTIONS: Mapping[str, Callable[[Evidence, Picture], str]] = {
    "zoo_distributions": _zoo,
    "ceilings": _ceilings,
    "tau_with_intervals": _tau,
    "heatmap": _heatmap,
    "predicted_against_measured": _predicted,
    "error_by_family": _errors,
    "training_curves": _curves,
    "ablations": _ablations,
    "importance": _importance,
    "invariance": _invariance,
}
