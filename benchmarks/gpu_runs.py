"""Stages of ``benchmarks.gpu`` that train through ``convscale.train``: waits, a kill and going on, a process of DDP."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.gpu import Card

Row = dict[str, Any]


def _pictures() -> Any:
    """512 of noise in ten classes, the same each time, in memory."""
    from convscale.images.splits import ArraySplit, DataSplits

    pixels = torch.randint(0, 256, (512, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(512) % 10
    classes = tuple("abcdefghij")
    split: dict[str, Any] = {
        name: ArraySplit(split=name, classes=classes, labels=labels, channels=3, pixels=pixels)
        for name in ("train", "validation", "test")
    }
    return DataSplits(classes=classes, **split)


def _short(card: Card, **options: Any) -> Any:
    """Two epochs of eight steps, the state saved after each step where there is an output."""
    from convscale.learn.train import train as fit

    given: dict[str, Any] = {"recipe": "small", "epochs": 2, "batch_size": 64, "checkpoint_seconds": 0, **options}
    return fit("resnet18", _pictures(), device=card.device.type, seed=0, **given)


def child(job: str, place: Path, card: Card) -> None:
    """What other processes of two stages do: be killed in the second epoch; train as one of DDP's."""
    if job == "ddp":
        run = _short(card, output=place / "ddp")
        found = {"losses": [row["train_loss"] for row in run.history], "notes": list(run.notes)}
        (place / "ddp.json").write_text(json.dumps(found), encoding="utf-8")
        return
    steps = itertools.count(1)

    def progress(event: Any) -> None:
        if event["kind"] == "step" and next(steps) == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    _short(card, output=place / "run", progress=progress)


def _children(card: Card, job: str, place: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, "-m", "benchmarks.gpu", "--device", str(card.device)]
    return subprocess.run([*command, "--child", job, str(place)], capture_output=True, text=True, check=False)


def resume(card: Card) -> Iterator[Row]:
    """A run that is killed in its second epoch and goes on, beside one that nobody disturbed."""
    with tempfile.TemporaryDirectory() as folder:
        killed = _children(card, "kill", Path(folder)).returncode
        again, whole = _short(card, output=Path(folder) / "run", resume=True), _short(card)
        off = [abs(a["train_loss"] - b["train_loss"]) for a, b in zip(again.history, whole.history, strict=True)]
        mine, right = again.net.state_dict(), whole.net.state_dict()
        apart = max(float((mine[name].double() - right[name].double()).abs().max()) for name in right)
        went_on = any(note.startswith("resumed from") for note in again.notes)
        yield {
            "killed_by": -killed,
            "resumed": went_on,
            "largest_loss_difference": max(off),
            "largest_weight_difference": apart,
        }


def ddp(card: Card) -> Iterator[Row]:
    """One process by the launcher (NCCL on a GPU), beside a run without it."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")
        done = _children(card, "ddp", Path(folder), *launcher)
        if done.returncode:
            raise SystemExit((done.stderr.strip().splitlines() or ["?"])[-1])
        found = json.loads((Path(folder) / "ddp.json").read_text(encoding="utf-8"))
    alone = [row["train_loss"] for row in _short(card).history]
    off = [abs(a - b) / b for a, b in zip(found["losses"], alone, strict=True)]
    yield {"processes": 1, "epochs": len(alone), "largest_relative_loss_difference": max(off)}


def waits(card: Card) -> Iterator[Row]:
    """How often a training step waits for the device, and the share of time without data."""
    import warnings

    seen: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        if card.cuda:
            torch.cuda.set_sync_debug_mode("warn")
        warnings.showwarning = lambda message, *_args, **_more: seen.append(str(message))
        run = _short(card)
    waited = sum("synchroniz" in text for text in seen)
    yield {
        "steps": 2 * 512 // 64,
        "waits": waited,
        "wait_share": statistics.mean(row["wait_share"] for row in run.history),
    }
