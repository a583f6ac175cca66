"""A block, a run of blocks and a stage as values; ``BLOCK_KINDS`` says what each kind of block is like.

A new kind stands in three places: here, as a class in ``nn/blocks.py``, and with its keys in ``nn/keymaps.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from convscale.arch.codec import require
from convscale.arch.parts import RELU, ActSpec, Part, require_positive


@dataclass(frozen=True, kw_only=True)
class SESpec(Part):
    """Squeeze-and-excitation (Hu et al., arXiv 1709.01507) inside a block."""

    ratio: float = 0.25
    """Squeezed width over the width named by ``of``."""
    of: Literal["input", "inner", "output"] = "input"
    """Which width of the block ``ratio`` is taken of."""
    where: Literal["inner", "output"] = "inner"
    """``inner``: after the spatial convolution; ``output``: after the last norm, before the residual add."""
    floor: int = 1
    """Least squeezed width."""
    divisor: int = 1
    """The squeezed width is rounded to a multiple of this."""
    min_fraction: float = 0.0
    """Rounded to a multiple, it never falls below this share of the exact one (MobileNetV3: 0.9)."""
    rounding: Literal["nearest", "down"] = "nearest"
    """How it is rounded."""
    activation: ActSpec = RELU
    """Between the two 1x1 convolutions."""
    gate: Literal["sigmoid", "hardsigmoid"] = "sigmoid"
    """What makes the factors in [0, 1] that channels are multiplied by."""

    def validate(self) -> None:
        require(0 < self.ratio <= 4, "SESpec.ratio", self.ratio, "in (0, 4]")
        require_positive(self, "floor", "divisor")
        require(not self.activation.affine, "SESpec.activation", self.activation, "one without affine")
        require(0 <= self.min_fraction <= 1, "SESpec.min_fraction", self.min_fraction, "in [0, 1]")

    def squeezed(self, *, block_input: int, inner: int, output: int) -> int:
        """Width between the two convolutions for a block of these widths (channels)."""
        width = {"input": block_input, "inner": inner, "output": output}[self.of] * self.ratio
        if self.divisor == 1:
            rounded = int(width + 1e-9) if self.rounding == "down" else round(width)
        else:
            offset = 0 if self.rounding == "down" else self.divisor / 2
            rounded = int(width + offset) // self.divisor * self.divisor
            rounded += self.divisor if rounded < self.min_fraction * width else 0
        return max(self.floor, self.divisor if self.divisor > 1 else 1, rounded)


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """What a kind of block is like: what its ``BlockSpec`` may say, and how its inner width follows."""

    inner_of: Literal["input", "output"]
    """Which of the block's widths the inner one follows."""
    takes_ratio: bool
    """Whether the inner width is ``inner_ratio`` times that, else it is that."""
    depthwise: bool
    """A mobile block: a depthwise spatial convolution, which may have several kernels, 1x1s that may be split, a linear
    output, and no shortcut where shapes differ. Else the shortcut is projected there, and groups have a width."""
    se_places: tuple[Literal["inner", "output"], ...] = ("inner", "output")
    """Where squeeze-and-excitation may stand; empty: nowhere."""
    mixes: bool = True
    """Whether a mobile block's kernels may be of several sizes and its 1x1s split (MixNet)."""
    fused: bool = False
    """A mobile block but for its spatial convolution, which is dense."""
    may_lack_kernel: bool = False
    """Whether it may do without its spatial convolution."""
    downsamples: tuple[str, ...] = ("stride", "blur", "blur_zeros", "avgpool", "maxpool")
    """What its ``downsample`` may say."""
    takes: tuple[str, ...] = ()
    """Which of ``OPTIONAL`` it has a use for."""

    @property
    def projects(self) -> bool:
        """Whether its shortcut is projected where shapes differ; mobile blocks have none there."""
        return not (self.depthwise or self.fused)


OPTIONAL: dict[str, object] = {
    "start_kernel": 0,
    "linear": False,
    "grn": False,
    "layer_scale": 0.0,
    "layers": 0,
    "light": False,
}
"""Fields of a ``BlockSpec`` that some kinds alone have a use for, and what they say in all others."""
BLOCK_KINDS = {
    "basic": BlockKind(inner_of="output", takes_ratio=False, depthwise=False, se_places=("output",)),
    "bottleneck": BlockKind(inner_of="output", takes_ratio=True, depthwise=False),
    "depthwise_separable": BlockKind(inner_of="input", takes_ratio=False, depthwise=True),
    "inverted_residual": BlockKind(inner_of="input", takes_ratio=True, depthwise=True),
    "conv": BlockKind(inner_of="output", takes_ratio=False, depthwise=False, se_places=(), mixes=False, fused=True),
    "fused_inverted_residual": BlockKind(
        inner_of="input", takes_ratio=True, depthwise=False, se_places=("inner",), mixes=False, fused=True
    ),
    "universal": BlockKind(
        inner_of="input",
        takes_ratio=True,
        depthwise=True,
        se_places=(),
        mixes=False,
        may_lack_kernel=True,
        takes=("start_kernel",),
    ),
    "convnext": BlockKind(
        inner_of="output",
        takes_ratio=True,
        depthwise=True,
        se_places=(),
        mixes=False,
        downsamples=("patch",),
        takes=("linear", "grn", "layer_scale"),
    ),
    "aggregated": BlockKind(
        inner_of="output",
        takes_ratio=True,
        depthwise=False,
        se_places=(),
        mixes=False,
        fused=True,
        downsamples=("depthwise",),
        takes=("layers", "light"),
    ),
}
"""By the name that ``BlockSpec.kind`` says."""


@dataclass(frozen=True, kw_only=True)
class BlockSpec(Part):
    """One residual block, without its stride and repeats (the stage says those)."""

    kind: str
    """One of ``BLOCK_KINDS``."""
    width: int
    """Output channels."""
    inner_ratio: float = 1.0
    """Inner width: over the output width for ``bottleneck``, ``convnext`` and ``aggregated``, over the *input* width
    (the expansion) for ``inverted_residual``, the fused one and ``universal``; the others have none."""
    inner_divisor: int = 1
    """The inner width is rounded to a multiple of this."""
    kernels: tuple[int, ...] = (3,)
    """Kernel sizes of the spatial convolution in pixels; several: channels are split over them (MixConv, arXiv
    1907.09595); empty: ``universal`` has none in its middle."""
    start_kernel: int = 0
    """Kernel size of a depthwise convolution in front of the expansion of ``universal``; 0: none."""
    group_width: int | None = None
    """Channels per group of the spatial convolution of ``basic`` and ``bottleneck``; None: dense."""
    expand_groups: int = 1
    """Into how many parallel 1x1 convolutions the expansion is split (MixNet)."""
    project_groups: int = 1
    """The same for the projection."""
    se: SESpec | None = None
    activation: ActSpec = RELU
    """After every convolution but the last; after the one of ``conv``."""
    out_activation: ActSpec = RELU
    """After the residual add, or after the last convolution where there is none."""
    downsample: Literal["stride", "blur", "blur_zeros", "avgpool", "maxpool", "patch", "depthwise"] = "stride"
    """How a stride of 2 is taken: by the spatial convolution, or by a 3x3 blur after it (TResNet, section 2; Zhang,
    arXiv 1904.11486; ``blur_zeros``: with zeros around the map instead of its reflection), or by a 2x2 average or
    max-pool after it; ``patch``: by a norm and a convolution of 2x2 patches in front of the block, which takes a
    change of width too (ConvNeXt, section 2.6); ``depthwise``: by a 3x3 depthwise convolution with a norm in front of
    the block (PP-HGNet)."""
    shortcut: Literal["conv", "avgpool"] = "conv"
    """Where shapes differ: 1x1 convolution with the stride, or 2x2 average pool before a 1x1 convolution (ResNet-D).
    Mobile blocks have none."""
    skip: bool = True
    """Whether the block has a residual connection at all."""
    linear: bool = False
    """Whether the 1x1 convolutions of ``convnext`` are linear layers over maps with channels last: the same function,
    as its authors wrote it."""
    grn: bool = False
    """Global response normalisation after the activation of ``convnext`` (ConvNeXt V2, arXiv 2301.00808, section 4)."""
    layer_scale: float = 0.0
    """Initial value of a learnable factor per channel at the end of ``convnext``; 0: none."""
    layers: int = 0
    """How many layers ``aggregated`` has in a row; their outputs and its input together are aggregated by two 1x1
    convolutions."""
    light: bool = False
    """Whether each of these layers is a 1x1 convolution and a depthwise one instead of a dense one."""

    @property
    def traits(self) -> BlockKind:
        """What its kind is like."""
        return BLOCK_KINDS[self.kind]

    def validate(self) -> None:
        require(self.kind in BLOCK_KINDS, "BlockSpec.kind", self.kind, f"one of {', '.join(BLOCK_KINDS)}")
        require_positive(self, "width", "inner_divisor", "expand_groups", "project_groups")
        require(self.inner_ratio > 0, "BlockSpec.inner_ratio", self.inner_ratio, "above 0")
        odd = all(k >= 1 and k % 2 == 1 for k in self.kernels) and (bool(self.kernels) or self.traits.may_lack_kernel)
        require(odd, "BlockSpec.kernels", self.kernels, "odd sizes of at least 1")
        if self.traits.projects:
            self._validate_dense()
        else:
            self._validate_mobile()
        self._validate_optional()
        if self.se is not None:
            places = self.traits.se_places
            require(bool(places), "BlockSpec.se", self.se, f"None for a {self.kind} block")
            right = f"{' or '.join(map(repr, places))} for a {self.kind} block"
            require(self.se.where in places, "SESpec.where", self.se.where, right)
        if not self.traits.takes_ratio:
            right = f"1.0 for a {self.kind} block"
            require(self.inner_ratio == 1.0, "BlockSpec.inner_ratio", self.inner_ratio, right)

    def _validate_mobile(self) -> None:
        why = "which has no groups" if self.traits.fused else "whose convolution is depthwise"
        right = f"None for a {self.kind} block, {why}"
        require(self.group_width is None, "BlockSpec.group_width", self.group_width, right)
        right = f"'conv' (unused) for a {self.kind} block"
        require(self.shortcut == "conv", "BlockSpec.shortcut", self.shortcut, right)
        if not self.traits.mixes:
            plain = len(self.kernels) <= 1 and self.expand_groups == self.project_groups == 1
            require(plain, "BlockSpec.kernels", self.kernels, f"one size, and no splits, for a {self.kind} block")

    def _validate_optional(self) -> None:
        places = self.traits.downsamples
        right = f"{' or '.join(map(repr, places))} for a {self.kind} block"
        require(self.downsample in places, "BlockSpec.downsample", self.downsample, right)
        for name, default in OPTIONAL.items():
            if name not in self.traits.takes:
                value = getattr(self, name)
                require(value == default, f"BlockSpec.{name}", value, f"{default!r} for a {self.kind} block")
        least = 1 if "layers" in self.traits.takes else 0
        require(self.layers >= least, "BlockSpec.layers", self.layers, f"at least {least} for a {self.kind} block")
        require(not self.out_activation.affine, "BlockSpec.out_activation", self.out_activation, "one without affine")
        start = self.start_kernel
        require(start == 0 or (start > 0 and start % 2 == 1), "BlockSpec.start_kernel", start, "0, or odd")
        require(0 <= self.layer_scale < math.inf, "BlockSpec.layer_scale", self.layer_scale, "0 or more")

    def _validate_dense(self) -> None:
        of_kind = f"for a {self.kind} block"
        require(len(self.kernels) == 1, "BlockSpec.kernels", self.kernels, f"one size {of_kind}")
        unsplit = self.expand_groups == self.project_groups == 1
        require(unsplit, "BlockSpec.expand_groups", self.expand_groups, f"1 {of_kind}")
        require(self.skip, "BlockSpec.skip", self.skip, f"True {of_kind}")
        if self.group_width is not None:
            require_positive(self, "group_width")
            inner = self.inner_width(self.width)
            right = f"a divisor of the inner width {inner}"
            require(inner % self.group_width == 0, "BlockSpec.group_width", self.group_width, right)

    def inner_width(self, block_input: int) -> int:
        """Channels of the spatial convolution's input for a block fed ``block_input`` channels."""
        base = block_input if self.traits.inner_of == "input" else self.width
        if not self.traits.takes_ratio:
            return base
        width = base * self.inner_ratio
        return max(self.inner_divisor, int(width + self.inner_divisor / 2) // self.inner_divisor * self.inner_divisor)

    def with_width(self, width: int, divisor: int) -> BlockSpec:
        """The block at another output width: a bottleneck's inner width rounds to ``divisor`` and to whole groups, the
        output of a block without one to whole groups.
        """
        if width == self.width:
            return self
        if not self.traits.projects:
            follows = self.traits.takes_ratio and self.traits.inner_of == "output"
            return replace(self, width=width, inner_divisor=divisor if follows else self.inner_divisor)
        group = self.group_width or 1
        if self.traits.takes_ratio:
            return replace(self, width=width, inner_divisor=math.lcm(divisor, group))
        return replace(self, width=max(1, round(width / group)) * group, inner_divisor=1)


@dataclass(frozen=True, kw_only=True)
class RunSpec(Part):
    """``repeat`` blocks of one kind in a row; only the first may change stride or width."""

    block: BlockSpec
    """What each of them is."""
    repeat: int = 1
    """How many."""

    def validate(self) -> None:
        require_positive(self, "repeat")


@dataclass(frozen=True, kw_only=True)
class StageSpec(Part):
    """Runs of blocks; the very first block takes the stage's stride."""

    runs: tuple[RunSpec, ...]
    """In their order."""
    stride: int = 1
    """1 or 2: by what the stage divides the map's sides."""
    tap: bool = True
    """Whether the stage's output is a feature map for ``features_only``."""

    def validate(self) -> None:
        require(len(self.runs) >= 1, "StageSpec.runs", self.runs, "at least one run")
        require(self.stride in (1, 2), "StageSpec.stride", self.stride, "1 or 2")
        first = self.runs[0].block
        strides = self.stride == 1 or bool(first.kernels) or first.start_kernel > 0
        require(strides, "StageSpec.stride", self.stride, "1, as the first block has no convolution that could take it")

    @property
    def depth(self) -> int:
        """Blocks in the stage."""
        return sum(run.repeat for run in self.runs)

    @property
    def width(self) -> int:
        """Output channels."""
        return self.runs[-1].block.width
