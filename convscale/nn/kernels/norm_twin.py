"""What the in-place norm's kernels compute, in plain PyTorch: their definition, and their stand-in on every device that
has no kernel for them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over a map of ``dtype`` are taken."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def per_channel(values: Tensor) -> Tensor:
    """(C,) as (C, 1, 1), to go with a map (N, C, H, W)."""
    return values[:, None, None]


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of a map (N, C, H, W)."""
    var, mean = torch.var_mean(x.to(sums_dtype(x.dtype)), dim=(0, 2, 3), correction=0)
    return mean, var


def normalise(
    x: Tensor, mean: Tensor, scale: Tensor, bias: Tensor, slope: float | None, out: Tensor | None = None
) -> Tensor:
    """act((x - mean) * scale + bias), all three (C,); ``slope``: of leaky ReLU, None: no activation. ``out`` may be
    x.
    """
    z = torch.addcmul(per_channel(bias), x.to(scale.dtype) - per_channel(mean), per_channel(scale))
    z = z if slope is None else F.leaky_relu_(z, slope)
    return z.to(x.dtype) if out is None else out.copy_(z)


def backward(
    y: Tensor, dy: Tensor, bias: Tensor, inverse: Tensor, scale: Tensor, slope: float | None, use_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for the input (N, C, H, W), the weight and the bias (C,) from the output alone.

    Args:
        y: act(normalised * weight + bias).
        dy: its gradient.
        bias: (C,).
        inverse: 1 over what stands for the weight where its inverse is needed, (C,).
        scale: weight times inverse standard deviation, (C,).
        slope: of leaky ReLU; None: no activation.
        use_batch: statistics were the batch's, so they have a gradient.
    """
    dz, z = dy.to(bias.dtype), y.to(bias.dtype)
    if slope is not None:
        dz, z = torch.where(z > 0, dz, dz * slope), torch.where(z > 0, z, z / slope)
    normalised = (z - per_channel(bias)) * per_channel(inverse)
    dbias, dweight = dz.sum((0, 2, 3)), (dz * normalised).sum((0, 2, 3))
    if not use_batch:
        return (dz * per_channel(scale)).to(y.dtype), dweight, dbias
    count = y.numel() // y.shape[1]
    dx = dz - per_channel(dbias / count) - normalised * per_channel(dweight / count)
    return (dx * per_channel(scale)).to(y.dtype), dweight, dbias
