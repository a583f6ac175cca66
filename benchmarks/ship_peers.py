"""Like against like: what we ship beside what an expert makes by hand of the same network, form by form.

    python -m benchmarks.ship_peers [--models resnet50 ...] [--batch-sizes 8] [--threads 2] [--rounds 9] [--seconds 0.4]
        [--img-size N] [--prepare] [--again] [--work runs/ship_peers] [--records results/ship_peers.jsonl] [--json]

For each network, batch and number of threads all contenders are opened first and then timed in turns in one process.
Three rows, each with the peers that keep its promise:

fp32: timm eager, behind torch.compile (plain, and with freezing), in ONNX Runtime, and in OpenVINO held to float32.
bf16: timm behind torch.compile (plain, and with freezing) in bfloat16 autocast, and in OpenVINO as it comes (bfloat16
    where there is hardware).
int8: ONNX Runtime's static quantiser (unsigned activations, per channel) in ONNX Runtime; NNCF's PERFORMANCE and MIXED
    presets in OpenVINO, the rest in float32 or bfloat16; torchao's PT2E with the X86Inductor quantiser (`pip install
    --group bench`; a failure stands in the table with its reason).

Where a runtime has free streams, one stream and one per thread are tried for peers as for ours, at the stated batch.
Ours is the fastest of our forms of that row; of INT8 our fastest ONNX file in ONNX Runtime has a line of its own: it is
all there is where OpenVINO is not installed. Weights are random, the same for all, with the norms' statistics those of
some images: speed does not depend on them, and INT8 is let through whatever it says; ``python -m benchmarks.ship_gate``
judges its answers. The machine's own peaks, of large matrix products in the three types, are timed in the same turns.

What is in the records is not run again without ``--again``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import convscale as cs
from benchmarks.records import in_turns, replace_record, write_record
from benchmarks.ship_peers_table import MODELS, ROWS, cells_of, records_in, table
from convscale.artifact.artifact import Artifact, load_artifact, open_artifact
from convscale.errors import UserError, first_line
from convscale.formats.onnx import write_onnx
from convscale.machine import Environment
from convscale.networks.inputs import preprocessing_of
from convscale.runtimes.base import Opening, open_runtime
from convscale.runtimes.pytorch.runner import torch_threads
from convscale.runtimes.silence import quiet
from convscale.ship.forms import FORMS, export_forms, fastest_of, form_names

CALIBRATION = 64
IN_ORT = "ours, ONNX in ONNX Runtime"
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something that takes a batch."""

    row: str
    """``fp32``, ``bf16`` or ``int8``."""
    label: str
    """Who."""
    call: Call
    """One batch."""
    how: str = ""
    """Runtime and settings that were the fastest."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network at one batch and number of threads."""

    model: str
    batch: int
    threads: int
    size: int
    folder: Path

    def images(self) -> np.ndarray:
        """A normalised batch, float32 (N, 3, H, W)."""
        rng = np.random.default_rng(0)
        return rng.standard_normal((self.batch, 3, self.size, self.size), dtype=np.float32)


def calibration(size: int) -> np.ndarray:
    """Normalised noise with some structure, float32 (CALIBRATION, 3, size, size)."""
    coarse = np.random.default_rng(1).standard_normal((CALIBRATION, 3, 8, 8), dtype=np.float32)
    return np.stack([np.kron(image, np.ones((1, -(-size // 8), -(-size // 8))))[:, :size, :size] for image in coarse])


def prepare(model: str, size: int, folder: Path) -> None:
    """The peers' files by hand, and our forms, unless an earlier run left them."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = folder / "peer.onnx"
    _once(folder / "weights.pth", lambda to: torch.save(settled(model, size).state_dict(), to))
    _once(plain, lambda to: write_onnx(timms(model, folder), torch.randn(2, 3, size, size), to))
    _once(folder / "peer-ort.onnx", partial(_static_by_hand, plain, size=size))
    for preset in ("performance", "mixed"):
        _once(folder / f"peer-nncf-{preset}.xml", partial(_nncf_by_hand, plain, size=size, preset=preset))
    net = cs.create_model(model)
    cs.load_weights(net, folder / "weights.pth")
    names = [n for n in form_names(net, int8=True, bf16=True, image_size=size) if FORMS[n].format != "torch"]
    missing = [name for name in names if not (folder / "forms" / name).is_dir()]
    if missing:
        shutil.rmtree(folder / "forms" / "onnx-fp32", ignore_errors=True)
        (folder / "forms").mkdir(exist_ok=True)
        pictures = (np.clip(calibration(size) * 50 + 120, 0, 255)).astype(np.uint8).transpose(0, 2, 3, 1)
        export_forms(
            net,
            folder / "forms",
            list(dict.fromkeys(["onnx-fp32", *missing])),
            preprocessing=preprocessing_of(net, size),
            calibration_images=np.ascontiguousarray(pictures),
            max_drop=100.0,
        )


def settled(model: str, size: int) -> nn.Module:
    """timm's network with random weights, its norms knowing the statistics of some images, as a trained one's do: else
    values grow or vanish from layer to layer, and what half precision makes of them says nothing.
    """
    torch.manual_seed(0)
    net = timm.create_model(model).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for some in np.split(calibration(size)[:32].astype(np.float32), 2):
            net(torch.from_numpy(some))
    return net.eval()


def timms(model: str, folder: Path) -> nn.Module:
    """timm's network with the weights that ours has too."""
    net = timm.create_model(model).eval()
    net.load_state_dict(torch.load(folder / "weights.pth", weights_only=True))
    return net


def _once(path: Path, make: Callable[[Path], object]) -> None:
    """Make a file; one that could not be made leaves the reason in its place."""
    failed = path.with_suffix(".failed")
    if path.is_file() or failed.is_file():
        return
    temporary = path.with_name(f"new-{path.name}")
    try:
        with quiet():
            make(temporary)
    except Exception as error:
        failed.write_text(first_line(error), encoding="utf-8")
        return
    if path.suffix == ".xml":
        temporary.with_suffix(".bin").rename(path.with_suffix(".bin"))
    temporary.rename(path)


def _static_by_hand(source: Path, target: Path, *, size: int) -> None:
    """As ONNX Runtime's documentation has it: pre-process, then static quantisation to Q/DQ, unsigned activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(calibration(size)[:, None])

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            batch = next(self.left, None)
            return None if batch is None else {name: batch.astype(np.float32)}

    import onnx

    ready = target.with_name("ready.onnx")
    quant_pre_process(os.fspath(source), os.fspath(ready))
    name = onnx.load(os.fspath(ready), load_external_data=False).graph.input[0].name
    quantize_static(
        os.fspath(ready),
        os.fspath(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    ready.unlink()


def _nncf_by_hand(source: Path, target: Path, *, size: int, preset: str) -> None:
    import nncf
    import openvino as ov

    data: Any = nncf.Dataset([batch.astype(np.float32) for batch in calibration(size)[:, None]])
    model = ov.convert_model(os.fspath(source))
    made: Any = nncf.quantize(model, data, preset=nncf.QuantizationPreset(preset), subset_size=CALIBRATION)
    ov.save_model(made, os.fspath(target), compress_to_fp16=False)


def quick(call: Call, seconds: float = 0.4) -> float:
    """Seconds of a call, in a moment."""
    call()
    return statistics.median(in_turns({"x": call}, 1, seconds)["x"])


def in_file_runtime(cell: Cell, path: Path, runtime: str, precisions: Sequence[str]) -> tuple[Call, str]:
    """A peer's file in its fastest settings.

    Raises:
        UserError: there is no such file; the message says why.
    """
    failed = path.with_suffix(".failed")
    if failed.is_file():
        raise UserError(failed.read_text(encoding="utf-8"))
    streams = (1, cell.threads) if cell.threads > 1 and cell.batch >= cell.threads else (1,)
    found: list[tuple[float, Call, str]] = []
    for precision in precisions:
        for count in streams:
            how = Opening(threads=cell.threads, streams=count, batch_size=cell.batch, precision=precision)
            runner = open_runtime(path, runtime, how)
            prepared = runner.prepare(cell.images())
            call = partial(runner.run, prepared)
            found.append((quick(call), call, f"{runtime} {precision}, {count} stream(s)"))
    _, call, how = min(found, key=lambda each: each[0])
    return call, how


def in_torch(cell: Cell, *, compiled: str, precision: str) -> tuple[Call, str]:
    """timm's network in PyTorch; ``compiled``: ``eager``, ``compiled`` or ``compiled-frozen``."""
    runner = open_runtime(
        timms(cell.model, cell.folder),
        compiled,
        Opening(threads=cell.threads, precision=precision, layout="nhwc" if compiled == "compiled" else "nchw"),
    )
    prepared = runner.prepare(torch.from_numpy(cell.images()))
    return partial(runner.run, prepared), f"{compiled} {precision}"


def in_inductor(cell: Cell) -> tuple[Call, str]:
    """torchao's PT2E with the X86Inductor quantiser, compiled with freezing.

    Raises:
        Exception: torchao is not there, or refuses; all of it is shown in the table.
    """
    import torch._inductor.config as inductor
    from torchao.quantization.pt2e.quantize_pt2e import (  # pyright: ignore[reportMissingImports]
        convert_pt2e,
        prepare_pt2e,
    )
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # pyright: ignore[reportMissingImports]

    example = (torch.from_numpy(cell.images()).contiguous(memory_format=torch.channels_last),)
    with torch.no_grad():
        graph = torch.export.export(timms(cell.model, cell.folder), example).module()
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        ready = prepare_pt2e(graph, quantizer)
        for start in range(0, 16, cell.batch):
            some = calibration(cell.size)[start : start + cell.batch].astype(np.float32)
            ready(torch.from_numpy(np.resize(some, cell.images().shape)))
        made = convert_pt2e(ready)
        with inductor.patch(freezing=True):
            fast = torch.compile(made)
            fast(*example)

    def call() -> object:
        with torch.inference_mode(), torch_threads(cell.threads):
            return fast(*example)

    return call, "inductor int8"


def peers(cell: Cell) -> Iterator[tuple[str, str, Callable[[], tuple[Call, str]]]]:
    """Row, label, and how to open it."""
    plain = cell.folder / "peer.onnx"
    for compiled in ("eager", "compiled", "compiled-frozen"):
        yield "fp32", f"timm {compiled}", partial(in_torch, cell, compiled=compiled, precision="fp32")
    for runtime in ("onnxruntime", "openvino"):
        yield "fp32", f"timm {runtime}", partial(in_file_runtime, cell, plain, runtime, ["fp32"])
    for compiled in ("compiled", "compiled-frozen"):
        yield "bf16", f"timm {compiled}, bf16", partial(in_torch, cell, compiled=compiled, precision="amp")
    yield "bf16", "timm openvino, bf16", partial(in_file_runtime, cell, plain, "openvino", ["bf16"])
    static = cell.folder / "peer-ort.onnx"
    yield "int8", "quantize_static by hand", partial(in_file_runtime, cell, static, "onnxruntime", ["fp32"])
    for preset in ("performance", "mixed"):
        file = cell.folder / f"peer-nncf-{preset}.xml"
        yield "int8", f"NNCF {preset} by hand", partial(in_file_runtime, cell, file, "openvino", ["fp32", "bf16"])
    yield "int8", "PT2E X86Inductor", partial(in_inductor, cell)


def ours(cell: Cell) -> Iterator[Contender]:
    """Of each row the fastest of our forms, tuned at this batch."""
    forms = {place.name: load_artifact(place) for place in sorted((cell.folder / "forms").iterdir())}
    kinds = {name: _row_of(name) for name in forms}
    for row, label, runtimes in (*((row, "ours", None) for row in ROWS), ("int8", IN_ORT, ("onnxruntime",))):
        fitting = [n for n in forms if kinds[n] == row and (runtimes is None or FORMS[n].format == "onnx")]
        some: Any = {n: art for n, art in forms.items() if n == "onnx-fp32" or n in fitting}
        if row != "fp32" and len(some) == 1:
            continue
        found = fastest_of(some, batch_sizes=(cell.batch,), threads=cell.threads, runtimes=runtimes)
        trials = {n: t for n, t in found.again.items() if n in fitting}
        if not trials:
            continue
        name = min(trials, key=lambda n: trials[n].latency_s / trials[n].settings.batch_size)
        yield Contender(row=row, label=label, call=_opened(forms[name], trials[name].settings, cell), how=name)


def _row_of(form: str) -> str:
    return "int8" if FORMS[form].int8 else "bf16" if FORMS[form].bf16 else "fp32"


def _opened(art: Artifact, settings: Any, cell: Cell) -> Call:
    how = Opening(threads=settings.threads, streams=settings.streams, batch_size=cell.batch)
    runner = open_artifact(art, settings.runtime, how)
    noise = np.random.default_rng(0).integers(0, 256, (cell.batch, cell.size, cell.size, 3), dtype=np.uint8)
    return partial(runner.run, runner.prepare(art.input_batch(noise)))


def products(threads: int) -> dict[str, tuple[Call, float]]:
    """Large matrix products in three types, with their operations."""
    side = 2048
    a, b = torch.randn(side, side), torch.randn(side, side)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    small = torch.randint(-64, 64, (2, side, side), dtype=torch.int8)

    @contextmanager
    def held() -> Iterator[None]:
        with torch_threads(threads), torch.inference_mode():
            yield

    def of(product: Callable[[], object]) -> Call:
        def call() -> object:
            with held():
                return product()

        return call

    work = 2.0 * side**3
    return {
        "fp32": (of(lambda: a @ b), work),
        "bf16": (of(lambda: half_a @ half_b), work),
        "int8": (of(lambda: torch._int_mm(small[0], small[1])), work),
    }


def run_cell(cell: Cell, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All contenders of one cell, in turns. One record each, failures too."""
    there: list[Contender] = []
    failed: list[tuple[str, str, str]] = []
    for row, label, make in peers(cell):
        try:
            with quiet():
                call, how = make()
            call()
            there.append(Contender(row=row, label=label, call=call, how=how))
        except Exception as error:
            failed.append((row, label, first_line(error)[:160]))
    there += list(ours(cell))
    tops = products(cell.threads)
    calls = {f"{c.row} {c.label}": c.call for c in there} | {
        f"product {kind}": call for kind, (call, _) in tops.items()
    }
    times = in_turns(calls, args.rounds, args.seconds)
    peaks = {kind: work / statistics.median(times[f"product {kind}"]) / 1e9 for kind, (_, work) in tops.items()}
    about = {
        "schema": 1,
        "model": cell.model,
        "batch_size": cell.batch,
        "threads": cell.threads,
        "image_size": cell.size,
        "environment": asdict(Environment.here()),
        "peak_gflops": {kind: round(value, 1) for kind, value in peaks.items()},
    }
    rows = []
    for one in there:
        taken = np.array(times[f"{one.row} {one.label}"])
        speeds = cell.batch / np.percentile(taken, (50, 25, 75, 0, 100))
        rows.append(
            {
                **about,
                "row": one.row,
                "contender": one.label,
                "how": one.how,
                "images_per_s": round(float(speeds[0]), 2),
                "quartiles": [round(float(speeds[2]), 2), round(float(speeds[1]), 2)],
                "range": [round(float(speeds[4]), 2), round(float(speeds[3]), 2)],
                "p50_ms": round(1e3 * float(np.percentile(taken, 50)), 3),
                "p99_ms": round(1e3 * float(np.percentile(taken, 99)), 3),
                "calls": len(taken),
            }
        )
    rows += [{**about, "row": row, "contender": label, "failed": reason} for row, label, reason in failed]
    for row in rows:
        replace_record(args.records, row, ("model", "batch_size", "threads", "row", "contender"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8])
    parser.add_argument("--threads", nargs="+", type=int, default=[2])
    parser.add_argument("--img-size", type=int, default=None, help="of all networks; None: each at its own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.4, help="of timed calls, per contender and round")
    parser.add_argument("--prepare", action="store_true", help="only write the files")
    parser.add_argument("--again", action="store_true", help="also what is in the records")
    parser.add_argument("--work", type=Path, default=Path("runs/ship_peers"), help="files are kept here and used again")
    parser.add_argument(
        "--records", type=Path, default=Path("results/ship_peers.jsonl"), help="the table goes beside it"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for model in args.models:
        size = args.img_size or int(preprocessing_of(cs.create_model(model)).height)
        folder = args.work / f"{model}-{size}"
        prepare(model, size, folder)
        for batch, threads in [] if args.prepare else [(b, t) for b in args.batch_sizes for t in args.threads]:
            if (model, batch, threads) in cells_of(records_in(args.records)) and not args.again:
                continue
            rows = run_cell(Cell(model=model, batch=batch, threads=threads, size=size, folder=folder), args)
            print("\n".join(map(json.dumps, rows)) if args.json else table(rows), flush=True)
            write_record(args.records.with_suffix(".md"), table(records_in(args.records)))


if __name__ == "__main__":
    main()
