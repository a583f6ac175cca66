"""PP-HGNetV2 (PaddleClas, docs/zh_CN/models/ImageNet1k/PP-HGNetV2.md): blocks that aggregate the outputs of all their
layers.
"""

from __future__ import annotations

from convscale.arch.block import BlockSpec, RunSpec, StageSpec
from convscale.arch.parts import IDENTITY, ActSpec, HeadSpec, InputSpec, ScalingRules, StemSpec
from convscale.arch.spec import NetSpec

# the stem's channels inside and at its end; per stage the channels of a block's layers, of its output, and blocks;
# layers per block
_SIZES = {
    "b0": ((16, 16), ((16, 64, 1), (32, 256, 1), (64, 512, 2), (128, 1024, 1)), 3),
    "b1": ((24, 32), ((32, 64, 1), (48, 256, 1), (96, 512, 2), (192, 1024, 1)), 3),
    "b2": ((24, 32), ((32, 96, 1), (64, 384, 1), (128, 768, 3), (256, 1536, 1)), 4),
    "b3": ((24, 32), ((32, 128, 1), (64, 512, 1), (128, 1024, 3), (256, 2048, 1)), 5),
    "b4": ((32, 48), ((48, 128, 1), (96, 512, 1), (192, 1024, 3), (384, 2048, 1)), 6),
    "b5": ((32, 64), ((64, 128, 1), (128, 512, 2), (256, 1024, 5), (512, 2048, 2)), 6),
    "b6": ((48, 96), ((96, 192, 2), (192, 512, 3), (384, 1024, 6), (768, 2048, 3)), 6),
}
_AFFINE = ("b0", "b1", "b2", "b3")
"""Sizes with a learnable affine layer behind each activation."""


def hgnetv2(
    name: str, stem: tuple[int, int], table: tuple[tuple[int, int, int], ...], layers: int, *, affine: bool
) -> NetSpec:
    """An HGNetV2 of any size.

    Args:
        name: of the spec.
        stem: channels inside the stem and at its end.
        table: per stage the channels of a block's layers, of its output, and the number of blocks.
        layers: per block.
        affine: a learnable affine layer behind each activation.
    """
    act = ActSpec(kind="relu", affine=affine)
    stages = tuple(
        StageSpec(
            runs=(
                RunSpec(
                    block=BlockSpec(
                        kind="aggregated",
                        width=width,
                        inner_ratio=inner / width,
                        kernels=(3,) if i < 2 else (5,),
                        activation=act,
                        out_activation=IDENTITY,
                        downsample="depthwise",
                        layers=layers,
                        light=i >= 2,
                    ),
                    repeat=repeat,
                ),
            ),
            stride=1 if i == 0 else 2,
        )
        for i, (inner, width, repeat) in enumerate(table)
    )
    return NetSpec(
        name=name,
        family="hgnetv2",
        input=InputSpec(interpolation="bicubic", crop_pct=0.965),
        stem=StemSpec(kind="branched", widths=stem, stride=4, activation=act),
        stages=stages,
        head=HeadSpec(pooled_width=2048, activation=act),
        init="kaiming",
        scaling=ScalingRules(head="fixed"),
    )


SPECS = {
    spec.name: spec
    for spec in (
        hgnetv2(f"hgnetv2_{size}", stem, table, layers, affine=size in _AFFINE)
        for size, (stem, table, layers) in _SIZES.items()
    )
}
