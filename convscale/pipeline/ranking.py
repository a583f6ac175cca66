"""In which order networks are promising whose features were tried on the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from convscale.show.fit_parts import Candidate as Row
from convscale.show.fit_parts import Probed
from convscale.stats import standard_error

WORTH_POINTS = 0.5
"""A probe within this many points of another's, or within a standard error, is no worse: what was published decides
between them."""

T = TypeVar("T")


def no_worse(rows: Sequence[Row], multilabel: bool) -> float:
    """How far a probe may lie behind the best of these and be no worse, as a share: ``WORTH_POINTS`` or a standard
    error.
    """
    first = max((row.probe for row in rows if row.probe), key=lambda one: one.top1 or 0.0, default=Probed())
    least = WORTH_POINTS / 100
    # to what a mean average precision is known is not said by the number of images
    return least if multilabel else max(least, standard_error(first.top1 or 0.0, first.validation or 1))


def by_promise(things: Sequence[T], rows: Sequence[Row], multilabel: bool) -> list[T]:
    """What belongs to probed rows, the most promising first: by features; where those of two are as good by what was
    published for their image size, and where nothing was by the features after all.
    """
    probes = [(row.probe.top1 if row.probe else None) or 0.0 for row in rows]
    best, worth = max(probes, default=0.0), no_worse(rows, multilabel)

    def promise(number: int) -> tuple[int, float, float]:
        behind = best - probes[number]
        return math.floor(behind / worth + 1e-9), -(rows[number].published_top1 or 0.0), behind

    return [things[number] for number in sorted(range(len(things)), key=promise)]
