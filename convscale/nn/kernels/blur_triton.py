"""The binomial blur in Triton, for maps (N, C, H, W) that lie channels-last: [1, 2, 1] x [1, 2, 1] / 16 with a stride
of 1 or 2 and a border that is reflected where it is read, so that no padded copy is made.

A block is some positions, all images', times some channels beside each other. Neighbours read the same values, which
lie in the cache: memory gives a map once.
"""

# Triton's own types are not known to a type checker.
# pyright: reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _reflect(at, size):
    """A position of the padded side, within the map: -1 is 1, and size is size - 2."""
    at = tl.where(at < 0, -at, at)
    return tl.where(at >= size, 2 * size - 2 - at, at)


@triton.jit
def _share(at, out, size, STRIDE: tl.constexpr):
    """Share of the input at ``at`` in the output at ``out``, along one side; the reflected border's beside its own."""
    way = at - out * STRIDE
    share = tl.where(way == 0, 0.5, tl.where((way == 1) | (way == -1), 0.25, 0.0))
    share += tl.where((at == 1) & (out == 0), 0.25, 0.0)
    return share + tl.where((at == size - 2) & (out * STRIDE == size - 1), 0.25, 0.0)


@triton.jit
def blur_rows(
    x_ptr, y_ptr, M, C, H, W, OH, OW, STRIDE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """y (N, OH, OW, C) of x (N, H, W, C); M = N OH OW."""
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    mask = (rows < M)[:, None] & (cols < C)[None, :]
    ow, oh, image = rows % OW, (rows // OW) % OH, (rows // (OW * OH)).to(tl.int64)
    total = tl.zeros((BM, BC), tl.float32)
    for i in tl.static_range(3):
        h = _reflect(oh * STRIDE + i - 1, H)
        for j in tl.static_range(3):
            w = _reflect(ow * STRIDE + j - 1, W)
            at = ((image * H + h) * W + w)[:, None] * C + cols[None, :]
            weight = (2 if i == 1 else 1) * (2 if j == 1 else 1) / 16
            total += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) * weight
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def blur_gradient_rows(
    dy_ptr, dx_ptr, M, C, H, W, OH, OW,
    STRIDE: tl.constexpr, OUTPUTS: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx (N, H, W, C) of dy (N, OH, OW, C); M = N H W. Along a side OUTPUTS outputs at most hold an input: 2 with a
    stride of 2, else 3.
    """
    cols = tl.program_id(1) * BC + tl.arange(0, BC)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    mask = (rows < M)[:, None] & (cols < C)[None, :]
    w, h, image = rows % W, (rows // W) % H, (rows // (W * H)).to(tl.int64)
    total = tl.zeros((BM, BC), tl.float32)
    for i in tl.static_range(OUTPUTS):
        oh = h // STRIDE + i + (2 - OUTPUTS)
        down = tl.where((oh >= 0) & (oh < OH), _share(h, oh, H, STRIDE), 0.0)
        for j in tl.static_range(OUTPUTS):
            ow = w // STRIDE + j + (2 - OUTPUTS)
            share = down * tl.where((ow >= 0) & (ow < OW), _share(w, ow, W, STRIDE), 0.0)
            at = ((image * OH + oh) * OW + ow)[:, None] * C + cols[None, :]
            dy = tl.load(dy_ptr + at, mask=mask & (share > 0)[:, None], other=0.0)
            total += dy.to(tl.float32) * share[:, None]
    at = rows.to(tl.int64)[:, None] * C + cols[None, :]
    tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=mask)
