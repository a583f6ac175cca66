"""EfficientNet (Tan & Le, arXiv 1905.11946), its Lite form, and both with TensorFlow's padding."""

from __future__ import annotations

from dataclasses import replace

from convscale.arch.block import StageSpec
from convscale.arch.multipliers import scale_to
from convscale.arch.parts import RELU6, SILU, ActSpec, HeadSpec, InputSpec, NormSpec, ScalingRules, StemSpec
from convscale.arch.rows import INCEPTION_MEAN, INCEPTION_STD, run, stages
from convscale.arch.spec import NetSpec


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
    return stages(
        *((stride, (run(repeat, kernel, exp, width, act, se=se),)) for repeat, kernel, stride, exp, width in table)
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


def _tensorflow(base: NetSpec, pixels: InputSpec) -> NetSpec:
    """TensorFlow's SAME padding and batch-norm epsilon."""
    return replace(base, name=f"tf_{base.name}", padding="same", norm=NormSpec(eps=1e-3), input=pixels)


_TF_B0 = _tensorflow(_B0, _B0.input)
_TF_LITE0 = _tensorflow(_LITE0, replace(_LITE0.input, mean=INCEPTION_MEAN, std=INCEPTION_STD))
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
    )
}
