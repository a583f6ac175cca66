"""RegNetX and RegNetY (Radosavovic et al., arXiv 2003.13678): stages cut from one line of block widths."""

from __future__ import annotations

import math
from collections import Counter

from convscale.arch.block import BlockSpec, RunSpec, SESpec, StageSpec
from convscale.arch.parts import InputSpec, StemSpec
from convscale.arch.spec import NetSpec

_QUANTUM = 8
"""Widths along the line are multiples of this (section 3.3)."""


def regnet(
    name: str,
    depth: int,
    initial_width: int,
    slope: float,
    step: float,
    group_width: int,
    *,
    se: bool = False,
    min_fraction: float = 0.0,
) -> NetSpec:
    """A RegNet of its design space's parameters (section 3.3): block j of ``depth`` would be u_j = w_0 + w_a j channels
    wide, and is as wide as the power w_0 w_m^s nearest to it. Blocks of one width are a stage. Bottlenecks do not
    narrow.

    Args:
        name: of the spec.
        depth: blocks in all.
        initial_width: w_0.
        slope: w_a.
        step: w_m, between widths of neighbouring stages.
        group_width: channels per group of the 3x3 convolutions, at most the stage's width; widths round to whole
            groups.
        se: squeeze-and-excitation to a quarter of the block's input (RegNetY).
        min_fraction: 0: widths half-way between whole groups round to the even number of them, as in the paper's code;
            above: they round up, and so does what would fall below this share (torchvision's rule).
    """
    powers = [round(math.log1p(slope * j / initial_width) / math.log(step)) for j in range(depth)]
    blocks = Counter(round(initial_width * step**power / _QUANTUM) * _QUANTUM for power in powers)
    stages = tuple(
        StageSpec(runs=(RunSpec(block=_block(width, group_width, se, min_fraction), repeat=repeat),), stride=2)
        for width, repeat in sorted(blocks.items())
    )
    return NetSpec(
        name=name,
        family="regnet",
        input=InputSpec(interpolation="bicubic"),
        stem=StemSpec(widths=(32,), tap=True),
        stages=stages,
    )


def _block(width: int, group_width: int, se: bool, min_fraction: float) -> BlockSpec:
    group = min(group_width, width)
    whole = max(1, round(width / group)) * group
    if min_fraction:
        whole = max(group, int(width + group / 2) // group * group)
        whole += group if whole < min_fraction * width else 0
    return BlockSpec(kind="bottleneck", width=whole, group_width=group, se=SESpec() if se else None)


# depth, w_0, w_a, w_m, group width: of the released networks (appendix D gives the widths that they lead to)
_X = {
    "002": (13, 24, 36.44, 2.49, 8),
    "004": (22, 24, 24.48, 2.54, 16),
    "006": (16, 48, 36.97, 2.24, 24),
    "008": (16, 56, 35.73, 2.28, 16),
    "016": (18, 80, 34.01, 2.25, 24),
    "032": (25, 88, 26.31, 2.25, 48),
    "040": (23, 96, 38.65, 2.43, 40),
    "064": (17, 184, 60.83, 2.07, 56),
    "080": (23, 80, 49.56, 2.88, 120),
    "120": (19, 168, 73.36, 2.37, 112),
    "160": (22, 216, 55.59, 2.1, 128),
    "320": (23, 320, 69.86, 2.0, 168),
}
_Y = {
    "002": (13, 24, 36.44, 2.49, 8),
    "004": (16, 48, 27.89, 2.09, 8),
    "006": (15, 48, 32.54, 2.32, 16),
    "008": (14, 56, 38.84, 2.4, 16),
    "016": (27, 48, 20.71, 2.65, 24),
    "032": (21, 80, 42.63, 2.66, 24),
    "040": (22, 96, 31.41, 2.24, 64),
    "064": (25, 112, 33.22, 2.27, 72),
    "080": (17, 192, 76.82, 2.19, 56),
    "120": (19, 168, 73.36, 2.37, 112),
    "160": (18, 200, 106.23, 2.48, 112),
    "320": (20, 232, 115.89, 2.53, 232),
}
_TV_FRACTION = 0.9
"""torchvision's rounding to whole groups, which makes these three other networks."""
SPECS = {
    spec.name: spec
    for spec in (
        *(regnet(f"regnetx_{size}", *row) for size, row in _X.items()),
        *(regnet(f"regnety_{size}", *row, se=True) for size, row in _Y.items()),
        regnet("regnetx_004_tv", *_X["004"], min_fraction=_TV_FRACTION),
        *(regnet(f"regnety_{size}_tv", *_Y[size], se=True, min_fraction=_TV_FRACTION) for size in ("008", "080")),
    )
}
