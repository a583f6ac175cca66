"""Families made for 224 px, on small images."""

from __future__ import annotations

from dataclasses import replace

from convscale.arch.bounds import DROPS_BORDERS
from convscale.arch.parts import StemSpec
from convscale.arch.spec import NetSpec
from convscale.errors import UserError

LEAST_MAP = 2
"""Side in pixels that the last feature map should keep."""


def for_image_size(spec: NetSpec, image_size: int, *, least_map: int = LEAST_MAP) -> NetSpec:
    """The network at ``image_size`` px, with a stem that shrinks less where its last map would otherwise be under
    ``least_map`` px.

    The stem gives way first because its rate was chosen for 224 px: the max-pool goes, then its stride halves (a
    space-to-depth stem takes blocks of 2 instead of 4). Networks whose last map is large enough only change their size.
    A changed one is a baseline of its own for further scaling.

    Raises:
        UserError: the network takes no such size.
    """
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise UserError(f"image size is {image_size!r}; it must be a whole number of at least 1")
    stem = spec.stem
    while _last_side(spec, stem, image_size) < least_map and stem.reduction > 1:
        stem = _gentler(stem)
    if stem == spec.stem:
        spec.check_size(image_size)
        return replace(spec, input=replace(spec.input, size=image_size))
    multiple = stem.stride if stem.kind == "space_to_depth" else 1
    least = next(size for size in range(multiple, 1 << 12, multiple) if _survives(spec, stem, size))
    if image_size < least or image_size % multiple:
        raise UserError(f"image size is {image_size} px; {spec.name} takes a multiple of {multiple} from {least} px up")
    pixels = replace(spec.input, size=image_size, multiple=multiple, min_size=least)
    return replace(spec, name=f"{spec.name}-{image_size}px", stem=stem, input=pixels, lineage=None)


def _gentler(stem: StemSpec) -> StemSpec:
    """The stem with half its reduction."""
    if stem.pool:
        return replace(stem, pool=False)
    if stem.kind == "space_to_depth" and stem.stride == 2:
        return replace(stem, kind="conv", stride=1)
    if stem.kind == "patch":
        return replace(stem, stride=stem.stride // 2, kernel=stem.kernel // 2)
    return replace(stem, stride=stem.stride // 2)


def _survives(spec: NetSpec, stem: StemSpec, size: int) -> bool:
    """Whether every blur of ``spec`` gets a map of at least 2 x 2 pixels, which it needs to reflect, and every patch
    is whole.
    """
    side = _first_side(stem, size)
    for stage in spec.stages:
        if stage.stride == 2:
            how = stage.runs[0].block.downsample
            if side < 2 and how in ("blur", *DROPS_BORDERS):
                return False
            side = _halved(side, how)
    return side > 0


def _last_side(spec: NetSpec, stem: StemSpec, size: int) -> int:
    """Side of the last map in pixels; 0 where nothing is left."""
    side = _first_side(stem, size)
    for stage in spec.stages:
        side = _halved(side, stage.runs[0].block.downsample) if stage.stride == 2 else side
    return side


def _first_side(stem: StemSpec, size: int) -> int:
    """Side of the stem's output in pixels."""
    return size // stem.stride if stem.kind == "patch" else -(-size // stem.reduction)


def _halved(side: int, how: str) -> int:
    """Side of a map after a stride of 2."""
    return side // 2 if how in DROPS_BORDERS else -(-side // 2)
