"""The command `weightnet`: what can be done with checkpoints of one's own.

Commands import what they need when they run, so that the help appears at once.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from weightnet.symmetry import PermutationSpec, Space, State

app = typer.Typer(
    help="Read a trained network's weights: predict its properties, see and use its symmetries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Order(StrEnum):
    """The order of channels in a canonical form."""

    sort = "sort"
    align = "align"
    none = "none"


MAX_SEED = (1 << 63) - 1
SHOWN = 200  # rows of a table of problems

Checkpoint = Annotated[Path, typer.Argument(help="A .safetensors, .pt or .pth file of tensors.")]
Output = Annotated[Path, typer.Argument(help="The .safetensors file to write.")]
Architecture = Annotated[
    str,
    typer.Option(
        help="A family of the zoo, a classifier of torchvision, or your package.module:callable."
    ),
]
Arguments = Annotated[
    str,
    typer.Option(
        "--architecture-args",
        help='The architecture\'s arguments as JSON, e.g. \'{"width": 0.25, "classes": 10}\'.',
    ),
]
Shape = Annotated[
    str, typer.Option("--input", help="Shape of one input, e.g. 3,224,224 [from the arguments]")
]


@app.command()
def symmetry(
    architecture: Annotated[str, typer.Argument(help="See --architecture of `permute`.")],
    width: Annotated[float | None, typer.Option(help="Factor on the hidden widths.")] = None,
    stem: Annotated[str | None, typer.Option(help="imagenet or small.")] = None,
    arguments: Arguments = "{}",
    shape: Shape = "",
) -> None:
    """Show the channel spaces of an architecture: which channels move together, and where."""
    from weightnet.command import reported

    with reported():
        from weightnet.architecture import trace_architecture

        shortcuts = {"width": width, "stem": stem}
        values = {key: value for key, value in shortcuts.items() if value is not None}
        _, spec = trace_architecture(
            architecture, parse_arguments(arguments) | values, parse_shape(shape)
        )
        show(spec, architecture)


@app.command()
def permute(
    checkpoint: Checkpoint,
    output: Output,
    architecture: Architecture,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the random permutation.")] = 0,
    arguments: Arguments = "{}",
    shape: Shape = "",
) -> None:
    """Write a randomly permuted copy of a checkpoint: other weights, the same function."""
    from weightnet.command import reported

    with reported():
        import torch

        from weightnet import symmetry
        from weightnet.checkpoint import write_checkpoint

        spec, state = read_fitting(checkpoint, architecture, arguments, shape)
        permutation = spec.random(torch.Generator().manual_seed(seed))
        write_checkpoint(output, symmetry.permute(spec, permutation, state))


@app.command()
def canonicalize(
    checkpoint: Checkpoint,
    output: Output,
    architecture: Architecture,
    order: Annotated[Order, typer.Option(help="Of the channels.")] = Order.sort,
    scale: Annotated[bool, typer.Option(help="Fix the scale of ReLU channels.")] = True,
    fold_batchnorm: Annotated[
        bool, typer.Option("--fold-batchnorm", help="Fold BatchNorms into their layers first.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(help="The checkpoint that --order align matches.")
    ] = None,
    arguments: Arguments = "{}",
    shape: Shape = "",
) -> None:
    """Write the canonical form of a checkpoint: one for all its permuted and rescaled copies."""
    from weightnet.command import reported

    with reported():
        from weightnet import symmetry
        from weightnet.checkpoint import write_checkpoint

        spec, state = read_fitting(checkpoint, architecture, arguments, shape)
        other = None
        if reference is not None:
            other = read_fitting(reference, architecture, arguments, shape)[1]
        form = symmetry.canonicalize(
            spec, state, order=order.value, scale=scale, fold=fold_batchnorm, reference=other
        )
        write_checkpoint(output, form)


@app.command()
def predict(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Files of tensors: .safetensors, .pt.")
    ],
    architecture: Architecture,
    arguments: Arguments = "{}",
    predictor: Annotated[
        Path | None, typer.Option(help="A saved predictor [the pipeline's, or the reference]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    path: Annotated[Path | None, typer.Option(help="A folder of your modules.")] = None,
    shape: Shape = "",
) -> None:
    """Predict the properties of trained networks from their weights, with 90% intervals.

    Exit code 0: all predicted; 1: some checkpoints could not be read; 2: none, or wrong usage.
    """
    from weightnet.command import reported

    with reported():
        if as_json and as_csv:
            raise ValueError("one of --json and --csv may be given, however: both are")
        from weightnet.estimator import WeightNet, prepare

        model = WeightNet.load(predictor)
        settings: dict[str, Any] = {"architecture": architecture, "path": path}
        settings |= {"arguments": parse_arguments(arguments), "shape": parse_shape(shape)}
        prepared, errors = [], []
        for checkpoint in checkpoints:
            try:
                prepared += prepare(checkpoint, **settings)
            except ValueError as error:
                errors.append(str(error))
        if not prepared:
            raise ValueError("\nerror: ".join(dict.fromkeys(errors)))
        table = model.predict_prepared(prepared)
        if as_json:
            typer.echo(table.reset_index().to_json(orient="records", indent=1, double_precision=6))
        elif as_csv:
            typer.echo(table.to_csv(float_format="%.6g"), nl=False)
        else:
            show_predictions(table, f"predicted by {model.predictor} in {model.place}")
        for one in prepared:
            for note in one.notes:
                typer.echo(f"note: {one.name}: {note}", err=True)
        if "outside" in table:
            for name, row in table[table["outside"]].iterrows():
                typer.echo(
                    f"warning: {name} is unlike the networks that the predictor was trained on "
                    f"(farther from them than {1 - row['novelty']:.0%} of its validation "
                    "networks): do not rely on its predictions",
                    err=True,
                )
        for text in errors:
            typer.echo(f"error: {text}", err=True)
        if errors:
            raise typer.Exit(1)


@app.command()
def inspect(
    checkpoint: Checkpoint,
    architecture: Architecture,
    histogram: Annotated[
        Path | None, typer.Option(help="Draw the weights of each layer to this .png file.")
    ] = None,
    arguments: Arguments = "{}",
    path: Annotated[Path | None, typer.Option(help="A folder of your modules.")] = None,
    shape: Shape = "",
) -> None:
    """Show what is in a checkpoint: layers, parameters, channel spaces, tokens, norms, dead
    neurons."""
    from weightnet.command import reported

    with reported():
        from weightnet import inspection
        from weightnet.estimator import prepare

        (one,) = prepare(
            checkpoint,
            architecture=architecture,
            arguments=parse_arguments(arguments),
            shape=parse_shape(shape),
            path=path,
        )
        table = inspection.describe_layers(one.spec, one.state)
        show_layers(table, f"{checkpoint}: {inspection.summarize(one.spec, table)}")
        for note in one.notes:
            typer.echo(f"note: {note}", err=True)
        if histogram is not None:
            inspection.save_histogram(one.spec, one.state, histogram)


@app.command("import")
def import_zoo(
    folder: Annotated[Path, typer.Argument(help="A folder: metadata.csv and weight files.")],
    name: Annotated[str, typer.Option(help="What the family is to be called.")],
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out.")] = False,
    path: Annotated[Path | None, typer.Option(help="A folder of your modules.")] = None,
    shape: Shape = "",
) -> None:
    """Import a zoo of your own as a family of the pipeline. Nothing is written unless all rows are
    good, or --skip-bad leaves the others out.

    See docs/OWN_NETWORKS.md for the columns of metadata.csv (or metadata.parquet). The modules
    that its column `architecture` names are imported, and so run; nothing else is.
    """
    from weightnet.command import PARAMS_FILE, reported

    with reported():
        from weightnet import importing

        target = Path("data/raw") / name
        importing.check_target(folder, name, target)
        importing.check_family(PARAMS_FILE, name)
        zoo = importing.check_zoo(folder, name, path=path, shape=parse_shape(shape))
        show_import(zoo.problems, zoo.notes, zoo.total)
        bad = len({problem.row for problem in zoo.problems})
        if bad and not (skip_bad and len(zoo.rows)):
            remedy = "" if skip_bad else ", or pass --skip-bad to leave these out"
            raise ValueError(
                f"every row must be good, however: {bad} of {zoo.total} are not; nothing was "
                f"written. Correct them{remedy}"
            )
        digest = importing.write_zoo(zoo, name, target)
        importing.add_family(PARAMS_FILE, name, target, digest)
        out = f", {bad} rows left out" if bad else ""
        typer.echo(
            f"{name}: {len(zoo.rows)} networks{out}; properties {', '.join(zoo.properties)}\n"
            f"It is in {target} and in params.yaml (generate_zoo.families.{name}). To use it, set "
            f"there\n  families: [{name}]                   # or beside ours\n  splits: [iid]\n"
            f"  train_predictor.common.properties: [{', '.join(zoo.properties)}]\n"
            f"  plot.properties: the ones to draw\nand run `dvc repro`."
        )


@app.command()
def ablate(
    names: Annotated[
        list[str] | None, typer.Argument(help="Ablations or groups; all if none is named.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split to train and test on.")] = "iid",
    listed: Annotated[bool, typer.Option("--list", help="Show them, run none.")] = False,
    queue: Annotated[bool, typer.Option(help="Queue them for `dvc queue start`.")] = False,
    collect: Annotated[bool, typer.Option(help="Only compare those that have run.")] = False,
) -> None:
    """Train WeightNet without each of its parts, as DVC experiments, and compare.

    Writes metrics/ablations.csv; `dvc repro plot` shows it. No zoo model is ever retrained.
    """
    from weightnet.command import reported

    with reported():
        from weightnet import ablation

        chosen = ablation.choose(names or ())
        if listed:
            for one in chosen:
                changes = " ".join(one.changes)
                typer.echo(f"{one.group:16} {one.name:24} {one.predictor}: {changes}")
            return
        failed = [] if collect else ablation.run(chosen, split, queue=queue)
        if queue:
            typer.echo("queued; run `dvc queue start`, then `weightnet ablate --collect`")
        else:
            table = ablation.collect(split)
            count = table.loc[table["group"] != ablation.BASE, "ablation"].nunique()
            typer.echo(f"{count} ablations: {ablation.TABLE}; run `dvc repro plot` to show them")
        if failed:
            raise ValueError(
                f"every ablation must run, however: {', '.join(failed)} did not; see above, then "
                f"run `weightnet ablate {' '.join(failed)}`"
            )


@app.command()
def reference(
    source: Annotated[
        Path, typer.Argument(help="The trained predictor that the package is to ship.")
    ] = Path("data/predictors/weightnet-iid"),
) -> None:
    """For maintainers, after `dvc repro`: make a trained predictor the one that the package ships.

    Writes src/weightnet/reference/ with its model card, filled from params.yaml and metrics/.
    """
    from weightnet.command import PARAMS_FILE, reported

    with reported():
        from weightnet.estimator import REFERENCE
        from weightnet.publishing import publish

        size = publish(source, PARAMS_FILE, Path("metrics"), REFERENCE)
        typer.echo(f"{source} is the reference now: {size / 1e6:.1f} MB in {REFERENCE}")


def read_fitting(
    checkpoint: Path, architecture: str, arguments: str, shape: str
) -> tuple[PermutationSpec, State]:
    """The spec of the architecture, and the tensors of a checkpoint of it."""
    from weightnet.architecture import trace_architecture
    from weightnet.checkpoint import check_fits, check_real, read_checkpoint

    module, spec = trace_architecture(architecture, parse_arguments(arguments), parse_shape(shape))
    state = read_checkpoint(checkpoint, module.state_dict().keys())
    check_fits(module, state)
    check_real(state)
    return spec, state


def parse_arguments(text: str) -> dict[str, Any]:
    """The keyword arguments that JSON text spells; ValueError if it is no JSON object."""
    import json

    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--architecture-args must be JSON, however: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--architecture-args must be a JSON object, however: {text}")
    return values


def parse_shape(text: str) -> tuple[int, ...] | None:
    """The shape that ``3,224,224`` spells, None for no text; ValueError if it spells none."""
    sizes = text.split(",") if text else []
    if not all(size.strip().isdecimal() and len(size) < 7 and int(size) > 0 for size in sizes):
        raise ValueError(
            f"--input must be positive numbers below a million such as 3,224,224, however: {text}"
        )
    return tuple(map(int, sizes)) or None


def show_predictions(predicted: pd.DataFrame, title: str) -> None:
    """Print predictions as a table: one row a network and property."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    table.add_column("network", overflow="fold")
    table.add_column("property", overflow="fold")
    for name in ("predicted", "90% interval"):
        table.add_column(name, justify="right")
    properties = [name for name in predicted if f"{name}_low" in predicted]
    for network, row in predicted.iterrows():
        mark = " (!)" if row.get("outside", False) else ""
        for place, name in enumerate(properties):
            interval = f"{row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f}"
            label = escape(f"{network}{mark}") if place == 0 else ""
            last = place == len(properties) - 1
            table.add_row(label, name, f"{row[name]:.3f}", interval, end_section=last)
    Console().print(table)


def show_layers(layers: pd.DataFrame, title: str) -> None:
    """Print the layers of a network as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for name in layers:
        text = name in ("layer", "kind", "activation", "shape")
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    for row in layers.itertuples(index=False):
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else escape(str(v)) for v in row))
    Console(width=max(Console().width, 120)).print(table)


def show_import(problems: list[Any], notes: list[str], total: int) -> None:
    """Print what is wrong with an imported zoo, by row, and what was changed to read it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    if problems:
        table = Table(title=f"{len({p.row for p in problems})} of {total} rows are wrong")
        table.add_column("row", justify="right")
        table.add_column("file", overflow="fold")
        table.add_column("what is wrong", overflow="fold")
        for problem in problems[:SHOWN]:
            table.add_row(str(problem.row), escape(problem.file), escape(problem.fact))
        console.print(table)
    for note in notes[:SHOWN]:
        console.print(f"note: {note}", markup=False, highlight=False)
    hidden = max(0, len(problems) - SHOWN) + max(0, len(notes) - SHOWN)
    if hidden:
        console.print(f"... and {hidden} more", markup=False)


def escape(text: str) -> str:
    """Text from a file as it is shown: no markup, no control characters."""
    from rich.markup import escape as escape_markup

    return escape_markup("".join(c if c.isprintable() else "?" for c in text))


def show(spec: PermutationSpec, architecture: str) -> None:
    """Print a spec as a table: one row a channel space."""
    from rich.console import Console
    from rich.table import Table

    channels = sum(space.size for space in spec.spaces)
    table = Table(
        title=f"{architecture}: {len(spec.spaces)} spaces of {channels} channels, "
        f"{len(spec.layers)} layers",
        caption="members: tensors [axis], + first index, x indices per channel",
        show_lines=True,
    )
    for header in ("space", "members"):
        table.add_column(header, overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("scalable")
    for space in spec.spaces:
        scalable = "yes" if space.scalable else "no"
        table.add_row(space.name, "\n".join(members(space)), str(space.size), scalable)
    Console().print(table, markup=False)


def members(space: Space) -> list[str]:
    """The axes of a space in words, the tensors of one module together."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for axis in space.axes:
        owner, _, name = axis.tensor.rpartition(".")
        place = f"[{axis.axis}]"
        place += f" +{axis.offset}" if axis.offset else ""
        place += f" x{axis.repeat}" if axis.repeat > 1 else ""
        grouped.setdefault((owner, place), []).append(name)
    return [
        f"{owner}{'.' if owner else ''}{', '.join(names)} {place}"
        for (owner, place), names in grouped.items()
    ]
