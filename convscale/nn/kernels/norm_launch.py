"""The in-place norm's kernels, launched: the signatures of their twins, for maps channels-last or in planes."""

# A launch takes plain numbers where a kernel's parameters are Triton's constants.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_C = 64
"""Channels of a block at most, where they lie beside each other."""
BLOCK = 2048
"""Values of a block."""
SLICES = 8
"""Slices of a reduction per multiprocessor at most."""


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def _in_rows(x: Tensor) -> bool:
    """Whether a map lies channels-last; one that lies both ways (H = W = 1) does."""
    return x.is_contiguous(memory_format=torch.channels_last)


def _tile(channels: int) -> tuple[int, int]:
    """Channels and rows of a block."""
    import triton

    columns = min(BLOCK_C, triton.next_power_of_2(channels))
    return columns, max(1, BLOCK // columns)


def _plane_block(plane: int) -> int:
    import triton

    return min(BLOCK, max(16, triton.next_power_of_2(plane)))


def _slices(units: int, programs: int, x: Tensor) -> tuple[int, int]:
    """How many slices of how many units (blocks of rows, or images), so that all multiprocessors are busy."""
    wanted = max(1, min(units, _multiprocessors(x) * SLICES // max(1, programs)))
    each = -(-units // wanted)
    return -(-units // each), each


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) in float32 of a map (N, C, H, W).

    Sums are of x less the channel's first value, so that a mean far from 0 does not cancel.
    """
    import triton

    from convscale.nn.kernels.norm_triton import statistics_planes, statistics_rows

    n, c, h, w = x.shape
    shift = x[0, :, 0, 0].float().contiguous()
    if _in_rows(x):
        m, (bc, bm) = n * h * w, _tile(c)
        blocks = triton.cdiv(c, bc)
        count, each = _slices(triton.cdiv(m, bm), blocks, x)
        part = torch.empty(count, 2, c, device=x.device, dtype=torch.float32)
        statistics_rows[(blocks, count)](x, shift, part, m, c, each * bm, BM=bm, BC=bc)
    else:
        count, each = _slices(n, c, x)
        part = torch.empty(count, 2, c, device=x.device, dtype=torch.float32)
        statistics_planes[(c, count)](x, shift, part, n, c, h * w, each, BP=_plane_block(h * w))
    sums = part.double().sum(0) / (n * h * w)
    mean = sums[0]
    return (mean + shift).float(), (sums[1] - mean * mean).clamp_min(0).float()


def normalise(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: float | None, out: Tensor | None = None
) -> Tensor:
    """act((x - mean) * scale + bias); ``out`` may be x."""
    import triton

    from convscale.nn.kernels.norm_triton import normalise_planes, normalise_rows

    n, c, h, w = x.shape
    out = torch.empty_like(x) if out is None else out
    given = (x, out, *(value.float().contiguous() for value in (mean, scale, bias)))
    options = {"SLOPE": 1.0 if slope is None else slope, "ACT": slope is not None}
    if _in_rows(x):
        m, (bc, bm) = n * h * w, _tile(c)
        normalise_rows[(triton.cdiv(c, bc), triton.cdiv(m, bm))](*given, m, c, **options, BM=bm, BC=bc)
    else:
        block = _plane_block(h * w)
        normalise_planes[(n * c, triton.cdiv(h * w, block))](*given, c, h * w, **options, BP=block)
    return out


def backward(
    y: Tensor, dy: Tensor, bias: Tensor, inverse: Tensor, scale: Tensor, slope: float | None, use_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the input, the weight and the bias from the output alone; see the twin."""
    import triton

    from convscale.nn.kernels.norm_triton import gradient_planes, gradient_rows, sums_planes, sums_rows

    n, c, h, w = y.shape
    rows = _in_rows(y)
    dy = dy.contiguous(memory_format=torch.channels_last if rows else torch.contiguous_format)
    bias, inverse, scale = (value.float().contiguous() for value in (bias, inverse, scale))
    act = slope is not None
    options = {"SLOPE": slope if act else 1.0, "INV_SLOPE": 1.0 / slope if act else 1.0, "ACT": act}
    m, (bc, bm), block = n * h * w, _tile(c), _plane_block(h * w)
    blocks = triton.cdiv(c, bc)
    count, each = _slices(triton.cdiv(m, bm), blocks, y) if rows else _slices(n, c, y)
    part = torch.empty(count, 2, c, device=y.device, dtype=torch.float32)
    if rows:
        sums_rows[(blocks, count)](y, dy, bias, inverse, part, m, c, each * bm, **options, BM=bm, BC=bc)
    else:
        sums_planes[(c, count)](y, dy, bias, inverse, part, n, c, h * w, each, **options, BP=block)
    sums = part.double().sum(0).float()
    mean = sums / m if use_batch else torch.zeros_like(sums)
    dx = torch.empty_like(y)
    given = (y, dy, dx, bias, inverse, scale, mean[0], mean[1])
    if rows:
        gradient_rows[(blocks, triton.cdiv(m, bm))](*given, m, c, **options, BM=bm, BC=bc)
    else:
        gradient_planes[(n * c, triton.cdiv(h * w, block))](*given, c, h * w, **options, BP=block)
    return dx, sums[1].clone(), sums[0].clone()  # an operator's results may not share memory
