"""Rows of the tables in which papers write nets of depthwise blocks."""

from __future__ import annotations

from typing import Literal

from convscale.arch.block import BlockSpec, RunSpec, SESpec, StageSpec
from convscale.arch.parts import IDENTITY, RELU, ActSpec

INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)
"""Pixels in [-1, 1], as TensorFlow's mobile nets take them."""
V3_SE = SESpec(ratio=0.25, of="inner", divisor=8, min_fraction=0.9, activation=RELU, gate="hardsigmoid")
"""Squeeze-and-excitation of MobileNetV3 (section 5.3): to a quarter of the expansion."""


def run(
    repeat: int,
    kernels: int | tuple[int, ...],
    expansion: float,
    width: int,
    act: ActSpec,
    *,
    se: float | SESpec = 0.0,
    split: Literal["", "p", "ep"] = "",
    skip: bool = True,
) -> RunSpec:
    """One row of a table; expansion 0 is a depthwise-separable block; ``se``: the squeezed width over the block's
    input's, or all of it; ``split`` names the 1x1s that MixNet splits in two: expand, project.
    """
    block = BlockSpec(
        kind="inverted_residual" if expansion else "depthwise_separable",
        width=width,
        inner_ratio=float(expansion or 1),
        inner_divisor=8 if expansion else 1,
        kernels=kernels if isinstance(kernels, tuple) else (kernels,),
        expand_groups=2 if "e" in split else 1,
        project_groups=2 if "p" in split else 1,
        se=se if isinstance(se, SESpec) else SESpec(ratio=se, activation=act) if se else None,
        activation=act,
        out_activation=IDENTITY,
        skip=skip,
    )
    return RunSpec(block=block, repeat=repeat)


def fused(repeat: int, kernel: int, expansion: float, width: int, act: ActSpec) -> RunSpec:
    """A row of blocks whose expansion is the spatial convolution."""
    block = BlockSpec(
        kind="fused_inverted_residual",
        width=width,
        inner_ratio=float(expansion),
        inner_divisor=8,
        kernels=(kernel,),
        activation=act,
        out_activation=IDENTITY,
    )
    return RunSpec(block=block, repeat=repeat)


def conv(repeat: int, kernel: int, width: int, act: ActSpec, *, skip: bool = False) -> RunSpec:
    """A row of plain convolutions, each with norm and activation."""
    block = BlockSpec(kind="conv", width=width, kernels=(kernel,), activation=act, out_activation=IDENTITY, skip=skip)
    return RunSpec(block=block, repeat=repeat)


def stages(*rows: tuple[int, tuple[RunSpec, ...]]) -> tuple[StageSpec, ...]:
    """Stages of (stride, runs); the last one at each resolution is a feature tap."""
    strides = [stride for stride, _ in rows]
    last = [i + 1 == len(rows) or strides[i + 1] == 2 for i in range(len(rows))]
    return tuple(StageSpec(runs=runs, stride=stride, tap=tap) for (stride, runs), tap in zip(rows, last, strict=True))
