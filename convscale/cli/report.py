"""The command `report`: runs and speeds as a page or a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscale import words
from convscale.cli.options import MISSED, Json, print_json, refuse_lost, say
from convscale.cli.speed_options import progress_aside
from convscale.cli.tables import Column, number_column, print_table
from convscale.errors import UserError, check_number
from convscale.networks.names import network_of, spec_or_name

if TYPE_CHECKING:
    from convscale.choice.basis import Asked, Basis
    from convscale.choice.decide import Choice
    from convscale.predictor.profile import Profile
    from convscale.show.speed_points import SpeedPoint
    from convscale.speed.records import Record

PAGES, PICTURES = (".html",), (".html", ".png")


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("report")(report_command)


def report_command(
    run_dir: Annotated[
        Path | None,
        typer.Argument(help="Folder of a `convscale fit`, `train` or `search`: its report is made (again)."),
    ] = None,
    others: Annotated[
        list[Path] | None, typer.Argument(help="Further runs: each is compared with the first, image by image.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", help="Of runs that are compared: exit with 3 where one loses more points."),
    ] = None,
    records: Annotated[
        list[Path] | None,
        typer.Option(
            "--records",
            help="JSON lines of `measure --record`, all of them, whose rows say their device; or a .csv of timm's "
            "benchmark.py, of --device. Repeatable.",
        ),
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Add what released weights are predicted to run at on --device.")
    ] = False,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="With --predict: only these names, patterns or spec files. Repeatable."),
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
        str, typer.Option("--device", help="The GPU or processor of --predict and --layers, and of a .csv.")
    ] = "rtx-4090",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "-b",
            "--batch-size",
            help="Images per call of --predict and --layers; 256 (a processor: 1) when left out.",
        ),
    ] = None,
    img_size: Annotated[int | None, typer.Option("--img-size", help="Of --predict and --layers.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="amp (fp16; when left out), amp_bf16, fp32, bf16 or fp16.")
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
    scaling: Annotated[
        str | None,
        typer.Option(
            "--scaling",
            help="The same pictures under the maps of this network scaled by depth, width, resolution and compound: "
            "give trainings of them by --checkpoint, and --picture.",
        ),
    ] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", help="With --scaling: a training's folder or a checkpoint. Repeatable."),
    ] = None,
    picture: Annotated[
        list[Path] | None, typer.Option("--picture", help="With --scaling: a picture's file. Repeatable.")
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
    from convscale.choice.basis import Asked

    asked = bool(records or predict or layers or papers or ablation)
    if max_drop is not None and not others:
        raise UserError("--max-drop compares runs: give the old one and the new one")
    conditions = {"--device": device != "rtx-4090", "--precision": precision, "--layout": layout != "nchw"}
    conditions |= {"--compiled": compiled, "--mode": mode != "infer"}
    of_predictions = {"--batch-size": batch_size is not None, "--img-size": img_size is not None}
    of_predictions |= {"--calibration": calibration}
    line = {"--min-throughput": min_throughput is not None}
    if not asked and (scaling is not None or run_dir is not None):
        why = "goes with --records, --predict and --layers; leave it out"
        refuse_lost({**conditions, **of_predictions, **line, "--model": models}, why)
    if scaling is not None:
        if run_dir is not None or asked:
            raise UserError("--scaling makes a page of its own; give it with --checkpoint and --picture alone")
        path = _scaling_report(scaling, checkpoints or [], picture or [], output or Path("scaling.html"))
    elif checkpoints or picture:
        raise UserError("--checkpoint and --picture go with --scaling")
    elif others:
        if asked or run_dir is None:
            raise UserError("runs that are compared go with --max-drop, --output and --json alone")
        _compare([run_dir, *others], output or Path("comparison.html"), max_drop, as_json=as_json)
        return
    elif run_dir is not None:
        if asked:
            raise UserError("give a run's folder, or --records, --predict, --layers, --papers and --ablation, not both")
        path = _run_report(run_dir, output)
    elif not asked:
        raise UserError(
            "give a run's folder, or at least one of --records, --predict, --layers, --papers and --ablation"
        )
    elif models and not predict:
        raise UserError("--model says what to predict; give it with --predict")
    else:
        if not predict and not layers:
            refuse_lost(of_predictions, "goes with --predict and --layers; leave it out")
            if not any(path.suffix == ".csv" for path in records or ()):
                why = "is of --predict, --layers and a .csv of --records: JSON lines say it themselves; leave it out"
                refuse_lost(conditions, why)
        if not predict and not records:
            refuse_lost(line, "is a line among the speeds of --records and --predict; leave it out")
        stated = Asked(
            device=device, batch_size=batch_size, precision=precision, layout=layout, compiled=compiled, mode=mode
        )
        wanted = _Wanted(
            conditions=stated,
            calibration=calibration,
            image_size=img_size,
            records=tuple(records or ()),
            predict=predict,
            models=models,
            layers=tuple(layers or ()),
            papers=papers,
            ablation=ablation,
            min_throughput=min_throughput,
        )
        path = _speed_report(wanted, output or Path("speed.html"))
    print_json({"report": str(path)}) if as_json else say(f"report: {path}")


def _compare(folders: list[Path], output: Path, max_drop: float | None, *, as_json: bool) -> None:
    """Runs beside each other; exit code 3 where one is worse than was allowed."""
    from convscale.show.comparison import MOST_RUNS, compare, names_of, verdict, write_comparison
    from convscale.show.runs import whole_run

    check_output(output, PAGES)
    if max_drop is not None:
        check_number("--max-drop", max_drop, "a number of points from 0 to 100", 0, 100)
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs are given; at most {MOST_RUNS} are compared at once")
    runs = [whole_run(folder) for folder in folders]
    found = [compare(runs[0], run) for run in runs[1:]]
    unlike = next(((run, one) for run, one in zip(runs[1:], found, strict=True) if one.drop_points is None), None)
    if max_drop is not None and unlike is not None:
        raise UserError(
            f"--max-drop needs accuracies of the same kind and images; {unlike[0].run.path}: {verdict(unlike[1])}"
        )
    write_comparison(runs, found, output)
    worse = [one.new for one in found if max_drop is not None and (one.drop_points or 0) > max_drop + 1e-9]
    if as_json:
        values = {"runs": [run.run.to_dict() for run in runs], "compared": [one.to_dict() for one in found]}
        print_json({"report": str(output), **values, "worse": worse})
    else:
        for name, one in zip(names_of(runs)[1:], found, strict=True):
            say(f"{name}: {verdict(one)}")
            if one.same_data is False:
                say("they were trained on other data", indent=2)
            for key, (before, now) in one.recipe.items():
                say(f"{key}: {before} -> {now}", indent=2)
        say(f"report: {output}")
    for path in worse:
        say(f"{path} loses more than {max_drop:g} points", err=True)
    if worse:
        raise typer.Exit(MISSED)


def list_runs(top: Path, as_json: bool) -> None:
    """Runs in a folder, a line each."""
    from convscale.show.runs import runs_below

    found = runs_below(top)
    if as_json:
        print_json([run.to_dict() for run in found])
        return
    if not found:
        raise UserError(f"folder {top} holds no run: no fit.json, no log.jsonl, no artefact")
    columns = [
        *(Column("run"), Column("kind"), Column("network"), number_column("accuracy"), Column("of")),
        *(number_column("images/s"), Column("under"), Column("data"), number_column("cost"), Column("commit")),
        Column("state"),
    ]
    rows = [
        [
            str(run.path.relative_to(top)) if run.path != top else str(top),
            run.kind,
            run.network or words.UNKNOWN,
            _accuracy(run.accuracy, run.interval),
            run.metric or words.UNKNOWN,
            words.rate(run.images_per_s),
            run.conditions or words.UNKNOWN,
            " ".join(each for each in (run.data, (run.data_digest or "")[:8]) if each) or words.UNKNOWN,
            words.seconds(run.seconds),
            (run.commit or words.UNKNOWN)[:8],
            run.state,
        ]
        for run in found
    ]
    print_table(columns, rows)
    say("Accuracy with its 95 % interval.")


def _accuracy(share: float | None, interval: tuple[float, float] | None) -> str:
    if share is None:
        return words.UNKNOWN
    ends = "" if interval is None else f" ({100 * interval[0]:.1f}–{100 * interval[1]:.1f})"
    return f"{words.percent(share)}{ends}"


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What a report of speeds is to hold, as the options say."""

    conditions: Asked
    calibration: Path | None
    image_size: int | None
    records: tuple[Path, ...]
    predict: bool
    models: list[str] | None
    layers: tuple[str, ...]
    papers: bool
    ablation: bool
    min_throughput: float | None

    def basis(self) -> Basis:
        """What is predicted, and how."""
        from convscale.choice.basis import basis_of

        return basis_of(self.conditions, self.calibration)


def _run_report(run_dir: Path, output: Path | None) -> Path:
    """The report of a run of ``fit``, ``train`` or ``search``, made again."""
    from convscale.show.plots import save_fit_png
    from convscale.show.report import write_fit_report
    from convscale.show.search_report import write_search_report
    from convscale.show.train_report import write_train_report

    if (run_dir / "study.json").is_file():
        if output is not None:
            check_output(output, PAGES)
        return write_search_report(run_dir, output)
    training = not (run_dir / "fit.json").is_file() and (run_dir / "log.jsonl").is_file()
    if output is not None:
        check_output(output, PAGES if training else PICTURES)
        if output.suffix == ".png":
            return save_fit_png(run_dir, output)
    return (write_train_report if training else write_fit_report)(run_dir, output)


def _scaling_report(base: str, checkpoints: list[Path], pictures: list[Path], output: Path) -> Path:
    """EfficientNet's figure 7, of a user's own trainings and pictures."""
    from convscale.networks.names import spec_of
    from convscale.show.scaling_maps import write_scaling_maps

    check_output(output, PAGES)
    return write_scaling_maps(spec_of(base), checkpoints, pictures, output)


def _speed_report(wanted: _Wanted, output: Path) -> Path:
    """Speeds, layers and comparisons as a page, or accuracy against throughput as a picture."""
    from convscale.show.speed_plots import save_speed_png
    from convscale.show.speed_points import points_of
    from convscale.show.speed_report import write_speed_report
    from convscale.show.studies import ABLATION, papers_example, tresnet_ablation

    check_output(output, PICTURES)
    if output.suffix == ".png" and (wanted.layers or wanted.papers or wanted.ablation):
        raise UserError(
            "a .png shows accuracy against throughput alone; give --layers, --papers and --ablation with an .html file"
        )
    check_browser(output)  # before minutes of predicting, not after
    measured = [record for path in wanted.records for record in _read(path, wanted.conditions)]
    if wanted.records and not measured:
        raise UserError(f"{', '.join(map(str, wanted.records))}: no record in it")
    # Records of the ablation's networks stand in its comparison instead.
    elsewhere = {spec.name for spec in ABLATION.values()} if wanted.ablation else set()
    points = [*(record for record in measured if record.model not in elsewhere), *_predictions(wanted)]
    if output.suffix == ".png":
        return save_speed_png(points_of(points), output, min_throughput=wanted.min_throughput)
    comparisons = [papers_example()] if wanted.papers else []
    comparisons += [tresnet_ablation(records=measured)] if wanted.ablation else []
    return write_speed_report(
        points,
        output,
        comparisons=comparisons,
        profiles=_profiles(wanted),
        min_throughput=wanted.min_throughput,
    )


def _predictions(wanted: _Wanted) -> list[SpeedPoint]:
    """What released weights are predicted to run at, where that was asked for."""
    from convscale.show.candidates import predicted_points

    if not wanted.predict:
        return []
    sizes = None if wanted.image_size is None else [wanted.image_size]
    models = None if wanted.models is None else [spec_or_name(name) for name in wanted.models]
    return predicted_points(wanted.basis(), models, image_sizes=sizes, progress=lambda text: say(text, err=True))


def _profiles(wanted: _Wanted) -> list[Profile]:
    """Networks layer by layer."""
    from convscale.predictor.profile import profile

    if not wanted.layers:
        return []
    basis = wanted.basis()
    if not basis.predicted:
        raise UserError(
            f"--layers shows what is predicted for a named device, got device {basis.conditions.device!r}; or give "
            "--calibration"
        )
    return [
        profile(network_of(name), basis.conditions, image_size=wanted.image_size, calibration=basis.read_calibration())
        for name in wanted.layers
    ]


def check_output(path: Path, known: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: the file's name does not end in one of these.
    """
    if path.suffix not in known:
        raise UserError(f"--output {path} must end in {words.listed(known, 'or')}")


def check_browser(path: Path) -> None:
    """
    Raises:
        UserError: the file is a picture, and there is no browser to draw it.
    """
    if path.suffix == ".png":
        from convscale.show.picture import browser

        browser()


def write_choice(choice: Choice, path: Path) -> None:
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


def _read(path: Path, asked: Asked) -> list[Record]:
    """Records of a file; of a table of timm's, which does not say its device, as the flags say."""
    from convscale.conditions import Conditions
    from convscale.machine import Environment
    from convscale.predictor.devices import get_device
    from convscale.predictor.fitted import usual_on
    from convscale.speed.records import read_records, read_timm_csv

    if path.suffix != ".csv":
        return read_records(path, torn=progress_aside)
    card = get_device(asked.device)
    stated = Conditions(
        device=card.name,
        mode=asked.mode,
        precision=asked.precision or usual_on(card.name, asked.mode).precision,
        layout=asked.layout,
        runtime="compiled" if asked.compiled else "eager",
    )
    return read_timm_csv(path, conditions=stated, environment=Environment(device_name=card.title, cores=1))
