"""Distillation: a small student alone, with a softened teacher (Hinton et al. 2015), and as USI does (cross-entropy
plus five times the teacher's divergence at temperature 1), three seeds.

    python -m benchmarks.distil [--data-dir DIR] [--stamps /usr/share/tuxpaint/stamps] [--seeds 3] [--train 6000]
        [--epochs 4] [--threads 1] [--output results/distil.jsonl] [--table results/distil.md]

Sets: Fashion-MNIST (DIR holds its idx files; the first ``--train`` images of the train set, the whole test set), and
Debian's package tuxpaint-stamps-default (top folders with 5 PNGs or more are the classes, drawn anew for each seed:
25 % test, 15 % validation). Student: ResNet-18's blocks in three stages at an eighth of the width (stamps: a quarter,
64 px); teacher: the same at half the width, trained for twice as many epochs on the same images, once for each seed.
All by the recipe ``small-adamw``. The teacher's outputs are kept on the disk, and the second student of a seed reads
them. What is recorded under the same conditions is not run again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.fashion import small_resnet
from benchmarks.records import machine, replace_record, write_record
from benchmarks.transfer import split_of
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.evaluate import evaluate
from convscale.learn.train import train
from convscale.nn.net import create_model

METHODS: dict[str, dict[str, Any]] = {
    "alone": {},
    "softened": {"distill_weight": 0.5, "distill_temperature": 2.0},
    "usi": {"distill_kl": 5.0, "distill_temperature": 1.0, "label_smoothing": 0.0},
}
WIDTHS = {"fashion": (0.125, 0.5), "stamps": (0.25, 0.5)}
EPOCHS_OF = {"fashion": 1, "stamps": 5}
"""Times ``--epochs``: stamps are few."""


def fashion(options: argparse.Namespace) -> Callable[[int], DataSplits]:
    """The same images for every seed."""
    whole = open_dataset(options.data_dir)
    part = DataSplits(
        train=whole.train.subset(range(options.train)),
        validation=whole.validation.subset(range(1_000)),
        test=whole.test,
        classes=whole.classes,
    )
    return lambda seed: part


def network(name: str, data: DataSplits, width: float, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    spec = small_resnet(width)
    return create_model(spec, num_classes=len(data.classes), in_chans=data.channels)


def run(name: str, data: DataSplits, seed: int, options: argparse.Namespace, kept: Path) -> list[dict[str, Any]]:
    """The teacher, and the students by each method."""
    small, large = WIDTHS[name]
    epochs = options.epochs * EPOCHS_OF[name]
    how: dict[str, Any] = {"recipe": "small-adamw", "seed": seed, "precision": "fp32", "layout": "nhwc"}
    if name == "stamps":
        how |= {"image_size": 64, "augment": "resized-crop", "crop_scale": 0.35, "batch_size": 32, "workers": 0}
    taught = train(network(name, data, large, seed), data, epochs=2 * epochs, **how)
    teacher = taught.net.requires_grad_(False)
    judged = evaluate(teacher, data.test, taught.preprocessing)
    rows = [{"method": "teacher", "test_top1": judged.top1, "seconds": round(taught.seconds, 1)}]
    for method, settings in METHODS.items():
        extra: dict[str, Any] = {"teacher": teacher, "teacher_cache": kept} if settings else {}
        done = train(network(name, data, small, seed), data, epochs=epochs, **how, **settings, **extra)
        judged = evaluate(done.net, data.test, done.preprocessing)
        rows.append({"method": method, "test_top1": judged.top1, "seconds": round(done.seconds, 1)})
    return rows


def summarise(records: list[dict[str, Any]]) -> str:
    """A Markdown table of means and standard deviations over the seeds, and gains seed by seed."""
    lines = ["| set | teacher | alone | softened | USI |", "|---|---|---|---|---|"]
    gains = []
    for name in WIDTHS:
        rows = [row for row in records if row["set"] == name]
        if not rows:
            continue
        cells = []
        for method in ("teacher", *METHODS):
            values = [row["test_top1"] for row in rows if row["method"] == method]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1%} ({spread:.1%})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        of = {(row["seed"], row["method"]): row["test_top1"] for row in rows}
        each = [100 * (of[seed, "usi"] - of[seed, "alone"]) for seed in sorted({row["seed"] for row in rows})]
        gains.append(f"{name}: USI over alone, seed by seed: {', '.join(f'{gain:+.1f}' for gain in each)} points.")
    return "\n".join([*lines, "", *gains]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--stamps", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file for the summary")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    conditions = {key: getattr(options, key) for key in ("train", "epochs", "threads")}
    conditions |= {"torch": torch.__version__, "machine": machine()}
    sets: dict[str, Callable[[int], DataSplits]] = {}
    if options.data_dir is not None:
        sets["fashion"] = fashion(options)
    if options.stamps.is_dir():
        sets["stamps"] = lambda seed: split_of(options.stamps, seed)
    old: list[dict[str, Any]] = []
    if options.output and options.output.is_file():
        old = [json.loads(line) for line in options.output.read_text(encoding="utf-8").splitlines()]
    records: list[dict[str, Any]] = []
    for name, opened in sets.items():
        for seed in range(options.seeds):
            key = {"benchmark": "distil", "set": name, "seed": seed}
            known = [row for row in old if key.items() <= row.items() and row["conditions"] == conditions]
            if len(known) == 1 + len(METHODS):
                records += known
                continue
            with tempfile.TemporaryDirectory() as kept:
                rows = run(name, opened(seed), seed, options, Path(kept))
            for row in rows:
                record = {**key, **row, "conditions": conditions}
                records.append(record)
                print(f"{name}, seed {seed}, {row['method']}: {row['test_top1']:.2%} in {row['seconds']} s", flush=True)
                if options.output:
                    replace_record(options.output, record, ("benchmark", "set", "seed", "method"))
    print(summarise(records))
    if options.table:
        command = shlex.join(["python", "-m", "benchmarks.distil", *sys.argv[1:]])
        write_record(options.table, f"`{command}`; test accuracy, mean (sd).\n\n{summarise(records)}")


if __name__ == "__main__":
    main()
