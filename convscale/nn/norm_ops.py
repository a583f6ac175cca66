"""The arithmetic under `convscale.nn.norm`: statistics over processes, and the autograd functions.

`InPlaceNorm` is In-Place Activated BatchNorm (Rota Bulò et al., CVPR 2018, arXiv 1712.02616): it keeps its output alone
for the backward pass and gets the normalised input back by inverting the activation and the affine map.
`RecomputedNormAct` keeps its input alone, where batch norm and an activation keep an input each. `SyncNorm` keeps its
input, as BatchNorm does, with statistics taken over several processes. All take maps (N, C, H, W) and compute sums in
float32 where the maps are half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from convscale.nn.kernels import norm as kernels
from convscale.nn.kernels.norm import divisor
from convscale.nn.kernels.norm_twin import per_channel, sums_dtype
from convscale.nn.kernels.wanted import kernels_wanted

aten = torch.ops.aten
Gradients = tuple[Tensor | None, ...]
"""What a backward pass returns: one for each argument of the forward pass, None where there is none."""


def being_traced() -> bool:
    """Whether the code is being compiled, exported or traced: then only plain operations are wanted, and a compiler
    chooses what to keep.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


EMULATED: ContextVar[torch.dtype | None] = ContextVar("EMULATED", default=None)
"""What a trace on meta tensors stands for: the type that the emulated autocast gives convolutions, or None."""


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast gives convolutions on this kind of device; None where it is off. PyTorch knows none on
    meta: there it is the one that a trace emulates.
    """
    if device == "meta":
        return EMULATED.get()
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def without_autocast(device: str) -> AbstractContextManager[object]:
    """A context in which maps keep their type."""
    off = device == "meta" or autocast_dtype(device) is None
    return nullcontext() if off else torch.autocast(device, enabled=False)


def joint_statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values per channel over the maps of all processes of `group`.

    The processes' means and variances are combined (Chan et al., 1979) rather than their sums of squares, which would
    cancel. Batches may differ in size from process to process; one may be empty.

    Returns:
        mean (C,), variance (C,), count (), all float64.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    dtype = sums_dtype(x.dtype)
    if count:
        var, mean = torch.var_mean(x.to(dtype), dim=(0, 2, 3), correction=0)
    else:
        var = mean = x.new_zeros(channels, dtype=dtype)
    # Each process fills its row and the sum gathers them: all_reduce is what every backend and the compiler have.
    table = x.new_zeros(dist.get_world_size(group), 2 * channels + 1, dtype=torch.float64)
    table[dist.get_rank(group)] = torch.cat(
        [mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)]
    )
    dist.all_reduce(table, group=group)
    means, variances, counts = table[:, :channels], table[:, channels:-1], table[:, -1:]
    total = counts.sum().clamp_min(1.0)
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    return mean, var, total


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | int,
    momentum: float,
) -> None:
    """Move the running statistics towards a batch's, as BatchNorm does: the variance, of ``count`` values, unbiased."""
    if running_mean is None or running_var is None:
        return
    others = (count - 1).clamp_min(1.0) if isinstance(count, Tensor) else max(count - 1, 1)
    unbiased = var * (count / others)
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def _input_gradient(
    dz: Tensor, normalised: Tensor, scale: Tensor, count: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of the affine map and the normalisation; count None: the statistics were constants.

    Returns:
        gradient for the input (N, C, H, W), and this process's sums for weight and bias (C,). Only the former needs the
        other processes: gradients of parameters are summed, or averaged, by whoever trains in parallel.
    """
    dbias = dz.sum((0, 2, 3))
    dweight = (dz * normalised).sum((0, 2, 3))
    if count is None:
        return dz * per_channel(scale), dweight, dbias
    sums = torch.stack([dbias, dweight])
    dist.all_reduce(sums, group=group)
    mean_dz, mean_dz_normalised = (sums / count.to(sums.dtype)).unbind()
    dx = torch.addcmul(dz - per_channel(mean_dz), normalised, per_channel(mean_dz_normalised), value=-1.0)
    return dx.mul_(per_channel(scale)), dweight, dbias


class InPlaceNorm(torch.autograd.Function):
    """Batch norm and leaky ReLU (or identity) that keep their output alone, written over the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_batch: bool,
        momentum: float,
        eps: float,
        slope: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """Normalise x with the batch's statistics (use_batch) or the running ones; slope None: no activation.

        group: the processes to share statistics with; None: this one alone. The running statistics are updated when the
        batch's are used.
        """
        # A tensor without gradient may be the caller's own data; one with gradient comes out of another operation and
        # is overwritten.
        y = x if ctx.needs_input_grad[0] else torch.empty_like(x)
        count, slope_left = None, slope
        if group is None and kernels_wanted(x):
            if use_batch:
                mean, var = kernels.statistics(x)
                update_running(running_mean, running_var, mean, var, x.numel() // len(mean), momentum)
            else:
                assert running_mean is not None
                assert running_var is not None
                mean, var = running_mean.float(), running_var.float()
            invstd = torch.rsqrt(var + eps).to(weight.dtype)
            kernels.normalise(x, mean, weight * invstd, bias, slope, out=y)
            slope_left = None
        elif use_batch and group is None:
            save_mean, invstd = (torch.empty_like(weight) for _ in range(2))
            aten.native_batch_norm.out(
                x,
                weight,
                bias,
                running_mean,
                running_var,
                True,
                momentum,
                eps,
                out=y,
                save_mean=save_mean,
                save_invstd=invstd,
            )
        else:
            if use_batch:
                mean, var, count = joint_statistics(x, group)
                update_running(running_mean, running_var, mean, var, count, momentum)
            else:
                assert running_mean is not None
                assert running_var is not None
                mean, var = running_mean, running_var
            invstd = torch.rsqrt(var + eps).to(weight.dtype)
            unused = [torch.empty(0, dtype=weight.dtype, device=x.device) for _ in range(2)]
            mean, var = mean.to(weight.dtype), var.to(weight.dtype)
            if x.numel():  # a process may have run out of images
                aten.native_batch_norm.out(
                    x, weight, bias, mean, var, False, 0.0, eps, out=y, save_mean=unused[0], save_invstd=unused[1]
                )
        if slope_left is not None:
            F.leaky_relu_(y, slope_left)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, weight, bias, invstd, count)
        ctx.slope, ctx.group, ctx.use_batch = slope, group, use_batch
        return y

    @staticmethod
    # its wrapper takes ctx by position, which the base class allows by keyword too
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients for x, weight and bias from the output alone."""
        y, weight, bias, invstd, count = ctx.saved_tensors
        if ctx.group is None and kernels_wanted(y):
            found = kernels.backward(y, grads[0].to(y.dtype), weight, bias, invstd, ctx.slope, ctx.use_batch)
            return (
                *(g if need else None for g, need in zip(found, ctx.needs_input_grad[:3], strict=True)),
                *[None] * 7,
            )
        dtype = sums_dtype(y.dtype)
        dz, z = grads[0].to(dtype), y.to(dtype, copy=True)
        if ctx.slope is not None:
            dz = aten.leaky_relu_backward(dz, z, ctx.slope, True)
            F.leaky_relu_(z, 1.0 / ctx.slope)
        normalised = z.sub_(per_channel(bias)).div_(per_channel(divisor(weight, y.dtype)))
        scale = weight * invstd
        if ctx.group is None:
            zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
            dx, dweight, dbias = aten.native_batch_norm_backward(
                dz, normalised, scale, zeros, ones, zeros, ones, ctx.use_batch, 0.0, list(ctx.needs_input_grad[:3])
            )
        else:
            dx, dweight, dbias = _input_gradient(dz, normalised, scale, count, ctx.group)
        needs = ctx.needs_input_grad
        return (
            dx.to(y.dtype) if needs[0] else None,
            dweight if needs[1] else None,
            dbias if needs[2] else None,
            *[None] * 7,
        )


_BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": aten.silu_backward,
    "hardswish": aten.hardswish_backward,
    "mish": aten.mish_backward,
    "gelu": aten.gelu_backward,
}
"""Gradients of the activations that need their input, from the gradient of their output and that input."""
RECOMPUTABLE = frozenset(_BACKWARDS)


class RecomputedNormAct(torch.autograd.Function):
    """Batch norm and an activation whose backward needs the norm's output: keeps the norm's input, and makes the output
    again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_batch: bool,
        momentum: float,
        eps: float,
        act: nn.Module,
        name: str,
    ) -> Tensor:
        """act(norm(x)), with the batch's statistics (use_batch) or the running ones; `act` works in place and has the
        name `name`.
        """
        y, mean, invstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, use_batch, momentum, eps)
        if not use_batch:
            assert running_mean is not None
            assert running_var is not None
            mean, invstd = running_mean.clone(), torch.rsqrt(running_var + eps)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.use_batch, ctx.name = use_batch, name
        return act(y)

    @staticmethod
    # its wrapper takes ctx by position, which the base class allows by keyword too
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients for x, weight and bias."""
        x, weight, bias, mean, invstd = ctx.saved_tensors
        ones = torch.ones_like(invstd)
        z = torch.native_batch_norm(x, weight * invstd, bias, mean, ones, False, 0.0, 0.0)[0]
        dz = _BACKWARDS[ctx.name](grads[0], z)
        needs = ctx.needs_input_grad
        found = aten.native_batch_norm_backward(
            dz, x, weight, mean, invstd**-2, mean, invstd, ctx.use_batch, 0.0, list(needs[:3])
        )
        return (*(grad if need else None for grad, need in zip(found, needs[:3], strict=True)), *[None] * 7)


class SyncNorm(torch.autograd.Function):
    """Batch norm over the processes of a group, keeping its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        invstd: Tensor,
        count: Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """(x - mean) * invstd * weight + bias, with mean and invstd (C,) and count () of all the processes together."""
        ctx.save_for_backward(x, weight, mean, invstd, count)
        ctx.group = group
        scale = weight * invstd
        y = (x.to(weight.dtype) - per_channel(mean)).mul_(per_channel(scale)).add_(per_channel(bias))
        return y.to(x.dtype)

    @staticmethod
    # its wrapper takes ctx by position, which the base class allows by keyword too
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients for x, weight and bias; the collective is the same on every process whatever it needs."""
        x, weight, mean, invstd, count = ctx.saved_tensors
        normalised = (x.to(weight.dtype) - per_channel(mean)).mul_(per_channel(invstd))
        dx, dweight, dbias = _input_gradient(grads[0].to(weight.dtype), normalised, weight * invstd, count, ctx.group)
        needs = ctx.needs_input_grad
        return (
            dx.to(x.dtype) if needs[0] else None,
            dweight if needs[1] else None,
            dbias if needs[2] else None,
            *[None] * 4,
        )
