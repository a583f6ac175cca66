"""The largest batch that a GPU holds, as counted against its data sheet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from convscale.conditions import Conditions, Size, size_text
from convscale.cost.counting import Cost, cost_of, trace_of
from convscale.cost.subject import Network
from convscale.errors import UserError, check_flag
from convscale.predictor.devices import get_device
from convscale.stats import largest_true

CONTEXT_BYTES = 768 * 2**20
"""What CUDA's context and its libraries' code take of a GPU before the first tensor: 0.4 to 1 GB by card and version.
An assumption."""
HEADROOM = 0.19
"""Share of its memory that fragmentation and the convolutions' workspaces take. Set so that ResNet50's largest training
batch on a V100 (TResNet, arXiv 2003.13630, table 1: 288) comes out; the table's four other batches then come out 9 %
too small to 8 % too large."""
MOST = 2**16
"""The largest batch that is looked at."""
_LINES = 3
"""Lines that are drawn through two batches to come near the answer; a network needs one or two."""


@dataclass(frozen=True, kw_only=True)
class LargestBatch:
    """The largest batch of a network that a GPU is predicted to hold."""

    batch_size: int
    """Images."""
    cost: Cost
    """What a call at that batch costs: its ``peak_bytes`` are those that fit."""
    usable_bytes: int
    """The GPU's memory less what CUDA, fragmentation and workspaces take, and an average of the weights where there is
    one.
    """
    device: str
    """The GPU's title."""

    def __str__(self) -> str:
        c = self.cost
        return (
            f"about {self.batch_size:,} images of {size_text(c.image_size)} px fit in {self.device} ({c.mode}, "
            f"{c.precision}, {c.layout}): {c.peak_bytes / 2**30:.1f} GB of the {self.usable_bytes / 2**30:.1f} GB that "
            "are free for it"
        )


def predict_largest_batch(
    net_or_spec: Network,
    device: str = "rtx-4090",
    *,
    mode: str = "train",
    precision: str = "amp",
    layout: str = "nchw",
    image_size: Size | None = None,
    ema: bool = False,
) -> LargestBatch:
    """The largest batch that fits in a GPU's memory, without the GPU: counted bytes against its data sheet.

    Args:
        net_or_spec: a module, a NetSpec or a model's name.
        device: a known GPU (``convscale.predictor.devices.devices``).
        mode: ``train`` (SGD with momentum) or ``infer``.
        precision, layout, image_size: as for ``count``.
        ema: training keeps an average of the weights beside them (a recipe's ``ema_decay`` or ``ema_width``): their
            bytes once more. The best weights so far, and what a run goes back to, lie in the host's memory.

    Raises:
        UserError: not even one image fits, or as for ``count``; an unknown device or a processor; an average in
            inference.
    """
    if check_flag("ema", ema) and mode != "train":
        raise UserError(f"ema averages weights in training, but mode is {mode!r}; give mode 'train', or leave it out")
    sheet = get_device(device)
    if sheet.kind == "cpu":
        raise UserError(
            f"the largest batch is counted against a GPU's memory, got device {sheet.name}, a processor, whose memory "
            "is as large as its owner made it; name a GPU"
        )
    conditions = Conditions(
        device=sheet.name, mode=mode, precision=precision, layout=layout, batch_size=1, image_size=image_size
    )
    usable = int(sheet.memory_gb * 2**30 * (1 - HEADROOM)) - CONTEXT_BYTES

    @cache
    def counted(batch_size: int) -> Cost:
        return cost_of(trace_of(net_or_spec, replace(conditions, batch_size=batch_size)))

    if ema:
        usable -= counted(1).weight_bytes
    batch_size = largest_within(lambda batch_size: counted(batch_size).peak_bytes, usable)
    if batch_size < 1:
        raise UserError(
            f"not even one image fits in {sheet.title}: it takes {counted(1).peak_bytes / 2**30:.1f} GB, "
            f"{usable / 2**30:.1f} GB are free for it"
        )
    return LargestBatch(batch_size=batch_size, cost=counted(batch_size), usable_bytes=usable, device=sheet.title)


def largest_within(peak: Callable[[int], int], usable: int, *, most: int = MOST) -> int:
    """The largest batch whose peak is within ``usable`` bytes, at most ``most``; 0: not even one image's.

    A peak is the highest of many moments, each of which grows evenly with the batch; so a line through two batches
    leads near the answer, and a few calls of ``peak`` find it.
    """
    start = 1
    if peak(1) <= usable:
        one, two = min(16, most), min(32, most)
        for _ in range(_LINES):
            step = (peak(two) - peak(one)) / (two - one) if two > one else 0
            start = two + math.floor((usable - peak(two)) / step) if step > 0 else most
            start = min(max(start, 1), most)
            if start in (one, two):
                break
            one, two = sorted((two, start))
    return largest_true(lambda batch: peak(batch) <= usable, 1, most, start=start) or 0
