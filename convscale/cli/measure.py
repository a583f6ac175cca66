"""The commands that cost a network: count and measure. ``register`` puts them on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from convscale import words
from convscale.cli.detect import measure_boxes
from convscale.cli.options import MISSED, ImgSize, Json, Precision, Threads, print_json, say, terminal_width
from convscale.cli.speed_options import DetectorOptions, Head, Task, detector_head
from convscale.cli.tables import GAP, Column, number_column, print_table
from convscale.conditions import as_size, size_text
from convscale.errors import UserError
from convscale.networks.names import network_of, spec_beside

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
    models: Annotated[list[str], typer.Argument(help="Model names, spec files, or package.module:function.")],
    img_size: ImgSize = None,
    batch_size: Annotated[
        int, typer.Option("-b", "--batch-size", help="Images per call: bytes are of the whole batch.")
    ] = 1,
    mode: Mode = "infer",
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, amp (autocast to fp16), amp_bf16, bf16 or fp16.")
    ] = "fp32",
    layout: Annotated[str, typer.Option("--layout", help="nchw or nhwc.")] = "nchw",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Bytes and kernels as a compiler fuses them instead of eager.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="A named GPU: also the largest batch that is predicted to fit in it.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="With --device: training averages the weights, which takes their bytes again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Count parameters, multiply-accumulates, activations, bytes and memory."""
    from convscale.cost.counting import count
    from convscale.predictor.largest_batch import predict_largest_batch

    if ema and device is None:
        raise UserError("--ema is for the largest batch; give it with --device")
    counted = []
    for net in map(network_of, models):
        cost = count(net, img_size, batch_size, mode=mode, precision=precision, layout=layout, compiled=compiled)
        largest = None
        if device is not None:
            largest = predict_largest_batch(
                net, device, mode=mode, precision=precision, layout=layout, image_size=img_size, ema=ema
            )
        counted.append(_Counted(net.name, cost, largest))
    if as_json:
        print_json([each.to_dict() for each in counted])
        return
    _say_counts(counted)
    for each in counted:
        if each.largest is not None:
            say(f"{each.name}: {each.largest} (predicted)")
        if each.cost.unsupported:
            kinds = ", ".join(f"{kind} ({times} x)" for kind, times in sorted(each.cost.unsupported.items()))
            say(
                f"note: {each.name} has operators of unknown kind, their bytes counted, their multiply-accumulates "
                f"not: {kinds}"
            )


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


class _Counted(NamedTuple):
    """A network that was counted."""

    name: str
    cost: Cost
    largest: LargestBatch | None
    """The largest batch, where a device was named."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        row: dict[str, object] = {"name": self.name, "image_size": as_size(*self.cost.image_size)}
        row |= {key: getattr(self.cost, key) for key in _COUNTED}
        if self.largest is not None:
            row["largest_batch"] = {
                "device": self.largest.device,
                "batch_size": self.largest.batch_size,
                "peak_bytes": self.largest.cost.peak_bytes,
                "usable_bytes": self.largest.usable_bytes,
                "text": str(self.largest),
            }
        return row


def _say_counts(counted: Sequence[_Counted]) -> None:
    """A column per network, as many beside each other as the terminal holds."""
    first = counted[0].cost
    training = first.mode == "train"
    say(
        f"{'training' if training else 'inference'}, {'compiled' if first.compiled else 'eager'}, {first.precision}, "
        f"{first.layout}, batch {first.batch_size}; bytes are of the whole batch:"
    )
    quantities: list[tuple[str, Callable[[Cost], str]]] = [
        ("image, px", lambda c: size_text(as_size(*c.image_size))),
        ("parameters", lambda c: words.large(c.params)),
        ("MACs, with backward" if training else "MACs", lambda c: words.large(c.macs)),
        ("activations an image", lambda c: words.large(c.activations)),
        ("read", lambda c: words.large(c.read_bytes, "B")),
        ("written", lambda c: words.large(c.written_bytes, "B")),
        ("kernels", lambda c: words.count(c.kernels)),
        ("at most at once", lambda c: words.large(c.peak_bytes, "B")),
        ("of that, weights", lambda c: words.large(c.weight_bytes, "B")),
    ]
    if training:
        quantities += [
            ("optimiser's state", lambda c: words.large(c.optimizer_bytes, "B")),
            ("kept for backward", lambda c: words.large(c.saved_bytes, "B")),
        ]
    label = max(len(name) for name, _ in quantities)
    at_once = max(1, (terminal_width() - label) // (GAP + max(len(each.name) for each in counted)))
    for start in range(0, len(counted), at_once):
        shown = counted[start : start + at_once]
        print_table(
            [Column(""), *(number_column(each.name) for each in shown)],
            [[title, *(text(each.cost) for each in shown)] for title, text in quantities],
        )


def measure_command(
    models: Annotated[
        list[str],
        typer.Argument(help="Model names, spec files or artefact folders; with --task detection checkpoints too."),
    ],
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            "-b",
            "--batch-size",
            help="Images per call; 8, or what an artefact was tuned to, when left out. Repeatable: a sweep.",
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Batches 1, 2, 4 ... until throughput stops growing or memory ends.")
    ] = False,
    img_size: ImgSize = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="cpu, cuda or cuda:N; cpu when left out, with --promised what it was promised for."
        ),
    ] = None,
    precision: Precision = "fp32",
    layout: Annotated[
        str, typer.Option("--layout", help="nchw, nhwc, or auto: both are measured, the faster is reported.")
    ] = "nchw",
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="eager, compiled, compiled-frozen, onnxruntime (when left out; eager for training), openvino; on a "
            "GPU also compiled-max or tensorrt.",
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
    promised: Annotated[
        bool,
        typer.Option(
            "--promised",
            help="An artefact against the speed it was promised to have here; exit code 3 if it misses it.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="With --promised: append the measurement to this JSON-lines file."),
    ] = None,
    task: Task = "classification",
    head: Head = None,
    detector: DetectorOptions = None,
    as_json: Json = False,
) -> None:
    """Measure throughput on this device, with its conditions and spread."""
    from dataclasses import replace

    from convscale.artifact.artifact import Artifact, load_artifact
    from convscale.conditions import Conditions
    from convscale.speed.subjects import tuned_batch

    if output is not None and not promised:
        raise UserError("--output goes with --promised; --record FILE keeps other measurements")
    if promised:
        stated = {
            "-b": batch_size,
            "--sweep": sweep,
            "--img-size": img_size,
            "--precision": precision != "fp32",
            "--layout": layout != "nchw",
            "--runtime": runtime,
            "--mode": mode != "infer",
            "--threads": threads,
            "--protocol": protocol,
            "--task": task != "classification",
            "--head": head,
            "--detector": detector,
        }
        if given := [name for name, value in stated.items() if value]:
            raise UserError(f"--promised measures as was promised; give it without {given[0]}")
        _confirm(models, device, output or record, seconds, as_json)
        return
    device = device or "cpu"
    if detector_head(task, head, detector) is not None:
        if sweep or protocol or record is not None or len(batch_size or []) > 1:
            raise UserError("--sweep, --protocol, --record and several -b do not go with --task detection")
        wanted = Conditions(
            device=device,
            mode=mode,
            precision=precision,
            layout=layout,
            batch_size=(batch_size or [8])[0],
            runtime=runtime or "onnxruntime",
            threads=threads,
        )
        measure_boxes(models, head, img_size, detector, wanted, seconds, as_json)
        return
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
        load_artifact(model, runtime=runtime, threads=threads, device=device)
        if Path(model).is_dir()
        else network_of(model)
        for model in models
    ]
    done = []
    for model, net in zip(models, nets, strict=True):
        own, at = cond, sizes
        if isinstance(net, Artifact):
            at = batch_size or [tuned_batch(net) or sizes[0]]
            own = replace(cond, runtime=net.runtime, threads=net.threads, batch_size=at[0])
        for measurement in _measured(net, own, layout, None if sweep else at, protocol, seconds):
            done.append(_recorded(net, measurement, None if table else record))
            if not as_json:
                _say_measured(model, measurement)
    if table is not None:
        from convscale.speed.records import write_timm_csv

        write_timm_csv(table, done)
    if not as_json and len(done) > 1:
        _say_side_by_side(done)
    if as_json:
        print_json(
            [
                {**r.measurement.to_dict(), "images_per_s": r.measurement.images_per_s, "p99_s": r.measurement.p99_s}
                for r in done
            ]
        )


def _confirm(models: list[str], device: str | None, output: Path | None, seconds: float, as_json: bool) -> None:
    """One artefact against its promise; exit code 3 where it misses it."""
    from convscale.ship.confirm import confirm

    if len(models) != 1:
        raise UserError(f"--promised takes one artefact folder, got {len(models)}")
    if not Path(models[0]).is_dir():
        raise UserError(f"--promised takes an artefact folder, got {models[0]!r}")
    if output is not None and output.suffix == ".csv":
        raise UserError(f"--promised writes JSON lines, got {output}; name a .jsonl file")
    found = confirm(models[0], device, output=output, min_seconds=seconds, max_seconds=max(30.0, 10 * seconds))
    if as_json:
        print_json(found.to_dict())
    else:
        say(str(found))
        for note in (*found.notes, *found.measurement.warnings, *found.measurement.notes):
            say(f"note: {note}", 2)
        for doubt in found.promise.doubts:
            say(f"doubted beforehand: {doubt}", 2)
        if output is not None:
            say(f"record: {output}")
    if not found.kept:
        raise typer.Exit(MISSED)


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

    from convscale.artifact.artifact import Artifact
    from convscale.cost.counting import count
    from convscale.speed.records import Record, append_record

    made = Record(model=found.model, measurement=found, spec=spec_beside(net))
    if not isinstance(net, Artifact):
        with suppress(UserError):  # it can not be traced; what was measured stays
            cost = count(net, found.conditions.image_size)
            made = replace(made, params=cost.params, macs=cost.macs, activations=cost.activations)
    if path is not None:
        append_record(path, made)
    return made


def _say_measured(model: str, found: Measurement) -> None:
    say(f"{model}: {found}")
    say(
        f"{words.seconds(found.latency_s)} a call in the median, {words.seconds(found.p99_s)} at the 99th percentile "
        f"of {words.plural(len(found.times_s), 'call')}",
        2,
    )
    if found.peak_bytes is not None:
        say(f"{words.gigabytes(found.peak_bytes)} of the device's memory at most", 2)
    for warning in (*found.warnings, *found.notes):
        say(f"note: {warning}", 2)


def _say_side_by_side(records: list[Record]) -> None:
    """All measurements once more as a table."""
    print_table(
        [Column("network"), *map(number_column, ("batch", "images/s", "±", "a call", "p99"))],
        [
            [
                record.model,
                words.count(record.measurement.conditions.batch_size),
                words.rate(record.measurement.images_per_s),
                words.percent(record.measurement.iqr_rel / 2, 0),
                words.seconds(record.measurement.latency_s),
                words.seconds(record.measurement.p99_s),
            ]
            for record in records
        ],
    )
