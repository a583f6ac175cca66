"""The parts of a spec that stand outside its blocks: activation, stem, head, norm, input, scaling rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from convscale.arch.codec import check_type, field_types, require

Activation = Literal["identity", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu"]


def require_positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        require(value >= 1, f"{type(spec).__name__}.{name}", value, "at least 1")


class Part:
    """Shared by all parts: field values are checked against their annotations when a part is made."""

    def __post_init__(self) -> None:
        for name, annotation in field_types(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            check_type(f"{type(self).__name__}.{name}", value, annotation)
        self.validate()

    def validate(self) -> None:
        """Raise UserError when the values do not make sense together."""


@dataclass(frozen=True, kw_only=True)
class ActSpec(Part):
    """An activation function."""

    kind: Activation = "relu"
    slope: float = 0.01
    """Slope for negative inputs of ``leaky_relu``; the others ignore it."""
    affine: bool = False
    """Whether a learnable factor and a learnable summand of the whole map follow (PP-HGNetV2)."""

    def validate(self) -> None:
        require(0 <= self.slope < 1 and math.isfinite(self.slope), "ActSpec.slope", self.slope, "in [0, 1)")

    def __repr__(self) -> str:
        slope = f", {self.slope:g}" if self.kind == "leaky_relu" else ""
        return f"ActSpec({self.kind}{slope}{', affine' if self.affine else ''})"


IDENTITY = ActSpec(kind="identity")
RELU = ActSpec(kind="relu")
RELU6 = ActSpec(kind="relu6")
HARDSWISH = ActSpec(kind="hardswish")
SILU = ActSpec(kind="silu")


@dataclass(frozen=True, kw_only=True)
class StemSpec(Part):
    """From the image to the first stage."""

    kind: Literal["conv", "deep", "space_to_depth", "patch", "branched"] = "conv"
    """``conv``: one convolution; ``deep``: three 3x3, the first with the stride (ResNet-D); ``space_to_depth``: blocks
    of ``stride`` x ``stride`` pixels become channels, then a stride-1 convolution (TResNet, section 2); ``patch``: a
    convolution of patches that do not overlap, what is left at the border unused (ConvNeXt, section 2.2);
    ``branched``: a convolution, two small ones beside a max-pool, one of both and a 1x1 (PP-HGNetV2)."""
    widths: tuple[int, ...] = (64,)
    """Output channels, one per convolution; of a branched stem those inside, an even number, and those at its end."""
    kernel: int = 3
    """Side of each convolution's kernel, odd; of patches ``stride``."""
    stride: int = 2
    """Of the first convolution, 1 or 2; of space-to-depth, its blocks' side, 2 or 4; of patches, their side; of a
    branched stem, all of it: 4 is 2 at its first convolution and 2 at the one of both branches."""
    pool: bool = False
    """Whether a 3x3 max-pool of stride 2 follows."""
    tap: bool = False
    """Whether the output before the pool is a feature map."""
    activation: ActSpec = RELU

    def validate(self) -> None:
        require(
            len(self.widths) == {"deep": 3, "branched": 2}.get(self.kind, 1),
            "StemSpec.widths",
            self.widths,
            "three widths for a deep stem, two for a branched one, one for any other",
        )
        require(all(w >= 1 for w in self.widths), "StemSpec.widths", self.widths, "at least 1 each")
        even = self.kind != "branched" or self.widths[0] % 2 == 0
        require(even, "StemSpec.widths", self.widths, "even at first for a branched stem")
        if self.kind == "patch":
            require(self.kernel == self.stride, "StemSpec.kernel", self.kernel, "the stride of a patch stem")
        else:
            require(self.kernel >= 1 and self.kernel % 2 == 1, "StemSpec.kernel", self.kernel, "odd and at least 1")
        require(self.stride in (1, 2, 4), "StemSpec.stride", self.stride, "1, 2 or 4")

    @property
    def convs(self) -> int:
        """How many convolutions it has."""
        return 5 if self.kind == "branched" else len(self.widths)

    @property
    def reduction(self) -> int:
        """Pixels of the image per pixel of the stem's output, along one side."""
        return self.stride * (2 if self.pool else 1)


@dataclass(frozen=True, kw_only=True)
class HeadSpec(Part):
    """From the last stage to the logits."""

    width: int = 0
    """Channels of a 1x1 convolution before the pool; 0: none."""
    pooled_width: int = 0
    """Channels of a 1x1 convolution after the pool; 0: none."""
    pooled_norm: bool = False
    """Whether a norm follows that convolution, or the pool where there is none (ConvNeXt)."""
    pooled_bias: bool = False
    """Whether that convolution has a bias (MobileNetV3)."""
    activation: ActSpec = RELU
    """After either convolution."""
    dropout: float = 0.0
    """The published dropout rate in front of the classifier; a recipe may use it, building a net does not."""
    kind: Literal["gap", "ml_decoder"] = "gap"
    """``gap``: pool and linear classifier; ``ml_decoder``: attention of fixed queries to the last map (Ridnik et al.
    2021, arXiv 2111.12933), in the place of the pool and all that stands behind it."""
    decoder_width: int = 768
    """Of the decoder's tokens and queries."""
    decoder_groups: int = 0
    """Queries of the decoder; 0: 100, or one for each class where there are fewer."""

    def validate(self) -> None:
        right = "a multiple of 24, at most 8192"
        ok = 0 < self.decoder_width <= 8192 and self.decoder_width % 24 == 0
        require(ok, "HeadSpec.decoder_width", self.decoder_width, right)
        require(0 <= self.decoder_groups <= 10_000, "HeadSpec.decoder_groups", self.decoder_groups, "0 to 10000")
        require(self.width >= 0, "HeadSpec.width", self.width, "0 or more")
        require(self.pooled_width >= 0, "HeadSpec.pooled_width", self.pooled_width, "0 or more")
        require(0 <= self.dropout < 1, "HeadSpec.dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class NormSpec(Part):
    """Normalisation after every convolution."""

    kind: Literal["batchnorm", "inplace", "layernorm"] = "batchnorm"
    """``inplace``: the form that saves memory in training (``nn.norm``); the same function. ``layernorm``: over the
    channels of each pixel (ConvNeXt, section 2.6); convolutions before it have a bias."""
    eps: float = 1e-5
    """Added to the variance."""
    momentum: float = 0.1
    """Weight of the new batch in the running statistics (PyTorch's sense; TensorFlow's is one minus it); layer norms
    have none."""

    def validate(self) -> None:
        require(0 < self.eps < 1, "NormSpec.eps", self.eps, "in (0, 1)")
        require(0 < self.momentum <= 1, "NormSpec.momentum", self.momentum, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class InputSpec(Part):
    """What pixels the network takes."""

    size: int = 224
    """Side of the square image in pixels."""
    multiple: int = 1
    """Sizes must be a multiple of this."""
    min_size: int = 1
    """Least side in pixels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Per channel, subtracted from pixels in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Per channel, divided by after the mean."""
    crop_pct: float = 0.875
    """Share of the resized shorter side that the centre crop keeps."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"

    def validate(self) -> None:
        require_positive(self, "size", "multiple", "min_size")
        require(self.size % self.multiple == 0, "InputSpec.size", self.size, f"a multiple of {self.multiple}")
        require(self.size >= self.min_size, "InputSpec.size", self.size, f"at least {self.min_size}")
        require(len(self.mean) == len(self.std) >= 1, "InputSpec.std", self.std, "as long as mean")
        require(all(s > 0 for s in self.std), "InputSpec.std", self.std, "above 0")
        require(0 < self.crop_pct <= 1, "InputSpec.crop_pct", self.crop_pct, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ScalingRules(Part):
    """How a family's widths and depths follow multipliers."""

    divisor: int = 8
    """Widths round to a multiple of this."""
    min_fraction: float = 0.9
    """A rounded width never falls below this share of the scaled one (EfficientNet's rule)."""
    fixed_depth_stages: tuple[int, ...] = ()
    """Indices of stages whose depth stays (negative ones count from the end)."""
    stem: Literal["scale", "fixed", "at_least"] = "scale"
    """``at_least``: the stem's width scales up but never down (MobileNetV3)."""
    head: Literal["scale", "fixed", "at_least"] = "scale"
    """``at_least``: the head's width scales up but never down (MobileNetV2)."""

    def validate(self) -> None:
        require_positive(self, "divisor")
        require(0 <= self.min_fraction <= 1, "ScalingRules.min_fraction", self.min_fraction, "in [0, 1]")
