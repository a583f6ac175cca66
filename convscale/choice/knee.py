"""What a device can do, and where more speed stops being cheap: the front of accuracy and speed, and its knee."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from convscale.choice.basis import Basis
from convscale.choice.candidates import Candidate
from convscale.choice.decide import Option, front_of, judge
from convscale.choice.facts import NetworkFacts, SizedSpec
from convscale.choice.largest import Effort
from convscale.choice.measured import Bench
from convscale.choice.rows import Rows, as_it_is, by_rows
from convscale.choice.speeds import facts_of
from convscale.conditions import Constraint
from convscale.errors import UserError

SURVEYED = 8
"""Networks that are measured, where this machine is the device."""
ROWS = 5
"""Of the front that are shown."""
NO_LIMIT = Constraint()


@dataclass(frozen=True, kw_only=True)
class Front:
    """What a device can do."""

    rows: tuple[Option, ...]
    """Networks that no other beats in both accuracy and speed, fastest first: five at most, the knee among them."""
    knee: Option
    """Where the front bends most: beyond it accuracy costs much more speed, before it little is gained."""


def survey(
    pool: Sequence[Candidate],
    basis: Basis,
    effort: Effort,
    rows: Rows | None = None,
    constraint: Constraint = NO_LIMIT,
    seen: Callable[[Option], Option] = as_it_is,
) -> Front | None:
    """The front of a device: by prediction from all candidates, by measurement from a few that span it; None where all
    are above a limit on size.

    Args:
        pool: candidates with a published accuracy.
        basis: where and how.
        effort, rows: as for ``choose_from``.
        constraint: limits on parameters and memory.
        seen: as for ``choose_from``.

    Raises:
        UserError: no candidate has an accuracy and a speed.
    """
    claimed = [c for c in pool if c.top1 is not None and not c.why_not]
    wanted = [SizedSpec(c.spec, c.image_size) for c in claimed]
    facts = facts_of([*wanted, *(rows.measured if rows else ())], basis, effort.say)
    if rows is not None:
        facts = by_rows(facts, rows)
    options = [_option(c, facts, basis) for c in claimed]
    usable = [o for o in options if not o.facts.failed]
    options = [o for o in usable if judge(seen(o), constraint)[0] != "no"]
    if usable and not options:
        return None
    if not basis.predicted:
        bench = Bench(basis, facts, records=effort.records, seconds=effort.seconds, say=effort.say)
        likely = _spanning(options, SURVEYED)
        for number, option in enumerate(likely, start=1):
            effort.say(f"measuring {number} of {len(likely)}: {option.label}")
            bench(SizedSpec(option.spec, option.image_size))
        timed = {network: replace(facts[network], speed=speed) for network, speed in bench.speeds.items()}
        options = [_option(o.candidate, timed, basis) for o in likely]
    front = front_of(options)
    if not front:
        raise UserError("no candidate has both an accuracy and a speed; name candidates with released weights")
    at = knee_of([(o.images_per_s or 1.0, o.top1 or 0.0) for o in front])
    return Front(rows=tuple(front[i] for i in _some(len(front), at)), knee=front[at])


def _option(candidate: Candidate, facts: dict[SizedSpec, NetworkFacts], basis: Basis) -> Option:
    known = facts.get(SizedSpec(candidate.spec, candidate.image_size), NetworkFacts())
    return Option(candidate=candidate, facts=known, batch_size=basis.conditions.batch_size)


def _spanning(options: Sequence[Option], most: int) -> list[Option]:
    """At most ``most`` of those that no other beats in both accuracy and work, spread evenly over the work's logarithm:
    counts stand for speeds that are not known yet.
    """
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.facts.macs, -(o.top1 or 0.0))):
        if not best or (option.top1 or 0.0) > (best[-1].top1 or 0.0):
            best.append(option)
    if len(best) <= most:
        return best
    work = [math.log(max(o.facts.macs, 1)) for o in best]
    marks = [work[0] + (work[-1] - work[0]) * i / (most - 1) for i in range(most)]
    chosen = {min(range(len(best)), key=lambda i, mark=mark: abs(work[i] - mark)) for mark in marks}
    return [best[i] for i in sorted(chosen)]


def knee_of(points: Sequence[tuple[float, float]]) -> int:
    """The index of the knee of a front: farthest above the line between its ends, speeds in logarithms, both axes
    scaled to the front's extent (Satopaa et al. 2011, "Finding a kneedle in a haystack"). A front of one or two points
    has its knee at the more accurate end.

    Args:
        points: (images/s, accuracy), fastest first, accuracy rising.
    """
    if len(points) <= 2:
        return len(points) - 1
    (fast, low), (slow, high) = points[0], points[-1]
    width, height = math.log(fast / slow), high - low
    if width <= 0 or height <= 0:
        return len(points) - 1

    def above(point: tuple[float, float]) -> float:
        return (point[1] - low) / height - math.log(fast / point[0]) / width

    return max(range(len(points)), key=lambda i: (above(points[i]), i))


def _some(count: int, must: int) -> list[int]:
    """At most ``ROWS`` indices of ``count``, the ends and ``must`` among them, the others spread evenly."""
    if count <= ROWS:
        return list(range(count))
    chosen = {0, must, count - 1}
    for i in range(1, ROWS - 1):
        if len(chosen) < ROWS:
            chosen.add(round(i * (count - 1) / (ROWS - 1)))
    left = (i for i in range(count) if i not in chosen)
    while len(chosen) < ROWS:
        chosen.add(next(left))
    return sorted(chosen)
