"""Whether kernels are to be used."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

GENERATIONS: frozenset[int] = frozenset()
"""Major compute capabilities on which a committed record (``results/gpu-*``) shows a gain: none was measured yet."""
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of maps that kernels take."""


def switched_on() -> bool | None:
    """What ``CONVSCALE_KERNELS`` says: ``1`` on, ``0`` off, else None."""
    return {"1": True, "0": False}.get(os.environ.get("CONVSCALE_KERNELS", ""))


def interpreted() -> bool:
    """Whether Triton runs in its interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels_wanted(x: torch.Tensor) -> bool:
    """Whether a map (N, C, H, W) goes through a kernel: on a GPU, of a type and a layout that kernels take, where they
    are switched on or known to gain. A map on the meta device stands for one on a GPU, in a trace: there the switch
    alone decides.
    """
    said = switched_on()
    if said is False or x.dtype not in KERNEL_TYPES or not x.numel():
        return False
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return False
    if x.is_meta:
        return said is True
    if not has_triton() or not (x.is_cuda or (interpreted() and x.device.type == "cpu")):
        return False
    return said is True or (x.is_cuda and _generation(x.device) in GENERATIONS)


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
