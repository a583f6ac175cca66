"""Several labels per image: the asymmetric loss against binary cross-entropy, and ML-Decoder against a pooled head:
mean average precision with its spread, and what the decoder costs as shipped.

    python -m benchmarks.multilabel --data-dir DIR [--seeds 5] [--epochs 15] [--train 4000] [--threads 2] [--json]
        [--output results/multilabel.jsonl] [--table results/multilabel.md] [--heads]

With ``--heads`` each loss is trained with both heads (the decoder 192 wide), and both networks are exported and timed
in ONNX Runtime, in float and in 8 bits, in turns; with an output, what is recorded under the same conditions is not run
again.

Images are composed here: one to four garments of Fashion-MNIST (DIR holds its idx files), each at its own size and
place, over a crop of one of scikit-image's photographs, 56 px, gray; the network is trained on them at 28 px, its own
size. The classes are long-tailed: each is drawn 0.75 times as often as the one before, so of ten labels an image has
about two, and the last class is rare. Train, validation and test images are made of different garments and photographs.
Every seed composes its own set, and trains the same network (ResNet-18's blocks at half width) once with each loss,
from the same first weights and with the same recipe (``multilabel`` with another learning rate and no policy).
Thresholds are set on validation; the test set is read once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.fashion import small_resnet
from benchmarks.records import in_turns, machine, replace_record, write_record
from convscale.arch.spec import NetSpec
from convscale.artifact.artifact import load_artifact
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import ArraySplit, DataSplits
from convscale.learn.evaluate import binary_calibration_error, evaluate
from convscale.learn.train import train
from convscale.nn.net import create_model
from convscale.ship.export import export

SIDE, MOST, TAIL = 56, 4, 0.75
LOSSES: dict[str, dict[str, Any]] = {"bce": {"loss": "bce"}, "asymmetric": {"loss": "asymmetric"}}
HEADS = ("gap", "ml_decoder")
DECODER_WIDTH = 192
SHIPPED = ("onnx fp32", "onnx int8")
SPEED_SIDE, SPEED_BATCH = 112, 8
PHOTOGRAPHS = {
    "train": ("astronaut", "chelsea", "coffee"),
    "validation": ("rocket",),
    "test": ("hubble_deep_field", "retina"),
}


def photographs(names: tuple[str, ...]) -> list[np.ndarray]:
    """Gray, float, (H, W)."""
    from skimage import data

    return [np.asarray(getattr(data, name)(), dtype=np.float32)[..., :3].mean(2) for name in names]


def compose(garments: ArraySplit, split: str, count: int, random: np.random.Generator) -> ArraySplit:
    """``count`` images with one to four garments each."""
    classes = len(garments.classes)
    chances = TAIL ** np.arange(classes)
    chances /= chances.sum()
    members = [torch.nonzero(garments.labels == label).flatten().numpy() for label in range(classes)]
    backgrounds = photographs(PHOTOGRAPHS[split])
    pixels, labels = np.empty((count, SIDE, SIDE, 1), np.uint8), torch.zeros(count, classes)
    for row in range(count):
        source = backgrounds[random.integers(len(backgrounds))]
        top, left = random.integers(source.shape[0] - SIDE), random.integers(source.shape[1] - SIDE)
        canvas = 0.6 * source[top : top + SIDE, left : left + SIDE]
        for label in random.choice(classes, size=random.integers(1, MOST + 1), p=chances):
            garment, side = garments.pixels[random.choice(members[label])], int(random.integers(18, 34))
            resized = F.interpolate(
                garment.permute(2, 0, 1)[None].float(), (side, side), mode="bilinear", antialias=True
            )[0, 0].numpy()
            y, x = random.integers(SIDE - side + 1), random.integers(SIDE - side + 1)
            cover = np.clip(resized / 48, 0, 1)  # dark pixels are background in Fashion-MNIST
            canvas[y : y + side, x : x + side] = cover * resized + (1 - cover) * canvas[y : y + side, x : x + side]
            labels[row, label] = 1
        pixels[row, :, :, 0] = np.clip(canvas, 0, 255).astype(np.uint8)
    return ArraySplit(
        split=split, classes=garments.classes, labels=labels, channels=1, pixels=torch.from_numpy(pixels), origin=split
    )


def composed(data: DataSplits, options: argparse.Namespace, seed: int) -> DataSplits:
    """A set of composed images."""
    random = np.random.default_rng(seed)
    sizes = {"train": options.train, "validation": options.train // 4, "test": options.train // 2}
    parts = {split: compose(getattr(data, split), split, count, random) for split, count in sizes.items()}
    return DataSplits(train=parts["train"], validation=parts["validation"], test=parts["test"], classes=data.classes)


def f1(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the classes."""
    hits = (predicted & (labels > 0)).sum(0).double()
    return float((2 * hits / (predicted.sum(0) + labels.sum(0)).clamp(min=1)).mean())


def network(head: str) -> NetSpec:
    """The network with a head; the decoder is as narrow as the network."""
    spec = small_resnet()
    return replace(spec, head=replace(spec.head, kind=head, decoder_width=DECODER_WIDTH))


def run(data: DataSplits, name: str, options: argparse.Namespace, seed: int, head: str = "gap") -> dict[str, Any]:
    """Train with one loss; what it reaches on the test set."""
    from convscale.learn.evaluate import predict_split

    torch.manual_seed(seed)
    net = create_model(network(head), num_classes=len(data.classes), in_chans=1)
    overrides: dict[str, Any] = {
        "batch_size": 64,
        "lr": options.lr,
        "weight_decay": 0.05,
        "policy": "none",
        "cutout": 0.0,
        "augment": "shift-crop",
    }
    overrides |= {"ema_decay": 0.995, "precision": options.precision, "layout": "nhwc", **LOSSES[name]}
    done = train(net, data, recipe="multilabel", epochs=options.epochs, seed=seed, **overrides)
    found = evaluate(done.net, data.test, done.preprocessing)
    logits, kept, _, _ = predict_split(done.net, data.test, done.preprocessing)
    assert done.thresholds is not None
    tail = found.per_class[len(data.classes) // 2 :]
    return {
        "map": found.mean_average_precision, "map_rare_half": float(np.mean(tail)), "per_class": list(found.per_class),
        "f1_at_thresholds": f1(logits.sigmoid() > torch.tensor(done.thresholds), data.test.labels[kept]),
        "f1_at_half": f1(logits > 0, data.test.labels[kept]), "calibration_error": found.calibration_error,
        "calibration_error_tempered": _tempered(logits, data.test.labels[kept], done.temperatures),
        "best_epoch": done.best_epoch, "seconds": round(done.seconds, 1),
        "parameters": sum(parameter.numel() for parameter in done.net.parameters()),
    }  # fmt: skip


def _tempered(logits: torch.Tensor, labels: torch.Tensor, temperatures: tuple[float, ...] | None) -> float:
    """The calibration error of what an artefact says."""
    assert temperatures is not None
    return binary_calibration_error((logits / torch.tensor(temperatures)).sigmoid(), labels)


def shipped(classes: int, threads: int) -> list[dict[str, Any]]:
    """Images/s of both heads as shipped, untrained, timed in turns: a speed does not depend on the weights."""
    images = np.random.default_rng(0).integers(0, 256, (64, SPEED_SIDE, SPEED_SIDE, 1), dtype=np.uint8)
    how = Preprocessing(image_size=SPEED_SIDE, channels=1, mean=(0.5,), std=(0.25,))
    calls: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for head in HEADS:
            net = create_model(network(head), num_classes=classes, in_chans=1).eval()
            for form in SHIPPED:
                options: dict[str, Any] = {"verify_images": images, "preprocessing": how, "max_drop": 100.0}
                if form.endswith("int8"):
                    options |= {"int8": True, "calibration_images": images}
                art = export(net, Path(place) / f"{head}-{form.split()[1]}", **options)
                opened = load_artifact(art.folder, threads=threads)
                batch = opened.input_batch(images[:SPEED_BATCH])
                calls[f"{head}, {form}"] = partial(opened.runner, batch)
        times = in_turns(calls, rounds=5, seconds=1.0)
    return [
        {
            "benchmark": "multilabel-shipped", "head": label.split(", ")[0], "form": label.split(", ")[1],
            "images_per_s": SPEED_BATCH / statistics.median(seconds),
            "conditions": {"batch": SPEED_BATCH, "side": SPEED_SIDE, "classes": classes, "threads": threads},
        }
        for label, seconds in times.items()
    ]  # fmt: skip


def compare_heads(source: DataSplits, options: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Both losses with both heads; what is in the output under these conditions is taken from there."""
    conditions = {key: getattr(options, key) for key in ("epochs", "train", "lr", "precision")} | about
    old: list[dict[str, Any]] = []
    if options.output and options.output.is_file():
        old = [json.loads(line) for line in options.output.read_text(encoding="utf-8").splitlines()]
    records = []
    for seed in range(options.seeds):
        data = None
        for head in HEADS:
            for name in LOSSES:
                key = {"benchmark": "multilabel-heads", "seed": seed, "head": head, "loss": name}
                known = [row for row in old if key.items() <= row.items() and row["conditions"] == conditions]
                if known:
                    records.append(known[0])
                    continue
                data = data or composed(source, options, seed)
                record = {**key, **run(data, name, options, seed, head), "conditions": conditions}
                records.append(record)
                print(f"seed {seed}, {head}, {name}: mAP {record['map']:.2%} in {record['seconds']} s", flush=True)
                if options.output:
                    replace_record(options.output, record, tuple(key))
    if not any(row["benchmark"] == "multilabel-shipped" for row in old):
        for record in shipped(len(source.classes), options.threads):
            record["conditions"] |= about
            print(f"{record['head']}, {record['form']}: {record['images_per_s']:,.0f} images/s", flush=True)
            if options.output:
                replace_record(options.output, record, ("benchmark", "head", "form"))
    return records


def summarise_heads(records: list[dict[str, Any]]) -> str:
    """A Markdown table of means and standard deviations over the seeds."""
    keys = {"map": "mAP", "f1_at_thresholds": "F1 at the thresholds", "calibration_error": "calibration error",
            "calibration_error_tempered": "the same, as shipped"}  # fmt: skip
    lines = ["| head | loss | " + " | ".join(keys.values()) + " |", "|---" * (len(keys) + 2) + "|"]
    for head in HEADS:
        for name in LOSSES:
            rows = [row for row in records if row["loss"] == name and row["head"] == head]
            if not rows:
                continue
            values = [[row[key] for row in rows] for key in keys]
            cells = [f"{statistics.mean(each):.1%} ({_spread(each):.1%})" for each in values]
            lines.append(f"| {head} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summarise(records: list[dict[str, Any]]) -> str:
    """A Markdown table of means and standard deviations over the seeds."""
    keys = {
        "map": "mAP",
        "map_rare_half": "mAP of the 5 rarer classes",
        "f1_at_thresholds": "F1 at the thresholds",
        "f1_at_half": "F1 at 0.5",
    }
    lines = ["| loss | " + " | ".join(keys.values()) + " |", "|---|---|---|---|---|"]
    for name in LOSSES:
        rows = [row for row in records if row["loss"] == name]
        cells = [
            f"{statistics.mean(row[key] for row in rows):.1%} ({_spread([row[key] for row in rows]):.1%})"
            for key in keys
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    pairs = [
        tuple(next(row["map"] for row in records if row["seed"] == seed and row["loss"] == name) for name in LOSSES)
        for seed in _seeds(records)
    ]
    gains = [100 * (asymmetric - bce) for bce, asymmetric in pairs]
    lines.append(
        f"\nmAP of asymmetric over bce, seed by seed: {', '.join(f'{gain:+.1f}' for gain in gains)}; mean "
        f"{statistics.mean(gains):+.1f}."
    )
    return "\n".join(lines) + "\n"


def _seeds(records: list[dict[str, Any]]) -> list[int]:
    return sorted({row["seed"] for row in records})


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument(
        "--train", type=int, default=4000, help="images; a quarter and a half as many for validation and test"
    )
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--heads", action="store_true", help="compare ML-Decoder with a pooled head too")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file for the summary")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source, records = open_dataset(options.data_dir), []
    about = {"torch": torch.__version__, "machine": machine()}
    if options.heads:
        summary = summarise_heads(compare_heads(source, options, about | {"threads": options.threads}))
        print(summary)
        if options.table:
            _write_table(options, summary)
        return
    for seed in range(options.seeds):
        data = composed(source, options, seed)
        for name in LOSSES:
            record = {
                "benchmark": "multilabel",
                "seed": seed,
                "loss": name,
                **run(data, name, options, seed),
                "labels_per_image": round(float(data.train.labels.sum(1).mean()), 2),
            }
            record["train_counts"] = data.train.class_counts().tolist()
            record["conditions"] = {
                key: getattr(options, key) for key in ("epochs", "train", "lr", "precision")
            } | about
            records.append(record)
            print(json.dumps(record) if options.json else f"seed {seed}, {name}: mAP {record['map']:.2%}", flush=True)
            if options.output:
                replace_record(options.output, record, ("benchmark", "seed", "loss"))
    if not options.json:
        print(summarise(records))
    if options.table:
        _write_table(options, summarise(records))


def _write_table(options: argparse.Namespace, summary: str) -> None:
    command = shlex.join(["python", "-m", "benchmarks.multilabel", *sys.argv[1:]])
    text = f"`{command}`: {options.train:,} composed training images, {options.epochs} epochs, {options.seeds} seeds"
    write_record(options.table, f"{text}; mean (sd).\n\n{summary}")


if __name__ == "__main__":
    main()
