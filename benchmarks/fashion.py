"""Fashion-MNIST from scratch: time and test accuracy, ours against timm's parts in a plain loop.

    python -m benchmarks.fashion --data-dir DIR [--side ours|timm] [--epochs 16] [--seeds 0 1 2] [--threads 2] [--json]
    [--model NAME] [--width 1] [--depth 1] [--output results/fashion.jsonl]
    ours:  [--recipe small] [--set KEY=VALUE ...]
    timm:  [--output-stride 32] [--opt sgd|adamw] [--lr 0.05 0.1 0.2] [--lr-epochs 3]

Ours: ``convscale.train`` on a network of our zoo, scaled. timm: one of its networks (``--output-stride 8`` keeps maps
of 4 px to the end) or, under a name of ours, the same network, fed with our own batches (its loader decodes files,
which would be slower), with its SGD or AdamW, cosine schedule, label smoothing and ModelEmaV3; of several learning
rates the best on the validation set after ``--lr-epochs`` is taken. Both see the same 54,000 training images, shifted
and flipped alike, each in the precision and layout that is fastest for its network, by measurement. Seconds are those
of the whole run, training and validation. The test set is read once a seed, at the end. Run one side at a time on a
quiet machine.

``resnet18_small`` is ResNet-18's blocks for 28 px (a 3x3 stem of stride 2 without pooling, the first three stages).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import machine, replace_record, write_record
from convscale.arch.scaling import scale
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_spec, list_models
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.evaluate import evaluate
from convscale.learn.loader import TrainLoader, measure_mean_std
from convscale.learn.progress import LiveProgress
from convscale.learn.recipes import get_recipe
from convscale.learn.settings import choose_settings
from convscale.learn.train import train
from convscale.nn.net import create_model

DATA = "fashion-mnist"
"""The folder's name where the four files are Fashion-MNIST's, as Debian has it."""
KEYS = ("data", "side", "epochs", "parameters", "seed", "conditions.threads")
"""A row is of these; one of others leaves it alone."""
USUAL = {"data": DATA, "seed": 0, "conditions.threads": 2}
"""Of rows that do not say so."""


def small_resnet(width: float = 0.5, stages: int = 3) -> NetSpec:
    """ResNet-18's blocks for 28 px: 3x3 stem of stride 2 without pooling, the first ``stages`` stages."""
    spec = scale(get_spec("resnet18"), width=width, image_size=28)
    stem = replace(spec.stem, kernel=3, stride=2, pool=False)
    return replace(spec, name=f"resnet18_small_w{width:g}", stem=stem, stages=spec.stages[:stages])


def our_spec(name: str, width: float, depth: float) -> NetSpec:
    """The network ``name`` of our zoo at 28 px, its widths and depths times ``width`` and ``depth``."""
    if name == "resnet18_small":
        return small_resnet(width)
    return scale(get_spec(name), width=width, depth=depth, image_size=28)


def run_ours(
    data: DataSplits, spec: NetSpec, epochs: int, seed: int, recipe: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Our trainer on our network."""
    with LiveProgress("ours") as live:
        run = train(spec, data, recipe=recipe, epochs=epochs, seed=seed, progress=live, **overrides)
    result = evaluate(run.net, data.test, run.preprocessing)
    return {
        "test_top1": result.top1, "interval": [result.top1_low, result.top1_high], "seconds": run.seconds,
        "precision": run.settings.precision,
        "layout": run.settings.layout, "images_per_s": len(data.train) * epochs / run.seconds,
        "parameters": sum(param.numel() for param in run.net.parameters()), "recipe": run.recipe.to_dict(),
        "history": [[round(row["seconds"], 1), row["val_top1"]] for row in run.history],
    }  # fmt: skip


def train_by_hand(
    data: DataSplits, make: Callable[[], torch.nn.Module], epochs: int, seed: int, optimizer: str, lr: float
) -> tuple[torch.nn.Module, Any, Preprocessing, list[list[float]], float]:
    """timm's optimiser, scheduler, loss and average in a plain loop, in the fastest precision and layout: the averaged
    network, its settings, its preprocessing, seconds and validation accuracy after each epoch, all seconds."""
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    torch.manual_seed(seed)
    net = make()
    weight_decay = 0.05 if optimizer == "adamw" else 5e-4
    adjust: Any = create_optimizer_v2(net, opt=optimizer, lr=lr, weight_decay=weight_decay, momentum=0.9)
    scheduler, _ = create_scheduler_v2(
        adjust, sched="cosine", num_epochs=epochs, warmup_epochs=1, warmup_lr=lr / 25, min_lr=lr / 1000
    )
    assert scheduler is not None
    criterion = LabelSmoothingCrossEntropy(0.1)
    mean, std = measure_mean_std(data.train)
    preprocessing = Preprocessing(image_size=28, channels=1, mean=mean, std=std, crop_pct=1.0)
    loader, history = TrainLoader(data.train, get_recipe("small-adamw"), image_size=28, seed=seed), []
    settings = choose_settings(net, get_recipe("small-adamw"), preprocessing.normalize(next(loader.batches(0)).images))
    memory_format = torch.channels_last if settings.layout == "nhwc" else torch.contiguous_format
    net.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    average = ModelEmaV3(net, decay=0.998, use_warmup=True)
    started, updates = time.perf_counter(), 0
    for epoch in range(epochs):
        net.train()
        for batch in loader.batches(epoch):
            inputs = preprocessing.normalize(batch.images).contiguous(memory_format=memory_format)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                outputs = net(inputs)
            loss = criterion(outputs.float(), batch.labels)
            adjust.zero_grad()
            loss.backward()
            adjust.step()
            updates += 1
            average.update(net, step=updates)
            scheduler.step_update(updates)
        scheduler.step(epoch + 1)
        top1 = evaluate(average.module, data.validation, preprocessing, precision=settings.precision).top1
        history.append([round(time.perf_counter() - started, 1), top1])
        print(f"timm: epoch {epoch + 1}/{epochs}, validation top-1 {top1:.2%}, {history[-1][0]:.0f} s", flush=True)
    return average.module, settings, preprocessing, history, time.perf_counter() - started


def best_rate(
    data: DataSplits, make: Callable[[], torch.nn.Module], epochs: int, optimizer: str, rates: list[float]
) -> tuple[float, dict[str, float]]:
    """The learning rate whose short training ends best on the validation set, and what each ended at."""
    if len(rates) == 1:
        return rates[0], {}
    ended = {rate: train_by_hand(data, make, epochs, 0, optimizer, rate)[3][-1][1] for rate in rates}
    return max(ended, key=lambda rate: ended[rate]), {f"{rate:g}": top1 for rate, top1 in ended.items()}


def run_timm(
    data: DataSplits, make: Callable[[], torch.nn.Module], epochs: int, seed: int, optimizer: str, lr: float
) -> dict[str, Any]:
    """timm's parts on the network of ``make``."""
    net, settings, preprocessing, history, seconds = train_by_hand(data, make, epochs, seed, optimizer, lr)
    result = evaluate(net, data.test, preprocessing)
    return {
        "test_top1": result.top1, "interval": [result.top1_low, result.top1_high], "seconds": seconds,
        "precision": settings.precision, "layout": settings.layout, "images_per_s": len(data.train) * epochs / seconds,
        "parameters": sum(param.numel() for param in net.parameters()),
        "recipe": {"optimizer": optimizer, "lr": lr, "epochs": epochs}, "history": history,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--side", choices=("ours", "timm"), default="ours")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="ours: of our zoo (default: poolnet); timm: of timm's (resnet18) or of ours")
    parser.add_argument("--width", type=float, default=1.0, help="factor of our network's widths")
    parser.add_argument("--depth", type=float, default=1.0, help="factor of our network's depths")
    parser.add_argument("--set", action="append", default=[], help="key=value of our recipe")
    parser.add_argument("--recipe", default="small", help="ours")
    parser.add_argument("--output-stride", type=int, default=32, choices=(8, 16, 32), help="of timm's network")
    parser.add_argument("--opt", default="sgd", help="timm's optimiser")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.1], help="timm's learning rates")
    parser.add_argument("--lr-epochs", type=int, default=3, help="of the trainings that choose among them")
    parser.add_argument("--validation", action="store_true", help="do not read the test set, nor write a record")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = open_dataset(arguments.data_dir)
    if arguments.validation:
        data = replace(data, test=data.validation)
    name = arguments.model or ("poolnet" if arguments.side == "ours" else "resnet18")
    facts: dict[str, Any] = {"model": name, "width": arguments.width, "depth": arguments.depth}
    if arguments.side == "ours":
        spec = our_spec(name, arguments.width, arguments.depth)
        overrides = dict(text.split("=", 1) for text in arguments.set)
        run = partial(run_ours, data, spec, arguments.epochs, recipe=arguments.recipe, overrides=overrides)
    else:
        make, network = peer(name, arguments)
        rate, tried = best_rate(data, make, arguments.lr_epochs, arguments.opt, arguments.lr)
        facts |= {**network, "tried": tried}
        run = partial(run_timm, data, make, arguments.epochs, optimizer=arguments.opt, lr=rate)
    for seed in arguments.seeds:
        row = run(seed=seed)
        conditions = {"threads": arguments.threads, "machine": machine(), "torch": torch.__version__}
        record = {"benchmark": "fashion", "data": arguments.data_dir.resolve().name, "side": arguments.side}
        record |= {"epochs": arguments.epochs, "seed": seed}
        record |= {**facts, **row, "conditions": conditions}
        if arguments.output and not arguments.validation:
            replace_record(arguments.output, record, KEYS, usual=USUAL)
            rows = [json.loads(line) for line in arguments.output.read_text(encoding="utf-8").splitlines()]
            write_record(arguments.output.with_suffix(".md"), summarise(rows))
        show(record, arguments)


def peer(name: str, arguments: argparse.Namespace) -> tuple[Callable[[], torch.nn.Module], dict[str, Any]]:
    """What makes the network that timm's parts train, and its facts: timm's, or ours under a name of ours."""
    import timm

    if name == "resnet18_small" or (name in list_models() and not timm.is_model(name)):
        spec = our_spec(name, arguments.width, arguments.depth)
        return lambda: create_model(spec, num_classes=10, in_chans=1), {}
    options: dict[str, Any] = {"output_stride": arguments.output_stride} if arguments.output_stride != 32 else {}
    return (
        lambda: timm.create_model(name, in_chans=1, num_classes=10, **options),
        {"output_stride": arguments.output_stride},
    )


def summarise(rows: list[dict[str, Any]]) -> str:
    """A Markdown table: a line for each network, trained for so many epochs, over its seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kind = (row.get("data", DATA), row["side"], row["parameters"], row["epochs"], row["conditions"]["threads"])
        groups.setdefault(kind, []).append(row)
    table = [
        "| network | parameters | trained by | epochs | seconds | test top-1, mean of the seeds (each) | images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, group in sorted(groups.items(), key=lambda item: (item[0][0] != DATA, *item[0][:2], item[0][3])):
        data, side, parameters, epochs, threads = kind
        first = group[0]
        scaled = "".join(f", {key} x {first[key]:g}" for key in ("width", "depth") if first.get(key, 1) != 1)
        scaled += "" if data == DATA else f", on {data}"
        scaled += "" if threads == USUAL["conditions.threads"] else f", {threads} threads"
        how = f"recipe `{first['recipe']['name']}`" if side == "ours" else by_hand(first)
        tops = [row["test_top1"] for row in group]
        each = ", ".join(f"{top1:.2%}" for top1 in tops)
        seconds = statistics.mean(row["seconds"] for row in group)
        speed = statistics.median(row["images_per_s"] for row in group)
        table.append(
            f"| `{first['model']}`{scaled} | {parameters:,} | {side}: {how}, {first['precision']} | {epochs} | "
            f"{seconds:.0f} | {statistics.mean(tops):.2%} ({each}) | {speed:,.0f} |"
        )
    machines = " and ".join(sorted({f"{row['conditions']['machine']}" for row in rows}))
    head = "Made by `python -m benchmarks.fashion`; records: [fashion.jsonl](fashion.jsonl). "
    head += f"{machines}; not measured on a GPU. 54,000 training images, 10,000 test images, read once a seed."
    return f"{head}\n\n" + "\n".join(table) + "\n"


def by_hand(row: dict[str, Any]) -> str:
    """How timm's parts trained."""
    tried = ", ".join(f"{rate} {top1:.1%}" for rate, top1 in row.get("tried", {}).items())
    chosen = f" of validation's {tried}" if tried else ""
    return f"{row['recipe']['optimizer']}, learning rate {row['recipe']['lr']:g}{chosen}, cosine, EMA"


def show(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    """One line of a run, or all of it as JSON."""
    (low, high), what = record["interval"], "validation" if arguments.validation else "test"
    text = f"{record['side']}, seed {record['seed']}: {what} top-1 {record['test_top1']:.2%} ({low:.2%} to {high:.2%}) "
    text += f"after {record['seconds']:.0f} s, {record['images_per_s']:,.0f} images/s, "
    text += f"{record['parameters']:,} parameters"
    print(json.dumps(record) if arguments.json else text, flush=True)


if __name__ == "__main__":
    main()
