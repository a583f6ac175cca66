"""From operators to the kernels a GPU runs: one each in eager mode, fused ones behind a compiler.

What the predictor sees of a network is this list, so the bytes here are the model: a convolution's bias is a kernel of
its own in eager CUDA, a cast costs its bytes, and a compiler reads a chain of pointwise operators' inputs once and
writes its end once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from convscale.cost.trace import Operator, Trace, Use

MATRIX = (
    "conv",
    "conv_1x1",
    "grouped",
    "grouped_pow2",
    "grouped_packed",
    "depthwise",
    "depthwise_native",
    "linear",
)
"""Kinds that multiply matrices: dense convolution and its 1x1 case; grouped convolution, where groups have a power of
two of channels, and where those also pack well into tiles (at most 32 wide, in multiples of 32 groups); depthwise by
cuDNN, and by PyTorch's own kernel; linear."""
NORMS = ("batch_norm", "batch_norm_train", "layer_norm", "group_norm")
"""Norms: ``batch_norm`` as in inference (and what has no kind of its own); ``batch_norm_train`` makes statistics or
their gradients."""
FUSED = ("fused", "fused_reduce", "fused_mean")
"""What a compiler makes: chains of pointwise operators, with a reduction over rows, with one over positions."""
OTHERS = (
    *NORMS,
    "pointwise",
    "pointwise_mixed",
    "reduce",
    "softmax",
    "pool",
    "copy",
    "cast",
    "update",
    *FUSED,
)
"""Kinds that move data; ``pointwise_mixed`` is a pointwise kernel whose inputs differ in shape, type or order, which
PyTorch does not vectorise."""
OWN_KERNELS = {
    **{
        f"{name}_{form}": "norm"
        for name in ("statistics", "normalise", "sums", "gradient")
        for form in ("rows", "planes")
    },
    **dict.fromkeys(("finish_statistics", "finish_sums"), "norm"),
    **dict.fromkeys(("blur_rows", "blur_gradient_rows"), "pool"),
}
"""This library's own kernels, of in-place norms and of the blur, by the names that :mod:`convscale.nn.kernels.launch`
gives them, and their kinds. Each reads its inputs and writes its outputs once, so that a norm's counts as
``batch_norm``, and a compiler joins nothing to it."""
PHASES = ("forward", "input", "weight", "backward")
"""What a kernel makes: the forward map, an input's or a weight's gradient, any other gradient (or the update)."""


class Kernel(NamedTuple):
    """One kind of kernel launch and what it moves; equal launches are one row with a count."""

    kind: str
    """One of ``MATRIX`` or ``OTHERS``."""
    phase: str = "forward"
    """One of ``PHASES``."""
    macs: int = 0
    """Multiply-accumulates."""
    in_bytes: int = 0
    """Bytes of maps read."""
    out_bytes: int = 0
    """Bytes of maps written."""
    weight_bytes: int = 0
    """Bytes of weights read."""
    rows: int = 0
    """Positions of the output, all images: the M of the matrix product."""
    width: int = 0
    """Output channels of a group: N."""
    depth: int = 0
    """Input channels of a group times kernel size: K."""
    channels: int = 0
    """Input channels of a group."""
    groups: int = 1
    """Groups."""
    window: int = 1
    """Positions of the kernel or window."""
    step: int = 1
    """Stride along one side."""
    side: int = 1
    """Width of the output map in pixels."""
    itemsize: int = 2
    """Bytes of an element of the product's inputs."""
    nhwc: bool = False
    """Whether the maps lie channels last."""
    permuted: bool = False
    """Whether inputs and outputs lie in different orders."""
    specials: int = 0
    """Exponentials and the like that a fused kernel evaluates."""
    scope: str = ""
    """The module it belongs to."""


def eager_kernels(traced: Trace) -> list[Kernel]:
    """One kernel per operator as CUDA's eager mode runs them."""
    result: list[Kernel] = []
    operators = traced.operators
    for index, op in enumerate(operators):
        if op.kind in ("conv", "linear"):
            # A weight's gradient is no map: its own layout says nothing of how the maps lie.
            maps = op.inputs[:1] if op.product == "weight" else (op.inputs[0], *op.outputs)
            kernel = matrix_kernel(op, any(use.channels_last for use in maps))
            result.append(kernel)
            if op.bias and kernel.kind != "depthwise_native":  # PyTorch's own depthwise kernel adds its bias itself
                result.append(_bias_kernel(op, kernel))
            continue
        kernel = moving_kernel(op)
        if op.name == "contiguous":
            kernel = kernel._replace(permuted=op.inputs[0].channels_last != op.outputs[0].channels_last)
        elif op.name == "clone":
            # a copy that changes the order of elements, unless autograd keeps a map that the next operator overwrites
            follower = operators[index + 1] if index + 1 < len(operators) else op
            kept = follower.kind == "pointwise" and follower.outputs[0].storage == op.inputs[0].storage
            kernel = kernel._replace(permuted=not kept)
        result.append(kernel)
    return result


def _bias_kernel(op: Operator, kernel: Kernel) -> Kernel:
    """A convolution's bias, which eager CUDA adds in a pass of its own over the map."""
    out = op.outputs[0].nbytes
    return Kernel("pointwise_mixed", in_bytes=out, out_bytes=out, side=kernel.side, nhwc=kernel.nhwc, scope=op.scope)


def is_slice(use: Use, traced: Trace) -> bool:
    """Whether it is a part of a larger map: some channels of several images, say."""
    return len(use.shape) == 4 and use.shape[0] > 1 and use.nbytes < traced.storages[use.storage]


def _phase(op: Operator) -> str:
    """One of ``PHASES``."""
    return op.product or ("forward" if op.phase in ("forward", "recompute") else "backward")


def nbytes(uses: Sequence[Use]) -> int:
    """Bytes of several tensors."""
    return sum(use.nbytes for use in uses)


_KIND = {"pointwise": "pointwise", "random": "pointwise", "unknown": "copy", "norm": "batch_norm"}
_NORM = {"native_layer_norm": "layer_norm", "native_group_norm": "group_norm"}


def _is_map(use: Use) -> bool:
    """Whether it is a whole map, not one that stands for a smaller one repeated over it."""
    return (
        len(use.shape) == 4
        and use.shape[1] > 1
        and use.shape[2] * use.shape[3] > 1
        and use.nbytes == prod(use.shape) * use.itemsize
    )


def _is_mixed(op: Operator) -> bool:
    """Whether tensors of a pointwise operator differ in shape, type or order; plain numbers do not count."""
    uses = (*op.inputs, *op.outputs)
    return len({(use.shape, use.itemsize, use.channels_last, use.nbytes) for use in uses if use.shape}) > 1


def moving_kernel(op: Operator) -> Kernel:
    """The kernel of an operator that moves data and multiplies nothing."""
    maps = [use for use in (*op.inputs, *op.outputs) if _is_map(use)]
    kind = _NORM.get(op.name) or _KIND.get(op.kind, op.kind)
    if kind == "batch_norm" and len(op.outputs) > 1:  # in training it makes statistics, or their gradients
        kind = "batch_norm_train"
    elif kind == "pointwise" and _is_mixed(op):
        kind = "pointwise_mixed"
    return Kernel(
        kind,
        phase=_phase(op),
        in_bytes=nbytes(op.inputs),
        out_bytes=nbytes(op.outputs),
        channels=maps[0].shape[1] if maps else 0,
        window=prod(op.kernel) if op.kernel else 1,
        side=maps[-1].shape[-1] if maps else 1,
        rows=op.outputs[0].nbytes // op.outputs[0].itemsize if op.kind == "pool" and op.outputs else 0,
        itemsize=op.inputs[0].itemsize if op.inputs else 4,
        nhwc=bool(maps) and maps[0].channels_last,
        permuted=len({use.channels_last for use in maps}) > 1,
        scope=op.scope,
    )


def matrix_kernel(op: Operator, nhwc: bool) -> Kernel:
    """The kernel of a convolution or a linear layer, as a matrix product of (rows, depth) and (depth, width).

    Args:
        op: the operator, of any phase.
        nhwc: whether its maps lie channels last.
    """
    if op.kind == "linear" or len(op.inputs[0].shape) < 3:
        return _linear_kernel(op)
    if op.product == "weight":  # gradient and input go in, the weight's gradient comes out
        (gradient, x), weight = op.inputs[:2], op.outputs[0]
        in_bytes, weight_bytes = gradient.nbytes + x.nbytes, 0
        grid = gradient.shape
    else:  # a map and the weight go in, a map comes out
        source, weight = op.inputs[:2]
        in_bytes, weight_bytes = source.nbytes, weight.nbytes
        grid = source.shape if op.product == "input" else op.outputs[0].shape
    window = prod(op.kernel)
    channels, width = weight.shape[1], weight.shape[0] // op.groups
    return Kernel(
        _kind_of_conv(op, channels, width, nhwc),
        phase=_phase(op),
        macs=op.macs,
        in_bytes=in_bytes,
        out_bytes=op.outputs[0].nbytes,
        weight_bytes=weight_bytes,
        rows=grid[0] * prod(grid[2:]),
        width=width,
        depth=channels * window,
        channels=channels,
        groups=op.groups,
        window=window,
        step=op.stride[0] if op.stride else 1,
        side=grid[-1],
        itemsize=op.inputs[0].itemsize,
        nhwc=nhwc,
        scope=op.scope,
    )


def _kind_of_conv(op: Operator, channels: int, width: int, nhwc: bool) -> str:
    """One of ``MATRIX``; ``channels`` go into a group, ``width`` come out of it."""
    if op.groups == 1:
        return "conv_1x1" if prod(op.kernel) == 1 else "conv"
    if channels == 1:
        return "depthwise" if nhwc or _cudnn_takes(op) else "depthwise_native"
    if channels != width or op.dilated or width & (width - 1):
        return "grouped"
    return "grouped_packed" if width <= 32 and op.groups % 32 == 0 else "grouped_pow2"


def _cudnn_takes(op: Operator) -> bool:
    """Whether PyTorch leaves a depthwise convolution of NCHW maps to cuDNN, as ``ConvParams.use_cudnn_depthwise``
    decides; else it runs its own.
    """
    kernel, channels = op.kernel, op.groups
    if len(kernel) != 2 or kernel[0] != kernel[1] or kernel[0] not in (1, 3, 5):
        return False
    if op.inputs[0].itemsize != 2 or op.dilated or channels < 32 or len(set(op.stride)) > 1:
        return False
    image = op.outputs[0] if op.product == "input" else op.inputs[1 if op.product == "weight" else 0]
    if image.shape[3] < 7:
        return False
    stride = op.stride[0]
    strided = kernel[0] > 1 and (channels >= 512 or (channels >= 256 and image.shape[3] >= 28))
    return stride == 1 or (stride == 2 and strided)


def _linear_kernel(op: Operator) -> Kernel:
    """A product of (batches, rows, depth) and (batches, depth, width)."""
    out = op.outputs[0]
    # Of its inputs (a bias may come first) the left factor is the one that has the output's rows.
    rows = out.shape[-2:-1]
    left = next((use for use in op.inputs if len(use.shape) >= 2 and use.shape[-2:-1] == rows), op.inputs[0])
    depth = left.shape[-1] if left.shape else 1
    batches = prod(out.shape[:-2]) if op.name in ("bmm", "baddbmm") else 1
    return Kernel(
        "linear",
        phase=_phase(op),
        macs=op.macs,
        in_bytes=nbytes(op.inputs),
        out_bytes=nbytes(op.outputs),
        rows=(out.nbytes // out.itemsize) // max(out.shape[-1], 1) // batches if out.shape else 1,
        width=out.shape[-1] if out.shape else 1,
        depth=depth,
        channels=depth,
        groups=batches,
        itemsize=op.inputs[0].itemsize,
        scope=op.scope,
    )


def prefers_channels_last(traced: Trace) -> bool:
    """Whether PyTorch's compiler turns the maps to channels-last: by MACs, since grouped convolutions lose what the
    others gain.

    Source: the measured speed-ups that torch._inductor weighs in ``GraphLowering.decide_layout_opt`` (grouped 1.358,
    small 0.783, narrowing 0.725, others 0.823 of the time); in training any grouped or narrowing convolution decides
    against it.
    """
    macs: Counter[str] = Counter()
    for op in traced.operators:
        if op.kind != "conv" or op.phase != "forward" or len(op.inputs[1].shape) < 4:
            continue
        out_channels, in_channels, height = op.inputs[1].shape[:3]
        if op.groups > 1 and in_channels > 1:
            macs["grouped"] += op.macs
        elif out_channels <= 64 and in_channels <= 64:
            macs["small"] += op.macs
        elif out_channels * 2 <= in_channels and height > 1:
            macs["narrowing"] += op.macs
        else:
            macs["other"] += op.macs
    if traced.conditions.mode == "train":
        return not macs["grouped"] and not macs["narrowing"] and macs["other"] > 0
    weighed = 1.358 * macs["grouped"] + 0.783 * macs["small"] + 0.725 * macs["narrowing"] + 0.823 * macs["other"]
    return 0 < weighed <= sum(macs.values())
