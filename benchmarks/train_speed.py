"""Training steps, ours against timm's: the same architecture, batch, optimiser, precision and layout; images/s and peak
memory.

    python -m benchmarks.train_speed [resnet50 efficientnet_b0 tresnet_m tresnet_m:batchnorm] [--batch 32] [--size 224]
        [--rounds 5] [--threads 2] [--precision fp32|bf16] [--layout nchw|nhwc] [--json] [--output
        results/train_speed.jsonl]

A step is forward, loss, backward and an SGD step with momentum on noise. ``NAME:batchnorm`` is our fast form of a
network whose own norm is in-place (its memory-saving form). Speed: both in one process, alternating, median over the
rounds of the ratio and of each side's wall-clock images/s, with the interquartile range. Memory: how far one side's
steps raise a fresh process's peak resident size above what importing and building took, with every block of 64 KiB or
more given back to the system when it is freed (glibc's ``MALLOC_MMAP_THRESHOLD_``), so that it is what the steps hold
and not how the heap is scattered; ``peak_mb_default`` is the same with glibc's defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.records import machine, replace_record

MODELS = ("resnet50", "efficientnet_b0", "tresnet_m", "tresnet_m:batchnorm")
KEYS = ("model", *(f"conditions.{name}" for name in ("batch", "size", "threads", "precision", "layout")))
"""A row is of these; one of others leaves it alone."""


def build(side: str, model: str) -> nn.Module:
    """Our network or timm's."""
    name, _, norm = model.partition(":")
    torch.manual_seed(0)
    if side == "timm":
        import timm

        return timm.create_model(name, num_classes=1000)
    from convscale.nn.net import create_model

    options: dict[str, Any] = {"norm": norm} if norm else {}
    return create_model(name, num_classes=1000, **options)


def stepper(net: nn.Module, options: argparse.Namespace) -> Callable[[], None]:
    """One training step on a fixed batch."""
    memory_format = torch.channels_last if options.layout == "nhwc" else torch.contiguous_format
    net = net.train().to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, options.size, options.size, generator=generator).contiguous(
        memory_format=memory_format
    )
    labels = torch.randint(0, 1000, (options.batch,), generator=generator)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            outputs = net(images)
        F.cross_entropy(outputs.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare_speed(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Images/s of both sides, alternating."""
    steps = {side: stepper(build(side, model), options) for side in ("ours", "timm")}
    rates: dict[str, list[float]] = {side: [] for side in steps}
    for turn in range(options.rounds + 1):
        for side, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                rates[side].append(options.batch / (time.perf_counter() - started))
    return {
        "images_per_s": {side: round(statistics.median(values), 2) for side, values in rates.items()},
        "iqr_rel": {
            side: round(float(np.subtract(*np.percentile(values, [75, 25])) / np.median(values)), 3)
            for side, values in rates.items()
        },
        "speed_ratio": round(statistics.median(a / b for a, b in zip(rates["ours"], rates["timm"], strict=True)), 3),
    }


def peak_megabytes(side: str, model: str, options: argparse.Namespace, *, give_back: bool) -> float:
    """What two steps add to the peak of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.train_speed", model, "--memory-of", side]
    for name in ("batch", "size", "threads", "precision", "layout"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"} if give_back else None
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1]
    )


def peak_kilobytes() -> int:
    """This process's own peak resident size; ``getrusage`` would count what it was forked from too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    raise SystemExit("peak memory needs Linux's /proc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--rounds", type=int, default=5, help="0: memory only, which other work on the machine does not disturb"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), default="nhwc")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory-of", choices=("ours", "timm"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        step = stepper(build(options.memory_of, options.models[0]), options)
        before = peak_kilobytes()
        step()
        step()
        print((peak_kilobytes() - before) / 1024)
        return
    conditions = {
        name: getattr(options, name) for name in ("batch", "size", "threads", "precision", "layout", "rounds")
    }
    conditions |= {"machine": machine(), "torch": torch.__version__}
    for model in options.models:
        memory, scattered = (
            {side: peak_megabytes(side, model, options, give_back=held) for side in ("ours", "timm")}
            for held in (True, False)
        )
        record = {
            "benchmark": "train_speed",
            "model": model,
            **(compare_speed(model, options) if options.rounds else {}),
        }
        record |= {
            "peak_mb": {side: round(value) for side, value in memory.items()},
            "memory_ratio": round(memory["ours"] / memory["timm"], 3),
        }
        record |= {
            "peak_mb_default": {side: round(value) for side, value in scattered.items()},
            "conditions": conditions,
        }
        if options.output:
            replace_record(options.output, record, KEYS)
        text = f"{model:24} "
        if options.rounds:
            rates, iqr = record["images_per_s"], record["iqr_rel"]
            text += f"ours {rates['ours']:.2f} images/s (IQR {iqr['ours']:.1%}), "
            text += f"timm {rates['timm']:.2f} (IQR {iqr['timm']:.1%}): "
            text += f"{record['speed_ratio']:.2f}x the speed, "
        text += f"{record['memory_ratio']:.2f}x the memory ({record['peak_mb']['ours']:,} and "
        text += f"{record['peak_mb']['timm']:,} MB)"
        print(json.dumps(record) if options.json else text, flush=True)


if __name__ == "__main__":
    main()
