"""Which network: candidates and a constraint become a choice with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from convscale.arch.scale import scale
from convscale.arch.small import for_image_size
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import as_spec
from convscale.errors import UserError

FIT_FAMILIES = ("tresnet_m", "efficientnet_b0", "resnet50d")
"""Baselines whose scaled members `fit` tries by itself: the two papers' and the strongest plain one."""
SMALL_IMAGE = 64
"""Up to this side in pixels, members are scaled in width and depth alone, at the images' own size."""
_SMALL_STEPS = ((0.25, 0.25), (0.375, 0.25), (0.5, 0.3), (0.75, 0.35))  # width, depth
_PHIS = (-5.0, -4.0, -3.0, -2.0, -1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A candidate whose speed is known."""

    spec: NetSpec
    family: str
    """The baseline that it was scaled from: candidates of one family are ranked by size."""
    macs: int
    """Multiply-accumulates per image."""
    images_per_s: float


def scaled_members(base: NetSpec | str, image_size: int) -> list[NetSpec]:
    """A family's members for images of ``image_size`` px, from the smallest to the largest.

    Small images (up to 64 px) keep their size and get a gentler stem; above, members shrink from ``image_size`` by the compound rule.
    """
    spec = for_image_size(as_spec(base), image_size)
    if image_size <= SMALL_IMAGE:
        label = as_spec(base).name
        return [scale(spec, width=w, depth=d, name=f"{label}-w{w:g}-d{d:g}") for w, d in _SMALL_STEPS]
    return [scale(spec, phi=phi) if phi else spec for phi in _PHIS]


def finalists(timed: Sequence[Timed], min_throughput: float, most: int = 3) -> list[Timed]:
    """Up to ``most`` candidates that keep ``min_throughput`` images/s: each family's largest, then the largest of the rest.

    Within a family a larger member is the more accurate one (EfficientNet, section 3); between families only training can tell.

    Raises:
        UserError: none keeps it; the fastest and its speed are named.
    """
    if not timed:
        raise UserError("there are no candidates; name at least one network")
    fast = sorted((c for c in timed if c.images_per_s >= min_throughput), key=lambda c: -c.macs)
    if not fast:
        best = max(timed, key=lambda c: c.images_per_s)
        raise UserError(
            f"no candidate keeps {min_throughput:,.0f} images/s; the fastest is {best.spec.name} with {best.images_per_s:,.0f} images/s: "
            "lower the constraint, the image size or the batch"
        )
    leaders: dict[str, Timed] = {}
    for candidate in fast:
        leaders.setdefault(candidate.family, candidate)
    chosen = list(leaders.values())[:most]
    chosen += [c for c in fast if c not in chosen][: most - len(chosen)]
    return chosen


def sized(spec: NetSpec, image_size: int | None) -> NetSpec:
    """A named candidate at the size asked for; None: its own."""
    return spec if image_size is None else replace(for_image_size(spec, image_size), name=spec.name)
