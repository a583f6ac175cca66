"""Nets of depthwise blocks, each a table from its paper.

EfficientNet (arXiv 1905.11946) and its Lite form, MobileNetV1 (1704.04861) and V2 (1801.04381), MnasNet-B1
(1807.11626), MixNet (1907.09595).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from convscale.arch.multipliers import scale_to
from convscale.arch.spec import (
    IDENTITY,
    RELU,
    RELU6,
    SILU,
    ActSpec,
    BlockSpec,
    HeadSpec,
    InputSpec,
    NetSpec,
    NormSpec,
    RunSpec,
    ScalingRules,
    SESpec,
    StageSpec,
    StemSpec,
)

_INCEPTION: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def _run(
    repeat: int,
    kernels: int | tuple[int, ...],
    expansion: float,
    width: int,
    act: ActSpec,
    *,
    se: float = 0.0,
    split: str = "",
    skip: bool = True,
) -> RunSpec:
    """One row of a table; expansion 0 is a depthwise-separable block; ``split`` names the 1x1s that MixNet splits in
    two: expand, project.
    """
    block = BlockSpec(
        kind="inverted_residual" if expansion else "depthwise_separable",
        width=width,
        inner_ratio=float(expansion or 1),
        inner_divisor=8 if expansion else 1,
        kernels=kernels if isinstance(kernels, tuple) else (kernels,),
        expand_groups=2 if "e" in split else 1,
        project_groups=2 if "p" in split else 1,
        se=SESpec(ratio=se, activation=act) if se else None,
        activation=act,
        out_activation=IDENTITY,
        skip=skip,
    )
    return RunSpec(block=block, repeat=repeat)


def _stages(*rows: tuple[int, tuple[RunSpec, ...]]) -> tuple[StageSpec, ...]:
    """Stages of (stride, runs); the last one at each resolution is a feature tap."""
    strides = [stride for stride, _ in rows]
    last = [i + 1 == len(rows) or strides[i + 1] == 2 for i in range(len(rows))]
    return tuple(StageSpec(runs=runs, stride=stride, tap=tap) for (stride, runs), tap in zip(rows, last, strict=True))


def _efficientnet_b0(*, act: ActSpec, se: float) -> tuple[StageSpec, ...]:
    """EfficientNet, table 1."""
    table = (
        (1, 3, 1, 0, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    return _stages(
        *((stride, (_run(repeat, kernel, exp, width, act, se=se),)) for repeat, kernel, stride, exp, width in table)
    )


_B0 = NetSpec(
    name="efficientnet_b0",
    family="efficientnet",
    input=InputSpec(interpolation="bicubic"),
    stem=StemSpec(widths=(32,), activation=SILU),
    stages=_efficientnet_b0(act=SILU, se=0.25),
    head=HeadSpec(width=1280, activation=SILU, dropout=0.2),
    init="efficientnet",
)
_LITE0 = replace(
    _B0,
    name="efficientnet_lite0",
    stem=StemSpec(widths=(32,), activation=RELU6),
    stages=_efficientnet_b0(act=RELU6, se=0.0),
    head=HeadSpec(width=1280, activation=RELU6, dropout=0.2),
    scaling=ScalingRules(fixed_depth_stages=(0, -1), stem="fixed", head="fixed"),
)
_V1 = NetSpec(
    name="mobilenetv1_100",
    family="mobilenet",
    input=InputSpec(interpolation="bicubic", **_INCEPTION),
    stem=StemSpec(widths=(32,), activation=RELU6),
    stages=tuple(
        StageSpec(runs=(replace(run, block=replace(run.block, out_activation=RELU6)),), stride=stride)
        for stride, run in (
            (1, _run(1, 3, 0, 64, RELU6, skip=False)),
            (2, _run(2, 3, 0, 128, RELU6, skip=False)),
            (2, _run(2, 3, 0, 256, RELU6, skip=False)),
            (2, _run(6, 3, 0, 512, RELU6, skip=False)),
            (2, _run(2, 3, 0, 1024, RELU6, skip=False)),
        )
    ),
    init="efficientnet",
)
_V2 = NetSpec(
    name="mobilenetv2_100",
    family="mobilenet",
    input=InputSpec(interpolation="bicubic"),
    stem=StemSpec(widths=(32,), activation=RELU6),
    stages=_stages(
        (1, (_run(1, 3, 0, 16, RELU6),)),
        (2, (_run(2, 3, 6, 24, RELU6),)),
        (2, (_run(3, 3, 6, 32, RELU6),)),
        (2, (_run(4, 3, 6, 64, RELU6),)),
        (1, (_run(3, 3, 6, 96, RELU6),)),
        (2, (_run(3, 3, 6, 160, RELU6),)),
        (1, (_run(1, 3, 6, 320, RELU6),)),
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
    stages=_stages(
        (1, (_run(1, 3, 0, 16, RELU, skip=False),)),
        (2, (_run(3, 3, 3, 24, RELU),)),
        (2, (_run(3, 5, 3, 40, RELU),)),
        (2, (_run(3, 5, 6, 80, RELU),)),
        (1, (_run(2, 3, 6, 96, RELU),)),
        (2, (_run(4, 5, 6, 192, RELU),)),
        (1, (_run(1, 3, 6, 320, RELU, skip=False),)),
    ),
    head=HeadSpec(width=1280, dropout=0.2),
    init="efficientnet",
    scaling=ScalingRules(head="fixed"),
)


def _mixnet(name: str, stem: int, stages: tuple[StageSpec, ...], dropout: float) -> NetSpec:
    return NetSpec(
        name=name,
        family="mixnet",
        input=InputSpec(interpolation="bicubic"),
        stem=StemSpec(widths=(stem,)),
        stages=stages,
        head=HeadSpec(width=1536, dropout=dropout),
        init="efficientnet",
        scaling=ScalingRules(head="fixed"),
    )


_K2, _K3, _K4, _K5 = (3, 5), (3, 5, 7), (3, 5, 7, 9), (3, 5, 7, 9, 11)
_MIX_S = _mixnet(  # MixNet, figure 4 (searched on ImageNet)
    "mixnet_s",
    16,
    _stages(
        (1, (_run(1, 3, 0, 16, RELU),)),
        (2, (_run(1, 3, 6, 24, RELU, split="ep"), _run(1, 3, 3, 24, RELU, split="ep"))),
        (2, (_run(1, _K3, 6, 40, SILU, se=0.5), _run(3, _K2, 6, 40, SILU, se=0.5, split="ep"))),
        (2, (_run(1, _K3, 6, 80, SILU, se=0.25, split="p"), _run(2, _K2, 6, 80, SILU, se=0.25, split="p"))),
        (1, (_run(1, _K3, 6, 120, SILU, se=0.5, split="ep"), _run(2, _K4, 3, 120, SILU, se=0.5, split="ep"))),
        (2, (_run(1, _K5, 6, 200, SILU, se=0.5), _run(2, _K4, 6, 200, SILU, se=0.5, split="p"))),
    ),
    0.2,
)
_MIX_M = _mixnet(
    "mixnet_m",
    24,
    _stages(
        (1, (_run(1, 3, 0, 24, RELU),)),
        (2, (_run(1, _K3, 6, 32, RELU, split="ep"), _run(1, 3, 3, 32, RELU, split="ep"))),
        (2, (_run(1, _K4, 6, 40, SILU, se=0.5), _run(3, _K2, 6, 40, SILU, se=0.5, split="ep"))),
        (2, (_run(1, _K3, 6, 80, SILU, se=0.25), _run(3, _K4, 6, 80, SILU, se=0.25, split="ep"))),
        (1, (_run(1, 3, 6, 120, SILU, se=0.5), _run(3, _K4, 3, 120, SILU, se=0.5, split="ep"))),
        (2, (_run(1, _K4, 6, 200, SILU, se=0.5), _run(3, _K4, 6, 200, SILU, se=0.5, split="p"))),
    ),
    0.25,
)

# width, depth, published size in px, dropout, timm's default size: EfficientNet's released coefficients (PyTorch users
# know the last as the default)
_COEFFICIENTS = (
    (1.0, 1.0, 224, 0.2, 224),
    (1.0, 1.1, 240, 0.2, 240),
    (1.1, 1.2, 260, 0.3, 256),
    (1.2, 1.4, 300, 0.3, 288),
    (1.4, 1.8, 380, 0.4, 320),
    (1.6, 2.2, 456, 0.4, 448),
    (1.8, 2.6, 528, 0.5, 528),
    (2.0, 3.1, 600, 0.5, 600),
)
_CROPS = (0.875, 0.882, 0.89, 0.904, 0.922, 0.934, 0.942, 0.949)
_LITE_SIZES = (224, 240, 260, 300, 380)


def _member(base: NetSpec, name: str, i: int, size: int, *, dropout: float) -> NetSpec:
    width, depth = _COEFFICIENTS[i][:2]
    spec = scale_to(base, depth=depth, width=width, image_size=size, name=name)
    return replace(spec, input=replace(spec.input, crop_pct=_CROPS[i]), head=replace(spec.head, dropout=dropout))


def _tensorflow(base: NetSpec, **preprocessing: Any) -> NetSpec:
    """TensorFlow's SAME padding and batch-norm epsilon."""
    return replace(
        base,
        name=f"tf_{base.name}",
        padding="same",
        norm=NormSpec(eps=1e-3),
        input=replace(base.input, **preprocessing),
    )


_TF_B0, _TF_LITE0 = _tensorflow(_B0), _tensorflow(_LITE0, **_INCEPTION)
SPECS = {
    spec.name: spec
    for spec in (
        *(_member(_B0, f"efficientnet_b{i}", i, row[4], dropout=row[3]) for i, row in enumerate(_COEFFICIENTS)),
        *(_member(_TF_B0, f"tf_efficientnet_b{i}", i, row[2], dropout=row[3]) for i, row in enumerate(_COEFFICIENTS)),
        *(
            _member(_LITE0, f"efficientnet_lite{i}", i, size, dropout=min(0.3, _COEFFICIENTS[i][3]))
            for i, size in enumerate(_LITE_SIZES)
        ),
        *(
            _member(_TF_LITE0, f"tf_efficientnet_lite{i}", i, size, dropout=min(0.3, _COEFFICIENTS[i][3]))
            for i, size in enumerate(_LITE_SIZES)
        ),
        _V1,
        scale_to(_V2, width=0.5, name="mobilenetv2_050"),
        _V2,
        scale_to(_V2, width=1.4, name="mobilenetv2_140"),
        _MNAS,
        _MIX_S,
        _MIX_M,
        scale_to(_MIX_M, width=1.3, name="mixnet_l"),
    )
}
