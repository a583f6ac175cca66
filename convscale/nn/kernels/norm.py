"""The in-place norm as operators of PyTorch's own kind, so that it survives ``torch.compile`` and ``torch.export`` with
its memory saving: a compiler that sees plain batch norm and leaky ReLU keeps an input of each.

``convscale::norm_act`` gives act(norm(x)) with what its backward pass needs; ``convscale::norm_act_backward`` makes the
gradients from the output. A kernel does it where one is wanted (:mod:`convscale.nn.kernels.wanted`), else its twin.
``PARTS`` has the plain functions behind the operators: a trace looks into them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from convscale.nn.kernels import norm_launch, norm_twin
from convscale.nn.kernels.norm_twin import sums_dtype
from convscale.nn.kernels.wanted import kernels_wanted

SMALLEST_SCALE = 1e-3
"""The backward pass divides by no smaller |weight| than this in float32 and float64."""
SMALLEST_SCALE_HALF = 1e-2
"""The same in bfloat16 and float16, whose outputs carry 2 to 3 digits."""


def divisor(weight: Tensor, map_dtype: torch.dtype) -> Tensor:
    """sign(w) * max(|w|, smallest scale), with sign(0) = 1: what stands for the weight where its inverse is needed."""
    smallest = SMALLEST_SCALE_HALF if map_dtype in (torch.bfloat16, torch.float16) else SMALLEST_SCALE
    return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype) * weight.abs().clamp_min(smallest)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of a map (N, C, H, W)."""
    return (norm_launch if kernels_wanted(x) else norm_twin).statistics(x)


def normalise(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: float | None, out: Tensor | None = None
) -> Tensor:
    """act((x - mean) * scale + bias), by channel; ``out`` may be x."""
    return (norm_launch if kernels_wanted(x) else norm_twin).normalise(x, mean, scale, bias, slope, out)


def backward(
    y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, invstd: Tensor, slope: float | None, use_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the input, the weight and the bias (C,) from the output ``y`` of act(norm(x))."""
    how = norm_launch if kernels_wanted(y) else norm_twin
    return how.backward(y, dy, bias, 1.0 / divisor(weight, y.dtype), weight * invstd, slope, use_batch)


def _norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(norm(x)), with the mean and the biased variance (C,) it used: the running ones, or the batch's where there
    are none.
    """
    dtype = sums_dtype(x.dtype)
    if running_mean is None or running_var is None:
        mean, var = statistics(x)
    else:
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
    scale = weight.to(dtype) * torch.rsqrt(var + eps)
    return normalise(x, mean, scale, bias.to(dtype), slope), mean, var


norm_act = torch.library.custom_op("convscale::norm_act", mutates_args=())(_norm_act)


@norm_act.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    slope: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    found = x.new_empty(x.shape[1], dtype=sums_dtype(x.dtype))
    return torch.empty_like(x), found, torch.empty_like(found)


def _norm_act_backward(
    y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, var: Tensor, eps: float, slope: float | None, use_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the input, the weight and the bias."""
    dtype = sums_dtype(y.dtype)
    invstd = torch.rsqrt(var.to(dtype) + eps)
    return backward(y, dy, weight.to(dtype), bias.to(dtype), invstd, slope, use_batch)


norm_act_backward = torch.library.custom_op("convscale::norm_act_backward", mutates_args=())(_norm_act_backward)
PARTS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "convscale::norm_act": _norm_act,
    "convscale::norm_act_backward": _norm_act_backward,
}
"""What each operator consists of, by its name."""


@norm_act_backward.register_fake
def _(
    y: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, var: Tensor, eps: float, slope: float | None, use_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    found = y.new_empty(y.shape[1], dtype=sums_dtype(y.dtype))
    return torch.empty_like(y), found, torch.empty_like(found)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, weight, bias, running_mean, _, eps, slope = inputs
    y, _, var = output
    ctx.save_for_backward(y, weight, bias, var)
    ctx.eps, ctx.slope, ctx.use_batch = eps, slope, running_mean is None


def _gradients(ctx: Any, dy: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor | None, ...]:
    y, weight, bias, var = ctx.saved_tensors
    dx, dweight, dbias = norm_act_backward(y, dy, weight, bias, var, ctx.eps, ctx.slope, ctx.use_batch)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None, None


norm_act.register_autograd(_gradients, setup_context=_keep)
