"""Operations that keep less for the backward pass than the sum of their parts, and are as exact.

`blur` keeps shapes alone, `conv_after` what its input was made of in place of its input, `gated_norm` a norm's input in
place of its output. Under a compiler, which chooses by itself what to keep, and without gradients they are plain
operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from convscale.nn.activations import is_symbol
from convscale.nn.kernels import blur as kernels
from convscale.nn.kernels.norm_twin import per_channel, sums_dtype
from convscale.nn.norm import BatchNormAct, InPlaceABN
from convscale.nn.norm_ops import Gradients, autocast_dtype, being_traced, without_autocast

aten = torch.ops.aten


def _plain(*tensors: Tensor) -> bool:
    if being_traced() or not torch.is_grad_enabled() or any(is_symbol(t) for t in tensors):
        return True
    return not any(t.requires_grad for t in tensors)


def hooked(*modules: nn.Module) -> bool:
    """Whether someone listens at a module's call, which the lean way goes around."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def _blur(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    channels = x.shape[1]
    return F.conv2d(
        F.pad(x, (1, 1, 1, 1), mode="reflect"),
        kernel.to(x.dtype).expand(channels, 1, 3, 3),
        stride=stride,
        groups=channels,
    )


def blur(x: Tensor, kernel: Tensor, stride: int = 2) -> Tensor:
    """Depthwise 3x3 convolution of (N, C, H, W) with ``BlurPool``'s kernel (1, 1, 3, 3) and reflect padding; keeps
    nothing for the backward pass.
    """
    if _plain(x):
        return _blur(x, kernel, stride)
    y = _Blur.apply(x, kernel, stride)
    assert isinstance(y, Tensor)
    return y


class _Blur(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, stride: int) -> Tensor:
        ctx.size, ctx.stride = x.shape, stride
        ctx.save_for_backward(kernel)
        ctx.by_kernel = kernels.takes(x, stride)
        if ctx.by_kernel:
            return kernels.blur(x, stride)
        with without_autocast(x.device.type):
            return _blur(x, kernel, stride)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        (kernel,) = ctx.saved_tensors
        grad = grads[0]
        _, channels, height, width = ctx.size
        if ctx.by_kernel and not torch.is_grad_enabled():  # the kernel has no derivative of its own
            return kernels.backward(grad, (height, width), ctx.stride), None, None
        spare = [
            size + 2 - ((out - 1) * ctx.stride + 3) for size, out in zip((height, width), grad.shape[2:], strict=True)
        ]
        weight = kernel.to(grad.dtype).expand(channels, 1, 3, 3)
        padded = F.conv_transpose2d(grad, weight, stride=ctx.stride, output_padding=spare, groups=channels)
        # The border that was reflected goes back to where it came from: row -1 is row 1, row H is row H - 2.
        padded[:, :, 2] += padded[:, :, 0]
        padded[:, :, height - 1] += padded[:, :, height + 1]
        padded[:, :, :, 2] += padded[:, :, :, 0]
        padded[:, :, :, width - 1] += padded[:, :, :, width + 1]
        return padded[:, :, 1:-1, 1:-1], None, None


def conv_after(
    conv: nn.Module, prepare: Callable[..., Tensor], *inputs: Tensor, prepared: Tensor | None = None
) -> Tensor:
    """conv(prepare(*inputs)), keeping the inputs; the convolution's own input is prepared a second time in the backward
    pass.

    Worth it where something else keeps the inputs already and `prepare` is cheap beside the convolution: a product with
    a gate, a blur, a pooling.

    Args:
        conv: the convolution. One of another class, or with hooks, or padding that isn't zeros, is called as usual.
        prepare: a pure function of the inputs, without parameters of its own and without randomness.
        inputs: maps or gates; they get the gradients.
        prepared: prepare(*inputs), where the caller has it already; no gradient flows through it.
    """
    if not isinstance(conv, nn.Conv2d) or type(conv) is not nn.Conv2d or hooked(conv) or _plain(conv.weight, *inputs):
        return conv(prepare(*inputs))
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return conv(prepare(*inputs))
    weight, bias = conv.weight, conv.bias
    dtype = autocast_dtype(inputs[0].device.type)
    if dtype is not None:
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y = _ConvAfter.apply(prepare, conv, None if prepared is None else prepared.detach(), weight, bias, *inputs)
    assert isinstance(y, Tensor)
    return y


class _ConvAfter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prepare: Callable[..., Tensor],
        conv: nn.Conv2d,
        prepared: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.prepare, ctx.geometry = prepare, (conv.stride, conv.padding, conv.dilation, conv.groups)
        ctx.biased = bias is not None
        ctx.save_for_backward(weight, *inputs)
        z = prepare(*inputs) if prepared is None else prepared
        with without_autocast(z.device.type):
            return conv._conv_forward(z.to(weight.dtype), weight, bias)

    @staticmethod
    # its wrapper takes ctx by position, which the base class allows by keyword too
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, *inputs = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        wanted = ctx.needs_input_grad[5:]
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted, strict=True)]
            z = ctx.prepare(*inputs)
        mask = [any(wanted), ctx.needs_input_grad[3], ctx.biased and ctx.needs_input_grad[4]]
        grad = grads[0].to(weight.dtype)
        sizes = [weight.shape[0]] if ctx.biased else None
        dz, dweight, dbias = aten.convolution_backward(
            grad, z.detach().to(weight.dtype), weight, sizes, stride, padding, dilation, False, [0, 0], groups, mask
        )
        dinputs: list[Tensor | None] = [None] * len(inputs)
        if any(wanted):
            found = iter(torch.autograd.grad(z, [t for t in inputs if t.requires_grad], dz.to(z.dtype)))
            dinputs = [next(found) if t.requires_grad else None for t in inputs]
        return None, None, None, dweight, dbias, *dinputs


def gated_norm(norm: nn.Module, se: nn.Module, x: Tensor) -> Tensor:
    """se(norm(x)), keeping x alone.

    Lean where the norm is one of ours that keeps its input and has no activation, and `se` has a method `gate`; plain
    for any other modules, such as the identity that a folded norm leaves.
    """
    gate_of = getattr(se, "gate", None)
    if gate_of is None or not isinstance(norm, BatchNormAct | InPlaceABN) or norm.activation != "identity":
        return se(norm(x))
    keeps_output = isinstance(norm, InPlaceABN) and norm.keep == "output"
    if keeps_output or hooked(norm, se) or _plain(x, *norm.parameters(), *se.parameters()):
        return se(norm(x))
    y, mean, invstd = norm.normalise_with_statistics(x)
    y_gated = _Gated.apply(y, gate_of(y), x.detach(), norm.weight.detach() * invstd, mean, norm.bias.detach())
    assert isinstance(y_gated, Tensor)
    return y_gated


class _Gated(torch.autograd.Function):
    """y * gate for y = (x - mean) * scale + bias, keeping x, from which y is made again."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, x: Tensor, scale: Tensor, mean: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(gate, x, scale, mean, bias)
        return y * gate

    @staticmethod
    # its wrapper takes ctx by position, which the base class allows by keyword too
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, x, scale, mean, bias = ctx.saved_tensors
        grad = grads[0]
        dgate = None
        if ctx.needs_input_grad[1]:
            y = (x.to(sums_dtype(x.dtype)) - per_channel(mean)).mul_(per_channel(scale)).add_(per_channel(bias))
            dgate = y.mul_(grad).sum((2, 3), keepdim=True).to(gate.dtype)
        return grad * gate, dgate, None, None, None, None
