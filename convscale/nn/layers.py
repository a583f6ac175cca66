"""The small layers that blocks are made of. Maps are (N, C, H, W)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convscale.errors import UserError, nearest
from convscale.nn import activations
from convscale.nn.lean import blur

PADDINGS = ("symmetric", "same", "none")
POOLS = ("avg", "max", "avgmax", "catavgmax", "")
GATES = ("sigmoid", "hardsigmoid")


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """TensorFlow's SAME padding of one dimension, (before, after): ceil(size / stride) outputs, the odd pixel after."""
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, which depends on the input's size."""

    def forward(self, input: Tensor) -> Tensor:
        top, bottom = same_padding(input.shape[2], self.kernel_size[0], self.stride[0], self.dilation[0])
        left, right = same_padding(input.shape[3], self.kernel_size[1], self.stride[1], self.dilation[1])
        return super().forward(F.pad(input, (left, right, top, bottom)))


def conv2d(
    in_chs: int,
    out_chs: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    padding: str = "symmetric",
    dilation: int = 1,
) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1.

    Args:
        padding: ``symmetric``: (kernel - 1) / 2 on every side; ``same``: TensorFlow's SAME (at stride 2 an even size is
            padded after, not before); ``none``: none at all, so that the border that fills no kernel is left out.

    Raises:
        UserError: an unknown padding, or channels that the groups don't divide.
    """
    if padding not in PADDINGS:
        raise UserError(f"padding {padding!r} is unknown{nearest(padding, PADDINGS)}")
    if in_chs % groups or out_chs % groups:
        raise UserError(f"groups must divide the channels, got {groups} groups for {in_chs} -> {out_chs} channels")
    reach = dilation * (kernel - 1)
    if padding == "same" and (stride > 1 or reach % 2):
        return SameConv2d(in_chs, out_chs, kernel, stride, 0, dilation, groups, bias)
    width = 0 if padding == "none" else reach // 2
    return nn.Conv2d(in_chs, out_chs, kernel, stride, width, dilation, groups, bias)


def split_channels(channels: int, parts: int) -> list[int]:
    """Near-equal parts; the first takes the remainder."""
    each = channels // parts
    if not each:
        raise UserError(f"{channels} channels can't be split over {parts} kernels")
    return [channels - each * (parts - 1)] + [each] * (parts - 1)


class MixedConv2d(nn.ModuleDict):
    """Channels split over convolutions of several kernel sizes, then concatenated (MixConv, Tan & Le, BMVC 2019, arXiv
    1907.09595).

    Also a grouped 1x1 convolution with kernels (1, 1). The children are named "0", "1", ...

    Args:
        in_chs: input channels; the first split takes the remainder.
        out_chs: output channels, split the same way.
        kernels: one kernel size per split.
        stride: of all of them.
        depthwise: each split's convolution is depthwise.
        padding: as in `conv2d`.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernels: tuple[int, ...],
        *,
        stride: int = 1,
        depthwise: bool = False,
        padding: str = "symmetric",
    ) -> None:
        super().__init__()
        self.splits = split_channels(in_chs, len(kernels))
        outs = split_channels(out_chs, len(kernels))
        for i, (ins, out, kernel) in enumerate(zip(self.splits, outs, kernels, strict=True)):
            self[str(i)] = conv2d(ins, out, kernel, stride=stride, groups=ins if depthwise else 1, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.splits, dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.values(), parts, strict=True)], dim=1)


class SpaceToDepth(nn.Module):
    """(N, C, H, W) to (N, block * block * C, H / block, W / block); output channel (row * block + column) * C +
    channel.

    The convolution of the same outcome has kernel and stride `block` and the weight w[o, c, i, j] = 1 where o = (i *
    block + j) * C + c, else 0; so a convolution with weight v (O, block * block * C, k, k) after it is one of kernel
    and stride block * k, block with the weight w[o, c, a * block + i, b * block + j] = v[o, (i * block + j) * C + c, a,
    b].
    """

    def __init__(self, block: int = 4) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        b = self.block
        if not activations.is_symbol(x) and (h % b or w % b):
            raise UserError(f"the image's height and width must be multiples of {b}, got {h} x {w}")
        x = x.view(n, c, h // b, b, w // b, b)
        return x.permute(0, 3, 5, 1, 2, 4).reshape(n, b * b * c, h // b, w // b)

    def extra_repr(self) -> str:
        return f"block={self.block}"


class BlurPool(nn.Module):
    """A fixed 3x3 binomial blur with a stride: the anti-aliased downsampling of Zhang (ICML 2019, arXiv 1904.11486)
    that TResNet uses.

    [1, 2, 1] x [1, 2, 1] / 16 per channel, with reflect padding of 1. It has no parameters, holds one 3x3 kernel
    outside the state dict, and keeps nothing but shapes for the backward pass.

    Args:
        stride: of the blur.
        zeros: pad with zeros instead (timm's ``blurpc``); its backward pass is PyTorch's own.

    Raises:
        UserError: a map with a side of 1, which can't be reflected.
    """

    kernel: Tensor

    def __init__(self, stride: int = 2, *, zeros: bool = False) -> None:
        super().__init__()
        self.stride, self.zeros = stride, zeros
        self.register_buffer("kernel", torch.empty(1, 1, 3, 3), persistent=False)
        self._fill()

    def _fill(self) -> None:
        if not self.kernel.is_meta:
            line = torch.tensor([1.0, 2.0, 1.0])
            self.kernel.copy_(torch.outer(line, line) / 16)

    def _apply(self, fn, recurse: bool = True):
        before = self.kernel
        super()._apply(fn, recurse)
        if self.kernel is not before:
            self._fill()  # to_empty() leaves garbage in what no state dict fills
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.zeros:
            channels = x.shape[1]
            return F.conv2d(
                x, self.kernel.to(x.dtype).expand(channels, 1, 3, 3), stride=self.stride, padding=1, groups=channels
            )
        if not activations.is_symbol(x) and (x.shape[2] < 2 or x.shape[3] < 2):
            raise UserError(
                f"BlurPool needs maps of at least 2 x 2, got {x.shape[2]} x {x.shape[3]}: use a larger image"
            )
        return blur(x, self.kernel, self.stride)

    def extra_repr(self) -> str:
        return f"stride={self.stride}" + (", zeros" if self.zeros else "")


class GlobalPool(nn.Module):
    """(N, C, H, W) to (N, C), or (N, 2 C) for ``catavgmax``; the kind "" gives the map back.

    Args:
        kind: ``avg`` (mean over the flattened map: TResNet's fast pooling), ``max``, ``avgmax`` (half the sum of both),
            ``catavgmax`` (average, then maximum) or "".

    Raises:
        UserError: an unknown kind.
    """

    def __init__(self, kind: str = "avg") -> None:
        super().__init__()
        if kind not in POOLS:
            raise UserError(f"global_pool {kind!r} is unknown{nearest(kind, POOLS)}")
        self.kind = kind

    def feat_mult(self) -> int:
        """Features per channel."""
        return 2 if self.kind == "catavgmax" else 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.kind:
            return x
        flat = x.flatten(2)
        if self.kind == "avg":
            return flat.mean(2)
        top = flat.max(2).values  # keeps positions, where adaptive_max_pool2d keeps the map
        if self.kind == "max":
            return top
        mean = flat.mean(2)
        return 0.5 * (mean + top) if self.kind == "avgmax" else torch.cat([mean, top], 1)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


class SqueezeExcite(nn.Module):
    """Channel attention (Hu et al., CVPR 2018): x * gate(mean of x).

    Args:
        channels: of the map.
        reduced: channels between the two 1x1 convolutions `reduce` and `expand`.
        activation: between them.
        gate: ``sigmoid`` or ``hardsigmoid``.
        bias: of both convolutions.
    """

    def __init__(
        self, channels: int, reduced: int, *, activation: str = "relu", gate: str = "sigmoid", bias: bool = True
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise UserError(f"gate {gate!r} is unknown{nearest(gate, GATES)}")
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=bias)
        self.act = activations.activation(activation)
        self.expand = nn.Conv2d(reduced, channels, 1, bias=bias)
        self.squash = activations.activation(gate)

    def gate(self, x: Tensor) -> Tensor:
        """The factors (N, C, 1, 1) for a map (N, C, H, W); keeps no map for the backward pass."""
        return self.squash(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class GlobalResponseNorm(nn.Module):
    """x + weight * (x * n) + bias for a map x, where n is each channel's L2 norm over the pixels divided by the mean of
    these norms over the channels (ConvNeXt V2, arXiv 2301.00808, section 4). It starts as the identity.

    Args:
        channels: of the map.
        channels_last: whether it takes (N, H, W, C) instead of (N, C, H, W).
        eps: added to the mean of the norms.
    """

    def __init__(self, channels: int, *, channels_last: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.channels_last, self.eps = channels_last, eps
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        pixels, channel = ((1, 2), 3) if self.channels_last else ((2, 3), 1)
        shape = (1, 1, 1, -1) if self.channels_last else (1, -1, 1, 1)
        norms = torch.linalg.vector_norm(x, dim=pixels, keepdim=True)
        share = norms / (norms.mean(channel, keepdim=True) + self.eps)
        factor = 1 + self.weight.view(shape) * share  # one value per channel, so that the map is read once
        return torch.addcmul(self.bias.view(shape).to(x.dtype), x, factor.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, channels_last={self.channels_last}, eps={self.eps:g}"


class LearnableAffine(nn.Module):
    """scale * x + bias with one scale and one bias for the whole map (PP-HGNetV2)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.to(x.dtype), x, self.scale.to(x.dtype))


class LayerScale(nn.Module):
    """A learnable factor per channel of a map (N, C, H, W) (Touvron et al., arXiv 2103.17239).

    Args:
        channels: C.
        start: initial value of all of them.
    """

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(1, -1, 1, 1)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): in training each sample's map is dropped with the given rate, and the
    kept ones are scaled up.

    Raises:
        UserError: a rate outside [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise UserError(f"drop_path_rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.rate or not self.training:
            return x
        kept = 1.0 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(kept).div_(kept)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
