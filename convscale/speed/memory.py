"""What a network keeps in memory for its backward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from convscale.errors import UserError


def image_channels(net: nn.Module) -> int:
    """Channels of the images a network takes: its own `in_chans`, else its first convolution's (a 16th of those after a 4 x 4 space-to-depth)."""
    own = getattr(net, "in_chans", None)
    if isinstance(own, int):
        return own
    first = next((m.in_channels for m in net.modules() if isinstance(m, nn.Conv2d)), 3)
    return first // 16 if first % 16 == 0 else first


def saved_bytes(net: nn.Module, image_size: int = 224, batch_size: int = 4) -> float:
    """Bytes kept for backward, per image: the distinct storages that autograd saves in one training step's forward pass.

    Parameters are left out; the input and buffers count where an operation keeps them. The pass runs on a copy of the network where its parameters
    are, in their precision, so that the network stays as it is.

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
        raise UserError(f"{type(net).__name__} has no parameter that requires a gradient, so nothing is kept for backward")
    own = {t.untyped_storage()._cdata for t in net.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no address is given out twice
        return tensor

    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        images = torch.rand(batch_size, image_channels(net), image_size, image_size, device=weight.device, dtype=weight.dtype)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            net(images)
    return sum(size for size, _ in kept.values()) / batch_size
