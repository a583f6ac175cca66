"""TResNet (Ridnik et al., arXiv 2003.13630): every ingredient a choice, so that the paper's ablation is a list of
specs.
"""

from __future__ import annotations

from convscale.arch.block import BlockSpec, RunSpec, SESpec, StageSpec
from convscale.arch.parts import ActSpec, InputSpec, NormSpec, StemSpec
from convscale.arch.spec import NetSpec

_BASIC_SE = SESpec(ratio=1 / 4, of="output", where="output", floor=64, rounding="down")
_BOTTLENECK_SE = SESpec(ratio=1 / 2, of="inner", where="inner", floor=64, rounding="down")  # planes * 4 / 8
OFFICIAL_V2_SLOPE = 1e-6
"""Every leaky slope of the authors' V2 code, its stem included; timm's port keeps V1's 1e-3 and 1e-2."""


def tresnet(
    name: str,
    depths: tuple[int, ...],
    base_width: int,
    *,
    kinds: tuple[str, ...] = ("basic", "basic", "bottleneck", "bottleneck"),
    se_stages: tuple[int, ...] = (0, 1, 2),
    space_to_depth: bool = True,
    blur: bool = True,
    norm: str = "inplace",
    slope: float = 1e-3,
    stem_slope: float = 1e-2,
    image_size: int = 224,
) -> NetSpec:
    """A TResNet of any ingredients (section 2 of the paper).

    Args:
        name: of the spec.
        depths: blocks per stage.
        base_width: channels of the stem and of stage 1's planes; they double from stage to stage.
        kinds: block kind per stage, ``basic`` or ``bottleneck``.
        se_stages: indices of the stages with squeeze-and-excitation.
        space_to_depth: the space-to-depth stem, else ResNet's 7x7 convolution with max-pool.
        blur: anti-alias downsampling, else plain strides.
        norm: ``inplace`` or ``batchnorm``.
        slope: of the leaky ReLUs inside blocks.
        stem_slope: of the stem's.
        image_size: default side in pixels, a multiple of 4.
    """
    stages = []
    for i, (kind, repeat) in enumerate(zip(kinds, depths, strict=True)):
        planes = base_width * 2**i
        bottleneck = kind == "bottleneck"
        block = BlockSpec(
            kind="bottleneck" if bottleneck else "basic",
            width=planes * 4 if bottleneck else planes,
            inner_ratio=0.25 if bottleneck else 1.0,
            se=(_BOTTLENECK_SE if bottleneck else _BASIC_SE) if i in se_stages else None,
            activation=ActSpec(kind="leaky_relu", slope=slope),
            downsample="blur" if blur else "stride",
            shortcut="avgpool",
        )
        stages.append(StageSpec(runs=(RunSpec(block=block, repeat=repeat),), stride=1 if i == 0 else 2))
    act = ActSpec(kind="leaky_relu", slope=stem_slope)
    if space_to_depth:
        stem = StemSpec(kind="space_to_depth", widths=(base_width,), stride=4, activation=act)
    else:
        stem = StemSpec(widths=(base_width,), kernel=7, pool=True, activation=act)
    multiple, least = (4, 20) if space_to_depth else (1, 1)
    return NetSpec(
        name=name,
        family="tresnet",
        input=InputSpec(size=image_size, multiple=multiple, min_size=least, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        stem=stem,
        stages=tuple(stages),
        norm=NormSpec(kind="inplace" if norm == "inplace" else "batchnorm"),
        init="tresnet",
    )


_V2 = ("bottleneck",) * 4
SPECS = {
    spec.name: spec
    for spec in (
        tresnet("tresnet_m", (3, 4, 11, 3), 64),
        tresnet("tresnet_l", (4, 5, 18, 3), 76),  # int(64 * 1.2)
        tresnet("tresnet_xl", (4, 5, 24, 3), 83),  # int(64 * 1.3)
        tresnet("tresnet_v2_l", (3, 4, 23, 3), 64, kinds=_V2),
        tresnet(
            "tresnet_v2_l_official", (3, 4, 23, 3), 64, kinds=_V2, slope=OFFICIAL_V2_SLOPE, stem_slope=OFFICIAL_V2_SLOPE
        ),
    )
}
