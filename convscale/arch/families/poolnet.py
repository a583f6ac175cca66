"""Plain convolutions and max-pools for small images.

After the networks that set training-time records on CIFAR-10 (Page 2018, "How to train your ResNet"; Jordan 2024, arXiv
2404.00498): three stages, each halved by a 2x2 max-pool behind its first convolution.

There is no published baseline to scale up from: the widest and deepest that still trains in an hour on two cores stands
here, and what keeps a speed is scaled down from it. The convolutions behind a stage's first have a shortcut, without
which the deep ones do not train.
"""

from __future__ import annotations

from dataclasses import replace

from convscale.arch.block import StageSpec
from convscale.arch.parts import RELU, InputSpec, StemSpec
from convscale.arch.rows import conv
from convscale.arch.spec import NetSpec


def _stage(depth: int, width: int) -> StageSpec:
    first, rest = conv(1, 3, width, RELU), conv(depth - 1, 3, width, RELU, skip=True)
    return StageSpec(runs=(replace(first, block=replace(first.block, downsample="maxpool")), rest), stride=2)


_POOLNET = NetSpec(
    name="poolnet",
    family="poolnet",
    input=InputSpec(size=32, min_size=8, crop_pct=1.0),
    stem=StemSpec(widths=(32,), stride=1),
    stages=(_stage(4, 64), _stage(4, 128), _stage(4, 256)),
)
SPECS = {_POOLNET.name: _POOLNET}
