"""Which candidates fit trains briefly: those that keep the speed, the largest of each family first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from convscale.arch.spec import NetSpec
from convscale.errors import UserError

FIT_FAMILIES = ("tresnet_m", "efficientnet_b0", "resnet50d")
"""Baselines whose scaled members `fit` tries by itself: the two papers' and the strongest plain one."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A candidate whose speed is known."""

    spec: NetSpec
    """The network."""
    family: str
    """The baseline that it was scaled from: candidates of one family are ranked by size."""
    macs: int
    """Multiply-accumulates per image."""
    images_per_s: float
    """Images a second."""


def finalists(timed: Sequence[Timed], min_throughput: float, most: int = 3) -> list[Timed]:
    """Up to ``most`` candidates that keep ``min_throughput`` images/s: each family's largest, then the largest of the
    rest.

    Within a family a larger member is the more accurate one (EfficientNet, section 3); between families only training
    can tell.

    Raises:
        UserError: none keeps it; the fastest and its speed are named.
    """
    if not timed:
        raise UserError("there are no candidates; name at least one network")
    fast = sorted((c for c in timed if c.images_per_s >= min_throughput), key=lambda c: -c.macs)
    if not fast:
        best = max(timed, key=lambda c: c.images_per_s)
        raise UserError(
            f"no candidate keeps {min_throughput:,.0f} images/s; the fastest is {best.spec.name} with "
            f"{best.images_per_s:,.0f} images/s: "
            "lower the constraint, the image size or the batch"
        )
    leaders: dict[str, Timed] = {}
    for candidate in fast:
        leaders.setdefault(candidate.family, candidate)
    chosen = list(leaders.values())[:most]
    chosen += [c for c in fast if c not in chosen][: most - len(chosen)]
    return chosen
