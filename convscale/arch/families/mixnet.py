"""MixNet (Tan & Le, arXiv 1907.09595): depthwise convolutions of several kernel sizes side by side."""

from __future__ import annotations

from convscale.arch.block import StageSpec
from convscale.arch.multipliers import scale_to
from convscale.arch.parts import RELU, SILU, HeadSpec, InputSpec, ScalingRules, StemSpec
from convscale.arch.rows import run, stages
from convscale.arch.spec import NetSpec


def _mixnet(name: str, stem: int, table: tuple[StageSpec, ...], dropout: float) -> NetSpec:
    return NetSpec(
        name=name,
        family="mixnet",
        input=InputSpec(interpolation="bicubic"),
        stem=StemSpec(widths=(stem,)),
        stages=table,
        head=HeadSpec(width=1536, dropout=dropout),
        init="efficientnet",
        scaling=ScalingRules(head="fixed"),
    )


_K2, _K3, _K4, _K5 = (3, 5), (3, 5, 7), (3, 5, 7, 9), (3, 5, 7, 9, 11)
_MIX_S = _mixnet(  # MixNet, figure 4 (searched on ImageNet)
    "mixnet_s",
    16,
    stages(
        (1, (run(1, 3, 0, 16, RELU),)),
        (2, (run(1, 3, 6, 24, RELU, split="ep"), run(1, 3, 3, 24, RELU, split="ep"))),
        (2, (run(1, _K3, 6, 40, SILU, se=0.5), run(3, _K2, 6, 40, SILU, se=0.5, split="ep"))),
        (2, (run(1, _K3, 6, 80, SILU, se=0.25, split="p"), run(2, _K2, 6, 80, SILU, se=0.25, split="p"))),
        (1, (run(1, _K3, 6, 120, SILU, se=0.5, split="ep"), run(2, _K4, 3, 120, SILU, se=0.5, split="ep"))),
        (2, (run(1, _K5, 6, 200, SILU, se=0.5), run(2, _K4, 6, 200, SILU, se=0.5, split="p"))),
    ),
    0.2,
)
_MIX_M = _mixnet(
    "mixnet_m",
    24,
    stages(
        (1, (run(1, 3, 0, 24, RELU),)),
        (2, (run(1, _K3, 6, 32, RELU, split="ep"), run(1, 3, 3, 32, RELU, split="ep"))),
        (2, (run(1, _K4, 6, 40, SILU, se=0.5), run(3, _K2, 6, 40, SILU, se=0.5, split="ep"))),
        (2, (run(1, _K3, 6, 80, SILU, se=0.25), run(3, _K4, 6, 80, SILU, se=0.25, split="ep"))),
        (1, (run(1, 3, 6, 120, SILU, se=0.5), run(3, _K4, 3, 120, SILU, se=0.5, split="ep"))),
        (2, (run(1, _K4, 6, 200, SILU, se=0.5), run(3, _K4, 6, 200, SILU, se=0.5, split="p"))),
    ),
    0.25,
)
SPECS = {spec.name: spec for spec in (_MIX_S, _MIX_M, scale_to(_MIX_M, width=1.3, name="mixnet_l"))}
