"""The named search spaces."""

from __future__ import annotations

import os
from pathlib import Path

from convscale.arch.multipliers import round_width
from convscale.arch.parts import RELU, SILU, ActSpec, HeadSpec, InputSpec, NormSpec, StemSpec
from convscale.errors import UserError, nearest
from convscale.nas.choices import KINDS, StageChoices
from convscale.nas.space import SearchSpace, load_space

_LEAKY = ActSpec(kind="leaky_relu", slope=1e-3)


def _mnasnet() -> SearchSpace:
    """MnasNet, section 4.1: per block one of three convolutions, 3x3 or 5x5, squeeze-and-excitation or none, with or
    without a residual; filters and layers around MobileNetV2's.
    """
    rows = (
        (16, 1, 1),
        (24, 2, 2),
        (32, 3, 2),
        (64, 4, 2),
        (96, 3, 1),
        (160, 3, 2),
        (320, 1, 1),
    )  # of MobileNetV2
    stages = tuple(
        StageChoices(
            kinds=("inverted_residual", "depthwise_separable", "conv"),
            kernels=(3, 5),
            expansions=(3.0, 6.0),
            se=(0.0, 0.25),
            skips=(True, False),
            widths=tuple(dict.fromkeys(round_width(width * share) for share in (0.75, 1.0, 1.25))),
            depths=tuple(depth for depth in (layers - 1, layers, layers + 1) if depth),
            stride=stride,
        )
        for width, layers, stride in rows
    )
    return SearchSpace(
        name="mnasnet",
        source=(
            "MnasNet (Tan et al., arXiv 1807.11626, section 4.1) around MobileNetV2's filters and layers; its skip by "
            "pooling, and squeeze-and-excitation on plain convolutions, are left out"
        ),
        stages=stages,
        stems=(StemSpec(widths=(32,)),),
        heads=(HeadSpec(width=1280, dropout=0.2),),
        input=InputSpec(interpolation="bicubic"),
        init="efficientnet",
    )


def _tresnet() -> SearchSpace:
    """TResNet's ingredients (section 2): basic or bottleneck blocks stage by stage, where squeeze-and-excitation
    stands, blur or plain strides, and both stems.
    """
    rows = ((64, (2, 3, 4), 1), (128, (3, 4, 5), 2), (256, (7, 9, 11, 13), 2), (512, (2, 3, 4), 2))
    stages = tuple(
        StageChoices(
            kinds=("basic", "bottleneck"),
            widths=tuple(width * share // 4 for share in (3, 4, 5)),
            depths=depths,
            se=(0.0, 0.25),
            se_floor=64,
            activations=(_LEAKY,),
            downsamples=("blur", "stride"),
            shortcut="avgpool",
            stride=stride,
        )
        for width, depths, stride in rows
    )
    leaky = ActSpec(kind="leaky_relu", slope=1e-2)
    return SearchSpace(
        name="tresnet",
        source="TResNet (Ridnik et al., arXiv 2003.13630, section 2), around TResNet-M",
        stages=stages,
        stems=(
            StemSpec(kind="space_to_depth", widths=(64,), stride=4, activation=leaky),
            StemSpec(widths=(64,), kernel=7, pool=True, activation=leaky),
        ),
        input=InputSpec(multiple=4, min_size=20, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        norm=NormSpec(kind="inplace"),
        init="tresnet",
    )


def _mobile() -> SearchSpace:
    """Inverted residuals, fused ones (EfficientNetV2) and depthwise-separable blocks with EfficientNet's choices."""
    rows = (
        ((16, 24), (1, 2), 1),
        ((24, 32, 40), (1, 2, 3, 4), 2),
        ((32, 40, 48, 64), (1, 2, 3, 4), 2),
        ((64, 80, 96, 112), (2, 3, 4, 6), 2),
        ((96, 112, 128, 160), (2, 3, 4, 6), 1),
        ((160, 192, 224, 256), (2, 3, 4, 6), 2),
        ((256, 320, 384), (1, 2), 1),
    )
    stages = tuple(
        StageChoices(
            kinds=("inverted_residual", "fused_inverted_residual", "depthwise_separable"),
            kernels=(3, 5),
            expansions=(4.0, 6.0),
            se=(0.0, 0.25),
            activations=(SILU,),
            widths=widths,
            depths=depths,
            stride=stride,
        )
        for widths, depths, stride in rows
    )
    return SearchSpace(
        name="mobile",
        source="convscale's own: the blocks of MobileNetV2, EfficientNet and EfficientNetV2, at 160 to 256 px",
        stages=stages,
        stems=(StemSpec(widths=(16,), activation=SILU), StemSpec(widths=(32,), activation=SILU)),
        heads=(
            HeadSpec(width=1280, activation=SILU, dropout=0.2),
            HeadSpec(width=640, activation=SILU, dropout=0.2),
            HeadSpec(dropout=0.2),
        ),
        image_sizes=(160, 192, 224, 256),
        input=InputSpec(interpolation="bicubic"),
        init="efficientnet",
    )


def _small() -> SearchSpace:
    """For images of 28 to 64 px: three or four maps, plain and mobile blocks alike."""
    rows = (
        ((16, 24, 32, 48, 64), (1, 2, 3), 1),
        ((32, 48, 64, 96, 128), (1, 2, 3, 4), 2),
        ((64, 96, 128, 192, 256), (1, 2, 3, 4), 2),
    )
    stages = tuple(
        StageChoices(
            kinds=KINDS,
            kernels=(3, 5),
            expansions=(2.0, 4.0),
            se=(0.0, 0.25),
            se_floor=8,
            activations=(RELU, SILU),
            downsamples=("stride", "maxpool"),
            bottleneck=2.0,
            widths=widths,
            depths=depths,
            stride=stride,
        )
        for widths, depths, stride in rows
    )
    return SearchSpace(
        name="small",
        source="convscale's own, for images of 28 to 64 px",
        stages=stages,
        stems=tuple(StemSpec(widths=(width,), stride=stride) for stride in (1, 2) for width in (16, 32)),
        image_sizes=(32,),
        input=InputSpec(size=32, min_size=8, crop_pct=1.0),
    )


_NAMED = {"mnasnet": _mnasnet, "tresnet": _tresnet, "mobile": _mobile, "small": _small}
SPACES = tuple(_NAMED)
"""Names of the spaces."""


def get_space(name: str | os.PathLike[str]) -> SearchSpace:
    """A named search space (``mnasnet``, ``tresnet``, ``mobile``, ``small``), or one from a YAML or JSON file.

    Raises:
        UserError: an unknown name (the nearest are given), or a file that holds no space.
    """
    if isinstance(name, str) and name in _NAMED:
        return _NAMED[name]()
    if not isinstance(name, str | os.PathLike) or Path(name).suffix not in (".json", ".yaml", ".yml"):
        raise UserError(f"search space {name!r} is unknown{nearest(str(name), _NAMED)}; or give a .yaml or .json file")
    return load_space(name)
