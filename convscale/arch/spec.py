"""An architecture as a value: frozen, validated, equal by value, with a JSON and YAML round trip.

A ``NetSpec`` says everything that the builder needs and nothing that it can derive. Families are tables of such values
(`resnet.py`, `tresnet.py`, `mobile.py`), scaling maps one to another (`scale.py`), and a user's own works wherever a
named one does.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from convscale.arch.codec import check_type, field_types, from_plain, require, to_plain
from convscale.errors import UserError

Activation = Literal["identity", "relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu"]


def _require_positive(spec: object, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        require(value >= 1, f"{type(spec).__name__}.{name}", value, "at least 1")


class _Part:
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
class ActSpec(_Part):
    """An activation function."""

    kind: Activation = "relu"
    slope: float = 0.01
    """Slope for negative inputs of ``leaky_relu``; the others ignore it."""

    def validate(self) -> None:
        require(0 <= self.slope < 1 and math.isfinite(self.slope), "ActSpec.slope", self.slope, "in [0, 1)")

    def __repr__(self) -> str:
        return f"ActSpec({self.kind}, {self.slope:g})" if self.kind == "leaky_relu" else f"ActSpec({self.kind})"


IDENTITY = ActSpec(kind="identity")
RELU = ActSpec(kind="relu")
RELU6 = ActSpec(kind="relu6")
SILU = ActSpec(kind="silu")


@dataclass(frozen=True, kw_only=True)
class SESpec(_Part):
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
    rounding: Literal["nearest", "down"] = "nearest"
    """How it is rounded."""
    activation: ActSpec = RELU
    """Between the two 1x1 convolutions."""
    gate: Literal["sigmoid", "hardsigmoid"] = "sigmoid"
    """What makes the factors in [0, 1] that channels are multiplied by."""

    def validate(self) -> None:
        require(0 < self.ratio <= 4, "SESpec.ratio", self.ratio, "in (0, 4]")
        _require_positive(self, "floor", "divisor")

    def squeezed(self, *, block_input: int, inner: int, output: int) -> int:
        """Width between the two convolutions for a block of these widths (channels)."""
        width = {"input": block_input, "inner": inner, "output": output}[self.of] * self.ratio
        if self.divisor == 1:
            rounded = int(width + 1e-9) if self.rounding == "down" else round(width)
        else:
            offset = 0 if self.rounding == "down" else self.divisor / 2
            rounded = int(width + offset) // self.divisor * self.divisor
        return max(self.floor, self.divisor if self.divisor > 1 else 1, rounded)


@dataclass(frozen=True, kw_only=True)
class BlockSpec(_Part):
    """One residual block, without its stride and repeats (the stage says those)."""

    kind: Literal["basic", "bottleneck", "depthwise_separable", "inverted_residual"]
    width: int
    """Output channels."""
    inner_ratio: float = 1.0
    """Inner width: over the output width for ``basic`` and ``bottleneck``, over the *input* width (the expansion) for
    ``inverted_residual``; ``depthwise_separable`` has none."""
    inner_divisor: int = 1
    """The inner width is rounded to a multiple of this."""
    kernels: tuple[int, ...] = (3,)
    """Kernel sizes of the spatial convolution in pixels; several: channels are split over them (MixConv, arXiv
    1907.09595)."""
    group_width: int | None = None
    """Channels per group of the spatial convolution of ``basic`` and ``bottleneck``; None: dense."""
    expand_groups: int = 1
    """Into how many parallel 1x1 convolutions the expansion is split (MixNet)."""
    project_groups: int = 1
    """The same for the projection."""
    se: SESpec | None = None
    activation: ActSpec = RELU
    """After every convolution but the last."""
    out_activation: ActSpec = RELU
    """After the residual add, or after the last convolution where there is none."""
    downsample: Literal["stride", "blur"] = "stride"
    """How a stride of 2 is taken: by the spatial convolution, or by a 3x3 blur after it (TResNet, section 2; Zhang,
    arXiv 1904.11486)."""
    shortcut: Literal["conv", "avgpool"] = "conv"
    """Where shapes differ: 1x1 convolution with the stride, or 2x2 average pool before a 1x1 convolution (ResNet-D).
    Mobile blocks have none."""
    skip: bool = True
    """Whether the block has a residual connection at all."""

    @property
    def is_mobile(self) -> bool:
        """Depthwise blocks: linear output and no projection on the shortcut."""
        return self.kind in ("depthwise_separable", "inverted_residual")

    def validate(self) -> None:
        _require_positive(self, "width", "inner_divisor", "expand_groups", "project_groups")
        require(self.inner_ratio > 0, "BlockSpec.inner_ratio", self.inner_ratio, "above 0")
        require(
            bool(self.kernels) and all(k >= 1 and k % 2 == 1 for k in self.kernels),
            "BlockSpec.kernels",
            self.kernels,
            "odd sizes of at least 1",
        )
        if self.group_width is not None:
            require(
                not self.is_mobile,
                "BlockSpec.group_width",
                self.group_width,
                f"None for a {self.kind} block, whose convolution is depthwise",
            )
            _require_positive(self, "group_width")
            inner = self.inner_width(self.width)
            require(
                inner % self.group_width == 0,
                "BlockSpec.group_width",
                self.group_width,
                f"a divisor of the inner width {inner}",
            )
        if self.is_mobile:
            require(
                self.shortcut == "conv", "BlockSpec.shortcut", self.shortcut, f"'conv' (unused) for a {self.kind} block"
            )
        else:
            require(len(self.kernels) == 1, "BlockSpec.kernels", self.kernels, f"one size for a {self.kind} block")
            require(
                self.expand_groups == self.project_groups == 1,
                "BlockSpec.expand_groups",
                self.expand_groups,
                f"1 for a {self.kind} block",
            )
            require(self.skip, "BlockSpec.skip", self.skip, f"True for a {self.kind} block")
        if self.kind == "basic" and self.se is not None:
            require(self.se.where == "output", "SESpec.where", self.se.where, "'output' for a basic block")
        if self.kind in ("basic", "depthwise_separable"):
            require(self.inner_ratio == 1.0, "BlockSpec.inner_ratio", self.inner_ratio, f"1.0 for a {self.kind} block")

    def inner_width(self, block_input: int) -> int:
        """Channels of the spatial convolution's input for a block fed ``block_input`` channels."""
        if self.kind == "depthwise_separable":
            return block_input
        base = block_input if self.kind == "inverted_residual" else self.width
        width = base * self.inner_ratio
        return max(self.inner_divisor, int(width + self.inner_divisor / 2) // self.inner_divisor * self.inner_divisor)


@dataclass(frozen=True, kw_only=True)
class RunSpec(_Part):
    """``repeat`` blocks of one kind in a row; only the first may change stride or width."""

    block: BlockSpec
    """What each of them is."""
    repeat: int = 1
    """How many."""

    def validate(self) -> None:
        _require_positive(self, "repeat")


@dataclass(frozen=True, kw_only=True)
class StageSpec(_Part):
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

    @property
    def depth(self) -> int:
        """Blocks in the stage."""
        return sum(run.repeat for run in self.runs)

    @property
    def width(self) -> int:
        """Output channels."""
        return self.runs[-1].block.width


@dataclass(frozen=True, kw_only=True)
class StemSpec(_Part):
    """From the image to the first stage."""

    kind: Literal["conv", "deep", "space_to_depth"] = "conv"
    """``conv``: one convolution; ``deep``: three 3x3, the first with the stride (ResNet-D); ``space_to_depth``: blocks
    of ``stride`` x ``stride`` pixels become channels, then a stride-1 convolution (TResNet, section 2)."""
    widths: tuple[int, ...] = (64,)
    """Output channels, one per convolution."""
    kernel: int = 3
    """Side of each convolution's kernel, odd."""
    stride: int = 2
    """Of the first convolution, 1 or 2; of space-to-depth, its blocks' side, 2 or 4."""
    pool: bool = False
    """Whether a 3x3 max-pool of stride 2 follows."""
    tap: bool = False
    """Whether the output before the pool is a feature map."""
    activation: ActSpec = RELU

    def validate(self) -> None:
        require(
            len(self.widths) == (3 if self.kind == "deep" else 1),
            "StemSpec.widths",
            self.widths,
            "three widths for a deep stem, one for any other",
        )
        require(all(w >= 1 for w in self.widths), "StemSpec.widths", self.widths, "at least 1 each")
        require(self.kernel >= 1 and self.kernel % 2 == 1, "StemSpec.kernel", self.kernel, "odd and at least 1")
        require(self.stride in (1, 2, 4), "StemSpec.stride", self.stride, "1, 2 or 4")

    @property
    def reduction(self) -> int:
        """Pixels of the image per pixel of the stem's output, along one side."""
        return self.stride * (2 if self.pool else 1)


@dataclass(frozen=True, kw_only=True)
class HeadSpec(_Part):
    """From the last stage to the logits."""

    width: int = 0
    """Channels of a 1x1 convolution before the pool; 0: none."""
    activation: ActSpec = RELU
    dropout: float = 0.0
    """The published dropout rate in front of the classifier; a recipe may use it, building a net does not."""

    def validate(self) -> None:
        require(self.width >= 0, "HeadSpec.width", self.width, "0 or more")
        require(0 <= self.dropout < 1, "HeadSpec.dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class NormSpec(_Part):
    """Normalisation after every convolution."""

    kind: Literal["batchnorm", "inplace"] = "batchnorm"
    """``inplace``: the form that saves memory in training (``nn.norm``); the same function."""
    eps: float = 1e-5
    """Added to the variance."""
    momentum: float = 0.1
    """Weight of the new batch in the running statistics (PyTorch's sense; TensorFlow's is one minus it)."""

    def validate(self) -> None:
        require(0 < self.eps < 1, "NormSpec.eps", self.eps, "in (0, 1)")
        require(0 < self.momentum <= 1, "NormSpec.momentum", self.momentum, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class InputSpec(_Part):
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
        _require_positive(self, "size", "multiple", "min_size")
        require(self.size % self.multiple == 0, "InputSpec.size", self.size, f"a multiple of {self.multiple}")
        require(self.size >= self.min_size, "InputSpec.size", self.size, f"at least {self.min_size}")
        require(len(self.mean) == len(self.std) >= 1, "InputSpec.std", self.std, "as long as mean")
        require(all(s > 0 for s in self.std), "InputSpec.std", self.std, "above 0")
        require(0 < self.crop_pct <= 1, "InputSpec.crop_pct", self.crop_pct, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ScalingRules(_Part):
    """How a family's widths and depths follow multipliers."""

    divisor: int = 8
    """Widths round to a multiple of this."""
    min_fraction: float = 0.9
    """A rounded width never falls below this share of the scaled one (EfficientNet's rule)."""
    fixed_depth_stages: tuple[int, ...] = ()
    """Indices of stages whose depth stays (negative ones count from the end)."""
    stem: Literal["scale", "fixed"] = "scale"
    head: Literal["scale", "fixed", "at_least"] = "scale"
    """``at_least``: the head's width scales up but never down (MobileNetV2)."""

    def validate(self) -> None:
        _require_positive(self, "divisor")
        require(0 <= self.min_fraction <= 1, "ScalingRules.min_fraction", self.min_fraction, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Lineage(_Part):
    """Where a scaled spec comes from, so that scaling again starts from the unrounded baseline."""

    base: NetSpec
    """The unrounded baseline."""
    depth: float = 1.0
    """Multiplier of blocks per stage."""
    width: float = 1.0
    """Multiplier of channels."""
    resolution: float = 1.0
    """Multiplier of the image's side."""

    def validate(self) -> None:
        for name in ("depth", "width", "resolution"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"Lineage.{name}", value, "a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class NetSpec(_Part):
    """A whole network. Specs compare by all but their names, families and lineages."""

    name: str = field(default="custom", compare=False)
    family: str = field(default="custom", compare=False)
    """``tresnet``, ``efficientnet``, ``resnet``, ``mobilenet`` ...: whose weight layouts it may use."""
    input: InputSpec = InputSpec()
    stem: StemSpec
    stages: tuple[StageSpec, ...]
    head: HeadSpec = HeadSpec()
    norm: NormSpec = NormSpec()
    padding: Literal["symmetric", "same"] = "symmetric"
    """``same``: TensorFlow's, asymmetric for stride 2 and dependent on the image size."""
    init: Literal["resnet", "tresnet", "efficientnet"] = "resnet"
    """Initial weights: kaiming normal fan-out for relu or leaky relu, or fan-out over groups; the residual ones zero
    each block's last norm."""
    scaling: ScalingRules = ScalingRules()
    lineage: Lineage | None = field(default=None, compare=False)

    def validate(self) -> None:
        require(bool(self.name), "NetSpec.name", self.name, "not empty")
        require(len(self.stages) >= 1, "NetSpec.stages", self.stages, "at least one stage")
        if self.stem.kind == "space_to_depth":
            require(
                self.input.multiple % self.stem.stride == 0,
                "InputSpec.multiple",
                self.input.multiple,
                f"a multiple of {self.stem.stride}, the space-to-depth stem's block",
            )
        else:
            require(self.stem.stride < 4, "StemSpec.stride", self.stem.stride, f"1 or 2 for a {self.stem.kind} stem")

    @property
    def num_features(self) -> int:
        """Channels that the classifier takes (average pooling)."""
        return self.head.width or self.stages[-1].width

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks per stage."""
        return tuple(stage.depth for stage in self.stages)

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels per stage."""
        return tuple(stage.width for stage in self.stages)

    @property
    def reduction(self) -> int:
        """Pixels of the image per pixel of the last map, along one side."""
        return self.stem.reduction * math.prod(stage.stride for stage in self.stages)

    def check_size(self, image_size: int) -> int:
        """Return ``image_size`` if the network takes square images of that side in pixels.

        Raises:
            UserError: it is no whole number of at least ``input.min_size``, or no multiple of ``input.multiple``.
        """
        if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
            raise UserError(
                f"image size is {image_size!r}; it must be a whole number of pixels, at least {self.input.min_size}"
            )
        if image_size < self.input.min_size or image_size % self.input.multiple:
            of = f"a multiple of {self.input.multiple} and " if self.input.multiple > 1 else ""
            raise UserError(f"image size is {image_size} px; {self.name} takes {of}at least {self.input.min_size} px")
        return image_size

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; fields at their default are left out, so that a file shows what is special about a net."""
        return to_plain(self)

    def to_json(self) -> str:
        """As indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """As YAML."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> NetSpec:
        """The inverse of ``to_dict``.

        Raises:
            UserError: an unknown key (the nearest is named), a missing one, or a value that does not fit.
        """
        return from_plain(NetSpec, values, "spec")

    @staticmethod
    def from_json(text: str) -> NetSpec:
        """The inverse of ``to_json``; UserError on text that is no spec."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"spec is no valid JSON: {error}") from None
        return NetSpec.from_dict(values)

    @staticmethod
    def from_yaml(text: str) -> NetSpec:
        """The inverse of ``to_yaml``; UserError on text that is no spec."""
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"spec is no valid YAML: {' '.join(str(error).split())}") from None
        return NetSpec.from_dict(values)

    def __repr__(self) -> str:
        stages = " ".join(
            "+".join(f"{run.repeat}x{run.block.kind}-{run.block.width}" for run in stage.runs)
            + (f"/{stage.stride}" if stage.stride > 1 else "")
            for stage in self.stages
        )
        stem = f"{self.stem.kind}-{'-'.join(map(str, self.stem.widths))}/{self.stem.reduction}"
        head = f" head-{self.head.width}" if self.head.width else ""
        return f"<NetSpec {self.name}: {self.input.size} px, {stem}, {stages}{head}, {self.norm.kind}>"


def load_spec(path: str | os.PathLike[str]) -> NetSpec:
    """Read a spec from a ``.json``, ``.yaml`` or ``.yml`` file.

    Raises:
        UserError: no such file, another suffix, or content that is no spec; the message names the file.
    """
    path = Path(path)
    readers = {".json": NetSpec.from_json, ".yaml": NetSpec.from_yaml, ".yml": NetSpec.from_yaml}
    if path.suffix not in readers:
        raise UserError(f"spec file {path} ends in {path.suffix!r}; it must end in .json, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"spec file {path} can not be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return readers[path.suffix](text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def save_spec(spec: NetSpec, path: str | os.PathLike[str]) -> None:
    """Write a spec as JSON or YAML, by the suffix of ``path``, atomically."""
    from convscale.files import write_text

    path = Path(path)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"spec file {path} ends in {path.suffix!r}; it must end in .json, .yaml or .yml")
    write_text(path, spec.to_json() + "\n" if path.suffix == ".json" else spec.to_yaml())
