"""Speed of what is shipped: our tuned artefacts against timm in eager PyTorch, torch.compile, ONNX Runtime and OpenVINO.

    python -m benchmarks.ship [--models resnet50 tresnet_m ...] [--batch-size 8] [--rounds 7] [--seconds 1.0] [--threads N] [--json]
                              [--records results/ship.jsonl]

Every contender of a network is opened first, then all are timed in turns, round after round; medians and interquartile ranges are over all calls.
Weights are random and speed does not depend on them, so INT8 is let through whatever it disagrees on: `python -m benchmarks.ship_gate` is where
its answers are judged. All contenders run at the same batch, size and threads. The machine's peak is that of a large float32 matrix product,
timed in the same turns. Run it on a quiet machine.

Contenders: timm's network eager, compiled, compiled with freezing, exported by torch.onnx.export into ONNX Runtime and into OpenVINO (float32, both
with their usual settings); ours, tuned: float32, and the fastest form of all that `export_fastest` finds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

import convscale as cs
from convscale.images.preprocess import Preprocessing
from convscale.ship.artifact import Artifact, open_artifact
from convscale.ship.nets import preprocessing_of
from convscale.ship.onnx_files import write_onnx
from convscale.ship.runtime import open_runtime, torch_threads
from convscale.ship.tune import export_fastest
from convscale.speed.conditions import Conditions
from convscale.speed.records import Record, append_record
from convscale.speed.timing import Environment, Measurement, available_cores

MODELS = ("resnet50", "tresnet_m", "tresnet_l", "efficientnet_b0", "efficientnet_b3", "mobilenetv2_100", "mixnet_m", "tf_efficientnet_lite0")
PEERS = ("timm eager", "timm compiled", "timm compiled-frozen", "timm onnxruntime", "timm openvino")
MATRIX = 2048
"""Side of the matrices whose product is taken for the peak."""

Contenders = dict[str, tuple[Callable[[], object], Conditions]]


def peers(name: str, base: Conditions, folder: Path) -> Contenders:
    """timm's network in every runtime, at the stated size."""
    size = base.image_size
    assert size is not None, "the benchmark states its size"
    net = timm.create_model(name).eval()
    batch = torch.randn(base.batch_size, 3, size, size)
    write_onnx(net, batch[:2], folder / "peer.onnx")
    found: Contenders = {}
    for label in PEERS:
        runtime = label.split()[1]
        source = folder / "peer.onnx" if runtime in ("onnxruntime", "openvino") else timm.create_model(name)
        runner = open_runtime(source, runtime, threads=base.threads)
        prepared = runner.prepare(batch)
        found[label] = (lambda runner=runner, prepared=prepared: runner.run(prepared), dataclasses.replace(base, runtime=runtime))
    return found


def ours(name: str, base: Conditions, folder: Path) -> tuple[Contenders, dict[str, Artifact]]:
    """Our network, tuned at the stated batch: in float32, and in its fastest form."""
    size, batch = base.image_size, base.batch_size
    assert size is not None, "the benchmark states its size"
    net = cs.create_model(name)
    pre = Preprocessing(image_size=size, mean=(0.0,) * 3, std=(1.0,) * 3)
    noise = np.random.default_rng(0).integers(0, 256, (32, size, size, 3), dtype=np.uint8)
    found: Contenders = {}
    artifacts: dict[str, Artifact] = {}
    for label, int8 in (("ours fp32", False), ("ours fastest", True)):
        art, forms = export_fastest(
            net, folder / label, batch_sizes=(batch,), threads=base.threads, int8=int8, preprocessing=pre, calibration_images=noise,
            max_drop=100.0,
        )  # fmt: skip
        for form, tuning in forms.items():
            print(f"  {label}: {form} {getattr(getattr(tuning, 'best', None), 'images_per_s', 0.0):.1f} images/s", flush=True)
        runner = open_artifact(art, art.runtime, threads=base.threads, streams=art.streams)
        prepared = runner.prepare(art.input_batch(noise[:batch]))
        cond = dataclasses.replace(base, runtime=art.runtime, precision=art.precision)
        found[label] = (lambda runner=runner, prepared=prepared: runner.run(prepared), cond)
        artifacts[label] = art
    return found, artifacts


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each contender's calls: everybody for ``seconds``, then again, ``rounds`` times."""
    for call in calls.values():
        for _ in range(3):
            call()
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            call()  # the caches are somebody else's still
            spent = 0.0
            while spent < seconds:
                start = time.perf_counter()
                call()
                times[label].append(time.perf_counter() - start)
                spent += times[label][-1]
    return times


def matrix_product(threads: int) -> Callable[[], object]:
    """A large float32 matrix product: what this machine can do at most."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)

    def call() -> object:
        with torch_threads(threads):
            return a @ b

    return call


def compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All contenders of one network. Returns a row each."""
    size = args.img_size or preprocessing_of(cs.create_model(name)).image_size
    base = Conditions(batch_size=args.batch_size, image_size=size, threads=args.threads or available_cores())
    macs = cs.count(cs.create_model(name), image_size=size).macs
    with tempfile.TemporaryDirectory() as place:
        contenders = peers(name, base, Path(place))
        mine, artifacts = ours(name, base, Path(place))
        contenders |= mine
        threads = base.threads or 1
        calls = {label: call for label, (call, _) in contenders.items()} | {"peak": matrix_product(threads)}
        times = in_turns(calls, args.rounds, args.seconds)
    peak = 2 * MATRIX**3 / float(np.median(times.pop("peak")))
    environment = Environment.here()
    rows = []
    for label, taken in times.items():
        streams = artifacts[label].streams if label in artifacts else 1
        notes = (label, f"{streams} stream(s)", f"peak {peak / 1e9:.1f} GFLOP/s")
        m = Measurement(times_s=tuple(taken), conditions=contenders[label][1], environment=environment, model=name, notes=notes)
        append_record(args.records, Record(model=name, measurement=m, macs=macs))
        rows.append({"model": name, "contender": label, "images_per_s": m.images_per_s, "iqr_rel": m.iqr_rel, "runtime": m.conditions.runtime,
                     "precision": m.conditions.precision, "streams": streams, "share_of_peak": 2 * macs * m.images_per_s / peak})  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> str:
    """One network's table, and what the issue asks of it."""
    speed = {row["contender"]: row["images_per_s"] for row in rows}
    lines = [f"{rows[0]['model']}"]
    for row in rows:
        form = f"{row['runtime']}, {row['precision']}, {row['streams']} stream(s)"
        share = f"{row['share_of_peak']:5.0%} of fp32 peak" if row["precision"] == "fp32" else ""
        lines.append(f"  {row['contender']:22s} {row['images_per_s']:8.1f} images/s  IQR {row['iqr_rel']:4.0%}  {form:40s} {share}")
    best_peer = max((s for label, s in speed.items() if label in PEERS), default=float("nan"))
    fastest = speed["ours fastest"]
    lines.append(f"  fastest / timm compiled {fastest / speed['timm compiled']:.2f}   fastest / best peer {fastest / best_peer:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=None, help="None: the network's own size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed calls, per contender and round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--records", type=Path, default=Path("results/ship.jsonl"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in args.models:
        rows = compare(name, args)
        print("\n".join(json.dumps(row) for row in rows) if args.json else summary(rows), flush=True)


if __name__ == "__main__":
    main()
