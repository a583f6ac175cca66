"""The blur's kernels, launched, for maps that lie channels-last. Their definition, and what serves every other map, is
:func:`convscale.nn.lean.blur` in plain PyTorch, which copies the map to pad it, and in half of all layouts once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convscale.nn.kernels.launch import launch, parts_of, tile
from convscale.nn.kernels.wanted import kernels_wanted


def takes(x: Tensor, stride: int) -> bool:
    """Whether a map (N, C, H, W) is blurred by a kernel."""
    return stride in (1, 2) and x.is_contiguous(memory_format=torch.channels_last) and kernels_wanted(x)


def blur(x: Tensor, stride: int) -> Tensor:
    """[1, 2, 1] x [1, 2, 1] / 16 of each channel of (N, C, H, W) at a stride, the border reflected."""
    n, c, h, w = x.shape
    oh, ow = (h - 1) // stride + 1, (w - 1) // stride + 1
    y = torch.empty(n, c, oh, ow, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    m, (bc, bm) = n * oh * ow, tile(c)
    grid = (parts_of(m, bm), parts_of(c, bc))
    launch("blur_rows", grid, [x], [y], (m, c, h, w, oh, ow), STRIDE=stride, BM=bm, BC=bc)
    return y


def backward(dy: Tensor, size: tuple[int, int], stride: int) -> Tensor:
    """The gradient of ``blur``'s input, ``size`` its height and width."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    n, c, oh, ow = dy.shape
    h, w = size
    dx = torch.empty(n, c, h, w, device=dy.device, dtype=dy.dtype, memory_format=torch.channels_last)
    m, (bc, bm) = n * h * w, tile(c)
    grid = (parts_of(m, bm), parts_of(c, bc))
    options = {"STRIDE": stride, "OUTPUTS": 2 if stride == 2 else 3, "BM": bm, "BC": bc}
    launch("blur_gradient_rows", grid, [dy], [dx], (m, c, h, w, oh, ow), **options)
    return dx
