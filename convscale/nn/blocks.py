"""The blocks that all families are built of: one class per kind, each read from a BlockSpec.

Children are named alike everywhere, so that a key map is a short table: ``conv1`` to ``conv3`` (each a convolution, its
norm and activation), ``se`` and ``shortcut``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from convscale.arch.block import BlockSpec
from convscale.arch.parts import IDENTITY, ActSpec, NormSpec
from convscale.nn.activations import activation
from convscale.nn.dressed import HoldsNorms
from convscale.nn.layers import (
    BlurPool,
    DropPath,
    GlobalResponseNorm,
    LayerScale,
    LearnableAffine,
    MixedConv2d,
    SqueezeExcite,
    conv2d,
)
from convscale.nn.lean import conv_after, gated_norm, hooked
from convscale.nn.norm import norm_act

SMOOTHERS: dict[str, Callable[[int], nn.Module]] = {
    "blur": BlurPool,
    "blur_zeros": lambda stride: BlurPool(stride, zeros=True),
    "avgpool": nn.AvgPool2d,
    "maxpool": nn.MaxPool2d,
}
"""What takes a stride after a convolution, by the name that ``BlockSpec.downsample`` says."""


class ConvNormAct(HoldsNorms):
    """Convolution, norm, activation (with its affine layer) and, where it anti-aliases, a blur that takes the stride:
    (N, in_chs, H, W) -> (N, out_chs, H/stride, W/stride).

    Args:
        in_chs: input channels.
        out_chs: output channels.
        kernels: side of the kernel in pixels; several split the channels (MixConv).
        norm: kind and constants of the norm.
        act: the activation that follows it.
        stride: 1 or 2.
        depthwise: one kernel per channel.
        group_width: channels per group; None: dense.
        splits: into how many parallel 1x1 convolutions a 1x1 is split.
        padding: ``symmetric``, ``same`` or ``none``.
        downsample: who takes the stride, as a ``BlockSpec`` says it: the convolution, or a blur or a pool after the
            activation.
        keep: what an in-place norm keeps for backward; ``input`` where its weight starts at zero.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernels: tuple[int, ...] = (1,),
        *,
        norm: NormSpec,
        act: ActSpec,
        stride: int = 1,
        depthwise: bool = False,
        group_width: int | None = None,
        splits: int = 1,
        padding: str = "symmetric",
        downsample: str = "stride",
        keep: Literal["output", "input"] = "output",
    ) -> None:
        super().__init__()
        smooths = downsample in SMOOTHERS and stride > 1
        conv_stride = 1 if smooths else stride
        if len(kernels) > 1 or splits > 1:
            parts = kernels if len(kernels) > 1 else kernels * splits
            self.conv: nn.Module = MixedConv2d(
                in_chs, out_chs, parts, stride=conv_stride, depthwise=depthwise, padding=padding
            )
        else:
            groups = in_chs if depthwise else in_chs // (group_width or in_chs)
            bias = norm.kind == "layernorm"  # which takes no mean of a channel away, as batch norm does
            self.conv = conv2d(
                in_chs, out_chs, max(kernels), stride=conv_stride, groups=groups, bias=bias, padding=padding
            )
        self.norm = norm_act(
            norm.kind, out_chs, eps=norm.eps, momentum=norm.momentum, activation=act.kind, slope=act.slope, keep=keep
        )
        self.affine = LearnableAffine() if act.affine else None
        self.blur = SMOOTHERS[downsample](stride) if smooths else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = x if self.affine is None else self.affine(x)
        return x if self.blur is None else self.blur(x)


class Block(nn.Module):
    """What every block shares: the shortcut, stochastic depth, the add and the activation after it.

    Subclasses define ``residual(x)``, whose result nothing else may hold, since the shortcut is added to it in place.
    """

    se: SqueezeExcite | None

    def __init__(self, spec: BlockSpec, in_chs: int, stride: int, norm: NormSpec, drop_path: float) -> None:
        super().__init__()
        self.lean = (
            norm.kind == "inplace"
        )  # whoever asks for in-place norms wants the memory: recompute what is cheap to make again
        unchanged = stride == 1 and in_chs == spec.width
        self.has_shortcut = spec.skip and (unchanged or spec.traits.projects)
        self.drop_path = DropPath(drop_path) if drop_path > 0 and self.has_shortcut else None
        out_act = spec.out_activation if self.has_shortcut else IDENTITY
        self.act = None if out_act.kind == "identity" else activation(out_act.kind, out_act.slope)
        self.last_act = IDENTITY if self.has_shortcut else spec.out_activation
        self.shortcut: nn.Module | None = None

    def _project_shortcut(self, spec: BlockSpec, in_chs: int, stride: int, norm: NormSpec, padding: str) -> None:
        if stride == 1 and in_chs == spec.width:
            return
        pools = spec.shortcut == "avgpool" and stride > 1
        project = ConvNormAct(
            in_chs, spec.width, norm=norm, act=IDENTITY, stride=1 if pools else stride, padding=padding
        )
        pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
        self.shortcut = nn.Sequential(pool, project) if pools else nn.Sequential(project)

    def residual(self, x: Tensor) -> Tensor:
        """The block without its shortcut."""
        raise NotImplementedError

    def last_unit(self) -> ConvNormAct:
        """The convolution and norm that the residual branch ends in."""
        return [child for child in self.children() if isinstance(child, ConvNormAct)][-1]

    def forward(self, x: Tensor) -> Tensor:
        # The projection comes first: with in-place norms nothing of the residual branch is alive then.
        shortcut = x if self.shortcut is None else self.shortcut(x)
        y = self.residual(x)
        if not self.has_shortcut:
            return y
        if self.drop_path is not None:
            y = self.drop_path(y)
        y = y.add_(shortcut)
        return y if self.act is None else self.act(y)


def _squeeze_excite(spec: BlockSpec, in_chs: int, inner: int) -> SqueezeExcite | None:
    if spec.se is None:
        return None
    squeezed = spec.se.squeezed(block_input=in_chs, inner=inner, output=spec.width)
    channels = inner if spec.se.where == "inner" else spec.width
    return SqueezeExcite(channels, squeezed, activation=spec.se.activation.kind, gate=spec.se.gate)


class BasicBlock(Block):
    """Two spatial convolutions (He et al., arXiv 1512.03385, figure 2 left)."""

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, in_chs, stride, norm, drop_path)
        width, act = spec.width, spec.activation
        self._project_shortcut(spec, in_chs, stride, norm, padding)
        groups = {"group_width": spec.group_width, "padding": padding, "norm": norm}
        self.conv1 = ConvNormAct(
            in_chs, width, spec.kernels, act=act, stride=stride, downsample=spec.downsample, **groups
        )
        self.conv2 = ConvNormAct(width, width, spec.kernels, act=self.last_act, keep="input", **groups)
        self.se = _squeeze_excite(spec, in_chs, width)

    def residual(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        last, se = self.conv2, self.se
        if se is None:
            return last(x)
        return gated_norm(last.norm, se, last.conv(x)) if self.lean and not hooked(last) else se(last(x))


class Bottleneck(Block):
    """1x1, spatial, 1x1 (He et al., arXiv 1512.03385, figure 5 right); the stride is on the spatial convolution."""

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, in_chs, stride, norm, drop_path)
        inner, act = spec.inner_width(in_chs), spec.activation
        self._project_shortcut(spec, in_chs, stride, norm, padding)
        self.conv1 = ConvNormAct(in_chs, inner, norm=norm, act=act)
        self.conv2 = ConvNormAct(
            inner,
            inner,
            spec.kernels,
            norm=norm,
            act=act,
            stride=stride,
            group_width=spec.group_width,
            padding=padding,
            downsample=spec.downsample,
        )
        self.conv3 = ConvNormAct(inner, spec.width, norm=norm, act=self.last_act, keep="input")
        self.se = _squeeze_excite(spec, in_chs, inner)
        self.se_inside = spec.se is not None and spec.se.where == "inner"

    def residual(self, x: Tensor) -> Tensor:
        return _project(self, self.conv2(self.conv1(x)))


class InvertedResidual(Block):
    """Expand, depthwise, project (Sandler et al., arXiv 1801.04381); without the expansion a depthwise-separable block
    (arXiv 1704.04861).
    """

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, in_chs, stride, norm, drop_path)
        inner, act = spec.inner_width(in_chs), spec.activation
        expands = spec.traits.takes_ratio
        self.conv1 = ConvNormAct(in_chs, inner, norm=norm, act=act, splits=spec.expand_groups) if expands else None
        self.conv2 = ConvNormAct(
            inner,
            inner,
            spec.kernels,
            norm=norm,
            act=act,
            stride=stride,
            depthwise=True,
            padding=padding,
            downsample=spec.downsample,
        )
        self.conv3 = ConvNormAct(
            inner, spec.width, norm=norm, act=self.last_act, splits=spec.project_groups, keep="input"
        )
        self.se = _squeeze_excite(spec, in_chs, inner)
        self.se_inside = spec.se is not None and spec.se.where == "inner"

    def residual(self, x: Tensor) -> Tensor:
        return _project(self, self.conv2(x if self.conv1 is None else self.conv1(x)))


class Conv(Block):
    """One convolution with its norm and its activation, which comes before the add (EfficientNetV2's first stage, arXiv
    2104.00298).
    """

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, in_chs, stride, norm, drop_path)
        self.conv1 = ConvNormAct(
            in_chs,
            spec.width,
            spec.kernels,
            norm=norm,
            act=spec.activation,
            stride=stride,
            padding=padding,
            downsample=spec.downsample,
        )
        self.se = None
        self.after = _after(self.last_act, spec.activation, norm)

    def residual(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return x if self.after is None else self.after(x)

    def forward(self, x: Tensor) -> Tensor:
        return _add_apart(self, x)


class FusedInvertedResidual(Block):
    """A spatial convolution that expands, and a 1x1 that projects (EfficientNetV2, arXiv 2104.00298, figure 2)."""

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, in_chs, stride, norm, drop_path)
        inner = spec.inner_width(in_chs)
        self.conv1 = ConvNormAct(
            in_chs,
            inner,
            spec.kernels,
            norm=norm,
            act=spec.activation,
            stride=stride,
            padding=padding,
            downsample=spec.downsample,
        )
        self.conv2 = ConvNormAct(inner, spec.width, norm=norm, act=self.last_act, keep="input")
        self.se = _squeeze_excite(spec, in_chs, inner)

    def residual(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(x if self.se is None else self.se(x))


class UniversalBottleneck(Block):
    """An inverted bottleneck with a depthwise convolution before the expansion, after it, at both places or at none;
    the last one takes the stride (MobileNetV4, arXiv 2404.10518, figure 4).
    """

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, in_chs, stride, norm, drop_path)
        inner, act, middle = spec.inner_width(in_chs), spec.activation, bool(spec.kernels)

        def depthwise(channels: int, kernels: tuple[int, ...], act: ActSpec, stride: int) -> ConvNormAct:
            return ConvNormAct(
                channels,
                channels,
                kernels,
                norm=norm,
                act=act,
                stride=stride,
                depthwise=True,
                padding=padding,
                downsample=spec.downsample,
            )

        first_stride = 1 if middle else stride
        self.conv0 = depthwise(in_chs, (spec.start_kernel,), IDENTITY, first_stride) if spec.start_kernel else None
        self.conv1 = ConvNormAct(in_chs, inner, norm=norm, act=act)
        self.conv2 = depthwise(inner, spec.kernels, act, stride) if middle else None
        self.conv3 = ConvNormAct(inner, spec.width, norm=norm, act=self.last_act, keep="input")
        self.se = None

    def residual(self, x: Tensor) -> Tensor:
        for unit in (self.conv0, self.conv1, self.conv2, self.conv3):
            x = x if unit is None else unit(x)
        return x


class NormConv(HoldsNorms):
    """A norm, then a convolution of ``stride`` x ``stride`` patches: (N, in_chs, H, W) -> (N, out_chs, H // stride,
    W // stride) (ConvNeXt, arXiv 2201.03545, section 2.6).
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int, norm: NormSpec) -> None:
        super().__init__()
        # Its input is another block's output, and may be a feature map that is given out: it stays as it is.
        self.norm = norm_act(norm.kind, in_chs, eps=norm.eps, momentum=norm.momentum, keep="input")
        self.conv = conv2d(in_chs, out_chs, stride, stride=stride, bias=True, padding="none")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class ConvNeXtBlock(Block):
    """Depthwise convolution, norm, then a layer that expands and one that projects each pixel (ConvNeXt, arXiv
    2201.03545, figure 4; with global response normalisation V2, 2301.00808, figure 5). Where shapes differ,
    ``NormConv`` stands in front.
    """

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, spec.width, 1, norm, drop_path)
        width, inner = spec.width, spec.inner_width(in_chs)
        self.down = NormConv(in_chs, width, stride, norm) if stride > 1 or in_chs != width else None
        self.conv1 = ConvNormAct(width, width, spec.kernels, norm=norm, act=IDENTITY, depthwise=True, padding=padding)
        self.linear = spec.linear
        self.expand = nn.Linear(width, inner) if spec.linear else conv2d(width, inner, 1, bias=True)
        self.between = activation(spec.activation.kind, spec.activation.slope)
        self.grn = GlobalResponseNorm(inner, channels_last=spec.linear) if spec.grn else None
        self.project = nn.Linear(inner, width) if spec.linear else conv2d(inner, width, 1, bias=True)
        self.scale = LayerScale(width, spec.layer_scale) if spec.layer_scale else None
        last = self.last_act
        self.after = None if last.kind == "identity" else activation(last.kind, last.slope)

    def residual(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x.permute(0, 2, 3, 1) if self.linear else x  # (N, H, W, C)
        x = self.between(self.expand(x))
        x = self.project(x if self.grn is None else self.grn(x))
        x = x.permute(0, 3, 1, 2) if self.linear else x
        x = x if self.scale is None else self.scale(x)
        return x if self.after is None else self.after(x)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.down is None else self.down(x))


class AggregatedBlock(Block):
    """Layers in a row, whose outputs and input together two 1x1 convolutions squeeze and expand again (PP-HGNetV2's HG
    block). Where the map shrinks, a depthwise convolution stands in front.
    """

    def __init__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> None:
        super().__init__(spec, in_chs, 1, norm, drop_path)
        inner, act, shared = spec.inner_width(in_chs), spec.activation, {"norm": norm, "padding": padding}
        self.down = (
            ConvNormAct(in_chs, in_chs, (3,), act=IDENTITY, stride=stride, depthwise=True, **shared)
            if stride > 1
            else None
        )
        self.layers, chs = nn.ModuleList(), in_chs
        for _ in range(spec.layers):
            if spec.light:
                pointwise = ConvNormAct(chs, inner, act=IDENTITY, **shared)
                depthwise = ConvNormAct(inner, inner, spec.kernels, act=act, depthwise=True, **shared)
                self.layers.append(nn.Sequential(pointwise, depthwise))
            else:
                self.layers.append(ConvNormAct(chs, inner, spec.kernels, act=act, **shared))
            chs = inner
        self.squeeze = ConvNormAct(in_chs + spec.layers * inner, spec.width // 2, act=act, **shared)
        self.excite = ConvNormAct(spec.width // 2, spec.width, act=act, **shared)
        self.after = _after(self.last_act, act, norm)

    def residual(self, x: Tensor) -> Tensor:
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        x = self.excite(self.squeeze(torch.cat(maps, 1)))
        return x if self.after is None else self.after(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.down is None else self.down(x)
        return _add_apart(self, x)


def _after(last: ActSpec, before: ActSpec, norm: NormSpec) -> nn.Module | None:
    """The activation of a block's end, behind a norm with the activation ``before``: in place only where that keeps no
    output for its backward pass.
    """
    if last.kind == "identity":
        return None
    return activation(last.kind, last.slope, inplace=before.kind == "identity" and norm.kind == "batchnorm")


def _add_apart(block: Block, x: Tensor) -> Tensor:
    """``Block.forward`` where the residual branch ends in an activation, which may need its output for backward:
    nothing is added to it in place.
    """
    y = block.residual(x)
    if not block.has_shortcut:
        return y
    y = x + (y if block.drop_path is None else block.drop_path(y))
    return y if block.act is None else block.act(y)


def _project(block: Bottleneck | InvertedResidual, x: Tensor) -> Tensor:
    """The last 1x1 convolution with its norm, and squeeze-and-excitation before or after it."""
    last = block.conv3
    if block.se is None:
        return last(x)
    lean = block.lean and not hooked(last, block.se)
    if not block.se_inside:
        return gated_norm(last.norm, block.se, last.conv(x)) if lean else block.se(last(x))
    if lean and isinstance(last.conv, nn.Conv2d):
        return last.norm(conv_after(last.conv, torch.mul, x, block.se.gate(x)))
    return last(block.se(x))


class BlockMaker(Protocol):
    """Makes the module of a block; a ``Block``'s class is one."""

    def __call__(
        self, spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float
    ) -> Block:
        """``build_block``'s arguments."""
        ...


BLOCKS: dict[str, BlockMaker] = {
    "aggregated": AggregatedBlock,
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "conv": Conv,
    "convnext": ConvNeXtBlock,
    "depthwise_separable": InvertedResidual,
    "fused_inverted_residual": FusedInvertedResidual,
    "inverted_residual": InvertedResidual,
    "universal": UniversalBottleneck,
}
"""By the kind that a ``BlockSpec`` says."""


def build_block(spec: BlockSpec, in_chs: int, stride: int, *, norm: NormSpec, padding: str, drop_path: float) -> Block:
    """The module of ``spec`` for ``in_chs`` input channels, with stochastic depth at rate ``drop_path``."""
    return BLOCKS[spec.kind](spec, in_chs, stride, norm=norm, padding=padding, drop_path=drop_path)
