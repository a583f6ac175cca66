"""How a kernel is launched: by Triton where there are values, and on the meta device as the operator
``convscale::launch``, which computes nothing and tells a trace what would run.

Every kernel takes the tensors that it reads, then those that it writes, then its sizes, and reads or writes each of
them once: what a trace counts is what the kernels' own loads and stores move.
"""

# A launch takes plain numbers where a kernel's parameters are Triton's constants.
# pyright: reportIndexIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAME = "convscale::launch"
"""The operator: ``launch(str kernel, Tensor[] reads, Tensor(a!)[] writes)``."""
_LIBRARY = torch.library.Library("convscale", "FRAGMENT")
_LIBRARY.define("launch(str kernel, Tensor[] reads, Tensor(a!)[] writes) -> ()")
BLOCK_C = 64
"""Channels of a block at most, where they lie beside each other."""
BLOCK = 2048
"""Values of a block."""
UNITS = 132
"""Multiprocessors of the card that a tensor without values stands for: an H100's."""


def _nothing(kernel: str, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
    """What a kernel does to tensors without values."""


_LIBRARY.impl("launch", _nothing, "Meta")


def launch(
    name: str,
    grid: tuple[int, int],
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    sizes: Sequence[int],
    **constants: object,
) -> None:
    """Run a kernel of :mod:`convscale.nn.kernels.norm_triton` or :mod:`convscale.nn.kernels.blur_triton`.

    Args:
        name: its name.
        grid: programs along either axis; a card takes at most 65,535 along the second.
        reads: the tensors that it reads, in the order of its parameters.
        writes: those that it writes; one of ``reads`` may be among them.
        sizes: its whole numbers.
        constants: what it is compiled for.
    """
    if reads[0].is_meta:
        torch.ops.convscale.launch(name, reads, writes)
        return
    from convscale.nn.kernels import blur_triton, norm_triton

    kernel = getattr(blur_triton if name.startswith("blur") else norm_triton, name)
    with torch.cuda.device_of(reads[0]):  # Triton launches on the current device, which may be another
        kernel[grid](*reads, *writes, *sizes, **constants)


def multiprocessors(x: Tensor) -> int:
    """Of the card that ``x`` lies on; few in Triton's interpreter."""
    if x.is_meta:
        return UNITS
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def parts_of(whole: int, part: int) -> int:
    """How many parts cover the whole."""
    return -(-whole // part)


def tile(channels: int) -> tuple[int, int]:
    """Channels and positions of a block, of a map that lies channels-last."""
    columns = min(BLOCK_C, power_of_two(channels))
    return columns, max(1, BLOCK // columns)


def power_of_two(least: int) -> int:
    """The smallest power of two of at least ``least``."""
    return 1 << max(0, least - 1).bit_length()
