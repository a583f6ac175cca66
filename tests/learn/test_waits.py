"""A training step waits for the device once, where it reads loss and gradient norm."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from convscale.learn.train import train
from tests.learn.nets import halves_data, small_net
from tests.learn.test_train import QUICK

SAID = "called a synchronizing CUDA operation"
"""What torch warns of in ``set_sync_debug_mode("warn")``."""


class Waiting(nn.Module):
    """A network that waits for the device in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        warnings.warn(SAID, stacklevel=1)
        return self.body(x)


def waits_of_steps(net: nn.Module, device: str, *, skip: int = 4) -> list[int]:
    """How often each step after the first few waited; what an epoch's end does is in none of them."""
    counts: list[int] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        waited, step = 0, 0

        def told(event: Any) -> None:
            nonlocal waited, step
            now = sum("synchronizing" in str(each.message) for each in seen)
            if event["kind"] == "step":
                if event["step"] == step + 1:  # not the first of an epoch
                    counts.append(now - waited)
                step = event["step"]
            waited = now

        recipe = QUICK.override({"epochs": 2, "batch_size": 8, "clip_norm": 1.0, "ema_every": 1})
        train(net, halves_data(), recipe=recipe, device=device, workers=0, progress=told)
    return counts[skip:]


def test_waits_are_counted_by_step() -> None:
    assert waits_of_steps(Waiting(), "cpu", skip=0) == [1] * 12 + [1] * 11
    assert waits_of_steps(small_net(), "cpu") == [0] * 19


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_waits_once() -> None:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        waits = waits_of_steps(small_net(), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len(waits) >= 15
    assert max(waits) <= 1
