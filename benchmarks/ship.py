"""Speed of what is shipped: our tuned artefacts against timm in eager PyTorch, torch.compile, ONNX Runtime and
OpenVINO.

    python -m benchmarks.ship [--models resnet50 tresnet_m ...] [--batch-size 8] [--rounds 9] [--seconds 0.5] [--threads
    N] [--json]
                              [--prepare] [--work runs/ship] [--records results/ship.jsonl]

Every contender of a network is opened first, then all are timed in turns, round after round; medians and interquartile
ranges are over all calls.
Weights are random and speed does not depend on them, so INT8 is let through whatever it disagrees on: `python -m
benchmarks.ship_gate` is where its answers are judged. All contenders run at the same batch, size and threads. The
machine's peak is that of a large float32 matrix product,
timed in the same turns: the best of several sizes and libraries. `--prepare` only writes the files, which needs no
quiet machine; a run without it uses what lies in `--work` and should have the machine to itself.

Contenders: timm's network eager, compiled, compiled with freezing, exported by torch.onnx.export into ONNX Runtime and
into OpenVINO (float32, both with their usual settings); ours, tuned: the fastest float32 form and the fastest of all
that `export_forms` makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from onnx import TensorProto, helper

import convscale as cs
from benchmarks.records import in_turns, replace_record, write_record
from convscale.artifact.artifact import Artifact, load_artifact, open_artifact
from convscale.conditions import Conditions, sides
from convscale.formats.onnx import write_onnx
from convscale.machine import Environment, available_cores
from convscale.networks.inputs import preprocessing_of
from convscale.runtimes.base import Opening, file_runtimes, open_runtime
from convscale.runtimes.pytorch.runner import torch_threads
from convscale.ship.forms import Fastest, Forms, export_forms, fastest_of, form_names
from convscale.ship.tune import Tuning, cost, settings_of
from convscale.ship.tune import in_turns as tune_in_turns
from convscale.speed.timing import Measurement

MODELS = (
    "resnet50",
    "tresnet_m",
    "tresnet_l",
    "efficientnet_b0",
    "efficientnet_b3",
    "mobilenetv2_100",
    "mixnet_m",
    "tf_efficientnet_lite0",
)
PEERS = ("timm eager", "timm compiled", "timm compiled-frozen", "timm onnxruntime", "timm openvino")
OWED = {"resnet50": 1.9, "tresnet_m": 1.9}
"""Times torch.compile that the fastest form owes."""
CALIBRATION = 32
Call = Callable[[], object]


def conditions_of(name: str, args: argparse.Namespace) -> Conditions:
    """Batch, size and threads of all contenders."""
    size = args.img_size or preprocessing_of(cs.create_model(name)).image_size
    return Conditions(batch_size=args.batch_size, image_size=size, threads=args.threads or available_cores())


def peer_net(name: str) -> torch.nn.Module:
    """timm's network, untrained."""
    return timm.create_model(name).eval()


def prepare(name: str, base: Conditions, folder: Path) -> Forms:
    """The peer's ONNX file and our artefacts, unless an earlier run has left them."""
    assert base.image_size is not None, "the benchmark states its size"
    size, _ = sides(base.image_size)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "peer.onnx").is_file():
        write_onnx(peer_net(name), torch.randn(2, 3, size, size), folder / "peer.tmp")
        (folder / "peer.tmp").rename(folder / "peer.onnx")
    net = cs.create_model(name)
    names = form_names(net, int8=True, image_size=size)
    if all((folder / "forms" / form).is_dir() for form in names):
        return {form: load_artifact(folder / "forms" / form) for form in names}
    shutil.rmtree(folder / "forms", ignore_errors=True)
    (folder / "forms").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (CALIBRATION, size, size, 3), dtype=np.uint8)
    pre = preprocessing_of(net, size)
    return export_forms(net, folder / "forms", names, preprocessing=pre, calibration_images=noise, max_drop=100.0)


def open_peers(name: str, base: Conditions, folder: Path) -> dict[str, tuple[Call, Conditions]]:
    """timm's network in every runtime, called once."""
    assert base.image_size is not None, "the benchmark states its size"
    batch = torch.randn(base.batch_size, 3, *sides(base.image_size))
    found = {}
    for label in PEERS:
        runtime = label.split()[1]
        source = folder / "peer.onnx" if runtime in file_runtimes() else peer_net(name)
        runner = open_runtime(source, runtime, Opening(threads=base.threads))
        prepared = runner.prepare(batch)
        runner.run(prepared)
        found[label] = (
            lambda runner=runner, prepared=prepared: runner.run(prepared),
            dataclasses.replace(base, runtime=runtime),
        )
    return found


def open_ours(
    forms: Forms, base: Conditions
) -> tuple[dict[str, tuple[Call, Conditions]], dict[str, Artifact], Fastest]:
    """Our network, tuned at the stated batch: in its fastest float32 form, and in its fastest."""
    found = fastest_of(forms, batch_sizes=(base.batch_size,), threads=base.threads)
    trials = {
        form: found.again.get(form, result.best) for form, result in found.forms.items() if isinstance(result, Tuning)
    }
    for form, trial in trials.items():
        s = trial.settings
        print(f"  {form}: {trial.images_per_s:.1f} images/s in {s.runtime}, {s.streams} stream(s)", flush=True)
    tuned = {form: load_artifact(art.folder) for form, art in forms.items() if isinstance(art, Artifact)}
    floats = [form for form in trials if "fp32" in form]
    again = tune_in_turns([(tuned[form], settings_of(tuned[form])) for form in floats])
    best_float = min(zip(again, floats, strict=True), key=lambda pair: cost(pair[0], "throughput"))[1]
    calls, arts = {}, {}
    for label, form in (("ours fp32", best_float), ("ours fastest", found.winner)):
        art = tuned[form]
        runner = open_artifact(
            art,
            art.runtime,
            Opening(threads=base.threads, streams=art.streams, batch_size=base.batch_size),
        )
        shape = (base.batch_size, *sides(art.image_size), 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        prepared = runner.prepare(art.input_batch(noise))
        cond = dataclasses.replace(base, runtime=art.runtime, precision=art.precision)
        calls[label] = (lambda runner=runner, prepared=prepared: runner.run(prepared), cond)
        arts[label] = art
    return calls, arts, found


def matrix_products(threads: int, folder: Path) -> dict[str, tuple[Call, float]]:
    """Large float32 matrix products, and their floating-point operations: what this machine can do at most."""
    found: dict[str, tuple[Call, float]] = {}
    for side in (1024, 2048, 4096):
        a, b = torch.randn(side, side), torch.randn(side, side)

        def call(a: torch.Tensor = a, b: torch.Tensor = b) -> object:
            with torch_threads(threads):
                return a @ b

        found[f"torch {side}"] = (call, 2.0 * side**3)
        if side == 4096:
            continue
        path = folder / f"matmul-{side}.onnx"
        onnx.save(_matmul(side), path)
        for runtime in ("onnxruntime", "openvino"):
            runner = open_runtime(path, runtime, Opening(threads=threads))
            prepared = runner.prepare(np.random.default_rng(0).standard_normal((side, side), dtype=np.float32))
            found[f"{runtime} {side}"] = (lambda runner=runner, prepared=prepared: runner.run(prepared), 2.0 * side**3)
    return found


def _matmul(side: int) -> onnx.ModelProto:
    weight = np.random.default_rng(1).standard_normal((side, side), dtype=np.float32)
    a, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", side]) for name in ("a", "c"))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["a", "b"], ["c"])], "matmul", [a], [c], [onnx.numpy_helper.from_array(weight, "b")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def compare(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All contenders of one network. Returns a row each."""
    base, folder = conditions_of(name, args), args.work / name
    contenders = open_peers(name, base, folder)
    mine, artifacts, found = open_ours(prepare(name, base, folder), base)
    contenders |= mine
    macs = cs.count(cs.create_model(name), image_size=base.image_size).macs
    products = matrix_products(base.threads or 1, folder)
    calls = {label: call for label, (call, _) in contenders.items()}
    times = in_turns(calls | {label: call for label, (call, _) in products.items()}, args.rounds, args.seconds)
    peaks = {label: operations / float(np.median(times[label])) for label, (_, operations) in products.items()}
    best = max(peaks, key=lambda label: peaks[label])
    rows = []
    for label, (_, cond) in contenders.items():
        m = Measurement(
            times_s=tuple(round(t, 7) for t in times[label]),
            conditions=cond,
            environment=Environment.here(),
            model=name,
        )
        row = {
            "schema": 1,
            "model": name,
            "contender": label,
            "images_per_s": round(m.images_per_s, 2),
            "iqr_rel": round(m.iqr_rel, 4),
            "streams": artifacts[label].streams if label in artifacts else 1,
            "macs": macs,
            "share_of_peak": 2 * macs * m.images_per_s / peaks[best],
            "peak": {
                "product": best,
                "gflops": round(peaks[best] / 1e9, 1),
                "all": {k: round(v / 1e9, 1) for k, v in peaks.items()},
            },
            "measurement": m.to_dict(),
        }
        if label == "ours fastest":
            row["search"] = found.to_dict()
        replace_record(args.records, row, ("model", "contender"))
        rows.append(row)
    return rows


def verdicts(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """One network's ratios."""
    speed = {row["contender"]: row["images_per_s"] for row in rows}
    best_peer = max(value for label, value in speed.items() if label in PEERS)
    share = next(row["share_of_peak"] for row in rows if row["contender"] == "ours fp32")
    return {
        "fastest / compiled": speed["ours fastest"] / speed["timm compiled"],
        "fastest / best peer": speed["ours fastest"] / best_peer,
        "fp32 / compiled": speed["ours fp32"] / speed["timm compiled"],
        "fp32 / best peer": speed["ours fp32"] / best_peer,
        "fp32 share of peak": share,
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """One network's lines for people."""
    lines = [f"{rows[0]['model']}, {rows[0]['measurement']['conditions']['image_size']} px"]
    for row in rows:
        c = row["measurement"]["conditions"]
        form = f"{c['runtime']}, {c['precision']}, {row['streams']} stream(s)"
        share = f"{row['share_of_peak']:5.0%} of fp32 peak" if c["precision"] == "fp32" else ""
        lines.append(
            f"  {row['contender']:22s} {row['images_per_s']:8.1f} images/s  IQR {row['iqr_rel']:4.0%}  {form:40s} "
            f"{share}"
        )
    lines.append("  " + "   ".join(f"{label} {value:.2f}" for label, value in verdicts(rows).items()))
    peaks = rows[0]["peak"]["all"]
    lines.append("  GFLOP/s of matrix products: " + ", ".join(f"{label} {value:.0f}" for label, value in peaks.items()))
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All records as Markdown."""
    first = rows[0]["measurement"]
    versions = ", ".join(f"{name} {value}" for name, value in first["environment"]["versions"].items())
    c = first["conditions"]
    lines = [
        "# Speed of what is shipped",
        "",
        "Made by `python -m benchmarks.ship`; records with raw times: [ship.jsonl](ship.jsonl). "
        f"{first['environment']['device_name']}, "
        f"{first['environment']['cores']} cores, CPU only (not measured on a GPU); {versions}. Batch "
        f"{c['batch_size']}, {c['threads']} threads, each",
        "network at its own size; all contenders in turns in one process, medians; in brackets the interquartile range",
        "as a share of the median. Ours are tuned at that batch; INT8's answers are judged in "
        "[ship_gate.md](ship_gate.md),",
        "with the same settings of the quantiser.",
        "",
        "## images/s",
        "",
        "| network | px | " + " | ".join([*PEERS, "ours fp32", "ours fastest"]) + " |",
        "|---|---|" + "---|" * (len(PEERS) + 2),
    ]
    models = [name for name in MODELS if any(row["model"] == name for row in rows)]
    by_model = {name: {row["contender"]: row for row in rows if row["model"] == name} for name in models}
    for name, found in by_model.items():
        cells = [
            f"{found[label]['images_per_s']:.1f} ({found[label]['iqr_rel']:.0%})"
            for label in (*PEERS, "ours fp32", "ours fastest")
        ]
        lines.append(
            f"| {name} | {found['ours fp32']['measurement']['conditions']['image_size']} | " + " | ".join(cells) + " |"
        )
    lines += [
        "",
        "## Ratios",
        "",
        "| network | fastest form | fastest / torch.compile (owed) | fastest / best peer (owed 0.97) | fp32 / "
        "torch.compile | fp32 / best peer "
        "| fp32's share of the machine's fp32 peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in by_model.items():
        v, fastest = verdicts(list(found.values())), found["ours fastest"]
        cond = fastest["measurement"]["conditions"]
        form = f"{cond['precision']} in {cond['runtime']}, {fastest['streams']} stream(s)"
        owed = f" ({OWED[name]})" if name in OWED else ""
        peak = fastest["peak"]
        lines.append(
            f"| {name} | {form} | {v['fastest / compiled']:.2f}{owed} | {v['fastest / best peer']:.2f} | "
            f"{v['fp32 / compiled']:.2f} "
            f"| {v['fp32 / best peer']:.2f} | {v['fp32 share of peak']:.0%} of {peak['gflops']:.0f} GFLOP/s "
            f"({peak['product']}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=None, help="None: the network's own size")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of timed calls, per contender and round")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--prepare", action="store_true", help="only write the files")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ship"), help="exported files are kept here and used again"
    )
    parser.add_argument("--records", type=Path, default=Path("results/ship.jsonl"), help="the table goes beside it")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in args.models:
        base = conditions_of(name, args)
        prepare(name, base, args.work / name)
        if args.prepare:
            print(f"{name}: prepared", flush=True)
            continue
        rows = compare(name, args)
        print("\n".join(json.dumps(row) for row in rows) if args.json else summary(rows), flush=True)
        write_record(
            args.records.with_suffix(".md"), table([json.loads(text) for text in args.records.read_text().splitlines()])
        )


if __name__ == "__main__":
    main()
