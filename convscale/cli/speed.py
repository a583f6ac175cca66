"""The commands about speed: predict, choose, calibrate. ``register`` puts them on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscale import words
from convscale.cli.options import ImgSize, Json, Overwrite, Threads, print_json, say
from convscale.cli.report import PICTURES, check_output, write_choice
from convscale.cli.tables import Column, number_column, print_table
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError
from convscale.networks.names import spec_of

if TYPE_CHECKING:
    from convscale.choice.decide import Choice, Option
    from convscale.choice.largest import Largest
    from convscale.speed.records import Record

Device = Annotated[
    str, typer.Option("--device", help="A named GPU such as rtx-4090 (predicted), or cpu, cuda, cuda:N (measured).")
]
BatchOption = Annotated[
    int | None, typer.Option("-b", "--batch-size", help="Images per call; 256 on a named GPU, 8 here when left out.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", help="fp32, amp, bf16, fp16 or int8; amp on a GPU, fp32 on a CPU when left out."),
]
Layout = Annotated[str, typer.Option("--layout", help="nchw or nhwc.")]
Compiled = Annotated[bool, typer.Option("--compiled", help="Behind PyTorch's compiler instead of eager.")]
Mode = Annotated[str, typer.Option("--mode", help="infer or train.")]
Calibration = Annotated[Path | None, typer.Option("--calibration", help="File of `convscale calibrate`.")]
RecordsFile = Annotated[
    Path | None,
    typer.Option("--records", help="JSON lines: reuse its measurements of these conditions, append new ones."),
]

_SHOWN = 8
"""Rows of a list that are shown unless all are asked for."""
SPEC_FILES = (".json", ".yaml", ".yml")


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("predict")(predict_command)
    app.command("choose")(choose_command)
    app.command("calibrate")(calibrate_command)


def _progress(text: str) -> None:
    """To people on the side, so that standard output stays clean."""
    say(text, err=True)


def predict_command(
    models: Annotated[list[str], typer.Argument(help="Model names or spec files; ratios are to the first.")],
    device: Device,
    batch_size: BatchOption = None,
    img_size: ImgSize = None,
    precision: PrecisionOption = None,
    layout: Layout = "nchw",
    compiled: Compiled = False,
    mode: Mode = "infer",
    calibration: Calibration = None,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", help="eager (when left out), compiled; onnxruntime, tensorrt: by compiled's speed."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict throughput on a GPU that is not here, with its interval, and ratios between models."""
    from convscale.choice.basis import Asked, basis_of, device_title
    from convscale.choice.facts import SizedSpec
    from convscale.choice.speeds import predicted

    asked = Asked(
        device=device,
        batch_size=batch_size,
        precision=precision,
        runtime=runtime,
        layout=layout,
        compiled=compiled,
        mode=mode,
    )
    basis = basis_of(asked, calibration)
    if not basis.predicted:
        raise UserError(
            f"device {device!r} is this machine's own: `convscale measure` times it, or `convscale calibrate` first "
            "and use --calibration"
        )
    networks = [SizedSpec(spec, img_size or spec.input.size) for spec in map(spec_of, models)]
    predictions = [predicted(network, basis) for network in networks]
    ratios = [p.images_per_s / predictions[0].images_per_s for p in predictions]
    if as_json:
        rows = [
            {
                "name": network.spec.name,
                "image_size": network.image_size,
                "images_per_s": p.images_per_s,
                "low": p.low,
                "high": p.high,
                "bound_by": str(p.bound_by),
                "doubts": [str(doubt) for doubt in p.doubts],
                "ratio": ratio,
            }
            for network, p, ratio in zip(networks, predictions, ratios, strict=True)
        ]
        ratio_to = networks[0].spec.name
        print_json({"conditions": basis.conditions.to_dict(), "ratio_to": ratio_to, "predictions": rows})
        return
    say(f"predicted for {device_title(basis.conditions.device)}: {_in_words(basis.conditions)}")
    labels = [f"{network.spec.name} @{network.image_size}" for network in networks]
    print_table(
        [
            Column("network"),
            number_column("images/s"),
            number_column("80 % interval"),
            number_column("ratio"),
            Column("bound by"),
        ],
        [
            [
                label,
                words.exact(p.images_per_s),
                f"{words.exact(p.low)} to {words.exact(p.high)}",
                words.number(r),
                p.bound_by,
            ]
            for label, p, r in zip(labels, predictions, ratios, strict=True)
        ],
    )
    if len(labels) > 1:
        say(f"ratios are to {labels[0]}, and surer than absolute speeds")
    for doubt in dict.fromkeys(doubt for p in predictions for doubt in p.doubts):
        about = [label for label, p in zip(labels, predictions, strict=True) if doubt in p.doubts]
        say(f"doubt: {doubt}" if len(about) == len(labels) else f"doubt of {', '.join(about)}: {doubt}")


def choose_command(
    device: Device = "cpu",
    min_throughput: Annotated[
        float | None, typer.Option("--min-throughput", help="Images/s to keep, model only.")
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option("--max-latency", help="Milliseconds a call of the batch may take; batch 1 unless -b."),
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option("--max-memory", help="GB (2**30 bytes) alive at once in a call, as counted.")
    ] = None,
    max_params: Annotated[float | None, typer.Option("--max-params", help="Millions of parameters.")] = None,
    batch_size: BatchOption = None,
    precision: PrecisionOption = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="eager, compiled, onnxruntime, openvino, or best (tuned for each network; on a CPU when left out).",
        ),
    ] = None,
    mode: Mode = "infer",
    layout: Layout = "nchw",
    compiled: Compiled = False,
    threads: Threads = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model", help="Only these names, patterns, tags or spec files. Repeatable; all weights when left out."
        ),
    ] = None,
    img_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--img-size", help="Try each at this size. Repeatable; sizes with a published figure when left out."
        ),
    ] = None,
    accuracy: Annotated[str, typer.Option("--accuracy", help="imagenet (published) or none.")] = "imagenet",
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale", help="Instead: the largest scale of this network (name or spec file) that keeps the speed."
        ),
    ] = None,
    along: Annotated[str, typer.Option("--along", help="With --scale: phi, depth, width or resolution.")] = "phi",
    rule: Annotated[
        str, typer.Option("--rule", help="With --scale: compound, fast, depth, width or resolution.")
    ] = "compound",
    save: Annotated[
        Path | None,
        typer.Option(
            "--output", help="With --scale: write the spec to this .yaml or .json file; else a report, .html or .png."
        ),
    ] = None,
    calibration: Calibration = None,
    records: RecordsFile = None,
    budget: Annotated[int, typer.Option("--budget", help="Measure at most this many networks.")] = 20,
    seconds: Annotated[float, typer.Option("--seconds", help="Timed seconds per network, at least.")] = 1.0,
    show_all: Annotated[bool, typer.Option("--all", help="Every rejected network with its reason.")] = False,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", help="JSON lines measured on the named device, as a kit's measure.py writes them."),
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option("--kit", help="Also write what could win into this folder, with a script to measure it there."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Choose the most accurate network that keeps a constraint on a device."""
    from dataclasses import replace

    from convscale.choice.basis import Asked, basis_of
    from convscale.choice.candidates import candidates_of
    from convscale.choice.carried import write_kit
    from convscale.choice.choose import choose_from
    from convscale.choice.largest import Direction, Effort, largest_under
    from convscale.choice.rows import read_rows, rows_of
    from convscale.ship.kit import check_kit

    if all(limit is None for limit in (min_throughput, max_latency, max_memory, max_params)):
        raise UserError("give a constraint: --min-throughput, --max-latency, --max-memory or --max-params")
    if save is not None:  # before minutes of measuring, not after
        check_output(save, PICTURES if scale is None else (".yaml", ".yml", ".json"))
    if scale is not None and (max_memory is not None or max_params is not None or models or img_sizes):
        raise UserError("--scale takes --min-throughput and --max-latency only, and no --model or --img-size")
    constraint = Constraint(
        min_throughput=min_throughput,
        max_latency_ms=max_latency,
        max_memory_gb=max_memory,
        max_params_m=max_params,
    )
    asked = Asked(
        device=device,
        batch_size=batch_size,
        precision=precision,
        runtime=runtime,
        mode=mode,
        layout=layout,
        compiled=compiled,
        threads=threads,
        latency=max_latency is not None and min_throughput is None,
    )
    if scale is not None and (measured is not None or kit is not None):
        raise UserError("--scale takes neither --measured nor --kit; choose among candidates with them")
    found = None
    if measured is not None:
        found, asked = read_rows(measured, asked)
    elif kit is not None and runtime is None and not compiled:
        asked = replace(asked, runtime="onnxruntime")  # what a kit is measured in
    basis = basis_of(asked, calibration)
    rows = None if found is None or measured is None else rows_of(found, basis, measured)
    if kit is not None:
        if not basis.predicted:
            raise UserError(f"--kit is for a device that is not here, got {device!r}; `convscale choose` measures here")
        check_kit(basis.conditions, kit, overwrite=overwrite)  # before candidates are looked at
    effort = Effort(records=records, seconds=seconds, say=_progress)
    if scale is not None:
        direction = Direction(along=along, rule=rule)
        _finish_scale(largest_under(spec_of(scale), basis, constraint, direction, effort), save, as_json)
        return
    if budget < 1:
        raise UserError(f"budget is {budget!r}; it must be a whole number of networks to measure, at least 1")
    named = [spec_of(name) if Path(name).suffix in SPEC_FILES else name for name in models] if models else None
    choice = choose_from(candidates_of(named, img_sizes, accuracy), basis, constraint, effort, budget=budget, rows=rows)
    if save is not None:
        write_choice(choice, save)
    written = None if kit is None else write_kit(choice, kit, overwrite=overwrite, progress=_progress)
    if as_json:
        print_json({**choice.to_dict(), **({} if written is None else {"kit": written.to_dict()})})
    else:
        _print_choice(choice, show_all)
        if written is not None:
            say(f"kit: {written}")
        if save is not None:
            say(f"report: {save}")


def _finish_scale(largest: Largest, save: Path | None, as_json: bool) -> None:
    from convscale.arch.spec import save_spec
    from convscale.choice.measured import chosen_among

    if save is not None:
        save_spec(largest.spec, save)
    if as_json:
        print_json(largest.to_dict())
        return
    say(str(largest))
    say(_in_words(largest.basis.conditions, chosen_among(largest.basis) if largest.basis.tuned else ""))
    say(f"written to {save}" if save else "--output FILE.yaml saves it; wherever a model name goes, the file goes too")


def _in_words(c: Conditions, chosen_from: str = "") -> str:
    mode = "training" if c.mode == "train" else "inference"
    threads = f", {c.threads} threads" if c.threads else ""
    return f"{mode}, {chosen_from or f'{c.runtime}, {c.precision}, {c.layout}'}, batch {c.batch_size}{threads}"


def _print_choice(choice: Choice, show_all: bool) -> None:
    """A choice for people."""
    from convscale.choice.candidates import describe_accuracy
    from convscale.choice.decide import describe_speed

    best = choice.best
    say(f"{best.label}: {best.reason}")
    source = f"; {best.candidate.source}" if best.candidate.source else ""
    say(f"{describe_accuracy(best.candidate)}{source}", 2)
    chance = best.chance(choice.floor) if choice.floor else None
    say(
        describe_speed(best.speed)
        + (f", {words.odds(chance)} likely to keep {words.exact(choice.floor)}" if chance is not None else ""),
        2,
    )
    say(
        f"{words.large(best.facts.params)} parameters, {words.gigabytes(best.facts.memory_bytes)} at batch "
        f"{best.batch_size} as counted",
        2,
    )
    for doubt in best.speed.doubts if best.speed else ():
        say(f"doubt: {doubt}", 2)
    say(f"{choice.kind} on {choice.device}: {_in_words(choice.conditions, choice.chosen_from)}", 2)
    _print_front(choice.front, best)
    _reasons("may be better, but not sure to keep it", choice.maybe, show_all)
    _reasons("keep it, accuracy not known", choice.alternatives, show_all)
    if choice.aligned:
        say("hardware-aligned relatives:")
        for aligned in choice.aligned[: None if show_all else 3]:
            say(str(aligned), 2)
    _reasons("rejected", sorted(choice.rejected, key=lambda o: -(o.top1 or 0)), show_all)
    for note in choice.notes:
        say(f"note: {note}")


def _print_front(options: Sequence[Option], best: Option) -> None:
    say("front, fastest first (* chosen, ? maybe, - not fast enough):")
    mixed = len({o.speed.kind for o in options if o.speed}) > 1
    rows = [
        [
            "*" if o is best else {"maybe": "?", "no": "-"}.get(o.verdict, ""),
            words.accuracy(o.top1),
            words.exact(o.images_per_s or 0),
            *([o.speed.kind if o.speed else ""] if mixed else []),
            o.label,
        ]
        for o in options
    ]
    kinds = [Column("speed is")] if mixed else []
    print_table([Column(""), number_column("top-1"), number_column("images/s"), *kinds, Column("network")], rows)


def _reasons(title: str, options: Sequence[Option], show_all: bool) -> None:
    if not options:
        return
    shown = list(options)[: None if show_all else _SHOWN]
    say(f"{title}:")
    for o in shown:
        say(f"{o.label}{'' if o.top1 is None else f' ({words.accuracy(o.top1)})'}: {o.reason}", 2)
    if len(options) > len(shown):
        say(f"and {len(options) - len(shown)} more; --all shows them", 2)


CALIBRATION_MODELS = (
    "mobilenetv2_050",
    "mobilenetv1_100",
    "mnasnet_100",
    "efficientnet_lite0",
    "efficientnet_b0",
    "mixnet_s",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet50d",
    "seresnext50_32x4d",
    "tresnet_m",
)
"""A dozen that differ in what binds them: depthwise, grouped, split, dense; small and large."""


def calibrate_command(
    device: Annotated[
        str, typer.Option("--device", help="cpu, or the named GPU that the measurements are of.")
    ] = "cpu",
    output: Annotated[Path, typer.Option("--output", help="Calibration file to write.")] = Path("calibration.json"),
    csv: Annotated[Path | None, typer.Option("--csv", help="Go by a table of timm's benchmark.py.")] = None,
    measurements: Annotated[
        list[Path] | None,
        typer.Option("--measurement", help="Go by a JSON-lines file of `convscale measure --record`. Repeatable."),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="What to measure here; a dozen networks when left out. Repeatable."),
    ] = None,
    mode: Mode = "infer",
    precision: PrecisionOption = None,
    layout: Layout = "nchw",
    compiled: Compiled = False,
    batch_size: BatchOption = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Timed seconds per network, at least.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Set the predictor to a device: by measuring a dozen models here, or by measurements or a timm table of it.

    --mode, --precision, --layout and --compiled say what a table was measured under; its name is not trusted for that.
    """
    from convscale.choice.basis import Asked, basis_of
    from convscale.machine import Environment
    from convscale.predictor.calibrate import calibrate, observations_of
    from convscale.predictor.calibration import save_calibration
    from convscale.predictor.devices import get_device
    from convscale.speed.records import read_records, read_timm_csv

    card = "" if device.startswith("cuda") else get_device(device).name
    if csv is not None and measurements:
        raise UserError("give --csv or --measurement, not both")
    if (csv is not None or measurements) and models:
        raise UserError("--model says what to measure here; with --csv or --measurement nothing is measured")
    if not card or (card != "cpu" and csv is None and not measurements):
        raise UserError(
            f"device {device!r} is not measured by calibrate: record it with `convscale measure --device cuda --record "
            "FILE`, "
            "then `convscale calibrate --device NAME --measurement FILE`"
        )
    asked = Asked(
        device=device,
        batch_size=batch_size,
        precision=precision,
        layout=layout,
        mode=mode,
        runtime="compiled" if compiled else "eager",
        threads=threads,
    )
    conditions = basis_of(asked).conditions
    if csv is not None:
        there = Environment(device_name=get_device(card).title, cores=1)
        records = read_timm_csv(csv, conditions=conditions, environment=there)
    elif measurements:
        records = [record for path in measurements for record in read_records(path)]
    else:
        records = _measure_models(models or list(CALIBRATION_MODELS), conditions, seconds)
    observations, unknown = observations_of(records, card)
    if not observations:
        raise UserError(f"nothing to calibrate with: no known model among {', '.join(unknown[:3]) or 'no rows'}")
    made = calibrate(observations)
    save_calibration(made, output)
    if as_json:
        print_json({"output": str(output), "unknown": unknown, **made.to_dict()})
        return
    say(
        f"calibrated for {get_device(card).title} ({made.mode}, {made.runtime}, {made.layout}) by {made.count} "
        f"measurements: {output}"
    )
    say(
        f"predicted times change by a factor of {words.number(made.scale)}; on four of five of these networks "
        f"they are then within {words.percent(made.spread, 0)}",
        2,
    )
    if unknown:
        say(
            "left out, since nothing here builds them: "
            f"{', '.join(unknown[:5])}{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}",
            2,
        )


def _measure_models(models: list[str], conditions: Conditions, seconds: float) -> list[Record]:
    """Records of the networks, timed here one after the other."""
    from convscale.speed.measuring import measure
    from convscale.speed.records import Record

    records = []
    for number, name in enumerate(models, start=1):
        spec = spec_of(name)
        measured = measure(spec, conditions, min_seconds=seconds, max_seconds=10 * seconds)
        _progress(f"{number}/{len(models)}: {spec.name} {words.rate(measured.images_per_s)} images/s")
        records.append(Record(model=spec.name, measurement=measured))
    return records
