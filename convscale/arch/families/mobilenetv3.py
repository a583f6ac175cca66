"""MobileNetV3 (Howard et al., arXiv 1905.02244), tables 1 and 2, and the authors' minimalistic form, which has neither
squeeze-and-excitation nor hard-swish nor 5x5 kernels.
"""

from __future__ import annotations

from dataclasses import replace

from convscale.arch.block import StageSpec
from convscale.arch.multipliers import scale_to
from convscale.arch.parts import HARDSWISH, RELU, HeadSpec, InputSpec, NormSpec, ScalingRules, StemSpec
from convscale.arch.rows import INCEPTION_MEAN, INCEPTION_STD, V3_SE, conv, run, stages
from convscale.arch.spec import NetSpec


def _large(*, minimal: bool) -> tuple[StageSpec, ...]:
    """Table 1."""
    act, five, se = (RELU, 3, 0.0) if minimal else (HARDSWISH, 5, V3_SE)
    return stages(
        (1, (run(1, 3, 0, 16, RELU),)),
        (2, (run(1, 3, 4, 24, RELU), run(1, 3, 3, 24, RELU))),
        (2, (run(3, five, 3, 40, RELU, se=se),)),
        (2, (run(1, 3, 6, 80, act), run(1, 3, 2.5, 80, act), run(2, 3, 2.3, 80, act))),
        (1, (run(2, 3, 6, 112, act, se=se),)),
        (2, (run(3, five, 6, 160, act, se=se),)),
        (1, (conv(1, 1, 960, act),)),
    )


def _small(*, minimal: bool) -> tuple[StageSpec, ...]:
    """Table 2; an expansion of 88 channels from 24 is 3.67."""
    act, five, se = (RELU, 3, 0.0) if minimal else (HARDSWISH, 5, V3_SE)
    return stages(
        (2, (run(1, 3, 0, 16, RELU, se=se),)),
        (2, (run(1, 3, 4.5, 24, RELU), run(1, 3, 3.67, 24, RELU))),
        (2, (run(1, five, 4, 40, act, se=se), run(2, five, 6, 40, act, se=se))),
        (1, (run(2, five, 3, 48, act, se=se),)),
        (2, (run(3, five, 6, 96, act, se=se),)),
        (1, (conv(1, 1, 576, act),)),
    )


def _mobilenetv3(name: str, table: tuple[StageSpec, ...], pooled_width: int, *, minimal: bool = False) -> NetSpec:
    act = RELU if minimal else HARDSWISH
    return NetSpec(
        name=name,
        family="mobilenetv3",
        input=InputSpec(interpolation="bicubic"),
        stem=StemSpec(widths=(16,), activation=act),
        stages=table,
        head=HeadSpec(pooled_width=pooled_width, pooled_bias=True, activation=act, dropout=0.2),
        init="efficientnet",
        scaling=ScalingRules(stem="at_least", head="fixed"),
    )


def _tensorflow(base: NetSpec) -> NetSpec:
    """TensorFlow's SAME padding, batch-norm epsilon and pixels."""
    pixels = replace(base.input, mean=INCEPTION_MEAN, std=INCEPTION_STD, interpolation="bilinear")
    return replace(base, name=f"tf_{base.name}", padding="same", norm=NormSpec(eps=1e-3), input=pixels)


def _large_150d(base: NetSpec) -> NetSpec:
    """timm's deeper and wider one, whose fourth stage shares out its five blocks as 1, 2, 2."""
    scaled = scale_to(base, width=1.5, depth=1.2, image_size=256, name="mobilenetv3_large_150d")
    runs = zip(scaled.stages[3].runs, (1, 2, 2), strict=True)
    fourth = replace(scaled.stages[3], runs=tuple(replace(run, repeat=repeat) for run, repeat in runs))
    return replace(scaled, stages=(*scaled.stages[:3], fourth, *scaled.stages[4:]), lineage=None)


_LARGE = _mobilenetv3("mobilenetv3_large_100", _large(minimal=False), 1280)
_SMALL = _mobilenetv3("mobilenetv3_small_100", _small(minimal=False), 1024)
_TF_LARGE, _TF_SMALL = _tensorflow(_LARGE), _tensorflow(_SMALL)
_MINIMAL_LARGE = _mobilenetv3("mobilenetv3_large_minimal_100", _large(minimal=True), 1280, minimal=True)
_MINIMAL_SMALL = _mobilenetv3("mobilenetv3_small_minimal_100", _small(minimal=True), 1024, minimal=True)
SPECS = {
    spec.name: spec
    for spec in (
        scale_to(_LARGE, width=0.75, name="mobilenetv3_large_075"),
        _LARGE,
        _large_150d(_LARGE),
        scale_to(_SMALL, width=0.5, name="mobilenetv3_small_050"),
        scale_to(_SMALL, width=0.75, name="mobilenetv3_small_075"),
        _SMALL,
        scale_to(_TF_LARGE, width=0.75, name="tf_mobilenetv3_large_075"),
        _TF_LARGE,
        scale_to(_TF_SMALL, width=0.75, name="tf_mobilenetv3_small_075"),
        _TF_SMALL,
        _tensorflow(_MINIMAL_LARGE),
        _tensorflow(_MINIMAL_SMALL),
    )
}
