"""EfficientNetV2 (Tan & Le, arXiv 2104.00298; the sizes beside S from the authors' released configurations), with
symmetric and with TensorFlow's padding, and timm's early versions of S (``_rw``).
"""

from __future__ import annotations

from dataclasses import replace

from convscale.arch.block import RunSpec
from convscale.arch.multipliers import scale_to
from convscale.arch.parts import SILU, HeadSpec, InputSpec, NormSpec, ScalingRules, StemSpec
from convscale.arch.rows import INCEPTION_MEAN, INCEPTION_STD, conv, fused, run, stages
from convscale.arch.spec import NetSpec

Row = tuple[int, int, float, int]
"""Repeats, stride, expansion, channels."""


def _efficientnetv2(
    name: str,
    plain: tuple[Row, ...],
    squeezing: tuple[Row, ...],
    *,
    stem: int,
    head: int = 1280,
    dropout: float = 0.2,
    size: int = 224,
    rules: ScalingRules = ScalingRules(),  # noqa: B008 - frozen
) -> NetSpec:
    """A network of table 4's form; every kernel is 3x3.

    Args:
        name: of the spec.
        plain: the stages in front: plain convolutions where nothing expands, else fused blocks.
        squeezing: the stages behind: inverted residuals with squeeze-and-excitation.
        stem: its channels.
        head: channels of the last 1x1 convolution.
        dropout: published rate in front of the classifier.
        size: side in pixels.
        rules: how it scales.
    """
    rows: list[tuple[int, tuple[RunSpec, ...]]] = []
    for repeat, stride, expansion, width in plain:
        blocks = fused(repeat, 3, expansion, width, SILU) if expansion else conv(repeat, 3, width, SILU, skip=True)
        rows.append((stride, (blocks,)))
    for repeat, stride, expansion, width in squeezing:
        rows.append((stride, (run(repeat, 3, expansion, width, SILU, se=0.25),)))
    return NetSpec(
        name=name,
        family="efficientnetv2",
        input=InputSpec(size=size, crop_pct=1.0, interpolation="bicubic"),
        stem=StemSpec(widths=(stem,), activation=SILU),
        stages=stages(*rows),
        head=HeadSpec(width=head, activation=SILU, dropout=dropout),
        init="efficientnet",
        scaling=rules,
    )


def _tensorflow(base: NetSpec, size: int, *, inception: bool = True, crop_pct: float = 1.0) -> NetSpec:
    """TensorFlow's SAME padding, batch-norm epsilon and pixels."""
    pixels = replace(base.input, size=size, crop_pct=crop_pct)
    if inception:
        pixels = replace(pixels, mean=INCEPTION_MEAN, std=INCEPTION_STD)
    return replace(base, name=f"tf_{base.name}", padding="same", norm=NormSpec(eps=1e-3), input=pixels)


_BASE = _efficientnetv2(
    "efficientnetv2_b0",
    ((1, 1, 0, 16), (2, 2, 4, 32), (2, 2, 4, 48)),
    ((3, 2, 4, 96), (5, 1, 6, 112), (8, 2, 6, 192)),
    stem=32,
    size=192,
    rules=ScalingRules(min_fraction=0.0),
)
_S_BEHIND = ((6, 2, 4, 128), (9, 1, 6, 160))
_S = _efficientnetv2(
    "efficientnetv2_s",
    ((2, 1, 0, 24), (4, 2, 4, 48), (4, 2, 4, 64)),
    (*_S_BEHIND, (15, 2, 6, 256)),
    stem=24,
    size=288,
)
_M = _efficientnetv2(
    "efficientnetv2_m",
    ((3, 1, 0, 24), (5, 2, 4, 48), (5, 2, 4, 80)),
    ((7, 2, 4, 160), (14, 1, 6, 176), (18, 2, 6, 304), (5, 1, 6, 512)),
    stem=24,
    dropout=0.3,
    size=320,
)
_L = _efficientnetv2(
    "efficientnetv2_l",
    ((4, 1, 0, 32), (7, 2, 4, 64), (7, 2, 4, 96)),
    ((10, 2, 4, 192), (19, 1, 6, 224), (25, 2, 6, 384), (7, 1, 6, 640)),
    stem=32,
    dropout=0.4,
    size=384,
)
_XL = _efficientnetv2(
    "efficientnetv2_xl",
    ((4, 1, 0, 32), (8, 2, 4, 64), (8, 2, 4, 96)),
    ((16, 2, 4, 192), (24, 1, 6, 256), (32, 2, 6, 512), (8, 1, 6, 640)),
    stem=32,
    dropout=0.4,
    size=384,
)
_RW_S = _efficientnetv2(  # before the authors' code was released: its first stage expands by 1 and projects
    "efficientnetv2_rw_s",
    ((2, 1, 1, 24), (4, 2, 4, 48), (4, 2, 4, 64)),
    (*_S_BEHIND, (15, 2, 6, 272)),
    stem=24,
    head=1792,
    size=288,
)
_RW_M = _efficientnetv2(  # the one before, 1.2 times as wide, 1.2 and behind 1.6 times as deep
    "efficientnetv2_rw_m",
    ((3, 1, 1, 32), (5, 2, 4, 56), (5, 2, 4, 80)),
    ((8, 2, 4, 152), (15, 1, 6, 192), (24, 2, 6, 328)),
    stem=32,
    head=2152,
    size=320,
)
# width, depth, training size in px, crop: of the authors' released configurations (PyTorch users know the sizes as the
# defaults)
_COEFFICIENTS = ((1.0, 1.0, 192, 0.875), (1.0, 1.1, 192, 0.882), (1.1, 1.2, 208, 0.89), (1.2, 1.4, 240, 0.904))
_TF_BASE = _tensorflow(_BASE, _BASE.input.size, inception=False)


def _base_member(i: int) -> NetSpec:
    width, depth, size, crop_pct = _COEFFICIENTS[i]
    spec = scale_to(_TF_BASE, depth=depth, width=width, image_size=size, name=f"tf_efficientnetv2_b{i}")
    return replace(spec, input=replace(spec.input, crop_pct=crop_pct))


SPECS = {
    spec.name: spec
    for spec in (
        *(_base_member(i) for i in range(len(_COEFFICIENTS))),
        _S,
        _M,
        _L,
        _XL,
        _tensorflow(_S, 300),
        *(_tensorflow(base, 384) for base in (_M, _L, _XL)),
        scale_to(_S, width=0.8, depth=0.9, image_size=224, name="efficientnetv2_rw_t"),
        _RW_S,
        _RW_M,
    )
}
