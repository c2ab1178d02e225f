"""Ablations: what each part of WeightNet is worth, measured by leaving it out.

An ablation is a row of `ABLATIONS`: parameters to change, and a predictor to train with them. It
runs as a DVC experiment, in a temporary copy, and only the stages that read the changed parameters
run in it (tokenize_zoo, one train_predictor): a zoo model is never retrained. Its predictions are
compared with those of the same predictor unchanged, the base, on the same test networks, by paired
resamples (`weightnet.evaluation.scores`); another set of test networks is refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from weightnet.command import PARAMS_FILE, load_names, load_section, require
from weightnet.durable import replace_file
from weightnet.params import read_params

SECTIONS = ("tokenize_zoo", "train_predictor")
METRICS = ("tau", "mae")
TABLE = Path("metrics/ablations.csv")
COLUMNS = (
    *("ablation", "group", "predictor", "base", "changes", "split", "property", "metric"),
    *("value", "low", "high", "difference", "difference_low", "difference_high", "n", "hash"),
)
BASE = "base"


@dataclass(frozen=True)
class Ablation:
    """One row of the table.

    Attributes:
        name: of the ablation, and of its experiment, after ``ablation-``.
        group: ablations of one group are shown together.
        changes: parameters, as ``dvc exp run --set-param`` takes them; none where the pipeline
            itself trains what is compared.
        predictor: what is trained with them.
        base: what it is compared with; by default the same predictor, unchanged.
    """

    name: str
    group: str
    changes: tuple[str, ...]
    predictor: str = "weightnet"
    base: str = ""

    @property
    def against(self) -> str:
        """The predictor that it is compared with."""
        return self.base or self.predictor

    @property
    def experiment(self) -> str:
        """The name of its experiment."""
        return f"ablation-{self.name}"


_W, _C = "train_predictor.weightnet", "train_predictor.common"
ABLATIONS: tuple[Ablation, ...] = (
    Ablation("canonical-none", "canonical form", ("tokenize_zoo.canonical.order=none",)),
    Ablation("canonical-align", "canonical form", ("tokenize_zoo.canonical.order=align",)),
    Ablation("canonical-no-scale", "canonical form", ("tokenize_zoo.canonical.scale=false",)),
    Ablation("no-intra-layer", "parts", (f"{_W}.intra_layer=false",)),
    Ablation("no-cross-layer", "parts", (f"{_W}.cross_layer=false",)),
    Ablation("no-messages", "parts", (f"{_W}.messages=false",)),
    Ablation("no-fields", "parts", (f"{_W}.fields=false",)),
    Ablation("no-spectra", "parts", (f"{_W}.spectra=false",)),
    Ablation("no-statistics", "parts", (f"{_W}.statistics=false",)),
    Ablation("no-trees", "parts", (f"{_W}.trees=0",)),
    Ablation("no-embeddings", "parts", (f"{_W}.embeddings=false",)),
    Ablation("raw-tokens", "tokens", (f"{_W}.tokens=raw",)),
    *(
        Ablation(
            f"{tokens}-alone",
            "tokens",
            (
                f"{_W}.tokens={tokens}",
                *(f"{_W}.{part}=false" for part in ("messages", "fields", "statistics")),
                f"{_W}.trees=0",
            ),
        )
        for tokens in ("statistics", "raw")
    ),
    Ablation("no-probes", "probes", (), "weightnet", base="weightnet_probe"),
    *(
        Ablation(
            f"probes-{count}", "probes", (f"tokenize_zoo.probes.count={count}",), "weightnet_probe"
        )
        for count in (8, 16, 64)
    ),
    *(
        Ablation(
            f"learned-probes-{count}",
            "probes",
            (f"train_predictor.weightnet_probe.learned_probes.per_class={count}",),
            "weightnet_probe",
        )
        for count in (0, 2, 20)
    ),
    Ablation("blocks-2", "size", (f"{_W}.blocks=2",)),
    Ablation("blocks-4", "size", (f"{_W}.blocks=4",)),
    Ablation("one-fold", "size", (f"{_W}.fit.folds=1", f"{_W}.trees=4")),
    Ablation("training-tokens-16", "size", (f"{_W}.training_tokens=16",)),
    Ablation("width-32", "size", (f"{_W}.width=32",)),
    Ablation("width-128", "size", (f"{_W}.width=128",)),
    *(
        Ablation(
            f"{predictor}-runs-{percent}",
            "training runs",
            (f"{_C}.splits.train_fraction={percent / 100}",),
            predictor,
        )
        for predictor in ("weightnet", "gbm")
        for percent in (12.5, 25, 50)
    ),
    Ablation("only-test-accuracy", "properties", (f"{_C}.properties=[test_accuracy]",)),
    Ablation("only-gap", "properties", (f"{_C}.properties=[generalization_gap]",)),
)


def choose(names: Iterable[str]) -> list[Ablation]:
    """Return the ablations of these names or groups, in the table's order; all for no name.

    Raises:
        ValueError: if a name is none of them.
    """
    wanted = set(names)
    groups = dict.fromkeys(one.group for one in ABLATIONS)
    unknown = sorted(wanted - {one.name for one in ABLATIONS} - set(groups))
    if unknown:
        raise ValueError(
            f"ablations must be named as in `weightnet ablate --list`, or by a group "
            f"({', '.join(groups)}), however: {', '.join(unknown)}"
        )
    return [one for one in ABLATIONS if not wanted or {one.name, one.group} & wanted]


def check(ablations: Sequence[Ablation], params: Mapping[str, Any]) -> None:
    """Check that each ablation changes parameters that exist, and none that a zoo model depends
    on.

    Raises:
        ValueError: naming the ablation and the parameter.
    """
    for one in ablations:
        for change in one.changes:
            key, _, value = change.partition("=")
            path = key.split(".")
            if path[0] not in SECTIONS:
                raise ValueError(
                    f"ablation {one.name} must change only {' and '.join(SECTIONS)}, so that no "
                    f"zoo model is retrained, however: it changes {key}"
                )
            inner: Any = params
            for part in path:
                if not isinstance(inner, Mapping) or part not in inner:
                    raise ValueError(
                        f"ablation {one.name} must change a key of {PARAMS_FILE}, however: {key} "
                        f"is not there; correct ABLATIONS in src/weightnet/ablation.py"
                    )
                inner = inner[part]
            if not value:
                raise ValueError(f"ablation {one.name} must give {key} a value, however: {change}")


def run(ablations: Sequence[Ablation], split: str, *, queue: bool = False) -> list[str]:
    """Run the ablations one after another, or queue them for `dvc queue start`.

    Returns:
        What failed: one name an ablation.

    Raises:
        ValueError: if a parameter is unknown or not to be changed, or if the zoo, its tokens or a
            base is missing or not up to date.
    """
    check(ablations, read_params(PARAMS_FILE))
    bases = sorted({f"train_predictor@{one.against}-{split}" for one in ablations})
    _expect_fresh(["generate_zoo", "train_zoo", "tokenize_zoo", *bases])
    failed = []
    for number, one in enumerate((one for one in ablations if one.changes), 1):
        print(f"{number}: {one.name}: {' '.join(one.changes)}", file=sys.stderr, flush=True)
        tokens = any(change.startswith("tokenize_zoo.") for change in one.changes)
        targets = [f"tokenize_zoo@{family}" for family in load_names("families") if tokens]
        targets.append(f"train_predictor@{one.predictor}-{split}")
        changes = [word for change in one.changes for word in ("--set-param", change)]
        how = "--queue" if queue else "--temp"
        # --single-item: nothing upstream of the targets runs, whatever its state
        command = ["exp", "run", how, "--force", "--single-item", "--name", one.experiment]
        if _dvc(*command, *changes, *targets).returncode:
            failed.append(one.name)
    return failed


def collect(split: str) -> pd.DataFrame:
    """Compare every ablation that has run with its base, and write metrics/ablations.csv.

    Returns:
        The table, columns `COLUMNS`: first the bases (without a difference), then the ablations.
        What the file already says of ablations that have run elsewhere stays, where their base is
        what it was.

    Raises:
        ValueError: if a base is missing, or an ablation tested other networks than its base.
    """
    from weightnet.evaluation.scores import ScoresConfig
    from weightnet.tokens import read_networks

    config = load_section(ScoresConfig, "evaluate", "scores")
    paths = [require(Path("data/tokens") / f, "tokenize_zoo") for f in load_names("families")]
    networks = read_networks(paths).frame
    found: dict[Ablation, pd.DataFrame] = {}
    bases: dict[str, pd.DataFrame] = {}
    earlier = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=list(COLUMNS))
    for name in earlier["base"].unique():
        path = Path(f"data/predictions/{name}-{split}.parquet")
        if path.exists():
            bases[str(name)] = pd.read_parquet(path)
    for one in ABLATIONS:
        path = Path(f"data/predictions/{one.predictor}-{split}.parquet")
        base = path.with_name(f"{one.against}-{split}.parquet")
        if one.changes:
            table = _from_experiment(one.experiment, path)
        else:  # the pipeline has trained both
            table = pd.read_parquet(path) if path.exists() and base.exists() else None
        if table is not None:
            found[one] = table
            require(base, f"train_predictor@{one.against}-{split}")
            bases.setdefault(one.against, pd.read_parquet(base))
    table = keep(earlier, compare(found, bases, networks, config, split))
    with replace_file(TABLE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6g")
    return table


def keep(earlier: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return ``table`` with those ablations of an ``earlier`` one that it lacks and whose base has
    the same values on the same networks in both, in the order of `ABLATIONS`."""
    subject = ["base", "split", "property", "metric"]

    def base_rows(rows: pd.DataFrame, name: str) -> dict[tuple[str, ...], tuple[str, str]]:
        own = rows[(rows["ablation"] == BASE) & (rows["base"] == name)]
        values = [f"{value:.6g}" for value in own["value"].astype(float)]
        keys = own[subject].itertuples(index=False, name=None)
        return dict(zip(keys, zip(values, own["hash"], strict=True), strict=True))

    parts = [table]
    for name, rows in earlier[earlier["ablation"] != BASE].groupby("ablation", sort=False):
        base = str(rows["base"].iat[0])
        same = base_rows(earlier, base) == base_rows(table, base) != {}
        if same and name not in set(table["ablation"]):
            parts.append(rows)
    if len(parts) == 1:
        return table
    place = {name: number for number, name in enumerate([BASE, *(one.name for one in ABLATIONS)])}
    joined = pd.concat(parts, ignore_index=True)
    order = joined["ablation"].map(lambda name: place.get(name, len(place)))
    return joined.iloc[order.argsort(kind="stable")].reset_index(drop=True)


def compare(
    found: Mapping[Ablation, pd.DataFrame],
    bases: Mapping[str, pd.DataFrame],
    networks: pd.DataFrame,
    config: Any,
    split: str,
) -> pd.DataFrame:
    """Return the table of ablations from their predictions and those of their bases.

    Args:
        found: predictions of each ablation, as train_predictor writes them.
        bases: predictions by predictor.
        networks: one row per network, as `Evaluation` takes it.
        config: a `ScoresConfig`.

    Raises:
        ValueError: if an ablation tested other networks than its base.
    """
    from weightnet.evaluation.metrics import interval
    from weightnet.evaluation.scores import Evaluation

    if not bases:
        return pd.DataFrame(columns=list(COLUMNS))
    hashes = {name: split_hashes(table) for name, table in bases.items()}
    for one, table in found.items():
        if split_hashes(table) != hashes[one.against]:
            raise ValueError(
                f"ablation {one.name} must test the networks that its base tests, however: the "
                f"split hash is {split_hashes(table)}, of the base {hashes[one.against]}; run "
                f"`weightnet ablate {one.name}` again"
            )
    parts = [table.assign(predictor=f"{BASE} {name}") for name, table in bases.items()]
    parts += [table.assign(predictor=one.name) for one, table in found.items()]
    evaluation = Evaluation(pd.concat(parts).assign(split=split), networks, config)

    def row(one: Ablation, label: str, of: str, metric: str) -> dict[str, Any]:
        values, n = evaluation.draws(label, split, of, "all", metric)
        low, high = interval(values[1:], config.level)
        described: dict[str, Any] = {
            **{"ablation": one.name, "group": one.group, "predictor": one.predictor},
            **{"base": one.against, "changes": " ".join(one.changes), "split": split},
            **{"property": of, "metric": metric, "value": values[0], "low": low, "high": high},
            **{"n": n, "hash": hashes[one.against]},
        }
        if one.name != BASE:
            base, _ = evaluation.draws(f"{BASE} {one.against}", split, of, "all", metric)
            lead = values - base
            low, high = interval(lead[1:], config.level)
            described |= {"difference": lead[0], "difference_low": low, "difference_high": high}
        return described

    subjects = [(Ablation(BASE, BASE, (), name), f"{BASE} {name}") for name in sorted(bases)]
    subjects += [(one, one.name) for one in found]
    tables = {
        **{f"{BASE} {n}": t for n, t in bases.items()},
        **{o.name: t for o, t in found.items()},
    }
    rows = [
        row(one, label, of, metric)
        for one, label in subjects
        for of in evaluation.properties
        if of in set(tables[label]["property"])
        for metric in METRICS
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def split_hashes(predictions: pd.DataFrame) -> str:
    """Return the hashes of each seed's test runs, as metrics/splits.csv has them, in one line."""
    from weightnet.evaluation.splits import split_hash

    test = predictions[predictions["part"] == "test"]
    return " ".join(split_hash(own, own["part"]) for _, own in test.groupby("seed"))


def _expect_fresh(targets: Sequence[str]) -> None:
    done = _dvc("status", "--json", *targets, capture=True)
    if done.returncode:
        raise ValueError(
            f"ablations must start from what the pipeline made, however: {done.stderr.strip()}"
        )
    stale = sorted(json.loads(done.stdout or "{}"))
    if stale:
        raise ValueError(
            f"ablations must start from results that are up to date, however: "
            f"{', '.join(stale)} changed; run `dvc repro {' '.join(targets[3:])}` first"
        )


def _from_experiment(name: str, path: Path) -> pd.DataFrame | None:
    """Read a table as the newest experiment of this name left it; None if there is none."""
    import dvc.api
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    revision = newest_experiment(name)
    if revision is None:
        return None
    try:
        with dvc.api.open(str(path), rev=revision, mode="rb") as file:
            return pd.read_parquet(file)
    except (DvcException, SCMError, FileNotFoundError):
        return None


def newest_experiment(name: str, repository: Path = Path()) -> str | None:
    """The commit of the last experiment called ``name``; None if none has run. One that was run
    again after a commit is there twice, and its name says not which."""
    command = ["git", "-C", str(repository), "for-each-ref", "--sort=-committerdate"]
    command += ["--format=%(objectname) %(refname)", "refs/exps"]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for line in found.splitlines():
        commit, _, reference = line.partition(" ")
        if reference.endswith(f"/{name}"):
            return commit
    return None


def _dvc(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Run DVC with this Python first on the path: stages start `python`."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        env={**os.environ, "PATH": path},
        capture_output=capture,
        text=True,
        check=False,
    )
