"""Fashion-MNIST from scratch: time and test accuracy, ours against timm's parts in a plain loop.

    python -m benchmarks.fashion --data-dir DIR [--side ours|timm] [--epochs 16] [--seed 0] [--threads 2] [--json]
    [--output results/fashion.jsonl]
    ours:  [--recipe small-adamw] [--width 0.5] [--set KEY=VALUE ...]
    timm:  [--model resnet18] [--output-stride 32] [--opt sgd|adamw] [--lr 0.1]

Ours: ``convscale.train`` on a residual network of three stages (ResNet-18's blocks at half width, a 3x3 stem of stride
2 without pooling), built from a spec. timm: one of its networks (``--output-stride 8`` keeps maps of 4 px to the end),
fed with our own batches (its loader decodes files, which would be slower), with its SGD or AdamW, cosine schedule,
label smoothing and ModelEmaV3. Both see the same 54,000 training images, shifted and flipped alike, each in the
precision and layout that is fastest for its network, by measurement. Seconds are those of the whole run, training and
validation. The test set is read once, at the end. Run one side at a time on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import machine, replace_record
from convscale.arch.scaling import scale
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_spec
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.learn.evaluate import evaluate
from convscale.learn.loader import TrainLoader, measure_mean_std
from convscale.learn.progress import LiveProgress
from convscale.learn.recipes import get_recipe
from convscale.learn.settings import choose_settings
from convscale.learn.train import train


def small_resnet(width: float = 0.5, stages: int = 3) -> NetSpec:
    """ResNet-18's blocks for 28 px: 3x3 stem of stride 2 without pooling, the first ``stages`` stages."""
    spec = scale(get_spec("resnet18"), width=width, image_size=28)
    stem = replace(spec.stem, kernel=3, stride=2, pool=False)
    return replace(spec, name=f"resnet18_small_w{width:g}", stem=stem, stages=spec.stages[:stages])


def run_ours(
    data: DataSplits, epochs: int, seed: int, recipe: str, width: float, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Our trainer on our network."""
    with LiveProgress("ours") as live:
        run = train(small_resnet(width), data, recipe=recipe, epochs=epochs, seed=seed, progress=live, **overrides)
    result = evaluate(run.net, data.test, run.preprocessing)
    return {
        "test_top1": result.top1, "interval": [result.top1_low, result.top1_high], "seconds": run.seconds,
        "precision": run.settings.precision,
        "layout": run.settings.layout, "images_per_s": len(data.train) * epochs / run.seconds,
        "parameters": sum(param.numel() for param in run.net.parameters()), "recipe": run.recipe.to_dict(),
        "history": [[round(row["seconds"], 1), row["val_top1"]] for row in run.history],
    }  # fmt: skip


def run_timm(
    data: DataSplits, epochs: int, seed: int, model: str, output_stride: int, optimizer: str, lr: float
) -> dict[str, Any]:
    """timm's network, optimiser, scheduler, loss and average in a plain loop, in the fastest precision and layout."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    torch.manual_seed(seed)
    options: dict[str, Any] = {"output_stride": output_stride} if output_stride != 32 else {}
    net = timm.create_model(model, in_chans=1, num_classes=10, **options)
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
    seconds = time.perf_counter() - started
    result = evaluate(average.module, data.test, preprocessing)
    return {
        "test_top1": result.top1, "interval": [result.top1_low, result.top1_high], "seconds": seconds,
        "precision": settings.precision, "layout": settings.layout, "images_per_s": len(data.train) * epochs / seconds,
        "parameters": sum(param.numel() for param in net.parameters()),
        "model": model, "output_stride": output_stride,
        "recipe": {"optimizer": optimizer, "lr": lr, "epochs": epochs}, "history": history,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--side", choices=("ours", "timm"), default="ours")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=float, default=0.5, help="of our network")
    parser.add_argument("--set", action="append", default=[], help="key=value of our recipe")
    parser.add_argument("--recipe", default="small-adamw", help="ours")
    parser.add_argument("--model", default="resnet18", help="timm's network")
    parser.add_argument("--output-stride", type=int, default=32, choices=(8, 16, 32), help="of timm's network")
    parser.add_argument("--opt", default="sgd", help="timm's optimiser")
    parser.add_argument("--lr", type=float, default=0.1, help="timm's learning rate")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = open_dataset(arguments.data_dir)
    if arguments.side == "ours":
        overrides = dict(text.split("=", 1) for text in arguments.set)
        record = run_ours(data, arguments.epochs, arguments.seed, arguments.recipe, arguments.width, overrides)
    else:
        record = run_timm(
            data,
            arguments.epochs,
            arguments.seed,
            arguments.model,
            arguments.output_stride,
            arguments.opt,
            arguments.lr,
        )
    conditions = {
        "threads": arguments.threads,
        "seed": arguments.seed,
        "machine": machine(),
        "torch": torch.__version__,
    }
    record = {
        "benchmark": "fashion",
        "side": arguments.side,
        "epochs": arguments.epochs,
        **record,
        "conditions": conditions,
    }
    if arguments.output:
        replace_record(arguments.output, record, ("side", "epochs", "parameters"))
    low, high = record["interval"]
    text = f"{arguments.side}: test top-1 {record['test_top1']:.2%} ({low:.2%} to {high:.2%}) "
    text += f"after {record['seconds'] / 60:.1f} min"
    print(
        json.dumps(record)
        if arguments.json
        else f"{text}, {record['images_per_s']:,.0f} images/s, {record['parameters']:,} parameters"
    )


if __name__ == "__main__":
    main()
