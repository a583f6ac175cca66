"""MobileNetV1 (Howard et al., arXiv 1704.04861) and V2 (Sandler et al., 1801.04381), MnasNet-B1 (Tan et al.,
1807.11626).
"""

from __future__ import annotations

from dataclasses import replace

from convscale.arch.block import StageSpec
from convscale.arch.multipliers import scale_to
from convscale.arch.parts import RELU, RELU6, HeadSpec, InputSpec, ScalingRules, StemSpec
from convscale.arch.rows import INCEPTION_MEAN, INCEPTION_STD, run, stages
from convscale.arch.spec import NetSpec

_V1 = NetSpec(
    name="mobilenetv1_100",
    family="mobilenet",
    input=InputSpec(interpolation="bicubic", mean=INCEPTION_MEAN, std=INCEPTION_STD),
    stem=StemSpec(widths=(32,), activation=RELU6),
    stages=tuple(
        StageSpec(runs=(replace(run, block=replace(run.block, out_activation=RELU6)),), stride=stride)
        for stride, run in (
            (1, run(1, 3, 0, 64, RELU6, skip=False)),
            (2, run(2, 3, 0, 128, RELU6, skip=False)),
            (2, run(2, 3, 0, 256, RELU6, skip=False)),
            (2, run(6, 3, 0, 512, RELU6, skip=False)),
            (2, run(2, 3, 0, 1024, RELU6, skip=False)),
        )
    ),
    init="efficientnet",
)
_V2 = NetSpec(
    name="mobilenetv2_100",
    family="mobilenet",
    input=InputSpec(interpolation="bicubic"),
    stem=StemSpec(widths=(32,), activation=RELU6),
    stages=stages(
        (1, (run(1, 3, 0, 16, RELU6),)),
        (2, (run(2, 3, 6, 24, RELU6),)),
        (2, (run(3, 3, 6, 32, RELU6),)),
        (2, (run(4, 3, 6, 64, RELU6),)),
        (1, (run(3, 3, 6, 96, RELU6),)),
        (2, (run(3, 3, 6, 160, RELU6),)),
        (1, (run(1, 3, 6, 320, RELU6),)),
    ),
    head=HeadSpec(width=1280, activation=RELU6, dropout=0.2),
    init="efficientnet",
    scaling=ScalingRules(head="at_least"),
)
_MNAS = NetSpec(
    name="mnasnet_100",
    family="mnasnet",
    input=InputSpec(interpolation="bicubic"),
    stem=StemSpec(widths=(32,)),
    stages=stages(
        (1, (run(1, 3, 0, 16, RELU, skip=False),)),
        (2, (run(3, 3, 3, 24, RELU),)),
        (2, (run(3, 5, 3, 40, RELU),)),
        (2, (run(3, 5, 6, 80, RELU),)),
        (1, (run(2, 3, 6, 96, RELU),)),
        (2, (run(4, 5, 6, 192, RELU),)),
        (1, (run(1, 3, 6, 320, RELU, skip=False),)),
    ),
    head=HeadSpec(width=1280, dropout=0.2),
    init="efficientnet",
    scaling=ScalingRules(head="fixed"),
)
SPECS = {
    spec.name: spec
    for spec in (
        _V1,
        scale_to(_V2, width=0.5, name="mobilenetv2_050"),
        _V2,
        scale_to(_V2, width=1.4, name="mobilenetv2_140"),
        _MNAS,
    )
}
