"""Networks that a busy machine may have made too slow are timed once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from convscale.arch.spec import NetSpec
from convscale.choice.decide import Option, judge
from convscale.choice.facts import SizedSpec, Speed
from convscale.choice.measured import sized_spec_of
from convscale.choice.members import Found, largest_member
from convscale.choice.speeds import Say
from convscale.conditions import Constraint
from convscale.errors import UserError
from convscale.show.fit_parts import Timed

NARROW = 1.5
"""A network that would have to be so many times as fast is too slow on a quiet machine too."""
MOST = 3
"""Networks that are timed once more at most."""


def timed_again(
    options: Sequence[Option], bench: Callable[[SizedSpec], Speed | None], constraint: Constraint, say: Say
) -> tuple[Option, ...]:
    """Options with the better of two speeds, where they came out narrowly too slow and are more accurate than all that
    keep the constraint: other work makes a speed too low, never too high.

    Args:
        options: measured and judged.
        bench: times a network anew; None: it can not run.
        constraint: what must be kept.
        say: told of each.
    """
    best = max((o.accuracy for o in options if o.verdict == "yes"), default=0.0)
    narrow = [o for o in options if _narrowly_lost(o, constraint) and o.accuracy > best]
    narrow.sort(key=lambda o: -o.accuracy)
    found: dict[SizedSpec, Speed] = {}
    for network in list(dict.fromkeys(sized_spec_of(o) for o in narrow))[:MOST]:
        say(f"timing again, since the machine was busy: {network.spec.name} @{network.image_size}")
        try:
            speed = bench(network)
        except UserError:  # it ran before
            speed = None
        if speed is not None:
            found[network] = speed
    return tuple(_with(o, found.get(sized_spec_of(o)), constraint) for o in options)


def larger_again(
    rising: Sequence[NetSpec],
    found: Found,
    floor: float,
    plain: Callable[[NetSpec], float],
    tuned: Callable[[NetSpec], float] | None,
    say: Say,
) -> Found:
    """A member that was found on a busy machine, or a larger one: the next larger one, or the smallest where none kept
    the speed, is timed once more, and where it keeps it after all the largest is looked for anew from there on.

    Args:
        rising, floor: as for ``largest_member``.
        found: what it gave.
        plain, tuned: as for it, each time timed anew: the better of all times.
        say: told of it.
    """
    at = rising.index(found.spec) + found.keeps
    if at == len(rising):
        return found
    say(f"timing again, since the machine was busy: {rising[at].name}")
    try:
        speed = (tuned or plain)(rising[at])
        if speed < floor:
            return found if found.keeps else replace(found, images_per_s=speed)
        larger = largest_member(rising[at:], floor, plain, tuned)
    except UserError:  # memory does not hold it, say
        return found
    return larger if larger.keeps else replace(found, spec=rising[at], images_per_s=speed, keeps=True)


def faster(before: Timed | None, now: Timed) -> Timed:
    """The better of two measurements of one network; None: there was none before."""
    return before if before is not None and (before.speed or 0.0) >= (now.speed or 0.0) else now


def _narrowly_lost(o: Option, constraint: Constraint) -> bool:
    speed, floor = o.images_per_s, constraint.floor(o.batch_size)
    return o.verdict in ("no", "maybe") and speed is not None and speed < floor <= NARROW * speed


def _with(o: Option, speed: Speed | None, constraint: Constraint) -> Option:
    """The option with a speed that is better than its own, judged anew."""
    if speed is None or speed.images_per_s <= (o.images_per_s or 0.0):
        return o
    made = replace(o, facts=replace(o.facts, speed=speed))
    verdict, reason = judge(made, constraint)
    return replace(made, verdict=verdict, reason=reason)
