"""The commands that cost a network: count and measure. ``register`` puts them on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from convscale.cli.options import Device, ImgSize, Json, Precision, Threads, print_json, say
from convscale.conditions import as_size, size_text
from convscale.errors import UserError
from convscale.networks.names import spec_of

Mode = Annotated[str, typer.Option("--mode", help="infer or train.")]

if TYPE_CHECKING:
    from convscale.conditions import Conditions
    from convscale.cost.counting import Cost
    from convscale.predictor.largest_batch import LargestBatch
    from convscale.speed.records import Record
    from convscale.speed.subjects import Measured
    from convscale.speed.timing import Measurement


def register(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("count")(count_command)
    app.command("measure")(measure_command)


def count_command(
    models: Annotated[list[str], typer.Argument(help="Model names or spec files.")],
    img_size: ImgSize = None,
    batch_size: Annotated[
        int, typer.Option("-b", "--batch-size", help="Images per call: bytes are of the whole batch.")
    ] = 1,
    mode: Mode = "infer",
    precision: Annotated[str, typer.Option("--precision", help="fp32, amp (CUDA's autocast), bf16 or fp16.")] = "fp32",
    layout: Annotated[str, typer.Option("--layout", help="nchw or nhwc.")] = "nchw",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Bytes and kernels as a compiler fuses them instead of eager.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="A named GPU: also the largest batch that is predicted to fit in it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count parameters, multiply-accumulates, activations, bytes and memory."""
    from convscale.cost.counting import count
    from convscale.predictor.largest_batch import predict_largest_batch

    rows = []
    for model in models:
        spec, largest = spec_of(model), None
        cost = count(spec, img_size, batch_size, mode=mode, precision=precision, layout=layout, compiled=compiled)
        row: dict[str, object] = {"name": spec.name, "image_size": as_size(*cost.image_size)}
        row |= {key: getattr(cost, key) for key in _COUNTED}
        if device is not None:
            largest = predict_largest_batch(
                spec, device, mode=mode, precision=precision, layout=layout, image_size=img_size
            )
            row["largest_batch"] = _as_json(largest)
        rows.append(row)
        if not as_json:
            _say_cost(spec.name, cost, largest)
    if as_json:
        print_json(rows)


_COUNTED = (
    *(
        "params",
        "macs",
        "activations",
        "read_bytes",
        "written_bytes",
        "kernels",
        "peak_bytes",
        "weight_bytes",
        "optimizer_bytes",
        "saved_bytes",
    ),
    *("unsupported", "batch_size", "mode", "precision", "layout", "compiled"),
)


def _as_json(largest: LargestBatch) -> dict[str, object]:
    """The largest batch as plain JSON values."""
    return {
        "device": largest.device,
        "batch_size": largest.batch_size,
        "peak_bytes": largest.cost.peak_bytes,
        "usable_bytes": largest.usable_bytes,
        "text": str(largest),
    }


def _say_cost(name: str, cost: Cost, largest: LargestBatch | None) -> None:
    say(
        f"{name} at {size_text(as_size(*cost.image_size))} px: {cost.params / 1e6:.2f} M parameters, "
        f"{cost.macs / 1e9:.3f} G "
        "multiply-accumulates"
        f"{' (forward and backward)' if cost.mode == 'train' else ''}, {cost.activations / 1e6:.2f} M activations an "
        "image"
    )
    what = "training" if cost.mode == "train" else "inference"
    say(
        f"{what}, {'compiled' if cost.compiled else 'eager'}, {cost.precision}, {cost.layout}, batch "
        f"{cost.batch_size}:",
        2,
    )
    say(f"{_mb(cost.read_bytes)} read and {_mb(cost.written_bytes)} written by {cost.kernels:,} kernels", 4)
    kept = ""
    if cost.mode == "train":
        kept = f", {_mb(cost.optimizer_bytes)} the optimiser's, {_mb(cost.saved_bytes)} kept for backward"
    say(f"at most {_mb(cost.peak_bytes)} at once: {_mb(cost.weight_bytes)} of weights{kept}", 4)
    if largest is not None:
        say(f"{largest} (predicted)", 2)
    if cost.unsupported:
        names = ", ".join(f"{name} ({times} x)" for name, times in sorted(cost.unsupported.items()))
        say(f"note: operators of unknown kind, their bytes counted, their multiply-accumulates not: {names}", 2)


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def measure_command(
    models: Annotated[list[str], typer.Argument(help="Model names, spec files or artefact folders.")],
    batch_size: Annotated[
        list[int] | None,
        typer.Option("-b", "--batch-size", help="Images per call; 8 when left out. Repeatable: a sweep."),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Batches 1, 2, 4 ... until throughput stops growing or memory ends.")
    ] = False,
    img_size: ImgSize = None,
    device: Device = "cpu",
    precision: Precision = "fp32",
    layout: Annotated[
        str, typer.Option("--layout", help="nchw, nhwc, or auto: both are measured, the faster is reported.")
    ] = "nchw",
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="eager, compiled, compiled-frozen, onnxruntime (when left out; eager for training) or openvino.",
        ),
    ] = None,
    mode: Mode = "infer",
    threads: Threads = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="tresnet: at 90 % of the largest batch that fits.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="Timed seconds per model, at least.")] = 1.0,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record",
            help="Append to this JSON-lines file; or make this .csv, a table as timm's benchmark.py writes it.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure throughput on this device, with its conditions and spread."""
    from dataclasses import replace

    from convscale.artifact.artifact import Artifact, load_artifact
    from convscale.conditions import Conditions

    if sweep and (batch_size or protocol):
        raise UserError("--sweep chooses the batches itself; give it without -b and --protocol")
    if protocol and batch_size:
        raise UserError("--protocol tresnet takes 90 % of the largest batch that fits; give it without -b")
    table = record if record is not None and record.suffix == ".csv" else None
    if table is not None and table.exists():
        raise UserError(f"--record {table} exists and a table is not appended to; name another, or a .jsonl file")
    sizes = batch_size or [8]
    usual = "eager" if mode == "train" else "onnxruntime"
    cond = Conditions(
        device=device,
        mode=mode,
        precision=precision,
        batch_size=sizes[0],
        image_size=img_size,
        runtime=runtime or usual,
        threads=threads,
    )
    nets = [
        load_artifact(model, runtime=runtime, threads=threads) if Path(model).is_dir() else spec_of(model)
        for model in models
    ]
    done = []
    for model, net in zip(models, nets, strict=True):
        own = replace(cond, runtime=net.runtime, threads=net.threads) if isinstance(net, Artifact) else cond
        for found in _measured(net, own, layout, None if sweep else sizes, protocol, seconds):
            done.append(_recorded(net, found, None if table else record))
            if not as_json:
                _say_measured(model, found)
    if table is not None:
        from convscale.speed.records import write_timm_csv

        write_timm_csv(table, done)
    if as_json:
        print_json(
            [
                {**r.measurement.to_dict(), "images_per_s": r.measurement.images_per_s, "p99_s": r.measurement.p99_s}
                for r in done
            ]
        )


def _measured(
    net: Measured, cond: Conditions, layout: str, sizes: list[int] | None, protocol: str | None, seconds: float
) -> Iterator[Measurement]:
    """Measurements one by one, as they are made."""
    from convscale.speed.measuring import measure, sweep

    if protocol is not None:
        return iter([measure(net, cond, layout=layout, min_seconds=seconds, protocol=protocol)])
    return sweep(net, cond, batch_sizes=sizes, layout=layout, min_seconds=seconds)


def _recorded(net: Measured, found: Measurement, path: Path | None) -> Record:
    """The measurement as a record with the network's counts, where it is one that is counted; appended to the file,
    where there is one.
    """
    from dataclasses import replace

    from convscale.arch.spec import NetSpec
    from convscale.cost.counting import count
    from convscale.speed.records import Record, append_record

    made = Record(model=found.model, measurement=found)
    if isinstance(net, NetSpec):
        cost = count(net, found.conditions.image_size)
        made = replace(made, params=cost.params, macs=cost.macs, activations=cost.activations)
    if path is not None:
        append_record(path, made)
    return made


def _say_measured(model: str, found: Measurement) -> None:
    say(f"{model}: {found}")
    say(
        f"{1e3 * found.latency_s:,.2f} ms a call in the median, {1e3 * found.p99_s:,.2f} ms at the 99th percentile of "
        f"{len(found.times_s)} calls",
        2,
    )
    if found.peak_bytes is not None:
        say(f"{found.peak_bytes / 2**30:.2f} GB of the device's memory at most", 2)
    for warning in (*found.warnings, *found.notes):
        say(f"note: {warning}", 2)
