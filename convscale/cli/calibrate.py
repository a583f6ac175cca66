"""The command calibrate: the predictor set to a device. ``register`` puts it on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscale import words
from convscale.cli.options import Json, Overwrite, Threads, print_json, refuse_lost, say
from convscale.cli.speed_options import (
    BatchOption,
    Compiled,
    Layout,
    Mode,
    PrecisionOption,
    progress_aside,
)
from convscale.errors import UserError
from convscale.files import check_new_file, check_output_file, check_outside
from convscale.networks.names import network_of

if TYPE_CHECKING:
    from convscale.conditions import Conditions
    from convscale.predictor.calibrate import Observation


def register(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("calibrate")(calibrate_command)


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
        str, typer.Option("--device", help="cpu, or the named GPU or processor that the measurements are of.")
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
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Time a hundred lone layers here, two minutes, instead of networks.")
    ] = False,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Timed seconds per network (1), or per layer of a sweep (0.25).")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Set the predictor to a device: by a dozen models or lone layers (--sweep) timed here, or by measurements of it.

    --mode, --precision, --layout and --compiled say what a table was measured under; its name is not trusted for that.
    Records of --measurement say it themselves.
    """
    from convscale.choice.basis import Asked, basis_of
    from convscale.machine import Environment
    from convscale.predictor.calibrate import observations_of
    from convscale.predictor.devices import get_device, is_processor, is_processor_here
    from convscale.speed.records import read_records, read_timm_csv

    check_output_file(output)  # before minutes of measuring, not after
    check_new_file(output, overwrite=overwrite)
    check_outside(output, [("--csv", csv), *(("--measurement", each) for each in measurements or ())])
    if sweep:
        if csv is not None or measurements or models or batch_size is not None:
            raise UserError("--sweep times its own layers: leave --csv, --measurement, --model and --batch-size out")
        device, observations = _sweep(device, precision, layout, mode, compiled, threads, seconds)
        _finish(observations, [], device, output, as_json)
        return
    conditions_of = {"--mode": mode != "infer", "--precision": precision, "--layout": layout != "nchw"}
    conditions_of |= {"--compiled": compiled, "--threads": threads is not None}
    measuring = {"--batch-size": batch_size is not None, "--seconds": seconds is not None}
    if measurements:
        refuse_lost({**conditions_of, **measuring}, "is not for --measurement, whose records say it; leave it out")
    if csv is not None:
        refuse_lost(measuring, "is not for --csv: its rows say their batch, and nothing is timed; leave it out")
    seconds = 1.0 if seconds is None else seconds
    card = "" if device.startswith("cuda") else get_device(device).name
    if csv is not None and measurements:
        raise UserError("give --csv or --measurement, not both")
    if (csv is not None or measurements) and models:
        raise UserError("--model says what to measure here; with --csv or --measurement nothing is measured")
    if not card or (csv is None and not measurements and not is_processor_here(card)):
        kind = "cpu" if card and is_processor(card) else "cuda"
        raise UserError(
            f"device {device!r} is not measured by calibrate{'' if kind == 'cuda' else ' here'}: record it with "
            f"`convscale measure --device {kind} --record FILE`{'' if kind == 'cuda' else ' there'}, then `convscale "
            f"calibrate --device {card if kind == 'cpu' else 'NAME'} --measurement FILE`"
        )
    asked = Asked(
        device=device,
        batch_size=batch_size,
        precision=precision,
        layout=layout,
        mode=mode,
        runtime="compiled" if compiled else "eager",
        threads=threads,
        by_rows=True,
    )
    conditions = basis_of(asked).conditions
    if csv is not None:
        there = Environment(device_name=get_device(card).title, cores=1)
        records = read_timm_csv(csv, conditions=conditions, environment=there)
    elif measurements:
        records = [record for path in measurements for record in read_records(path, torn=progress_aside)]
    else:
        here = replace(conditions, device="cpu")
        observations = _of(card, _measure_models(models or list(CALIBRATION_MODELS), here, seconds))
        _finish(observations, [], card, output, as_json)
        return
    observations, unknown = observations_of(records, card)
    if not observations:
        raise UserError(f"nothing to calibrate with: no known model among {', '.join(unknown[:3]) or 'no rows'}")
    _finish(observations, unknown, card, output, as_json)


def _finish(observations: list[Observation], unknown: list[str], card: str, output: Path, as_json: bool) -> None:
    """Calibrate, write, and say what came of it."""
    from convscale.predictor.calibrate import calibrate
    from convscale.predictor.calibration import save_calibration
    from convscale.predictor.devices import get_device

    waiting: list[str] = []
    made = calibrate(observations, waiting.append)
    save_calibration(made, output)
    if as_json:
        print_json({"output": str(output), "unknown": unknown, "left_out": waiting, **made.to_dict()})
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
    for line in waiting:
        say(line, 2)
    if unknown:
        say(
            "left out, since nothing here builds them: "
            f"{', '.join(unknown[:5])}{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}",
            2,
        )


def _of(device: str, observations: list[Observation]) -> list[Observation]:
    """What was observed here, under the name that the device was asked for by."""
    return [replace(one, conditions=replace(one.conditions, device=device)) for one in observations]


def _sweep(
    device: str,
    precision: str | None,
    layout: str,
    mode: str,
    compiled: bool,
    threads: int | None,
    seconds: float | None,
) -> tuple[str, list[Observation]]:
    """The device's own name, and what a sweep measured on it.

    Raises:
        UserError: a named GPU or processor that is not the one here.
    """
    from convscale.conditions import Conditions
    from convscale.machine import processor_name
    from convscale.predictor.devices import get_device, is_processor, is_processor_here
    from convscale.predictor.sweep import SECONDS, measure_sweep, sheet_here

    asked = "" if device.startswith("cuda") else get_device(device).name
    if is_processor(asked):
        here, card, found = "cpu", asked, processor_name()
    else:
        here = "cuda" if asked else device
        card = found = sheet_here(here).name
    if asked and not (is_processor_here(asked) if here == "cpu" else asked == card):
        raise UserError(
            f"device {device!r} is not the one here, which is {found}; leave --device at {here} to sweep that"
        )
    conditions = Conditions(
        device=here,
        mode=mode,
        precision=precision or ("fp32" if here == "cpu" else "amp"),
        layout=layout,
        runtime="compiled" if compiled else "eager",
        threads=threads,
    )
    swept = measure_sweep(conditions, seconds=SECONDS if seconds is None else seconds, say=progress_aside)
    return card, _of(card, swept)


def _measure_models(models: list[str], conditions: Conditions, seconds: float) -> list[Observation]:
    """The networks timed here one after the other: spec files and functions of the user's own as well as names."""
    from convscale.predictor.calibrate import Observation
    from convscale.speed.measuring import measure

    found = []
    nets = [network_of(name) for name in models]  # a name that nothing builds must not cost what was timed before it
    for number, net in enumerate(nets, start=1):
        measured = measure(net, conditions, min_seconds=seconds, max_seconds=10 * seconds)
        progress_aside(f"{number}/{len(models)}: {net.name} {words.rate(measured.images_per_s)} images/s")
        found.append(Observation(net=net, conditions=measured.conditions, images_per_s=measured.images_per_s))
    return found
