"""The members of a scalable family from small to large, finely spaced, and the largest that keeps a speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from convscale.arch.block import StageSpec
from convscale.arch.multipliers import multipliers, scale_to
from convscale.arch.scaling import scale
from convscale.arch.small import for_image_size
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import as_spec
from convscale.cache import key_of, load, save
from convscale.choice.candidates import SMALL_IMAGE
from convscale.errors import DoesNotFit, UserError

FIT_FAMILIES = ("tresnet_m", "efficientnet_b0", "resnet50d")
"""Baselines whose scaled members `fit` tries by itself: the two papers' and the strongest plain one."""
SMALL_FAMILIES = ("tresnet_m", "efficientnet_b0", "poolnet")
"""The same for small images, on which plain convolutions without bottlenecks learn the most in minutes."""
_PHI_STEP, _PHIS = 0.1, (-6.0, 3.0)
_WIDTHS = (*(0.125 + step / 16 for step in range(15)), *(1.125 + step / 8 for step in range(8)))
_DEPTH_OF_WIDTH = ((0.25, 0.25), (0.5, 0.3), (0.75, 0.35), (1.0, 0.45), (2.0, 1.0))
_DEEPER = 1.7
"""Of a width's usual depth: between two widths, which round to steps of 8 channels, depth fills the gap."""
_STEP = 1.05
"""A member costs at least this much more than the one before."""
_SURE = 1.02
"""A tuned speed must be this much above what is asked, since the shipped network is timed anew."""
_USED = 0.85
"""Share of the speed allowed that the network found should use."""
_TUNED_TRIES = 3


def families_for(image_size: int) -> tuple[str, ...]:
    """Baselines whose scaled members are tried for images of that side in pixels."""
    return SMALL_FAMILIES if image_size <= SMALL_IMAGE else FIT_FAMILIES


def members(base: NetSpec | str, image_size: int | None = None) -> list[NetSpec]:
    """A family's members from the smallest to the largest.

    Images of up to 64 px keep their size: members differ in width and, within a width, in depth, around the depths that
    suit so few pixels. Above, members follow the compound rule (EfficientNet, section 3.3) in steps of 0.1 of phi.

    Args:
        base: the family's baseline.
        image_size: side in pixels of the largest images; members above the baseline then grow in depth and width
            alone. None: the baseline's own, and larger members take larger images.
    """
    named = as_spec(base)
    if image_size is not None and image_size <= SMALL_IMAGE:
        return _small_members(named, image_size)
    spec = named if image_size is None else for_image_size(named, image_size)
    steps = [round(_PHIS[0] + _PHI_STEP * i, 4) for i in range(round((_PHIS[1] - _PHIS[0]) / _PHI_STEP) + 1)]
    made: list[NetSpec] = []
    for phi in steps:
        if phi == 0:
            member = spec
        elif phi > 0 and image_size is not None:
            depth, width, _ = multipliers(phi)
            member = scale(spec, depth=depth, width=width)
        else:
            member = scale(spec, phi=phi)
        if not made or member != made[-1]:
            made.append(member)
    return made


@cache
def _small_members(named: NetSpec, image_size: int) -> list[NetSpec]:
    """Every width at its usual depth and somewhat deeper, in order of work, at least ``_STEP`` apart."""
    spec = for_image_size(named, image_size)
    costs: dict[NetSpec, float] = {}
    for width in _WIDTHS:
        usual = _usual_depth(width)
        first, last = (_small_member(named, spec, width, round(more * usual, 3)) for more in (1.0, _DEEPER))
        low, high = (_macs(member, image_size) for member in (first, last))
        between = [first, *_deeper(named, first, last, width)]
        for number, member in enumerate(between):  # only the order matters, so those between are not counted
            costs.setdefault(member, low + (high - low) * number / max(1, len(between) - 1))
    made: list[NetSpec] = []
    for member in sorted(costs, key=lambda spec: costs[spec]):
        if not made or costs[member] >= _STEP * costs[made[-1]]:
            made.append(member)
    return made


def _small_member(named: NetSpec, spec: NetSpec, width: float, depth: float) -> NetSpec:
    return scale_to(spec, depth=depth, width=width, name=f"{named.name}-w{width:g}-d{depth:g}")


def _deeper(named: NetSpec, first: NetSpec, last: NetSpec, width: float) -> list[NetSpec]:
    """From ``first`` to ``last`` block by block: always the stage that is farthest behind, the later one first."""
    depths, goal = list(first.depths), last.depths
    made = []
    while depths != list(goal):
        behind = max(range(len(goal)), key=lambda i: (goal[i] - depths[i], i))
        depths[behind] += 1
        stages = tuple(_with_depth(stage, depth) for stage, depth in zip(first.stages, depths, strict=True))
        name = f"{named.name}-w{width:g}-d{'-'.join(map(str, depths))}"
        made.append(last if depths == list(goal) else replace(first, name=name, stages=stages, lineage=None))
    return made


def _with_depth(stage: StageSpec, depth: int) -> StageSpec:
    """The stage with so many blocks: its last run is repeated more often."""
    more = depth - stage.depth
    *others, run = stage.runs
    return replace(stage, runs=(*others, replace(run, repeat=run.repeat + more)))


def _macs(member: NetSpec, image_size: int) -> int:
    """Multiply-accumulates per image, from the cache where it was counted before."""
    from convscale.cost.counting import count

    key = key_of("macs", member, image_size=image_size)
    if (kept := load(key)) is None:
        kept = count(member, image_size=image_size).macs
        save(key, kept)
    return int(kept)


def _usual_depth(width: float) -> float:
    """The depth multiplier that goes with a width on small images, by straight lines between known pairs."""
    pairs = _DEPTH_OF_WIDTH
    for (w0, d0), (w1, d1) in pairwise(pairs):
        if width <= w1:
            return d0 + (d1 - d0) * max(0.0, width - w0) / (w1 - w0)
    return pairs[-1][1]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The largest member of a family that keeps a speed."""

    spec: NetSpec
    """The member: the smallest of the family where none keeps it."""
    images_per_s: float
    """Its speed, tuned where that was asked for."""
    keeps: bool
    """Whether it keeps what was asked."""
    tried: tuple[NetSpec, ...]
    """All members that were timed, in order."""


def largest_member(
    rising: Sequence[NetSpec],
    floor: float,
    plain: Callable[[NetSpec], float],
    tuned: Callable[[NetSpec], float] | None = None,
) -> Found:
    """The largest member whose speed is at least ``floor``.

    Speeds fall along ``rising``, so the crossing is bisected with ``plain``, which is quick. What is shipped is faster
    by a factor that hardly differs within a family: ``tuned`` is asked for the member found, the factor moves the
    crossing, and so on until the member uses most of the speed allowed, three times at most. Where quick timings lead
    out of what the tuned ones left open, which a busy machine brings about, the tuned ones alone say where to look.

    Args:
        rising: members from small to large.
        floor: images/s to keep.
        plain: images/s of a member in one runtime as it comes; raises ``DoesNotFit`` where memory does not hold it.
        tuned: images/s of a member in the form and settings in which it would ship; None: ``plain`` is what ships.

    Raises:
        UserError: no members.
        DoesNotFit: memory does not hold even the smallest.
    """
    if not rising:
        raise UserError("there are no members to choose from")
    tried: dict[NetSpec, float] = {}

    def speed(index: int) -> float:
        member = rising[index]
        if member not in tried:
            try:
                tried[member] = plain(member)
            except DoesNotFit:
                if index == 0:
                    raise
                tried[member] = 0.0  # it keeps no speed
        return tried[member]

    def found(index: int, value: float, keeps: bool) -> Found:
        return Found(spec=rising[index], images_per_s=value, keeps=keeps, tried=tuple(tried))

    if tuned is None:
        index = _largest_keeping(len(rising), speed, floor)
        return found(0, speed(0), False) if index is None else found(index, speed(index), True)
    shipped: dict[int, float] = {}
    goal = _SURE * floor
    at = _largest_keeping(len(rising), speed, floor) or 0
    while len(shipped) < _TUNED_TRIES and speed(at) > 0:
        shipped[at] = tuned(rising[at])
        low = max((i for i, value in shipped.items() if value >= goal), default=-1)
        high = min((i for i, value in shipped.items() if i > low and value < goal), default=len(rising))
        if high - low <= 1 or (low >= 0 and shipped[low] * _USED <= goal):
            break
        at = _largest_keeping(len(rising), speed, goal * speed(at) / shipped[at]) or 0
        if not low < at < high:  # a busy machine's quick timings contradict the tuned ones, which count
            at = _between(low, high, shipped, goal)
    kept = [at for at, value in shipped.items() if value >= _SURE * floor] or [
        at for at, value in shipped.items() if value >= floor
    ]
    if kept:
        return found(max(kept), shipped[max(kept)], True)
    if 0 not in shipped:  # the last that can be said: the smallest
        shipped[0] = tuned(rising[0])
    return found(0, shipped[0], shipped[0] >= floor)


def _between(low: int, high: int, shipped: Mapping[int, float], goal: float) -> int:
    """Where members between two that were tuned should cross a speed: by the logarithms of both speeds, or, where one
    end is open, by the work that members grow by.
    """
    if low in shipped and high in shipped:
        share = math.log(shipped[low] / goal) / math.log(shipped[low] / shipped[high])
        at = low + round(share * (high - low))
    else:
        known = low if low in shipped else high
        at = known + math.floor(math.log(shipped[known] / goal) / math.log(_STEP))
    return max(low + 1, min(high - 1, at))


def _largest_keeping(count: int, speed: Callable[[int], float], floor: float) -> int | None:
    """The largest index whose speed is at least ``floor``, where speeds fall; None: not even 0.

    Timing costs seconds, so the next index is where the logarithms of the speeds at both ends cross ``floor``.
    """
    low, high, at = -1, count, count // 3
    while high - low > 1:
        value = speed(at)
        if value >= floor:
            low = at
        else:
            high = at
        if value <= 0:  # how much too large it is is not known
            at = (low + high) // 2
        elif low >= 0 and high < count and speed(high) > 0:
            share = math.log(speed(low) / floor) / max(1e-9, math.log(speed(low) / speed(high)))
            at = low + round(share * (high - low))
        else:  # one end is open: go as far as members of 5 % more work each would take
            at += round(math.log(value / floor) / math.log(_STEP))
        at = max(low + 1, min(high - 1, at))
    return None if low < 0 else low
