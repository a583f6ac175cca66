"""What a network keeps in memory for its backward pass, as autograd does it; and what memory is free here."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from convscale.conditions import Size, sides
from convscale.errors import UserError, first_line
from convscale.networks.inputs import check_shapes_known, image_channels


@torch.inference_mode(False)  # whoever calls this may be in inference mode
def saved_bytes(net: nn.Module, image_size: Size = 224, batch_size: int = 4) -> float:
    """Bytes kept for backward, per image: the distinct storages that autograd saves in one training step's forward
    pass.

    Parameters are left out; the input and buffers count where an operation keeps them. The pass runs on a copy of the
    network where its parameters are, in their precision, so that the network stays as it is.

    Args:
        net: any module that takes (N, C, H, W).
        image_size: side of the square images in pixels, or (height, width).
        batch_size: N; what doesn't grow with it (statistics) is shared among the images.

    Raises:
        UserError: a size below 1, no parameter to train, or a network that can not be copied or run.
    """
    height, width = sides(image_size)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise UserError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    check_shapes_known(net)
    try:
        net = copy.deepcopy(net).train()
    except Exception as error:  # whatever a module of the user's holds
        raise UserError(f"{type(net).__name__} can not be copied: {first_line(error)}") from error
    weight = next((p for p in net.parameters() if p.requires_grad), None)
    if weight is None:
        raise UserError(
            f"{type(net).__name__} has no parameter that requires a gradient, so nothing is kept for backward"
        )
    own = {t.untyped_storage()._cdata for t in net.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held, so that no address is given out twice
        return tensor

    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        shape = (batch_size, image_channels(net), height, width)
        images = torch.rand(shape, device=weight.device, dtype=weight.dtype)
        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                net(images)
        except UserError:
            raise
        except Exception as error:  # whatever a network's code raises
            raise UserError(
                f"{type(net).__name__} can not be run at {height}x{width} px: {first_line(error)}"
            ) from error
    return sum(size for size, _ in kept.values()) / batch_size


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
