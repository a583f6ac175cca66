"""Intervals, scores and searches that several rooms need."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from convscale.errors import UserError

Z80 = 1.2816
"""Standard normal deviations from the middle to either end of an 80 % interval."""


def chance_above(floor: float, middle: float, low: float, high: float) -> float:
    """Probability that a positive quantity reaches ``floor``, by its 80 % interval: normal in the logarithm on either
    side of the middle, with the deviation of that side.
    """
    gap = math.log(middle / floor)
    width = math.log(middle / low) if gap > 0 else math.log(high / middle)
    if width <= 0:
        return float(gap >= 0)
    return 0.5 * (1 + math.erf(gap / (width / Z80) / math.sqrt(2)))


def reached_with(confidence: float, middle: float, low: float) -> float:
    """What a positive quantity reaches with a probability of at least a half, by its 80 % interval; as
    ``chance_above``.
    """
    deviations = NormalDist().inv_cdf(confidence) / NormalDist().inv_cdf(0.9)
    return middle * (low / middle) ** deviations


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927), 95 % by default.

    Raises:
        UserError: ``n`` is below 1 or ``successes`` outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise UserError(f"a share needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def standard_error(share: float, n: int) -> float:
    """Of a share of ``n`` images: the binomial's deviation. All or none of few images are not known for sure, so the
    share counts as no nearer to an end than one image in n + 1.

    Raises:
        UserError: ``n`` is below 1 or the share outside 0..1.
    """
    if n < 1 or not 0 <= share <= 1:
        raise UserError(f"a share of n needs 0 <= share <= 1 and n >= 1, got {share} of {n}")
    inside = min(max(share, 1 / (n + 1)), n / (n + 1))
    return math.sqrt(inside * (1 - inside) / n)


def average_precisions(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Average precision of each class: the mean of the precisions at which its images are found, by falling score.

    Images of the same score are found together. There is no interpolation (as in scikit-learn and torchmetrics).

    Args:
        logits: (N, classes); any scores that rank.
        truth: zeros and ones (N, classes); an image for which a class is NaN (not known) is left out of that class.

    Returns:
        float64 (classes,), NaN for a class that no image has.
    """
    precisions = np.full(logits.shape[1], np.nan)
    for column in range(logits.shape[1]):
        known = ~np.isnan(truth[:, column])
        score, real = (
            (logits[:, column], truth[:, column]) if known.all() else (logits[known, column], truth[known, column])
        )
        order = np.argsort(-score, kind="stable")
        scores, present = score[order], real[order] > 0
        if not present.any():
            continue
        last = np.append(scores[1:] != scores[:-1], True)  # the last image of each score
        right = np.cumsum(present)[last]
        so_far = np.flatnonzero(last) + 1
        precisions[column] = np.sum(np.diff(right, prepend=0) * (right / so_far)) / right[-1]
    return precisions


def mean_of_known(values: np.ndarray) -> float:
    """The mean of those that are not NaN; NaN where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def largest_true(holds: Callable[[int], bool], low: int, high: int, *, start: int | None = None) -> int | None:
    """The largest whole number in ``low..high`` for which ``holds``; None where it does not even hold for ``low``.

    ``holds`` must be true up to some number and false beyond it. The search doubles its step away from ``start`` until
    the edge lies between two tries, then halves the gap: about ``2 * log2(distance from start to the edge)`` tries.

    Args:
        holds: asked at most once for each number.
        low: the smallest number, included.
        high: the largest, included; at least ``low``.
        start: where to begin; None: ``low``.
    """
    if not low <= high:
        raise ValueError(f"low must not be above high, got {low} and {high}")
    first = low if start is None else min(max(start, low), high)
    step = 1
    if holds(first):
        yes, no = first, high + 1
        while yes < high:
            trial = min(yes + step, high)
            if not holds(trial):
                no = trial
                break
            yes, step = trial, 2 * step
    else:
        yes, no = low - 1, first
        while no > low:
            trial = max(no - step, low)
            if holds(trial):
                yes = trial
                break
            no, step = trial, 2 * step
    while no - yes > 1:
        middle = (yes + no) // 2
        yes, no = (middle, no) if holds(middle) else (yes, middle)
    return yes if yes >= low else None


def smallest_true(holds: Callable[[int], bool], low: int, high: int, *, start: int | None = None) -> int | None:
    """The smallest whole number in ``low..high`` for which ``holds``; None where it does not even hold for ``high``.

    ``holds`` must be false up to some number and true beyond it; arguments as for :func:`largest_true`.
    """
    edge = largest_true(lambda number: not holds(number), low, high, start=start)
    smallest = low if edge is None else edge + 1
    return smallest if smallest <= high else None


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact test of McNemar (1947): how likely a split as uneven as this is, where both are equally good.

    Args:
        only_first: images that the first alone gets right.
        only_second: images that the second alone gets right.

    Returns:
        The two-sided p of a binomial test with even odds; 1 where there is no such image.
    """
    from scipy.stats import binomtest

    n = only_first + only_second
    return 1.0 if n == 0 else float(binomtest(only_first, n, 0.5).pvalue)
