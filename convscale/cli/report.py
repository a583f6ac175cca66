"""The command `report`: runs and speeds as a page or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from convscale.cli.options import Json, print_json, say
from convscale.errors import UserError
from convscale.networks.names import spec_of

PAGES, PICTURES = (".html",), (".html", ".png")


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("report")(report_command)


def report_command(
    run_dir: Annotated[
        Path | None, typer.Argument(help="Folder of a `convscale fit` or `train`: its report is made (again).")
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            "--records",
            help="JSON lines of `measure --record`, or a .csv of timm's benchmark.py, measured on --device. Repeatable.",
        ),
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Add what released weights are predicted to run at on --device.")
    ] = False,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="With --predict: only these names or patterns. Repeatable.")
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", help="Add this network layer by layer, with its roofline. Repeatable."),
    ] = None,
    papers: Annotated[
        bool, typer.Option("--papers", help="Add the papers' four networks on a V100, published beside predicted.")
    ] = False,
    ablation: Annotated[
        bool,
        typer.Option("--ablation", help="Add TResNet's ingredients: predicted, and measured where --records has them."),
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="The GPU of --predict and --layers, and of a .csv.")
    ] = "rtx-4090",
    batch_size: Annotated[
        int | None,
        typer.Option("-b", "--batch-size", help="Images per call of --predict and --layers; 256 when left out."),
    ] = None,
    img_size: Annotated[int | None, typer.Option("--img-size", help="Of --predict and --layers.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="amp (when left out), fp32, bf16 or fp16.")
    ] = None,
    layout: Annotated[str, typer.Option("--layout", help="nchw or nhwc.")] = "nchw",
    compiled: Annotated[bool, typer.Option("--compiled", help="Behind PyTorch's compiler instead of eager.")] = False,
    mode: Annotated[str, typer.Option("--mode", help="infer or train.")] = "infer",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Predict by this file of `convscale calibrate`.")
    ] = None,
    min_throughput: Annotated[
        float | None, typer.Option("--min-throughput", help="Images/s to draw as a line.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help=".html: a page; .png: its picture alone. speed.html, or a run's own report, when left out."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file: a run's report again, or speeds, layers and comparisons."""
    asked = bool(records or predict or layers or papers or ablation)
    if run_dir is not None:
        if asked:
            raise UserError("give a run's folder, or --records, --predict, --layers, --papers and --ablation, not both")
        from convscale.show.plots import save_fit_png
        from convscale.show.report import write_fit_report
        from convscale.show.train_report import write_train_report

        training = not (run_dir / "fit.json").is_file() and (run_dir / "log.jsonl").is_file()
        if output is not None:
            check_output(output, PAGES if training else PICTURES)
        if output is not None and output.suffix == ".png":
            path = save_fit_png(run_dir, output)
        else:
            path = (write_train_report if training else write_fit_report)(run_dir, output)
    elif not asked:
        raise UserError(
            "give a run's folder, or at least one of --records, --predict, --layers, --papers and --ablation"
        )
    else:
        output = output or Path("speed.html")
        check_output(output, PICTURES)
        if models and not predict:
            raise UserError("--model says what to predict; give it with --predict")
        conditions: dict[str, Any] = {
            "batch_size": batch_size,
            "precision": precision,
            "layout": layout,
            "compiled": compiled,
            "mode": mode,
        }
        conditions["calibration"] = calibration
        from convscale.show.studies import ABLATION

        elsewhere = {spec.name for spec in ABLATION.values()} if ablation else set()
        points, found = _points(records or [], predict, models, device, img_size, conditions, elsewhere)
        if output.suffix == ".png":
            path = _picture(points, output, bool(layers or papers or ablation), min_throughput)
        else:
            comparisons, profiles = _parts(layers or [], papers, ablation, found, device, img_size, conditions)
            from convscale.show.speed_report import write_speed_report

            path = write_speed_report(
                points, output, comparisons=comparisons, profiles=profiles, min_throughput=min_throughput
            )
    print_json({"report": str(path)}) if as_json else say(f"report: {path}")


def check_output(path: Path, known: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: the file's name does not end in one of these.
    """
    if path.suffix not in known:
        raise UserError(f"--output {path} must end in {' or '.join(known)}")


def write_choice(choice: Any, path: Path) -> None:
    """The choice's options as accuracy against throughput with the constraint drawn in: a page, or a picture.

    Raises:
        UserError: the file ends in neither .html nor .png.
    """
    from convscale.show.candidates import choice_points

    check_output(path, PICTURES)
    points = choice_points(choice)
    title = f"{choice.best.label} for {choice.constraint}"
    if path.suffix == ".png":
        from convscale.show.speed_plots import save_speed_png

        save_speed_png(points, path, title=title, min_throughput=choice.floor or None)
        return
    from convscale.show.speed_report import write_speed_report

    write_speed_report(points, path, title=title, lead=f"{choice}.", min_throughput=choice.floor or None)


def _points(
    records: list[Path],
    predict: bool,
    models: list[str] | None,
    device: str,
    img_size: int | None,
    conditions: dict[str, Any],
    elsewhere: set[str],
) -> tuple[list[Any], list[Any]]:
    """What to draw, and all records: those of the networks ``elsewhere`` stand in a comparison instead."""
    found = [record for path in records for record in _read(path, device, conditions)]
    if records and not found:
        raise UserError(f"{', '.join(map(str, records))}: no record in it")
    drawn = [record for record in found if record.model not in elsewhere]
    if not predict:
        return drawn, found
    from convscale.show.candidates import predicted_points

    sizes = None if img_size is None else [img_size]
    made = predicted_points(device, models, image_sizes=sizes, progress=lambda text: say(text, err=True), **conditions)
    return [*drawn, *made], found


def _read(path: Path, device: str, conditions: dict[str, Any]) -> list[Any]:
    """Records of a file; of a table of timm's, which does not say its device, as the flags say."""
    from convscale.speed.records import read_records, read_timm_csv

    if path.suffix != ".csv":
        return read_records(path)
    from convscale.conditions import Conditions
    from convscale.machine import Environment
    from convscale.predictor.devices import get_device

    card = get_device(device)
    runtime = "compiled" if conditions["compiled"] else "eager"
    stated = Conditions(
        device=card.name, precision=conditions["precision"] or "amp", layout=conditions["layout"], runtime=runtime
    )
    return read_timm_csv(path, conditions=stated, environment=Environment(device_name=card.title, cores=1))


def _picture(points: list[Any], output: Path, others: bool, min_throughput: float | None) -> Path:
    from convscale.show.speed_plots import save_speed_png
    from convscale.show.speed_points import points_of

    if others:
        raise UserError(
            "a .png shows accuracy against throughput alone; give --layers, --papers and --ablation with an .html file"
        )
    return save_speed_png(points_of(points), output, min_throughput=min_throughput)


def _parts(
    layers: list[str],
    papers: bool,
    ablation: bool,
    found: list[Any],
    device: str,
    img_size: int | None,
    conditions: dict[str, Any],
) -> tuple[list[Any], list[Any]]:
    """Comparisons and profiles."""
    from convscale.choice.choose import setting_of
    from convscale.predictor.profile import profile
    from convscale.show.studies import papers_example, tresnet_ablation

    comparisons = [papers_example()] if papers else []
    comparisons += [tresnet_ablation(records=found)] if ablation else []
    if not layers:
        return comparisons, []
    setting = setting_of(device, **conditions)
    if not setting.predicted:
        raise UserError(
            f"--layers shows what is predicted for a named GPU, got device {device!r}; or give --calibration"
        )
    return comparisons, [
        profile(spec_of(name), setting.conditions, image_size=img_size, calibration=conditions["calibration"])
        for name in layers
    ]
