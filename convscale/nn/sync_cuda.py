"""Batch norm over processes by the kernels that PyTorch has for it on CUDA: what
:class:`convscale.nn.norm_ops.SyncNorm` defines, with fewer passes over the maps and none in float32 beside them.

Statistics are read in one pass, applied in one, and the backward pass is two. Source of the arguments: PyTorch's own
``torch/nn/modules/_functions.py`` and ``aten/src/ATen/native/cuda/Normalization.cu``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from convscale.nn.kernels.norm_twin import sums_dtype
from convscale.nn.norm_ops import Gradients, being_traced

aten = torch.ops.aten
_NO_IMAGE = 1e-30
"""Stands for the count of a process without images: the kernel that combines statistics divides by the count so far."""


def takes(x: Tensor) -> bool:
    """Whether maps go through PyTorch's kernels: on CUDA, and not while a compiler looks, which knows none of them."""
    return x.is_cuda and not being_traced()


def joint_statistics(
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and inverse standard deviation (C,) over the maps of all processes, in float32 (float64 of float64 maps),
    and the number of values per channel of each process (processes,), int32.

    Args:
        x: (N, C, H, W); N may differ from process to process, and be 0.
        running: mean and variance (C,) to move towards the batch's, or None.
        momentum: how far.
        eps: added to the variance.
        group: the processes.
    """
    channels, dtype = x.shape[1], sums_dtype(x.dtype)
    values = x.numel() // channels
    if values:
        mean, invstd = aten.batch_norm_stats(x, eps)
    else:
        mean, invstd = x.new_zeros(channels, dtype=dtype), x.new_ones(channels, dtype=dtype)
    # Each process fills its row and the sum gathers them: all_reduce is what every backend has.
    table = x.new_zeros(dist.get_world_size(group), 2 * channels + 1, dtype=dtype)
    table[dist.get_rank(group)] = torch.cat([mean, invstd, mean.new_full((1,), values)])
    dist.all_reduce(table, group=group)
    means, invstds, counts = table[:, :channels], table[:, channels:-1], table[:, -1]
    # The kernel takes counts of the running statistics' type; half precision could not hold them.
    wide = [None if each is None else each.to(dtype) for each in running]
    mean, invstd = aten.batch_norm_gather_stats_with_counts(
        means, means, invstds, *wide, momentum, eps, counts.clamp_min(_NO_IMAGE)
    )
    for mine, new in zip(running, wide, strict=True):
        if mine is not None and new is not None and new is not mine:
            mine.copy_(new)
    return mean, invstd, counts.to(torch.int32)


class SyncNormCuda(torch.autograd.Function):
    """Batch norm over the processes of a group, keeping its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        invstd: Tensor,
        counts: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(x - mean) * invstd * weight + bias, with what ``joint_statistics`` gave."""
        ctx.save_for_backward(x, weight, mean, invstd, counts)
        ctx.group = group
        return aten.batch_norm_elemt(x, weight, bias, mean, invstd, eps) if x.numel() else torch.empty_like(x)

    @staticmethod
    # its wrapper takes ctx by position, which the base class allows by keyword too
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients for x, weight and bias; the collective is the same on every process whatever it needs."""
        x, weight, mean, invstd, counts = ctx.saved_tensors
        last = x.is_contiguous(memory_format=torch.channels_last)
        dy = grads[0].to(x.dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        if x.numel():
            sum_dy, sum_dy_xmu, dweight, dbias = aten.batch_norm_backward_reduce(
                dy, x, mean, invstd, weight, True, True, True
            )
        else:
            sum_dy, sum_dy_xmu, dweight, dbias = (torch.zeros_like(mean) for _ in range(4))
        sums = torch.stack([sum_dy, sum_dy_xmu])
        dist.all_reduce(sums, group=ctx.group)
        needs = ctx.needs_input_grad
        dx = None
        if needs[0]:
            dx = torch.empty_like(x)
            if x.numel():
                dx = aten.batch_norm_backward_elemt(dy, x, mean, invstd, weight, sums[0], sums[1], counts)
        return dx, dweight if needs[1] else None, dbias if needs[2] else None, *[None] * 5
