"""A larger network that computes what a trained one does: it begins where that one ended.

Net2Net (Chen et al., arXiv 1511.05641): a wider layer repeats channels at random, and what reads them shares its
weights out; a deeper stage gets blocks whose residual branch is zero; a larger kernel has zeros around it. All three at
once, block by block, for the kinds of blocks that a search space offers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convscale.arch.block import BlockSpec
from convscale.arch.spec import NetSpec
from convscale.errors import UserError
from convscale.nas.choices import KINDS
from convscale.nn.blocks import Block, ConvNormAct
from convscale.nn.layers import SqueezeExcite
from convscale.nn.net import ConvNet

Map = Tensor
"""int64 (channels of the child,): which channel of the parent each one repeats."""
_NORM = ("weight", "bias", "running_mean", "running_var")


def misfit(parent: NetSpec, child: NetSpec) -> str:
    """Why a child can not compute what its parent does; empty where it can."""
    if (parent.norm, parent.padding, parent.stem.kind) != (child.norm, child.padding, child.stem.kind):
        return "their norm, padding or stem differ"
    shapes = [
        (s.kernel, s.stride, s.pool, s.activation, len(s.widths), h.activation, h.pooled_width, bool(h.width))
        for s, h in ((parent.stem, parent.head), (child.stem, child.head))
    ]
    if shapes[0] != shapes[1] or parent.head.pooled_width or parent.head.pooled_norm or parent.stem.kind == "branched":
        return "their stem or head differ in more than width"
    if parent.input.size != child.input.size:
        return f"images of {child.input.size} px, not {parent.input.size}"
    widths = [(*spec.stem.widths, spec.head.width) for spec in (parent, child)]
    if any(new < old for old, new in zip(*widths, strict=True)):
        return "its stem or head is narrower"
    if len(parent.stages) != len(child.stages):
        return f"{len(child.stages)} stages, not {len(parent.stages)}"
    before = parent.stem.widths[-1], child.stem.widths[-1]
    for at, (old, new) in enumerate(zip(parent.stages, child.stages, strict=True)):
        if len(old.runs) != 1 or len(new.runs) != 1 or old.stride != new.stride:
            return f"stage {at} has another stride, or several runs"
        reason = _block_misfit(old.runs[0].block, new.runs[0].block, old.stride, before, parent.padding)
        if not reason and new.depth < old.depth:
            reason = f"{new.depth} blocks, not {old.depth} or more"
        if not reason and new.depth > old.depth and not _deepens(new.runs[0].block):
            reason = "a block added there would change what it computes"
        if reason:
            return f"stage {at} has {reason}"
        before = old.width, new.width
    return ""


def _block_misfit(old: BlockSpec, new: BlockSpec, stride: int, inputs: tuple[int, int], padding: str) -> str:
    for name in ("kind", "activation", "out_activation", "skip", "shortcut"):
        if getattr(old, name) != getattr(new, name):
            return f"{name.replace('_', ' ')} {getattr(new, name)!r}, not {getattr(old, name)!r}"
    if old.kind not in KINDS or (stride > 1 and old.downsample != new.downsample):
        return f"kind {new.kind!r} or downsample {new.downsample!r}"
    if (old.se is None) != (new.se is None) or (old.se and new.se and old.se.where != new.se.where):
        return "squeeze-and-excitation elsewhere"
    if new.width < old.width or new.inner_width(inputs[1]) < old.inner_width(inputs[0]):
        return f"{new.width} channels, fewer outside or inside than its parent's {old.width}"
    if new.kernels[0] < old.kernels[0] or (new.kernels[0] > old.kernels[0] and padding == "same"):
        return f"a kernel of {new.kernels[0]}, not {old.kernels[0]}"
    if old.se and new.se:
        squeezed = [
            b.se.squeezed(block_input=i, inner=b.inner_width(i), output=b.width)
            for b, i in ((old, inputs[0]), (new, inputs[1]))
            if b.se
        ]
        if squeezed[1] < squeezed[0]:
            return "a narrower squeeze-and-excitation"
    same = [stride == 1 and width == block.width for width, block in zip(inputs, (old, new), strict=True)]
    return "a shortcut where its parent has none, or the other way round" if same[0] != same[1] else ""


def _deepens(block: BlockSpec) -> bool:
    """Whether a block with a residual branch of zeros gives back what it gets."""
    return block.skip and block.out_activation.kind in ("identity", "relu")


def grown(parent: ConvNet, child: NetSpec, *, seed: int = 0) -> ConvNet:
    """A network of the child's spec that computes what a trained parent does, in eval mode up to rounding.

    Args:
        parent: the trained network.
        child: at least as wide and deep everywhere, with the same choices else.
        seed: of the channels that are repeated.

    Raises:
        UserError: the parent's weights do not fit; the message says where.
    """
    if reason := misfit(parent.spec, child):
        raise UserError(f"the weights of {parent.spec.name} do not fit {child.name}: {reason}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ConvNet(child, num_classes=parent.num_classes, in_chans=parent.in_chans, drop_rate=parent.drop_rate)
        made = made.to(next(parent.parameters()).dtype)
        with torch.no_grad():
            _Growth(parent, made).run()
    return made.train(parent.training)


class _Growth:
    """Weights on their way from a parent to its child."""

    def __init__(self, parent: ConvNet, child: ConvNet) -> None:
        self.parent, self.child = parent, child

    def run(self) -> None:
        """From the stem to the classifier."""
        parent, child = self.parent, self.child
        at: Map = _same(_first_conv(parent.stem).in_channels)
        for old, new in zip(parent.stem, child.stem, strict=True):
            assert isinstance(old, ConvNormAct)
            assert isinstance(new, ConvNormAct)
            at = self.unit(old, new, at, None)
        for spec, old, new in zip(parent.spec.stages, parent.stages, child.stages, strict=True):
            se = spec.runs[0].block.se
            at = self.stage(old, new, at, se is not None and se.where == "output")
        if parent.head is not None and child.head is not None:
            at = self.unit(parent.head, child.head, at, None)
        old_last, new_last = parent.classifier, child.classifier
        assert isinstance(old_last, nn.Linear)
        assert isinstance(new_last, nn.Linear)
        new_last.weight.copy_(old_last.weight[:, at] / _copies(at))
        new_last.bias.copy_(old_last.bias)

    def stage(self, old: nn.Module, new: nn.Module, at: Map, gates_output: bool) -> Map:
        """A stage; its blocks' outputs are added to each other, so they repeat the same channels."""
        olds = [block for block in old.children() if isinstance(block, Block)]
        news = [block for block in new.children() if isinstance(block, Block)]
        first_old, first_new = olds[0].last_unit(), news[0].last_unit()
        identity = olds[0].has_shortcut and olds[0].shortcut is None
        out = at if identity else _widened(_width(first_old), _width(first_new))
        for number, block in enumerate(news):
            if number < len(olds):
                self.block(olds[number], block, at if number == 0 else out, out, gates_output)
            else:
                norm = block.last_unit().norm
                nn.init.zeros_(norm.weight)  # pyright: ignore[reportArgumentType]
                nn.init.zeros_(norm.bias)  # pyright: ignore[reportArgumentType]
        return out

    def block(self, old: Block, new: Block, at: Map, out: Map, gates_output: bool) -> None:
        """A block from one map to another: its units in a row, squeeze-and-excitation on what the last one gives, or on
        what it gets.
        """
        units = [
            (a, b)
            for a, b in zip(old.children(), new.children(), strict=True)
            if isinstance(a, ConvNormAct) and isinstance(b, ConvNormAct)
        ]
        maps = [at]
        for number, (a, b) in enumerate(units):
            maps.append(self.unit(a, b, maps[-1], out if number + 1 == len(units) else None))
        if old.se is not None and new.se is not None:
            self.squeeze(old.se, new.se, out if gates_output else maps[-2])
        if old.shortcut is not None and new.shortcut is not None:
            for a, b in zip(old.shortcut.children(), new.shortcut.children(), strict=True):
                if isinstance(a, ConvNormAct) and isinstance(b, ConvNormAct):
                    self.unit(a, b, at, out)

    def unit(self, old: ConvNormAct, new: ConvNormAct, at: Map, out: Map | None) -> Map:
        """A convolution and its norm; the channels that it gives repeat those of ``out``, else some at random."""
        a, b = old.conv, new.conv
        assert isinstance(a, nn.Conv2d)
        assert isinstance(b, nn.Conv2d)
        if a.groups > 1 and a.groups == a.in_channels:  # depthwise: it gives what it gets
            out, weight = at, a.weight[at]
        else:
            out = _widened(a.out_channels, b.out_channels) if out is None else out
            weight = a.weight[out][:, at] / _copies(at)[None, :, None, None]
        b.weight.zero_()
        edge = (b.kernel_size[0] - a.kernel_size[0]) // 2
        side = a.kernel_size[0]
        b.weight[:, :, edge : edge + side, edge : edge + side].copy_(weight)
        for name in _NORM:
            getattr(new.norm, name).copy_(getattr(old.norm, name)[out])
        return out

    def squeeze(self, old: SqueezeExcite, new: SqueezeExcite, at: Map) -> None:
        """Squeeze-and-excitation of a map."""
        inside = _widened(old.reduce.out_channels, new.reduce.out_channels)
        new.reduce.weight.copy_(old.reduce.weight[inside][:, at] / _copies(at)[None, :, None, None])
        new.expand.weight.copy_(old.expand.weight[at][:, inside] / _copies(inside)[None, :, None, None])
        if old.reduce.bias is not None and new.reduce.bias is not None:
            new.reduce.bias.copy_(old.reduce.bias[inside])
        if old.expand.bias is not None and new.expand.bias is not None:
            new.expand.bias.copy_(old.expand.bias[at])


def _same(channels: int) -> Map:
    return torch.arange(channels)


def _widened(old: int, new: int) -> Map:
    """All channels, then some of them again, as evenly as can be."""
    return torch.cat([torch.arange(old), *(torch.randperm(old) for _ in range(-(-new // old)))])[:new]


def _copies(at: Map) -> Tensor:
    """How often the channel that each one repeats is there."""
    return torch.bincount(at)[at]


def _first_conv(stem: nn.Sequential) -> nn.Conv2d:
    first = stem[0]
    assert isinstance(first, ConvNormAct)
    assert isinstance(first.conv, nn.Conv2d)
    return first.conv


def _width(unit: ConvNormAct) -> int:
    assert isinstance(unit.conv, nn.Conv2d)
    return unit.conv.out_channels
