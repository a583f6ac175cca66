# pyright: basic, reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false
# It runs with the code of 0.1.0, whose names and types the checker does not see.
"""Make ``tests/old_files/v0_1``: what convscale 0.1.0 wrote, so that tests can show that later versions still open it.

It must run with the code of commit bbd38ae, not with the present one:

    git worktree add ../convscale-0.1.0 bbd38ae
    PYTHONPATH=../convscale-0.1.0 OMP_NUM_THREADS=1 python tools/make_old_files.py

It works in a temporary folder and names everything by relative paths.
So no file holds a path of the machine that made it; that is checked.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from describe_surface import command_options, key_paths, public_names
from PIL import Image

import convscale as cs

TARGET = Path(__file__).resolve().parent.parent / "tests" / "old_files" / "v0_1"
FASHION = Path("/usr/share/datasets/fashion-mnist")
MOST_BYTES = 2_500_000
INTERRUPTED = 130
"""Exit code of a command that was told to stop."""
SEED = 7
RECIPE = "--set precision=fp32 --set layout=nchw --set lr=0.02 --set ema_decay=0.9 --set ema_every=1"
TRAIN = f"--data-dir data/fashion --model specs/resnet.yaml --epochs 3 -b 10 -j 0 --seed {SEED} --keep 1 {RECIPE}"
FIT = "--data-dir data/fashion --min-throughput 1 --model specs/mobilenet.yaml --model specs/resnet.yaml --epochs 3 "
FIT += f"--brief-epochs 1 -b 128 --threads 1 --runtime onnxruntime --seed {SEED} --set batch_size=10 {RECIPE}"
LABELS = "--data-dir data/labels.jsonl --model specs/mobilenet.yaml --recipe multilabel --epochs 3 -b 8 --img-size 28 "
LABELS += "-j 0 --set precision=fp32 --set layout=nchw --set policy=none"
MEASURE = "--img-size 32 -b 2 --threads 1 --seconds 0.05"


def main() -> None:
    """Make everything, check it, and put it in the place of what stood there."""
    package = Path(cs.__file__).parent
    assert (package / "choice.py").is_file(), f"{package} is not the code of commit bbd38ae; see the docstring"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="convscale-old-") as temporary:
        os.environ["CONVSCALE_CACHE"] = f"{temporary}/cache"
        work = Path(temporary) / "v0_1"
        work.mkdir()
        os.chdir(work)
        for step in (
            make_data,
            make_specs,
            make_trainings,
            make_artefacts,
            make_fits,
            make_records,
            make_rows,
            make_surface,
        ):
            began = time.monotonic()
            step()
            print(f"{step.__name__}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        check(work, [temporary, str(package.parent), str(TARGET.parents[2]), sys.prefix, f"{Path.home()}/"])
        os.chdir(TARGET.parents[2])
        shutil.rmtree(TARGET, ignore_errors=True)
        shutil.copytree(work, TARGET)


def convscale(line: str, *, code: int = 0) -> str:
    """Standard output of ``convscale LINE``."""
    from convscale.cli import main as run

    sys.argv, out, status = ["convscale", *line.split()], io.StringIO(), 0
    with contextlib.redirect_stdout(out):
        try:
            run()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
    assert status == code, f"convscale {line}: exit code {status}\n{out.getvalue()}"
    return out.getvalue()


def json_of(line: str) -> Any:
    """What ``convscale LINE --json`` says."""
    return parsed(convscale(f"{line} --json"))


def keep(name: str, value: Any) -> None:
    """Add a value to ``expected.json``."""
    path = Path("expected.json")
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | {name: value}, indent=1) + "\n")


def make_data() -> None:
    """The first images of Fashion-MNIST as idx files, and pictures with several labels."""
    for part, count in (("train", 200), ("t10k", 60)):
        write_idx(f"{part}-images-idx3-ubyte.gz", count, (28, 28))
        write_idx(f"{part}-labels-idx1-ubyte.gz", count, ())
    draw = np.random.default_rng(SEED)
    Path("data/pictures").mkdir()
    lines = []
    for number in range(32):
        light = number % 2 == 1
        coarse = draw.integers(150 if light else 0, 250 if light else 100, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((24, 20), Image.Resampling.NEAREST).save(f"data/pictures/{number:02}.png")
        split = ("train", "train", "val", "test")[number // 2 % 4]
        labels = ["image", "light"] if light else ["image"]
        lines.append(json.dumps({"path": f"pictures/{number:02}.png", "labels": labels, "split": split}))
    Path("data/labels.jsonl").write_text("\n".join(lines) + "\n")


def write_idx(name: str, count: int, shape: tuple[int, ...]) -> None:
    """The first ``count`` items of a file of Fashion-MNIST's."""
    header = 8 + 4 * len(shape)
    with gzip.open(FASHION / name) as file:
        data = file.read(header + count * int(np.prod(shape, dtype=int)))
    Path("data/fashion").mkdir(parents=True, exist_ok=True)
    with open(f"data/fashion/{name}", "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(data[:4] + struct.pack(">I", count) + data[8:])


def make_specs() -> None:
    """Tiny networks as YAML and JSON files, a full and a scaled one beside them, and a recipe."""
    Path("specs").mkdir()
    specs = {
        "resnet": tiny("resnet18", 3, width=0.0625, depth=0.5),
        "mobilenet": tiny("mobilenetv1_100", 4, width=0.1, depth=0.2),
        "efficientnet": tiny("efficientnet_b0", 5, width=0.1, depth=0.1),
        "tresnet": tiny("tresnet_m", 3, width=0.0625, depth=0.3),
        "tresnet_m": cs.get_spec("tresnet_m"),
        "scaled": cs.scale(cs.get_spec("efficientnet_b0"), phi=-2.0),
    }
    counts = {}
    for name, spec in specs.items():
        for suffix in ("yaml", "json"):
            cs.save_spec(spec, f"specs/{name}.{suffix}")
        cost = cs.count(spec)
        counts[name] = {"name": spec.name, "image_size": spec.input.size, "params": cost.params, "macs": cost.macs}
    keep("specs", counts)
    convscale("recipes efficientnet --set lr=0.5 --set epochs=3 --output recipe.yaml")
    keep("recipe", json_of("recipes recipe.yaml"))


def tiny(base: str, stages: int, *, width: float, depth: float) -> cs.NetSpec:
    """A scaled member of a family, its last stages left out."""
    spec = cs.scale(cs.get_spec(base), width=width, depth=depth, image_size=28, divisor=4)
    return replace(spec, name=f"tiny_{base}", stages=spec.stages[:stages], lineage=None)


@contextlib.contextmanager
def interrupted(when: Callable[[dict[str, Any]], bool]) -> Iterator[None]:
    """Meanwhile a training is told to stop at the first event for which ``when`` holds."""
    from convscale.learn.progress import LiveProgress

    show = LiveProgress.__call__

    def stop(self: LiveProgress, event: dict[str, Any]) -> None:
        show(self, event)
        if when(event):
            os.kill(os.getpid(), signal.SIGTERM)

    LiveProgress.__call__ = stop
    try:
        yield
    finally:
        LiveProgress.__call__ = show


def make_trainings() -> None:
    """A run that ended, the same run interrupted in its second epoch, a checkpoint of one for several labels."""
    run = json_of(f"train {TRAIN} --output trainings/finished")
    keep("train", {"args": TRAIN.split(), **{key: run[key] for key in ("best_metric", "best_epoch", "history")}})
    keep("evaluate", json_of("evaluate trainings/finished --data-dir data/fashion"))
    with interrupted(lambda event: event["kind"] == "step" and event["epoch"] == 2):
        convscale(f"train {TRAIN} --output trainings/interrupted", code=INTERRUPTED)
    convscale(f"train {LABELS} --output labels")
    shutil.copytree(max(Path("labels/checkpoints").glob("best-*")), "checkpoint")
    shutil.rmtree("labels")
    keep("evaluate_labels", json_of("evaluate checkpoint --data-dir data/labels.jsonl"))


def make_artefacts() -> None:
    """Every format and precision, each beside four images and what it said of them."""
    export = "export trainings/finished --data-dir data/fashion --max-drop 100 --output artefacts"
    convscale(f"{export}/onnx_fp32 --card licence=MIT")
    convscale(f"{export}/onnx_int8 --int8 --bake")
    convscale(f"{export}/openvino_fp32 --format openvino --bake")
    convscale("tune artefacts/openvino_fp32 -b 64 --threads 1")
    convscale(f"{export}/openvino_int8 --format openvino --int8")
    convscale("export checkpoint --data-dir data/labels.jsonl --output artefacts/onnx_labels")
    cs.export(random_net("tresnet"), "artefacts/torch_fp32", format="torch", classes=["a", "b", "c"])
    cs.export(random_net("efficientnet"), "artefacts/onnx_fp16", half=True, bake=True, classes=["a", "b", "c"])
    for folder in sorted(Path("artefacts").iterdir()):
        artifact = cs.load_artifact(folder)
        size, channels = artifact.image_size, artifact.preprocessing.channels
        coarse = np.random.default_rng(SEED).integers(0, 256, (4, 7, 7, channels), dtype=np.uint8)
        images = coarse.repeat(size // 7, axis=1).repeat(size // 7, axis=2)
        if channels == 1:
            with gzip.open("data/fashion/t10k-images-idx3-ubyte.gz") as file:
                images = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28, 1)[:4]
        answers = {"probabilities": artifact(images), "logits": artifact.logits(images)}
        np.savez_compressed(f"{folder}.npz", images=images, **answers)
        assert np.ptp(answers["probabilities"], axis=0).max() > 0.02, f"{folder} says the same of every image"


def random_net(name: str) -> torch.nn.Module:
    """An untrained network whose norms had one batch, so that its answers depend on the image."""
    torch.manual_seed(SEED)
    net = cs.create_model(cs.load_spec(f"specs/{name}.yaml"), num_classes=3)
    for module in net.modules():
        if hasattr(module, "momentum"):
            vars(module)["momentum"] = 1.0
    with torch.no_grad():
        net.train()(torch.randn(16, 3, 28, 28))
        for parameter in net.get_classifier().parameters():
            parameter.normal_()
    return net.eval()


def make_fits() -> None:
    """A whole run of ``fit``, and one interrupted in its full training; without their pages, which are made again."""
    run = json_of(f"fit {FIT} --output fits/finished")
    kept = {key: run[key] for key in ("winner", "evaluation", "verification", "constraint")}
    keep("fit", {"args": FIT.split(), **kept, "forms": sorted(run["artifact"]["search"]["forms"])})
    with interrupted(lambda event: event["kind"] == "step" and event["epochs"] == 3 and event["epoch"] == 2):
        convscale(f"fit {FIT} --output fits/interrupted", code=INTERRUPTED)
    Path("fits/finished/report.html").unlink()
    shutil.rmtree(min(Path("fits/finished/train/checkpoints").glob("step-*")))  # the last one is enough


def make_records() -> None:
    """Measurements as JSON lines and as a table of timm's, and calibrations made by them."""
    convscale(f"measure resnet18 mobilenetv2_050 {MEASURE} --runtime eager --record records.jsonl")
    convscale("measure specs/resnet.yaml -b 2 --threads 1 --seconds 0.05 --record records.jsonl")
    convscale(f"measure resnet18 {MEASURE} --mode train --record records.jsonl")
    convscale(f"measure resnet18 {MEASURE} --runtime eager --record records.csv")
    lines = [json.loads(line) for line in Path("records.jsonl").read_text().splitlines()]
    keep("records", [{key: line[key] for key in ("model", "params", "macs")} for line in lines])
    Path("two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    convscale("calibrate --device cpu --measurement two.jsonl --threads 1 --output calibration_cpu.json")
    Path("two.jsonl").unlink()
    columns = "model,infer_samples_per_sec,infer_batch_size,infer_img_size"
    Path("rtx-4090.csv").write_text(f"{columns}\nresnet18,9000,256,224\nmobilenetv2_050,14000,256,224\n")
    convscale("calibrate --device rtx-4090 --csv rtx-4090.csv --output calibration_rtx-4090.json")
    predict = "predict resnet18 --device {0} --calibration calibration_{0}.json"
    keep("predict", {device: json_of(predict.format(device)) for device in ("cpu", "rtx-4090")})


def make_rows() -> None:
    """Rows of ``classify``, of which a first part was written before it stopped."""
    convscale("classify data/pictures --model artefacts/torch_fp32 --output rows.jsonl --workers 1")
    lines = Path("rows.jsonl").read_text().splitlines(keepends=True)
    keep("rows", [json.loads(line) for line in lines])
    Path("rows.jsonl").write_text("".join(lines[:10]))


CANDIDATES = "--model resnet18 --model efficientnet_b0 --model tresnet_xl --model specs/scaled.yaml"
"""Every part of a choice: a fast one, one that may be fast enough, one with odd channels, one of unknown accuracy."""
COMMANDS = (
    "list tresnet_?",
    "list tresnet_m --pretrained",
    "show tresnet_m",
    "show specs/efficientnet.yaml",
    "scale efficientnet_b0 --phi 1",
    "count resnet18 --img-size 32 --device v100",
    f"measure mobilenetv2_050 {MEASURE} --runtime eager",
    "measure artefacts/onnx_fp32 -b 2 --seconds 0.05",
    "predict resnet18 --device rtx-4090",
    "calibrate --device rtx-4090 --csv rtx-4090.csv --output new/calibration.json",
    f"choose --device rtx-4090 --min-throughput 9000 {CANDIDATES}",
    "choose --device rtx-4090 --min-throughput 20000 --scale resnet18 --along resolution",
    "recipes",
    "recipes efficientnet",
    f"train {TRAIN} --output new/train",
    "evaluate trainings/finished --data-dir data/fashion",
    "evaluate checkpoint --data-dir data/labels.jsonl",
    "export trainings/finished --output new/export",
    "export trainings/finished --data-dir data/fashion --output new/export_checked",
    "tune artefacts/onnx_fp32 -b 64 --threads 1",
    "classify data/pictures/00.png --model artefacts/torch_fp32",
    "report trainings/finished",
    f"fit {FIT} --output fits/finished --resume",
)
"""What is run with ``--json``, in a copy of the folder."""


def make_surface() -> None:
    """Public names, options, and the keys of ``--json``; what the commands write is not kept."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as copy:
        os.chdir(shutil.copytree(here, Path(copy) / "v0_1"))
        outputs = [{"args": line.split(), "keys": key_paths(json_of(line))} for line in COMMANDS]
        os.chdir(here)
    surface = {"names": public_names(), "options": command_options(), "json": outputs}
    Path("surface.json").write_text(json.dumps(surface, indent=1) + "\n")


def parsed(text: str) -> Any:
    """JSON, or the values of JSON lines."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines()]


def check(folder: Path, words: list[str]) -> None:
    """No file holds one of the words, nor do all together hold too much."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    largest = ", ".join(
        f"{path.relative_to(folder)} {path.stat().st_size:,}"
        for path in sorted(files, key=lambda p: -p.stat().st_size)[:12]
    )
    assert total < MOST_BYTES, f"{total:,} bytes, at most {MOST_BYTES:,} are wanted; the largest: {largest}"
    for path in files:
        parts = {str(path): path.read_bytes()}
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts |= {f"{path}:{name}": archive.read(name) for name in archive.namelist()}
        hits = [f"{name} holds {word!r}" for name, data in parts.items() for word in words if word.encode() in data]
        assert not hits, "; ".join(hits)
    print(f"{len(files)} files, {total:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
