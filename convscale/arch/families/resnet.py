"""ResNet (He et al., arXiv 1512.03385; the stride on the 3x3) and what grew from it.

ResNet-D (arXiv 1812.01187), ResNeXt (1611.05431), SE-ResNeXt (1709.01507), Wide ResNet (1605.07146).
"""

from __future__ import annotations

from convscale.arch.block import BlockSpec, RunSpec, SESpec, StageSpec
from convscale.arch.parts import InputSpec, StemSpec
from convscale.arch.spec import NetSpec

_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
_PLANES = (64, 128, 256, 512)
_SE = SESpec(ratio=1 / 16, of="output", where="output", divisor=8)


def resnet(
    name: str,
    depth: int,
    *,
    inner_ratio: float = 0.25,
    group_width: int | None = None,
    variant_d: bool = False,
    se: bool = False,
) -> NetSpec:
    """A four-stage residual network of 18 to 200 layers.

    Args:
        name: of the spec.
        depth: 18 and 34 use basic blocks, the others bottlenecks with four times the planes.
        inner_ratio: bottleneck width over output width.
        group_width: channels per group of the first stage's 3x3 convolutions; doubles per stage, so that the number of
            groups stays.
        variant_d: deep stem of three 3x3 convolutions, and average pooling on shortcuts.
        se: squeeze-and-excitation at the end of each block.
    """
    basic = depth < 50
    stages = tuple(
        StageSpec(
            runs=(
                RunSpec(
                    block=BlockSpec(
                        kind="basic" if basic else "bottleneck",
                        width=planes if basic else 4 * planes,
                        inner_ratio=1.0 if basic else inner_ratio,
                        group_width=group_width * 2**i if group_width else None,
                        shortcut="avgpool" if variant_d else "conv",
                        se=_SE if se else None,
                    ),
                    repeat=repeat,
                ),
            ),
            stride=1 if i == 0 else 2,
        )
        for i, (planes, repeat) in enumerate(zip(_PLANES, _DEPTHS[depth], strict=True))
    )
    stem = (
        StemSpec(kind="deep", widths=(32, 32, 64), pool=True, tap=True)
        if variant_d
        else StemSpec(widths=(64,), kernel=7, pool=True, tap=True)
    )
    size = 256 if variant_d and depth > 50 else 224
    return NetSpec(
        name=name, family="resnet", input=InputSpec(size=size, interpolation="bicubic"), stem=stem, stages=stages
    )


SPECS = {
    spec.name: spec
    for spec in (
        *(resnet(f"resnet{depth}", depth) for depth in _DEPTHS),
        *(resnet(f"resnet{depth}d", depth, variant_d=True) for depth in (50, 101, 152)),
        resnet("resnext50_32x4d", 50, inner_ratio=0.5, group_width=4),
        resnet("resnext101_32x8d", 101, inner_ratio=1.0, group_width=8),
        resnet("seresnext50_32x4d", 50, inner_ratio=0.5, group_width=4, se=True),
        resnet("wide_resnet50_2", 50, inner_ratio=0.5),
    )
}
