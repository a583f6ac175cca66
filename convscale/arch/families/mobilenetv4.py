"""MobileNetV4's networks without attention (Qin et al., arXiv 2404.10518) with timm's rows, and timm's forms of them
that smooth maps before they shrink. The large one has 6.4 billion MACs at 384 px where the paper says 5.9.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from convscale.arch.block import BlockSpec, RunSpec, StageSpec
from convscale.arch.multipliers import scale_to
from convscale.arch.parts import IDENTITY, RELU, HeadSpec, InputSpec, ScalingRules, StemSpec
from convscale.arch.rows import INCEPTION_MEAN, INCEPTION_STD, conv, stages
from convscale.arch.spec import NetSpec


def _fused(kernel: int, expansion: float, width: int) -> RunSpec:
    """A fused inverted bottleneck."""
    block = BlockSpec(
        kind="fused_inverted_residual",
        width=width,
        inner_ratio=expansion,
        inner_divisor=8,
        kernels=(kernel,),
        out_activation=IDENTITY,
    )
    return RunSpec(block=block)


def _row(repeat: int, start: int, middle: int, expansion: float, width: int) -> RunSpec:
    """Universal inverted bottlenecks by the kernel sizes of their two depthwise convolutions, 0 where there is none."""
    block = BlockSpec(
        kind="universal",
        width=width,
        inner_ratio=expansion,
        inner_divisor=8,
        start_kernel=start,
        kernels=(middle,) if middle else (),
        out_activation=IDENTITY,
    )
    return RunSpec(block=block, repeat=repeat)


def _last(width: int = 960) -> tuple[int, tuple[RunSpec, ...]]:
    return 1, (conv(1, 1, width, RELU),)


_SMALL = stages(
    (2, (conv(1, 3, 32, RELU), conv(1, 1, 32, RELU))),
    (2, (conv(1, 3, 96, RELU), conv(1, 1, 64, RELU))),
    (2, (_row(1, 5, 5, 3, 96), _row(4, 0, 3, 2, 96), _row(1, 3, 0, 4, 96))),
    (
        2,
        (
            _row(1, 3, 3, 6, 128),
            _row(1, 5, 5, 4, 128),
            _row(1, 0, 5, 4, 128),
            _row(1, 0, 5, 3, 128),
            _row(2, 0, 3, 4, 128),
        ),
    ),
    _last(),
)
_MEDIUM = stages(
    (2, (_fused(3, 4, 48),)),
    (2, (_row(1, 3, 5, 4, 80), _row(1, 3, 3, 2, 80))),
    (
        2,
        (
            _row(1, 3, 5, 6, 160),
            _row(2, 3, 3, 4, 160),
            _row(1, 3, 5, 4, 160),
            _row(1, 3, 3, 4, 160),
            _row(1, 3, 0, 4, 160),
            _row(1, 0, 0, 2, 160),
            _row(1, 3, 0, 4, 160),
        ),
    ),
    (
        2,
        (
            _row(1, 5, 5, 6, 256),
            _row(1, 5, 5, 4, 256),
            _row(2, 3, 5, 4, 256),
            _row(1, 0, 0, 4, 256),
            _row(1, 3, 0, 4, 256),
            _row(1, 3, 5, 2, 256),
            _row(1, 5, 5, 4, 256),
            _row(2, 0, 0, 4, 256),
            _row(1, 5, 0, 2, 256),
        ),
    ),
    _last(),
)
_LARGE = stages(
    (2, (_fused(3, 4, 48),)),
    (2, (_row(1, 3, 5, 4, 96), _row(1, 3, 3, 4, 96))),
    (
        2,
        (
            _row(1, 3, 5, 4, 192),
            _row(3, 3, 3, 4, 192),
            _row(1, 3, 5, 4, 192),
            _row(5, 5, 3, 4, 192),
            _row(1, 3, 0, 4, 192),
        ),
    ),
    (
        2,
        (
            _row(4, 5, 5, 4, 512),
            _row(1, 5, 0, 4, 512),
            _row(1, 5, 3, 4, 512),
            _row(2, 5, 0, 4, 512),
            _row(1, 5, 3, 4, 512),
            _row(1, 5, 5, 4, 512),
            _row(3, 5, 0, 4, 512),
        ),
    ),
    _last(),
)


def _mobilenetv4(
    name: str, table: tuple[StageSpec, ...], *, stem: int = 32, size: int = 224, crop_pct: float = 0.95
) -> NetSpec:
    return NetSpec(
        name=name,
        family="mobilenetv4",
        input=InputSpec(size=size, interpolation="bicubic", crop_pct=crop_pct),
        stem=StemSpec(widths=(stem,), tap=True),
        stages=table,
        head=HeadSpec(pooled_width=1280, pooled_norm=True),
        init="efficientnet",
        scaling=ScalingRules(fixed_depth_stages=(0, -1), stem="fixed", head="fixed"),
    )


def _smoothed(
    base: NetSpec, name: str, how: Literal["avgpool", "blur_zeros"], *, size: int, min_size: int = 1
) -> NetSpec:
    """``base`` with another way to take strides."""

    def changed(stage: StageSpec) -> StageSpec:
        return replace(stage, runs=tuple(replace(run, block=replace(run.block, downsample=how)) for run in stage.runs))

    pixels = replace(base.input, size=size, min_size=min_size)
    return replace(base, name=name, input=pixels, stages=tuple(changed(stage) for stage in base.stages))


_CONV_S = _mobilenetv4("mobilenetv4_conv_small", _SMALL, crop_pct=0.875)
_CONV_M = _mobilenetv4("mobilenetv4_conv_medium", _MEDIUM, size=256)
_CONV_L = _mobilenetv4("mobilenetv4_conv_large", _LARGE, stem=24, size=384)
_HALF = scale_to(_CONV_S, width=0.5, name="mobilenetv4_conv_small_050")
_LEAST_POOLED = 31
"""px: four average pools halve 16 px, what the stem leaves of it, to one."""
SPECS = {
    spec.name: spec
    for spec in (
        replace(_HALF, input=replace(_HALF.input, mean=INCEPTION_MEAN, std=INCEPTION_STD)),
        _CONV_S,
        _CONV_M,
        _CONV_L,
        _smoothed(_CONV_M, "mobilenetv4_conv_aa_medium", "avgpool", size=256, min_size=_LEAST_POOLED),
        _smoothed(_CONV_L, "mobilenetv4_conv_aa_large", "avgpool", size=448, min_size=_LEAST_POOLED),
        _smoothed(_CONV_M, "mobilenetv4_conv_blur_medium", "blur_zeros", size=224),
    )
}
