"""ConvNeXt (Liu et al., arXiv 2201.03545) and ConvNeXt V2 (Woo et al., 2301.00808).

The sizes below tiny are V2's and serve both, as timm has them.
"""

from __future__ import annotations

from convscale.arch.block import BlockSpec, RunSpec, StageSpec
from convscale.arch.parts import IDENTITY, ActSpec, HeadSpec, InputSpec, NormSpec, StemSpec
from convscale.arch.spec import NetSpec

# size: blocks per stage, channels of the first stage (they double from stage to stage), crop of the default weights of
# each version
_SIZES = {
    "atto": ((2, 2, 6, 2), 40, 0.875, 0.875),
    "femto": ((2, 2, 6, 2), 48, 0.875, 0.875),
    "pico": ((2, 2, 6, 2), 64, 0.875, 0.875),
    "nano": ((2, 2, 8, 2), 80, 0.95, 0.875),
    "tiny": ((3, 3, 9, 3), 96, 0.95, 0.875),
    "small": ((3, 3, 27, 3), 96, 0.95, 0.875),
    "base": ((3, 3, 27, 3), 128, 0.875, 0.875),
    "large": ((3, 3, 27, 3), 192, 0.875, 0.875),
}
_LINEAR = ("tiny", "small", "base", "large")
"""Sizes whose authors wrote 1x1 convolutions as linear layers; timm's smaller ones are convolutions."""


def convnext(
    name: str, depths: tuple[int, ...], width: int, *, v2: bool = False, linear: bool = False, crop_pct: float = 0.875
) -> NetSpec:
    """A ConvNeXt of any size.

    Args:
        name: of the spec.
        depths: blocks per stage.
        width: channels of the first stage; they double from stage to stage.
        v2: global response normalisation instead of a learnable factor per channel.
        linear: 1x1 convolutions as linear layers with channels last.
        crop_pct: share of the resized shorter side that the centre crop keeps.
    """
    stages = tuple(
        StageSpec(
            runs=(
                RunSpec(
                    block=BlockSpec(
                        kind="convnext",
                        width=width * 2**i,
                        inner_ratio=4.0,
                        kernels=(7,),
                        activation=ActSpec(kind="gelu"),
                        out_activation=IDENTITY,
                        downsample="patch",
                        linear=linear,
                        grn=v2,
                        layer_scale=0.0 if v2 else 1e-6,
                    ),
                    repeat=repeat,
                ),
            ),
            stride=1 if i == 0 else 2,
        )
        for i, repeat in enumerate(depths)
    )
    return NetSpec(
        name=name,
        family="convnext",
        input=InputSpec(min_size=32, interpolation="bicubic", crop_pct=crop_pct),
        stem=StemSpec(kind="patch", widths=(width,), kernel=4, stride=4, activation=IDENTITY),
        stages=stages,
        head=HeadSpec(pooled_norm=True),
        norm=NormSpec(kind="layernorm", eps=1e-6),
        init="convnext",
    )


SPECS = {
    spec.name: spec
    for v2 in (False, True)
    for spec in (
        convnext(
            f"convnext{'v2' if v2 else ''}_{size}",
            depths,
            width,
            v2=v2,
            linear=size in _LINEAR,
            crop_pct=crops[v2],
        )
        for size, (depths, width, *crops) in _SIZES.items()
    )
}
