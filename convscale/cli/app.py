"""The command line: one thin function per command.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once. Bad input prints one line and exits
with 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscale import words
from convscale._version import __version__
from convscale.cli import learn as cli_learn
from convscale.cli import measure as cli_measure
from convscale.cli import report as cli_report
from convscale.cli import ship as cli_ship
from convscale.cli import speed as cli_speed
from convscale.cli.options import (
    Batch,
    DataDir,
    Device,
    Epochs,
    ImgSize,
    Json,
    Output,
    Overwrite,
    Precision,
    Resume,
    ResumeCommand,
    Seed,
    Sets,
    Threads,
    Zoo,
    overrides_of,
    print_json,
    say,
)
from convscale.cli.tables import Column, number_column, print_table
from convscale.errors import Stopped, UserError
from convscale.networks.names import spec_of

if TYPE_CHECKING:
    from convscale.pipeline.run import FitRun

app = typer.Typer(
    name="convscale",
    help="Pick, scale, train and ship image ConvNets by throughput.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command("list")
def list_command(
    pattern: Annotated[str, typer.Argument(help="Shell pattern, such as 'tresnet*'.")] = "*",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Released weights instead of architectures.")
    ] = False,
    zoo: Zoo = "all",
    as_json: Json = False,
) -> None:
    """List models, own and timm's, or released weights with their published accuracy."""
    from convscale.networks.offered import architectures_in, weights_in

    if not pretrained:
        names = architectures_in(zoo, pattern)
        if not names:
            raise UserError(f"no model matches {pattern!r}; `convscale list` shows all")
        print_json(names) if as_json else typer.echo("\n".join(names))
        return
    weights = weights_in(zoo, pattern)
    if not weights:
        raise UserError(f"no model matches {pattern!r}; `convscale list` shows all")
    if as_json:
        print_json(
            [
                {
                    "name": each.name,
                    "zoo": each.zoo,
                    "licence": each.licence,
                    "extra_data": each.extra_data,
                    "attention": each.attention,
                    "results": [{"image_size": r.image_size, "top1": r.top1, "source": r.source} for r in each.results],
                }
                for each in weights
            ]
        )
        return
    print_table(
        [
            Column("weights"),
            number_column("px"),
            number_column("top-1"),
            Column("zoo"),
            Column("licence"),
            Column("extra data"),
        ],
        [
            [
                each.name,
                words.UNKNOWN if result is None else str(result.image_size),
                words.accuracy(result and result.top1),
                each.zoo,
                each.licence,
                each.extra_data or words.UNKNOWN,
            ]
            for each in weights
            for result in each.results or (None,)
        ],
    )
    say(
        "ImageNet-1k top-1, – where no published figure is known; recipes differ, so figures compare weights, not "
        "architectures. Extra data: beside ImageNet-1k. Source: timm's results table and model cards."
    )


@app.command()
def show(model: Annotated[str, typer.Argument(help="A model name or a spec file.")], as_json: Json = False) -> None:
    """Print a model's spec as YAML."""
    spec = spec_of(model)
    print_json(spec.to_dict()) if as_json else typer.echo(f"# {spec!r}\n{spec.to_yaml()}".rstrip())


@app.command()
def scale(
    model: Annotated[str, typer.Argument(help="A model name or a spec file.")],
    phi: Annotated[float | None, typer.Option(help="Compound coefficient; negative scales down.")] = None,
    rule: Annotated[str, typer.Option(help="compound, fast, depth, width or resolution.")] = "compound",
    depth: Annotated[float | None, typer.Option(help="Multiplier of blocks.")] = None,
    width: Annotated[float | None, typer.Option(help="Multiplier of channels.")] = None,
    resolution: Annotated[float | None, typer.Option(help="Multiplier of the image's side.")] = None,
    img_size: ImgSize = None,
    divisor: Annotated[int | None, typer.Option(help="Widths become multiples of this.")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the spec to this .yaml or .json file.")] = None,
    as_json: Json = False,
) -> None:
    """Scale a model and print or save the new spec."""
    from convscale.arch.scaling import scale as scale_spec
    from convscale.arch.spec import save_spec

    spec = scale_spec(
        spec_of(model),
        phi=phi,
        rule=rule,
        depth=depth,
        width=width,
        resolution=resolution,
        image_size=img_size,
        divisor=divisor,
    )
    if output is not None:
        save_spec(spec, output)
    if as_json:
        print_json(spec.to_dict())
    else:
        say(repr(spec))
        say(
            f"written to {output}"
            if output
            else "--output FILE.yaml saves it; wherever a model name goes, the file goes too"
        )


cli_measure.register(app)


@app.command(cls=ResumeCommand)
def fit(
    data_dir: DataDir,
    min_throughput: Annotated[
        float, typer.Option("--min-throughput", help="Images/s that the shipped network must keep, model only.")
    ],
    output: Output,
    device: Device = "cpu",
    batch_size: Batch = 8,
    img_size: ImgSize = None,
    runtime: Annotated[
        str | None, typer.Option("--runtime", help="onnxruntime or openvino; the fastest installed one when left out.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Ship 8 bits where that is faster and keeps the accuracy.")
    ] = False,
    max_drop: Annotated[
        float, typer.Option("--max-drop", help="Accuracy points that INT8 may lose on validation.")
    ] = 0.5,
    precision: Precision = "fp32",
    threads: Threads = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="Choose among these names or spec files only. Repeatable; scaled families when left out."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A named recipe or a YAML file; chosen by the data when left out.")
    ] = None,
    init: Annotated[
        str | None, typer.Option("--init", help="'pretrained': start named candidates from their released weights.")
    ] = None,
    epochs: Epochs = None,
    brief_epochs: Annotated[int, typer.Option(help="Epochs of the comparison of finalists.")] = 1,
    max_minutes: Annotated[float | None, typer.Option(help="The full training ends by then.")] = None,
    sets: Sets = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The whole way: choose, train, export, check and report."""
    from convscale.learn.progress import LiveProgress
    from convscale.pipeline.run import fit as run_fit

    with LiveProgress() as live:
        run = run_fit(
            data_dir,
            min_throughput=min_throughput,
            output=output,
            device=device,
            batch_size=batch_size,
            precision=precision,
            runtime=runtime,
            int8=int8,
            max_drop=max_drop,
            threads=threads,
            image_size=img_size,
            candidates=[spec_of(name) for name in candidates] if candidates else None,
            recipe=recipe,
            init=init,
            epochs=epochs,
            brief_epochs=brief_epochs,
            max_minutes=max_minutes,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            progress=live,
            overrides=overrides_of(sets),
        )
    _finish(run, as_json)


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to make; a new one under runs/ when left out.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Fashion-MNIST's idx files; found or downloaded when left out.")
    ] = None,
    max_minutes: Annotated[float, typer.Option(help="The full training ends by then.")] = 6.0,
    as_json: Json = False,
) -> None:
    """Fit on Fashion-MNIST under a speed that this machine sets."""
    from convscale.learn.progress import LiveProgress
    from convscale.pipeline.demo import demo as run_demo

    with LiveProgress() as live:
        run = run_demo(output=output, data_dir=data_dir, max_minutes=max_minutes, progress=live)
    _finish(run, as_json)


def _finish(run: FitRun, as_json: bool) -> None:
    if as_json:
        keys = ("winner", "evaluation", "verification", "artifact", "timings", "constraint")
        record = run.record
        print_json({"output": str(run.output), "report": str(run.report), **{key: record[key] for key in keys}})
        return
    result = run.result
    images = words.plural(result.evaluation.n or 0, "test image")
    say(
        f"{result.winner.name}: {words.percent(result.top1, 2)} of {images} right; "
        f"artefact {run.output / 'artifact'}, report {run.report}"
    )


def _version(value: bool) -> None:
    if value:
        say(f"convscale {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


cli_learn.register(app)
cli_ship.register(app)
cli_speed.register(app)
cli_report.register(app)


def main() -> None:
    """Run the command line: exit code 0, 2 on bad input, 130 when interrupted."""
    try:
        app()
    except UserError as error:
        typer.echo(f"convscale: {error}", err=True)
        sys.exit(130 if isinstance(error, Stopped) else 2)
    except KeyboardInterrupt:
        typer.echo("convscale: interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
