"""Ways to share a budget between depth, width and resolution: shares, and the multipliers that they come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

STEPS = 4
"""Parts that a budget is shared out in: 15 ways to give them to depth, width and resolution."""
MOST = 16.0
"""Times the nominal cost, up to which a budget of time is looked for."""
_LOOKS = 7
_NEAR = 0.02
"""Of the budget, within which a cost is close enough."""


def directions(steps: int = STEPS) -> list[tuple[float, float, float]]:
    """All ways to give ``steps`` equal parts to depth, width and resolution, as shares that add up to 1."""
    return [
        (depth / steps, width / steps, (steps - depth - width) / steps)
        for depth in range(steps + 1)
        for width in range(steps + 1 - depth)
    ]


def spread(points: Sequence[tuple[float, float, float]], count: int) -> list[tuple[float, float, float]]:
    """So many of the points, each the farthest from those before it; the first stays first."""
    chosen = list(points[:1])
    while len(chosen) < min(count, len(points)):
        left = [point for point in points if point not in chosen]
        chosen.append(max(left, key=lambda point: min(math.dist(point, other) for other in chosen)))
    return chosen


def in_groups(points: Sequence[tuple[float, float, float]], size: int) -> list[Sequence[tuple[float, float, float]]]:
    """The points in their order, so many at a time."""
    return [points[at : at + size] for at in range(0, len(points), size)]


def at_cost(nominal: float, shares: tuple[float, float, float]) -> tuple[float, float, float]:
    """Multipliers of depth, width and resolution whose nominal cost, depth * width^2 * resolution^2, is this one."""
    return nominal ** shares[0], nominal ** (shares[1] / 2), nominal ** (shares[2] / 2)


def reach(cost_at: Callable[[float], float], budget: float) -> tuple[float, float]:
    """(nominal cost, cost) nearest to the budget, by bisection of the logarithm; rounding makes costs jump.

    Args:
        cost_at: times the baseline's cost, by the nominal one.
        budget: what it should be.
    """
    low, high, at = 0.0, math.log(MOST), math.log(budget)
    tried: list[tuple[float, float]] = []
    for _ in range(_LOOKS):
        tried.append((math.exp(at), cost_at(math.exp(at))))
        if abs(tried[-1][1] / budget - 1) < _NEAR:
            break
        low, high = (at, high) if tried[-1][1] < budget else (low, at)
        at = (low + high) / 2
    return min(tried, key=lambda one: abs(math.log(one[1] / budget)))


def unit(shares: tuple[float, float, float]) -> dict[str, float]:
    """Shares as two numbers in [0, 1]."""
    left = 1 - shares[0]
    return {"depth": shares[0], "rest": shares[1] / left if left > 1e-12 else 0.0}
