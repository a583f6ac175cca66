"""The in-place norm's kernels, launched: the signatures of their twins, for maps channels-last or in planes."""

from __future__ import annotations

import torch
from torch import Tensor

from convscale.nn.kernels.launch import BLOCK, launch, multiprocessors, parts_of, power_of_two, tile

SLICES = 8
"""Slices of a reduction per multiprocessor at most."""


def _in_rows(x: Tensor) -> bool:
    """Whether a map lies channels-last; one that lies both ways (H = W = 1) does."""
    return x.is_contiguous(memory_format=torch.channels_last)


def _plane_block(plane: int) -> int:
    return min(BLOCK, max(16, power_of_two(plane)))


def _slices(units: int, programs: int, x: Tensor) -> tuple[int, int]:
    """How many slices of how many units (blocks of rows, or images), so that all multiprocessors are busy."""
    wanted = max(1, min(units, multiprocessors(x) * SLICES // max(1, programs)))
    each = parts_of(units, wanted)
    return parts_of(units, each), each


def _finish(channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and block (slices, channels) of the kernels that put slices together: many slices at a time, so that few
    loads wait for each other.
    """
    columns = min(16, power_of_two(channels))
    return (parts_of(channels, columns), 1), {"BS": 64, "BC": columns}


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) in float32 of a map (N, C, H, W).

    Sums are of x less the channel's first value, so that a mean far from 0 does not cancel.
    """
    n, c, h, w = x.shape
    shift = x[0, :, 0, 0].float().contiguous()
    if _in_rows(x):
        m, (bc, bm) = n * h * w, tile(c)
        blocks = parts_of(c, bc)
        count, each = _slices(parts_of(m, bm), blocks, x)
        part = torch.empty(count, 2, c, device=x.device, dtype=torch.float32)
        launch("statistics_rows", (blocks, count), [x, shift], [part], (m, c, each * bm), BM=bm, BC=bc)
    else:
        count, each = _slices(n, c, x)
        part = torch.empty(count, 2, c, device=x.device, dtype=torch.float32)
        launch("statistics_planes", (c, count), [x, shift], [part], (n, c, h * w, each), BP=_plane_block(h * w))
    mean, var = (torch.empty(c, device=x.device, dtype=torch.float32) for _ in range(2))
    grid, block = _finish(c)
    launch("finish_statistics", grid, [part, shift], [mean, var], (count, n * h * w, c), **block)
    return mean, var


def normalise(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: float | None, out: Tensor | None = None
) -> Tensor:
    """act((x - mean) * scale + bias); ``out`` may be x."""
    n, c, h, w = x.shape
    out = torch.empty_like(x) if out is None else out
    reads = [x, *(value.float().contiguous() for value in (mean, scale, bias))]
    options = {"SLOPE": 1.0 if slope is None else slope, "ACT": slope is not None}
    if _in_rows(x):
        m, (bc, bm) = n * h * w, tile(c)
        launch("normalise_rows", (parts_of(m, bm), parts_of(c, bc)), reads, [out], (m, c), **options, BM=bm, BC=bc)
    else:
        block = _plane_block(h * w)
        launch("normalise_planes", (n * c, parts_of(h * w, block)), reads, [out], (c, h * w), **options, BP=block)
    return out


def backward(
    y: Tensor, dy: Tensor, bias: Tensor, inverse: Tensor, scale: Tensor, slope: float | None, use_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the input, the weight and the bias from the output alone; see the twin."""
    n, c, h, w = y.shape
    rows = _in_rows(y)
    dy = dy.contiguous(memory_format=torch.channels_last if rows else torch.contiguous_format)
    bias, inverse, scale = (value.float().contiguous() for value in (bias, inverse, scale))
    options: dict[str, object] = {"SLOPE": 1.0, "INV_SLOPE": 1.0, "ACT": False}
    if slope is not None:
        options = {"SLOPE": slope, "INV_SLOPE": 1.0 / slope, "ACT": True}
    m, (bc, bm), block = n * h * w, tile(c), _plane_block(h * w)
    options |= {"BM": bm, "BC": bc} if rows else {"BP": block}
    blocks = parts_of(c, bc)
    count, each = _slices(parts_of(m, bm), blocks, y) if rows else _slices(n, c, y)
    part = torch.empty(count, 2, c, device=y.device, dtype=torch.float32)
    if rows:
        launch("sums_rows", (blocks, count), [y, dy, bias, inverse], [part], (m, c, each * bm), **options)
    else:
        launch("sums_planes", (c, count), [y, dy, bias, inverse], [part], (n, c, h * w, each), **options)
    dbias, dweight, *means = (torch.empty(c, device=y.device, dtype=torch.float32) for _ in range(4))
    grid, finish = _finish(c)
    launch("finish_sums", grid, [part], [dbias, dweight, *means], (count, m, c), USE_BATCH=use_batch, **finish)
    dx = torch.empty_like(y)
    reads = [y, dy, bias, inverse, scale, *means]
    if rows:
        launch("gradient_rows", (parts_of(m, bm), blocks), reads, [dx], (m, c), **options)
    else:
        launch("gradient_planes", (n * c, parts_of(h * w, block)), reads, [dx], (c, h * w), **options)
    return dx, dweight, dbias
