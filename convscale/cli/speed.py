"""The commands about speed that is chosen by: predict and choose. ``register`` puts them on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscale import words
from convscale.cli.choice_text import in_words, print_choice
from convscale.cli.detect import choose_boxes, predict_boxes
from convscale.cli.options import (
    Attention,
    Commercial,
    Confidence,
    ImgSize,
    Json,
    Licences,
    NoExtraData,
    Overwrite,
    Threads,
    Zoo,
    end_where_missed,
    print_json,
    say,
)
from convscale.cli.report import PICTURES, check_browser, check_output, write_choice
from convscale.cli.speed_options import (
    BatchOption,
    Compiled,
    DetectorOptions,
    Device,
    Head,
    Layout,
    Mode,
    PrecisionOption,
    Task,
    detector_head,
    progress_aside,
)
from convscale.cli.tables import Column, number_column, print_table
from convscale.conditions import Conditions, Constraint, Size, size_text
from convscale.errors import UserError
from convscale.files import check_new_file, check_outside
from convscale.networks.names import is_spec_file, network_of, size_of, spec_of, spec_or_name

if TYPE_CHECKING:
    from convscale.choice.facts import SizedSpec
    from convscale.choice.largest import Largest
    from convscale.predictor.predict import Prediction

Calibration = Annotated[Path | None, typer.Option("--calibration", help="File of `convscale calibrate`.")]
RecordsFile = Annotated[
    Path | None,
    typer.Option("--records", help="JSON lines: reuse its measurements of these conditions, append new ones."),
]


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("predict")(predict_command)
    app.command("choose")(choose_command)


def predict_command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Model names, spec files, package.module:function, or .workload.json files; ratios are to the first."
        ),
    ],
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
        typer.Option(
            "--runtime",
            help="eager (when left out; on a processor compiled), compiled; onnxruntime, tensorrt (on a GPU): by "
            "compiled's speed.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save-workload", help="Also write the one network's workload there (.workload.json)."),
    ] = None,
    overwrite: Overwrite = False,
    task: Task = "classification",
    head: Head = None,
    detector: DetectorOptions = None,
    as_json: Json = False,
) -> None:
    """Predict throughput on a GPU or processor that is not here, with its interval, and ratios between models."""
    from convscale.choice.basis import Asked, basis_of
    from convscale.choice.facts import SizedSpec
    from convscale.choice.speeds import predicted
    from convscale.predictor.workload_file import SUFFIX

    if any(model.endswith(SUFFIX) for model in models):
        if not all(model.endswith(SUFFIX) for model in models):
            raise UserError(f"give names of networks or {SUFFIX} files, not both")
        named = (batch_size, img_size, precision, calibration, runtime, save, detector, head)
        given = [value is not None for value in named]
        given += [compiled, layout != "nchw", mode != "infer", task != "classification"]
        if any(given):
            raise UserError("a workload file holds for its own conditions: give --device and nothing else")
        _predict_files(models, device, as_json)
        return
    boxes_by = detector_head(task, head, detector)
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
    if boxes_by is not None:
        if save is not None:
            raise UserError("--save-workload writes a classifier's workload; leave it out with --task detection")
        predict_boxes(models, head, img_size, detector, basis, as_json)
        return
    if save is not None:
        check_new_file(save, overwrite=overwrite, what="--save-workload")
    networks = [SizedSpec(net, img_size or size_of(net)) for net in map(network_of, models)]
    predictions = [predicted(network, basis) for network in networks]
    if save is not None:
        if len(networks) > 1:
            raise UserError(f"--save-workload writes one network's workload, got {len(networks)} networks")
        _save_workload(networks[0], basis.conditions, save)
    _print_predictions(
        [(network.spec.name, network.image_size) for network in networks], predictions, basis.conditions, as_json
    )


def _predict_files(models: Sequence[str], device: str, as_json: bool) -> None:
    """Predict stored workloads, all of the same conditions; loads no torch."""
    from dataclasses import replace

    from convscale.predictor.devices import get_device
    from convscale.predictor.workload_file import predict_stored, read_workload

    stored = [read_workload(model) for model in models]
    conditions = replace(stored[0].conditions, device=get_device(device).name, image_size=None)
    for each, model in zip(stored, models, strict=True):
        if replace(each.conditions, device=conditions.device, image_size=None) != conditions:
            raise UserError(f"{model} holds for other conditions than {models[0]}; predict one at a time")
    named = [(each.name, each.conditions.image_size or 0) for each in stored]
    _print_predictions(named, [predict_stored(each, device) for each in stored], conditions, as_json)


def _save_workload(network: SizedSpec, conditions: Conditions, path: Path) -> None:
    """Write a network's workload."""
    from dataclasses import replace

    from convscale.predictor.workload_file import SUFFIX, save_workload

    if not path.name.endswith(SUFFIX):
        raise UserError(f"--save-workload is {path.name!r}; its name must end in {SUFFIX}")
    save_workload(network.spec, path, replace(conditions, image_size=network.image_size), name=network.spec.name)


def _print_predictions(
    networks: Sequence[tuple[str, Size]], predictions: Sequence[Prediction], conditions: Conditions, as_json: bool
) -> None:
    """Predictions of networks by name and size, for people or machines."""
    from convscale.choice.basis import device_title

    ratios = [p.images_per_s / predictions[0].images_per_s for p in predictions]
    if as_json:
        rows = [
            {
                "name": name,
                "image_size": size,
                "images_per_s": p.images_per_s,
                "low": p.low,
                "high": p.high,
                "bound_by": str(p.bound_by),
                "doubts": [str(doubt) for doubt in p.doubts],
                "ratio": ratio,
            }
            for (name, size), p, ratio in zip(networks, predictions, ratios, strict=True)
        ]
        print_json({"conditions": conditions.to_dict(), "ratio_to": networks[0][0], "predictions": rows})
        return
    say(f"predicted for {device_title(conditions.device)}: {in_words(conditions)}")
    labels = [f"{name} @{size_text(size)}" for name, size in networks]
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
            help="eager, compiled, onnxruntime, tensorrt (on a GPU), openvino, or best (tuned for each network; on a "
            "CPU when left out).",
        ),
    ] = None,
    mode: Mode = "infer",
    layout: Layout = "nchw",
    compiled: Compiled = False,
    threads: Threads = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Only these names, patterns, tags, spec files or package.module:function. Repeatable; every released "
            "ConvNet when left out.",
        ),
    ] = None,
    img_sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--img-size",
            help="Try each at this size. Repeatable; sizes with a published figure when left out. Of detectors one: "
            "512 (SSDLite: 320) when left out.",
        ),
    ] = None,
    zoo: Zoo = "all",
    licences: Licences = None,
    commercial: Commercial = False,
    no_extra_data: NoExtraData = False,
    attention: Attention = False,
    confidence: Confidence = 0.8,
    accuracy: Annotated[str, typer.Option("--accuracy", help="imagenet (published) or none.")] = "imagenet",
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale", help="Instead: the largest scale of this network (name or spec file) that keeps the speed."
        ),
    ] = None,
    along: Annotated[str, typer.Option("--along", help="With --scale: phi, depth, width or resolution.")] = "phi",
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            help="With --scale: compound, fast, depth, width, resolution, or a file of `search --scaling`.",
        ),
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
    task: Task = "classification",
    head: Head = None,
    detector: DetectorOptions = None,
    as_json: Json = False,
) -> None:
    """Choose the most accurate network that keeps a constraint on a device, of all that somebody released."""
    from dataclasses import replace

    from convscale.choice.basis import Asked, basis_of
    from convscale.choice.candidates import candidates_of
    from convscale.choice.carried import write_kit
    from convscale.choice.choose import CommonOptions, choose_from, notes_on
    from convscale.choice.largest import Direction, Effort, largest_under
    from convscale.choice.rows import read_rows, rows_of
    from convscale.networks.offered import Filter
    from convscale.ship.kit import check_kit

    boxes_by = detector_head(task, head, detector)
    if all(limit is None for limit in (min_throughput, max_latency, max_memory, max_params)):
        raise UserError("give a constraint: --min-throughput, --max-latency, --max-memory or --max-params")
    _check_scaling(
        scale is not None,
        of_scale={"--along": along != "phi", "--rule": rule != "compound"},
        of_candidates={
            "--zoo": zoo != "all",
            "--licence": licences,
            "--commercial": commercial,
            "--no-extra-data": no_extra_data,
            "--attention": attention,
            "--accuracy": accuracy != "imagenet",
            "--budget": budget != 20,
            "--all": show_all,
        },
    )
    if boxes_by is not None:
        others = (max_latency, max_memory, max_params, scale, save, records, measured, kit)
        if min_throughput is None or any(value is not None for value in others) or len(img_sizes or []) > 1:
            raise UserError("--task detection chooses by --min-throughput alone, at one --img-size")
        meant = {"--licence": licences, "--commercial": commercial, "--zoo": zoo != "all", "--attention": attention}
        meant |= {"--no-extra-data": no_extra_data, "--accuracy": accuracy != "imagenet", "--budget": budget != 20}
        if lost := [flag for flag, value in meant.items() if value]:
            raise UserError(
                f"{lost[0]} is for classifiers; --task detection chooses among backbones: name them (--model)"
            )
        common: CommonOptions = {
            "device": device,
            "min_throughput": min_throughput,
            "batch_size": batch_size,
            "precision": precision,
            "runtime": runtime,
            "mode": mode,
            "layout": layout,
            "compiled": compiled,
            "threads": threads,
            "image_sizes": img_sizes,
            "calibration": calibration,
            "seconds": seconds,
            "confidence": confidence,
        }
        choose_boxes(models, boxes_by, detector, common, as_json)
        return
    if save is not None:  # before minutes of measuring, not after
        check_output(save, PICTURES if scale is None else (".yaml", ".yml", ".json"))
        check_new_file(save, overwrite=overwrite)
        check_browser(save)
    if scale is not None and (max_memory is not None or max_params is not None or models or img_sizes):
        raise UserError("--scale takes --min-throughput and --max-latency only, and no --model or --img-size")
    constraint = Constraint(
        min_throughput=min_throughput,
        max_latency_ms=max_latency,
        max_memory_gb=max_memory,
        max_params_m=max_params,
        confidence=confidence,
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
    if kit is not None and overwrite:
        read = [("measured", measured), ("calibration", calibration), ("records", records)]
        check_outside(kit, [*read, *(("model", name) for name in models or [] if is_spec_file(name))])
    found = None
    if measured is not None:
        found, asked = read_rows(measured, asked)
    elif kit is not None and runtime is None and not compiled:
        asked = replace(asked, runtime="onnxruntime")  # what a kit is measured in
    basis = basis_of(asked, calibration)
    rows = None if found is None or measured is None else rows_of(found, basis, measured, models)
    if kit is not None:
        if not basis.predicted:
            raise UserError(f"--kit is for a device that is not here, got {device!r}; `convscale choose` measures here")
        check_kit(basis.conditions, kit, overwrite=overwrite)  # before candidates are looked at
    effort = Effort(records=records, seconds=seconds, say=progress_aside)
    if scale is not None:
        direction = Direction(along=along, rule=rule)
        _finish_scale(largest_under(spec_of(scale), basis, constraint, direction, effort), save, as_json)
        return
    if budget < 1:
        raise UserError(f"budget is {budget!r}; it must be a whole number of networks to measure, at least 1")
    named = [spec_or_name(name) for name in models] if models else None
    offer = Filter(
        zoo=zoo,
        licences=licences,
        commercial=commercial,
        extra_data=not no_extra_data,
        attention=attention,
    )
    pool = candidates_of(named, img_sizes, accuracy, offer)
    choice = choose_from(pool, basis, constraint, effort, budget=budget, notes=notes_on(offer, named), rows=rows)
    if not as_json:  # before what is written: a kit or a picture that can not be made must not cost the choice
        print_choice(choice, show_all)
    written = None if kit is None else write_kit(choice, kit, overwrite=overwrite, progress=progress_aside)
    if as_json:
        print_json({**choice.to_dict(), **({} if written is None else {"kit": written.to_dict()})})
    elif written is not None:
        say(f"kit: {written}")
    if save is not None:
        write_choice(choice, save)
        if not as_json:
            say(f"report: {save}")
    end_where_missed(choice.missed)


def _check_scaling(scaled: bool, *, of_scale: Mapping[str, object], of_candidates: Mapping[str, object]) -> None:
    """
    Args:
        scaled: whether one network is scaled.
        of_scale: options that say how, each with whether it was given.
        of_candidates: those that say which candidates are chosen among.

    Raises:
        UserError: one is given that nothing would go by.
    """
    lost = [flag for flag, given in (of_candidates if scaled else of_scale).items() if given]
    if lost and scaled:
        raise UserError(
            f"{lost[0]} is of a choice among candidates, and --scale scales one network; leave one of them out"
        )
    if lost:
        raise UserError(f"{lost[0]} says how --scale scales a network; give --scale NAME with it, or leave it out")


def _finish_scale(largest: Largest, save: Path | None, as_json: bool) -> None:
    from convscale.arch.spec import save_spec
    from convscale.choice.measured import chosen_among

    if save is not None:
        save_spec(largest.spec, save)
    if as_json:
        print_json(largest.to_dict())
    else:
        say(str(largest))
        say(in_words(largest.basis.conditions, chosen_among(largest.basis) if largest.basis.tuned else ""))
        hint = "--output FILE.yaml saves it; wherever a model name goes, the file goes too"
        say(f"written to {save}" if save else hint)
    end_where_missed(largest.missed)
