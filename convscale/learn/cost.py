"""What a run cost, and what would have made it faster: from what was measured while it ran."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from convscale import words
from convscale.learn.loader import TrainLoader
from convscale.machine import available_cores
from convscale.nn.norm import InPlaceABN

if TYPE_CHECKING:
    from convscale.learn.loop import Trainer


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """Where the time went."""

    seconds: float
    """The whole run."""
    training_s: float
    """Training steps, waiting for images included."""
    waiting_s: float
    """Of these, waiting for images."""
    validation_s: float
    """Everything else: validation and what belongs to an epoch's end."""
    images: int
    """Training images that were processed."""
    peak_memory_bytes: int
    """Of this process (CPU), or what its tensors took (CUDA)."""
    advice: tuple[str, ...]
    """What would have made it faster, the largest first; empty when nothing is known."""
    compile: Mapping[str, object] | None = None
    """What ``compile=auto`` came to: ``kept``, ``why``, ``gain`` (the share of forward and backward that it saves) and
    ``compile_seconds``, None where it was not tried, of ``mode`` (``default``, or ``graphs``: CUDA graphs). None: it
    was not asked for, or the run was too short."""

    def lines(self) -> tuple[str, ...]:
        """For people."""
        text = (
            f"cost: {words.duration(self.seconds)} ({self.waiting_s / max(self.seconds, 1e-9):.0%} waiting for images, "
        )
        text += f"{self.validation_s / max(self.seconds, 1e-9):.0%} validation), {self.images:,} images, "
        text += f"{self.peak_memory_bytes / 1e9:.1f} GB at most"
        tried = () if self.compile is None else (f"compile=auto, {self.compile['why']}",)
        return (text, *tried, *(f"faster: {each}" for each in self.advice))


def measure_cost(trainer: Trainer) -> RunCost:
    """The cost of a trainer's run, earlier parts of a resumed one included."""
    rows, device = trainer.history, trainer.job.device
    training = sum(row["train_seconds"] for row in rows)
    waiting = sum(row["train_seconds"] * row["wait_share"] for row in rows)
    total = rows[-1]["seconds"] if rows else 0.0
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cost = RunCost(
        seconds=total,
        training_s=training,
        waiting_s=waiting,
        validation_s=max(0.0, total - training),
        images=sum(row["images"] for row in rows),
        peak_memory_bytes=peak,
        advice=(),
        compile=trainer.compiling.record().get("compile"),  # pyright: ignore[reportArgumentType]
    )
    return RunCost(**{**vars(cost), "advice": tuple(_advice(trainer, cost))})


def _advice(trainer: Trainer, cost: RunCost) -> list[str]:
    recipe, settings, loader, device = trainer.job.recipe, trainer.job.settings, trainer.job.loader, trainer.job.device
    out, cores = [], available_cores()
    waited = cost.waiting_s / max(cost.seconds, 1e-9)
    if waited > 0.1 and not loader.in_memory:
        ways = []
        if loader.workers < cores:
            ways.append(f"workers={cores} (now {loader.workers})")
        if recipe.augment == "resized-crop" and not recipe.scaled_decode:
            ways.append(
                "--set scaled_decode=true (slightly different pixels; with --set scaled_share=0.5 more so and faster)"
            )
        ways.append(
            "files that are nearer to the size they are trained at"
            if recipe.shrink or not isinstance(loader, TrainLoader)
            else "--set shrink=1.15 (reads smaller copies, made once)"
        )
        out.append(f"{waited:.0%} of the time went into waiting for images: {'; '.join(ways)}")
    if recipe.grad_checkpointing:
        out.append(
            "grad_checkpointing computes every block twice; without it a step is about a quarter shorter, if memory "
            "allows"
        )
    if device.type == "cuda" and settings.precision == "fp32":
        out.append("--amp: half precision on this GPU")
    alone = trainer.job.processes.world == 1  # several processes try nothing
    if device.type == "cuda" and not recipe.compile and alone:
        out.append(
            "--set compile=auto: torch.compile is tried where the time left could pay for it, with and without CUDA "
            "graphs"
        )
    if device.type == "cuda" and recipe.compile is True and alone:
        out.append("--set compile=auto: CUDA graphs are tried too, which save the launches of small images' steps")
    if (
        recipe.precision != "auto"
        and device.type == "cpu"
        and settings.precision == "fp32"
        and torch.cpu._is_amx_tile_supported()
    ):
        out.append("--set precision=auto: this CPU computes in bf16, which is then tried")
    if recipe.layout != "auto":
        out.append(f"--set layout=auto measures both layouts (now {settings.layout})")
    if any(isinstance(module, InPlaceABN) for module in trainer.net.modules()) and not recipe.grad_checkpointing:
        out.append(
            "the network's in-place norms save memory and recompute; norm='batchnorm' is faster where memory allows"
        )
    if cost.validation_s > 0.3 * cost.seconds > 1.0:
        out.append(f"{cost.validation_s / cost.seconds:.0%} of the time was validation: a smaller validation set")
    if device.type == "cpu" and torch.get_num_threads() < cores:
        out.append(f"{cores} threads (now {torch.get_num_threads()})")
    return out
