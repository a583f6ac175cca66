"""What a network keeps in memory: for its backward pass, as autograd does it; and the largest batch that a card holds,
as counted.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from convscale.errors import UserError
from convscale.networks.inputs import image_channels

if TYPE_CHECKING:
    from convscale.arch.spec import NetSpec
    from convscale.cost.counting import Cost

CONTEXT_BYTES = 768 * 2**20
"""What CUDA's context and its libraries' code take of a card before the first tensor: 0.4 to 1 GB by card and version.
An assumption."""
HEADROOM = 0.19
"""Share of a card that fragmentation and the convolutions' workspaces take. Set so that ResNet50's largest training
batch on a V100 (TResNet, arXiv 2003.13630, table 1: 288) comes out; the table's four other batches then come out 9 %
too small to 8 % too large."""
MOST = 2**16
"""The largest batch that is looked at."""


def saved_bytes(net: nn.Module, image_size: int = 224, batch_size: int = 4) -> float:
    """Bytes kept for backward, per image: the distinct storages that autograd saves in one training step's forward
    pass.

    Parameters are left out; the input and buffers count where an operation keeps them. The pass runs on a copy of the
    network where its parameters are, in their precision, so that the network stays as it is.

    Args:
        net: any module that takes (N, C, H, W).
        image_size: side of the square images, pixels.
        batch_size: N; what doesn't grow with it (statistics) is shared among the images.

    Raises:
        UserError: a size below 1, or no parameter to train.
    """
    for name, value in (("image_size", image_size), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
    net = copy.deepcopy(net).train()
    weight = next((p for p in net.parameters() if p.requires_grad), None)
    if weight is None:
        raise UserError(
            f"{type(net).__name__} has no parameter that requires a gradient, so nothing is kept for backward"
        )
    own = {t.untyped_storage()._cdata for t in net.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no address is given out twice
        return tensor

    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        images = torch.rand(
            batch_size, image_channels(net), image_size, image_size, device=weight.device, dtype=weight.dtype
        )
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            net(images)
    return sum(size for size, _ in kept.values()) / batch_size


@dataclass(frozen=True, kw_only=True)
class LargestBatch:
    """The largest batch of a network that a card is predicted to hold."""

    batch_size: int
    """Images."""
    cost: Cost
    """What a call at that batch costs: its ``peak_bytes`` are those that fit."""
    usable_bytes: int
    """The card's memory less what CUDA, fragmentation and workspaces take."""
    device: str
    """The card."""

    def __str__(self) -> str:
        c = self.cost
        return (
            f"about {self.batch_size:,} images of {c.image_size[0]} px fit in {self.device} ({c.mode}, {c.precision}, "
            f"{c.layout}): "
            f"{c.peak_bytes / 2**30:.1f} GB of the {self.usable_bytes / 2**30:.1f} GB that are free for it"
        )


def predict_largest_batch(
    net_or_spec: nn.Module | NetSpec | str,
    device: str = "rtx-4090",
    *,
    mode: str = "train",
    precision: str = "amp",
    layout: str = "nchw",
    image_size: int | None = None,
) -> LargestBatch:
    """The largest batch that fits in a card's memory, without the card: counted bytes against its data sheet.

    Args:
        net_or_spec: a module, a NetSpec or a model's name.
        device: a known device (``convscale.predictor.devices.devices``).
        mode: ``train`` (SGD with momentum) or ``infer``.
        precision, layout, image_size: as for ``count``.

    Raises:
        UserError: not even one image fits, or as for ``count``; an unknown device.
    """
    from convscale.cost.counting import count
    from convscale.predictor.devices import get_device

    card = get_device(device)
    usable = int(card.memory_gb * 2**30 * (1 - HEADROOM)) - CONTEXT_BYTES
    counted: dict[int, Cost] = {}

    def peak(batch_size: int) -> int:
        if batch_size not in counted:
            counted[batch_size] = count(
                net_or_spec, image_size, batch_size, mode=mode, precision=precision, layout=layout
            )
        return counted[batch_size].peak_bytes

    found = largest_within(peak, usable)
    if found < 1:
        raise UserError(
            f"not even one image fits in {card.title}: it takes {peak(1) / 2**30:.1f} GB, {usable / 2**30:.1f} GB are "
            "free for it"
        )
    peak(found)
    return LargestBatch(batch_size=found, cost=counted[found], usable_bytes=usable, device=card.title)


def largest_within(peak: Callable[[int], int], usable: int, *, most: int = MOST) -> int:
    """The largest batch whose peak is within ``usable`` bytes, at most ``most``; 0: not even one image's.

    A peak is the highest of many moments, each of which grows evenly with the batch; so a line through two batches
    leads near the answer, and a few calls of ``peak`` find it.
    """
    if peak(1) > usable:
        return 0
    low, high = 1, most + 1  # low fits, high does not
    one, two = 16, 32
    while high - low > 1:
        step = (peak(two) - peak(one)) / (two - one)
        guess = two + int((usable - peak(two)) / step) if step > 0 else high - 1
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if peak(guess) <= usable else (low, guess)
        one, two = (two, guess) if guess != two else (low, high if high <= most else low + 1)
    return low


def free_bytes(root: str | os.PathLike[str] = "/") -> int | None:
    """Bytes of the machine's memory that a process may still take, within its container's limit; None where the system
    does not say.

    Args:
        root: where ``proc`` and ``sys`` are found; for tests.
    """
    try:
        lines = (Path(root) / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    group = Path(root) / "sys/fs/cgroup"
    try:
        limit = int((group / "memory.max").read_text(encoding="utf-8")) - int(
            (group / "memory.current").read_text(encoding="utf-8")
        )
    except (OSError, ValueError):  # no limit, or another kind of container
        return free
    return max(0, min(free, limit))
