"""Ways to spend a budget on depth, width and resolution, what came of them, and what there is to say of the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convscale.arch.rules import ScalingRule
from convscale.nas.directions import at_cost

PUBLISHED = ScalingRule(alpha=1.2, beta=1.1, gamma=1.15, name="efficientnet", baseline="efficientnet_b0")
"""EfficientNet, section 3.3: by FLOPs, for B0."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to spend the budget, and what came of it."""

    shares: tuple[float, float, float]
    """Of depth, width and resolution in the logarithm of the nominal cost."""
    alpha: float
    """Depth's multiplier."""
    beta: float
    """Width's."""
    gamma: float
    """Resolution's."""
    cost: float
    """Times the baseline's, as counted, measured or predicted of the rounded network; 0: not known."""
    accuracies: tuple[float, ...] = ()
    """On validation, one for each seed, in [0, 1]."""
    seconds: float = 0.0
    """In training."""
    failed: str = ""
    """Why it can not be trained: it takes no part any more; empty: it can, as far as is known."""

    @property
    def accuracy(self) -> float:
        """Mean over the seeds; -1 before the first."""
        return self.over(len(self.accuracies))

    def over(self, seeds: int) -> float:
        """Mean over the first so many seeds, which all points share; -1 before the first."""
        some = self.accuracies[:seeds]
        return sum(some) / len(some) if some else -1.0

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "shares": list(self.shares), "accuracies": list(self.accuracies)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Point:
        """From what ``to_dict`` gave."""
        return cls(**{**value, "shares": tuple(value["shares"]), "accuracies": tuple(value["accuracies"])})


def notes_on(best: Point, published: Point | None, *, budget: float, cost: str, macs: float | None) -> list[str]:
    """What a rule says of itself: the way found beside EfficientNet's published coefficients, which were found by FLOPs
    for B0, whatever the baseline here is.

    Args:
        best: the way found.
        published: EfficientNet's direction at the budget; None: it was not trained.
        budget: times the baseline's cost.
        cost: ``time`` or ``macs``.
        macs: of the way found, times the baseline's; None: not counted.
    """
    pairs = zip(best.shares, PUBLISHED.shares, strict=True)
    notes = [
        "shares of depth, width and resolution beside EfficientNet's published ones, which were found by FLOPs for B0: "
        + ", ".join(f"{mine:.2f} ({theirs:.2f})" for mine, theirs in pairs)
    ]
    if published is not None:
        seeds = min(len(best.accuracies), len(published.accuracies))
        gain = 100 * (best.over(seeds) - published.over(seeds))
        notes.append(
            f"EfficientNet's direction at {published.cost:.2f} times the cost: {100 * published.accuracy:.2f} % over "
            f"{len(published.accuracies)} seeds; this one gains {gain:+.2f} points"
        )
    if cost == "time":
        depth, width, side = at_cost(budget, best.shares)
        counted = "" if macs is None else f"it has {macs:.2f} times the baseline's multiply-accumulates; "
        notes.append(
            f"{counted}{budget:g} times by FLOPs in the same direction is depth x {depth:.3g}, width x {width:.3g}, "
            f"resolution x {side:.3g}; the direction that FLOPs would choose for this baseline needs a study of its "
            "own (cost macs)"
        )
    return notes
