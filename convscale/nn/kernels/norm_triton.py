"""The in-place norm in Triton: statistics, normalisation with its activation, and the backward pass.

Maps (N, C, H, W) lie channels-last, as (M, C) with M = N H W, or as planes of H W values. Sums are taken in float32,
per slice of rows or planes, and put together in float64. In half precision the forward pass moves 6 bytes
an element (statistics read, then read and write), the backward pass 10 (both maps twice, and the gradient). Parameters
come in the order that :mod:`convscale.nn.kernels.launch` asks for: what is read, what is written, sizes.
"""

# Triton's own types are not known to a type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(z, SLOPE: tl.constexpr, ACT: tl.constexpr):
    return tl.where(z > 0, z, z * SLOPE) if ACT else z


@triton.jit
def _invert(y, dy, bias, inverse, SLOPE: tl.constexpr, INV_SLOPE: tl.constexpr, ACT: tl.constexpr):
    """The activation's gradient, and the normalised input got back from the output."""
    y, dz = y.to(tl.float32), dy.to(tl.float32)
    if ACT:
        positive = y > 0
        dz = tl.where(positive, dz, dz * SLOPE)
        y = tl.where(positive, y, y * INV_SLOPE)
    return dz, (y - bias) * inverse


@triton.jit
def statistics_rows(x_ptr, shift_ptr, part_ptr, M, C, ROWS, BM: tl.constexpr, BC: tl.constexpr):
    """Sums of x - shift and of its square over slices of ROWS rows; part (slices, 2, C)."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    cmask = cols < C
    shift = tl.load(shift_ptr + cols, mask=cmask, other=0.0)[None, :]
    part = tl.program_id(1).to(tl.int64)
    first = part * ROWS
    last = tl.minimum(first + ROWS, M)
    s0 = tl.zeros((BM, BC), tl.float32)
    s1 = tl.zeros((BM, BC), tl.float32)
    for row in range(first, last, BM):
        rows = row + tl.arange(0, BM)
        mask = (rows < last)[:, None] & cmask[None, :]
        x = tl.load(x_ptr + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - shift, 0.0)
        s0 += x
        s1 += x * x
    out = part_ptr + part * 2 * C + cols
    tl.store(out, tl.sum(s0, 0), mask=cmask)
    tl.store(out + C, tl.sum(s1, 0), mask=cmask)


@triton.jit
def statistics_planes(x_ptr, shift_ptr, part_ptr, N, C, HW, IMAGES, BP: tl.constexpr):
    """The same over planes of HW values; a slice is IMAGES images of one channel."""
    c = tl.program_id(0)
    shift = tl.load(shift_ptr + c)
    part = tl.program_id(1).to(tl.int64)
    first = part * IMAGES
    last = tl.minimum(first + IMAGES, N)
    s0 = tl.zeros((BP,), tl.float32)
    s1 = tl.zeros((BP,), tl.float32)
    for n in range(first, last):
        plane = (n * C + c) * HW
        for start in range(0, HW, BP):
            at = start + tl.arange(0, BP)
            mask = at < HW
            x = tl.load(x_ptr + plane + at, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - shift, 0.0)
            s0 += x
            s1 += x * x
    out = part_ptr + part * 2 * C + c
    tl.store(out, tl.sum(s0, 0))
    tl.store(out + C, tl.sum(s1, 0))


@triton.jit
def finish_statistics(
    part_ptr, shift_ptr, mean_ptr, var_ptr, SLICES, M, C, BS: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Mean and biased variance (C,) of M values, from all slices' sums of x - shift and of its square, in float64."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    cmask = cols < C
    s0 = tl.zeros((BS, BC), tl.float64)
    s1 = tl.zeros((BS, BC), tl.float64)
    for first in range(0, SLICES, BS):
        part = first + tl.arange(0, BS)
        mask = (part < SLICES)[:, None] & cmask[None, :]
        at = part[:, None] * 2 * C + cols[None, :]
        s0 += tl.load(part_ptr + at, mask=mask, other=0.0).to(tl.float64)
        s1 += tl.load(part_ptr + at + C, mask=mask, other=0.0).to(tl.float64)
    mean = tl.sum(s0, 0) / M
    var = tl.maximum(tl.sum(s1, 0) / M - mean * mean, 0.0)
    shift = tl.load(shift_ptr + cols, mask=cmask, other=0.0).to(tl.float64)
    tl.store(mean_ptr + cols, (mean + shift).to(tl.float32), mask=cmask)
    tl.store(var_ptr + cols, var.to(tl.float32), mask=cmask)


@triton.jit
def normalise_rows(
    x_ptr,
    mean_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    M,
    C,
    SLOPE: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
):
    """y = act((x - mean) * scale + bias); y may be x."""
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cmask = cols < C
    mask = (rows < M)[:, None] & cmask[None, :]
    mean = tl.load(mean_ptr + cols, mask=cmask, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=cmask, other=0.0)[None, :]
    bias = tl.load(bias_ptr + cols, mask=cmask, other=0.0)[None, :]
    at = rows[:, None] * C + cols[None, :]
    z = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * scale + bias
    tl.store(y_ptr + at, _activate(z, SLOPE, ACT).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normalise_planes(
    x_ptr, mean_ptr, scale_ptr, bias_ptr, y_ptr, C, HW, SLOPE: tl.constexpr, ACT: tl.constexpr, BP: tl.constexpr
):
    """The same over planes."""
    plane = tl.program_id(0).to(tl.int64)
    c = plane % C
    mean, scale, bias = tl.load(mean_ptr + c), tl.load(scale_ptr + c), tl.load(bias_ptr + c)
    at = tl.program_id(1) * BP + tl.arange(0, BP)
    mask = at < HW
    z = (tl.load(x_ptr + plane * HW + at, mask=mask, other=0.0).to(tl.float32) - mean) * scale + bias
    tl.store(y_ptr + plane * HW + at, _activate(z, SLOPE, ACT).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sums_rows(
    y_ptr, dy_ptr, bias_ptr, inverse_ptr, part_ptr, M, C, ROWS,
    SLOPE: tl.constexpr, INV_SLOPE: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums of dz and of dz * normalised over slices of ROWS rows; part (slices, 2, C)."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    cmask = cols < C
    bias = tl.load(bias_ptr + cols, mask=cmask, other=0.0)[None, :]
    inverse = tl.load(inverse_ptr + cols, mask=cmask, other=0.0)[None, :]
    part = tl.program_id(1).to(tl.int64)
    first = part * ROWS
    last = tl.minimum(first + ROWS, M)
    s0 = tl.zeros((BM, BC), tl.float32)
    s1 = tl.zeros((BM, BC), tl.float32)
    for row in range(first, last, BM):
        rows = row + tl.arange(0, BM)
        mask = (rows < last)[:, None] & cmask[None, :]
        at = rows[:, None] * C + cols[None, :]
        y = tl.load(y_ptr + at, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0)  # 0 outside, and so is what it is multiplied with
        dz, normalised = _invert(y, dy, bias, inverse, SLOPE, INV_SLOPE, ACT)
        s0 += dz
        s1 += dz * normalised
    out = part_ptr + part * 2 * C + cols
    tl.store(out, tl.sum(s0, 0), mask=cmask)
    tl.store(out + C, tl.sum(s1, 0), mask=cmask)


@triton.jit
def sums_planes(
    y_ptr, dy_ptr, bias_ptr, inverse_ptr, part_ptr, N, C, HW, IMAGES,
    SLOPE: tl.constexpr, INV_SLOPE: tl.constexpr, ACT: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The same over planes."""
    c = tl.program_id(0)
    bias, inverse = tl.load(bias_ptr + c), tl.load(inverse_ptr + c)
    part = tl.program_id(1).to(tl.int64)
    first = part * IMAGES
    last = tl.minimum(first + IMAGES, N)
    s0 = tl.zeros((BP,), tl.float32)
    s1 = tl.zeros((BP,), tl.float32)
    for n in range(first, last):
        plane = (n * C + c) * HW
        for start in range(0, HW, BP):
            at = start + tl.arange(0, BP)
            mask = at < HW
            y = tl.load(y_ptr + plane + at, mask=mask, other=0.0)
            dy = tl.load(dy_ptr + plane + at, mask=mask, other=0.0)
            dz, normalised = _invert(y, dy, bias, inverse, SLOPE, INV_SLOPE, ACT)
            s0 += dz
            s1 += dz * normalised
    out = part_ptr + part * 2 * C + c
    tl.store(out, tl.sum(s0, 0))
    tl.store(out + C, tl.sum(s1, 0))


@triton.jit
def finish_sums(
    part_ptr, sum0_ptr, sum1_ptr, mean0_ptr, mean1_ptr, SLICES, M, C,
    USE_BATCH: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sums (C,) over all slices, and their means over M values: 0 where the statistics were not the batch's."""
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    cmask = cols < C
    s0 = tl.zeros((BS, BC), tl.float64)
    s1 = tl.zeros((BS, BC), tl.float64)
    for first in range(0, SLICES, BS):
        part = first + tl.arange(0, BS)
        mask = (part < SLICES)[:, None] & cmask[None, :]
        at = part[:, None] * 2 * C + cols[None, :]
        s0 += tl.load(part_ptr + at, mask=mask, other=0.0).to(tl.float64)
        s1 += tl.load(part_ptr + at + C, mask=mask, other=0.0).to(tl.float64)
    sum0, sum1 = tl.sum(s0, 0), tl.sum(s1, 0)
    tl.store(sum0_ptr + cols, sum0.to(tl.float32), mask=cmask)
    tl.store(sum1_ptr + cols, sum1.to(tl.float32), mask=cmask)
    mean0, mean1 = sum0 / M, sum1 / M
    if not USE_BATCH:
        mean0, mean1 = mean0 * 0.0, mean1 * 0.0
    tl.store(mean0_ptr + cols, mean0.to(tl.float32), mask=cmask)
    tl.store(mean1_ptr + cols, mean1.to(tl.float32), mask=cmask)


@triton.jit
def gradient_rows(
    y_ptr, dy_ptr, bias_ptr, inverse_ptr, scale_ptr, mean0_ptr, mean1_ptr, dx_ptr, M, C,
    SLOPE: tl.constexpr, INV_SLOPE: tl.constexpr, ACT: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx = scale * (dz - mean0 - normalised * mean1)."""
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cmask = cols < C
    mask = (rows < M)[:, None] & cmask[None, :]
    bias = tl.load(bias_ptr + cols, mask=cmask, other=0.0)[None, :]
    inverse = tl.load(inverse_ptr + cols, mask=cmask, other=0.0)[None, :]
    scale = tl.load(scale_ptr + cols, mask=cmask, other=0.0)[None, :]
    mean0 = tl.load(mean0_ptr + cols, mask=cmask, other=0.0)[None, :]
    mean1 = tl.load(mean1_ptr + cols, mask=cmask, other=0.0)[None, :]
    at = rows[:, None] * C + cols[None, :]
    y = tl.load(y_ptr + at, mask=mask, other=0.0)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0)
    dz, normalised = _invert(y, dy, bias, inverse, SLOPE, INV_SLOPE, ACT)
    dx = scale * (dz - mean0 - normalised * mean1)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_planes(
    y_ptr, dy_ptr, bias_ptr, inverse_ptr, scale_ptr, mean0_ptr, mean1_ptr, dx_ptr, C, HW,
    SLOPE: tl.constexpr, INV_SLOPE: tl.constexpr, ACT: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The same over planes."""
    plane = tl.program_id(0).to(tl.int64)
    c = plane % C
    bias, inverse = tl.load(bias_ptr + c), tl.load(inverse_ptr + c)
    scale, mean0, mean1 = tl.load(scale_ptr + c), tl.load(mean0_ptr + c), tl.load(mean1_ptr + c)
    at = tl.program_id(1) * BP + tl.arange(0, BP)
    mask = at < HW
    y = tl.load(y_ptr + plane * HW + at, mask=mask, other=0.0)
    dy = tl.load(dy_ptr + plane * HW + at, mask=mask, other=0.0)
    dz, normalised = _invert(y, dy, bias, inverse, SLOPE, INV_SLOPE, ACT)
    dx = scale * (dz - mean0 - normalised * mean1)
    tl.store(dx_ptr + plane * HW + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
