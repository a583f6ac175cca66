"""The largest member of a family that keeps a speed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convscale.arch.multipliers import RULES
from convscale.arch.scaling import scale
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import as_spec
from convscale.choice.decide import describe_speed
from convscale.choice.measured import Bench, speed_of, time_network
from convscale.choice.speeds import Say, Setting, Speed, as_json, known
from convscale.conditions import Constraint
from convscale.errors import UserError, nearest
from convscale.predictor.devices import devices
from convscale.words import exact

ALONG = ("phi", "depth", "width", "resolution")
CONFIRMATIONS = 6
"""Networks measured at most, from the predicted answer downwards."""
AHEAD = 4
"""Members beyond the crossing that are looked at as well: channels that suit the hardware can make a larger network the
faster one."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A scaled network and its speed."""

    spec: NetSpec
    """The network."""
    value: float
    """Phi, the multiplier of depth or width, or the image's side in pixels."""
    speed: Speed

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; the spec in full, so that it can be built elsewhere."""
        return {
            "name": self.spec.name,
            "value": self.value,
            "image_size": self.spec.input.size,
            "speed": as_json(self.speed),
            "spec": self.spec.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Largest:
    """What ``largest`` found."""

    along: str
    """What was scaled: ``phi``, ``depth``, ``width`` or ``resolution``."""
    found: Member
    """The largest whose speed keeps the constraint by the middle of its interval."""
    sure: Member | None
    """The largest whose whole interval keeps it; None: none does."""
    following: Member | None
    """The next larger one that was tried, too slow; None: the range ended first."""
    floor: float
    """Images/s asked for."""
    setting: Setting
    tried: int
    """Networks timed or predicted on the way."""
    confirmed: Speed | None = None
    """``found`` measured, where the device predicted for is this machine's own; None: it is not, or nothing was
    predicted."""

    @property
    def spec(self) -> NetSpec:
        """The found network."""
        return self.found.spec

    @property
    def value(self) -> float:
        """Its phi, multiplier or size."""
        return self.found.value

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        members = {
            key: None if (m := getattr(self, key)) is None else m.to_dict() for key in ("found", "sure", "following")
        }
        return {
            "along": self.along,
            "floor": self.floor,
            "conditions": self.setting.conditions.to_dict(),
            "tried": self.tried,
            **members,
            "confirmed": as_json(self.confirmed),
        }

    def __str__(self) -> str:
        name = {"phi": "phi {:g}", "depth": "depth x {:g}", "width": "width x {:g}", "resolution": "{:g} px"}[
            self.along
        ]
        lines = [
            f"{name.format(self.value)}: {self.spec.name} @{self.spec.input.size}, {describe_speed(self.found.speed)}, "
            f"needed {exact(self.floor)}"
        ]
        if self.sure is not None and self.sure.value != self.value:
            lines.append(
                "its interval crosses the constraint; the largest that keeps it with all of its interval: "
                f"{name.format(self.sure.value)}, "
            )
            lines[-1] += f"{self.sure.spec.name} @{self.sure.spec.input.size}, {describe_speed(self.sure.speed)}"
        elif self.sure is None:
            lines.append("its interval crosses the constraint, and no member keeps it with all of its interval")
        if self.confirmed is not None:
            kept = (
                "keeps it"
                if self.confirmed.images_per_s >= self.floor
                else "does NOT keep it, nor did the larger ones that were measured"
            )
            lines.append(f"on this machine: {describe_speed(self.confirmed)}, {kept}")
        if self.following is not None:
            lines.append(f"the next, {name.format(self.following.value)}: {describe_speed(self.following.speed)}")
        return "\n".join(lines)


def largest(
    base: NetSpec | str,
    *,
    setting: Setting,
    min_throughput: float | None = None,
    max_latency_ms: float | None = None,
    along: str = "phi",
    rule: str = "compound",
    seconds: float = 1.0,
    records: str | os.PathLike[str] | None = None,
    confirm: bool = True,
    progress: Say | None = None,
) -> Largest:
    """The largest scale of a network that keeps a speed: predicted for a named GPU, measured on this machine's own
    device.

    Where the device that is predicted for turns out to be this machine's own (its CPU by a calibration, or its GPU),
    the network found is measured, and the next smaller ones while it does not keep the speed.

    The crossing is found by bisection, because speed falls as a network grows; widths and sizes round, so a few members
    beyond it are tried as well.
    Steps: phi and multipliers 0.05 (measured: 0.25 and 0.1), sizes the network's own multiple (measured: about 16 px).

    Args:
        base: the network to scale, or its name.
        setting: conditions, from ``choice.setting_of``.
        min_throughput: images/s to keep.
        max_latency_ms: milliseconds that a call may take.
        along: ``phi`` (by ``rule``), ``depth``, ``width`` or ``resolution``.
        rule: as in ``scale``: ``compound``, ``fast``, ``depth``, ``width`` or ``resolution``.
        seconds: timed seconds per network, where measured.
        records: as in ``choose``.
        confirm: measure what was predicted, where that is possible.
        progress: told a line now and then.

    Raises:
        UserError: an unknown name, dimension or rule, a limit that is not above 0 or none at all, or even the smallest
            member is too slow.
    """
    floor = Constraint(min_throughput=min_throughput, max_latency_ms=max_latency_ms).floor(
        setting.conditions.batch_size
    )
    if not floor:
        raise UserError("scaling to a speed needs min_throughput or max_latency_ms")
    if along not in ALONG:
        raise UserError(f"along {along!r} is unknown{nearest(along, ALONG)}")
    if rule not in RULES:
        raise UserError(f"scaling rule {rule!r} is unknown{nearest(rule, RULES)}")
    say = progress or (lambda text: None)
    walk = _Walk(as_spec(base), along, rule, setting, seconds, records, say)
    last = len(walk.values) - 1
    start = walk.values.index({"phi": 0.0, "resolution": float(walk.base.input.size)}.get(along, 1.0))
    index = crossing(last, lambda i: walk.speed(i).images_per_s >= floor, start=start, same=walk.same)
    if index is None:
        smallest = walk.member(0)
        raise UserError(
            f"no {walk.base.name} scaled along {along} keeps {exact(floor)} images/s; "
            f"the smallest, {smallest.spec.name}, has {describe_speed(smallest.speed)}"
        )
    here = own_device(setting) if confirm and setting.predicted else ""
    index, measured, slow = walk.confirmed(index, floor, here) if here else (index, None, None)
    # A measured interval is the spread of calls, not doubt about the median: only predictions are searched twice.
    sure = index if walk.speed(index).low >= floor else None
    if sure is None and setting.predicted:
        sure = crossing(index, lambda i: walk.speed(i).low >= floor, start=index, same=walk.same)
    after = next((i for i in range(index + 1, last + 1) if not walk.same(index, i)), None)
    return Largest(
        along=along,
        found=walk.member(index),
        sure=None if sure is None else walk.member(sure),
        following=slow or (None if after is None else walk.member(after)),
        floor=floor,
        setting=setting,
        tried=len(walk.speeds),
        confirmed=measured,
    )


def own_device(setting: Setting) -> str:
    """``cpu`` or ``cuda`` where the device that a setting predicts for is this machine's own, by the name that its
    driver gives it; else nothing.
    """
    if setting.conditions.device == "cpu":
        return "cpu"
    if not Path("/proc/driver/nvidia").exists():
        return ""
    import torch

    if not torch.cuda.is_available():
        return ""
    return "cuda" if re.fullmatch(devices()[setting.conditions.device].driver, torch.cuda.get_device_name(0)) else ""


def crossing(
    last: int,
    keeps: Callable[[int], bool],
    *,
    start: int = 0,
    same: Callable[[int, int], bool] = lambda a, b: False,
    ahead: int = AHEAD,
) -> int | None:
    """The largest index in 0..last that keeps, where those that keep come first but for pockets of up to ``ahead``
    members; None: not even 0.

    Steps double from ``start``, so that members far larger than the answer, which take longest to time, are never
    tried.

    Args:
        keeps: whether the member at an index keeps the constraint.
        same: whether two indices are the same member, so that looking further costs nothing.
    """
    low, high, step = start, start, 1
    while not keeps(low):
        if low == 0:
            return None
        low, high, step = max(0, low - step), low, 2 * step
    if high == low:
        high = low + 1
        while high <= last and keeps(high):
            low, step = high, 2 * step
            high = low + step if low == last else min(low + step, last)
    while min(high, last + 1) - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    seen, i = 0, low + 1
    while i <= last and seen < ahead:
        if keeps(i):
            low, seen = i, 0
        elif not same(i, i - 1):
            seen += 1
        i += 1
    return low


class _Walk:
    """A family's members in order of size, built and timed when first asked for."""

    def __init__(
        self,
        base: NetSpec,
        along: str,
        rule: str,
        setting: Setting,
        seconds: float,
        records: str | os.PathLike[str] | None,
        say: Say,
    ) -> None:
        self.base, self.along, self.rule, self.setting, self.seconds, self.records, self.say = (
            base,
            along,
            rule,
            setting,
            seconds,
            records,
            say,
        )
        self.values = _values(base, along, fine=setting.predicted)
        self.specs: dict[int, NetSpec] = {}
        self.speeds: dict[NetSpec, Speed] = {}

    def spec(self, index: int) -> NetSpec:
        """The member at an index."""
        if index not in self.specs:
            value = self.values[index]
            if self.along == "phi":
                made = scale(self.base, phi=value, rule=self.rule) if value else self.base
            elif self.along == "resolution":
                made = replace(self.base, input=replace(self.base.input, size=int(value)))
            elif value == 1:
                made = self.base
            else:
                made = scale(self.base, depth=value) if self.along == "depth" else scale(self.base, width=value)
            self.specs[index] = made
        return self.specs[index]

    def same(self, a: int, b: int) -> bool:
        """Whether rounding makes two indices one network."""
        return self.spec(a) == self.spec(b)

    def speed(self, index: int) -> Speed:
        """The speed of the member at an index."""
        spec = self.spec(index)
        if spec not in self.speeds:
            unit = (spec, spec.input.size)
            self.say(f"{'predicting' if self.setting.predicted else 'measuring'} {spec.name} @{spec.input.size}")
            facts = known([unit], self.setting)
            found = (
                facts[unit].speed
                if self.setting.predicted
                else Bench(self.setting, facts, records=self.records, seconds=self.seconds)(unit)
            )
            if found is None:
                raise UserError(facts[unit].failed or f"{spec.name} @{spec.input.size} can not be timed")
            self.speeds[spec] = found
        return self.speeds[spec]

    def confirmed(self, index: int, floor: float, device: str) -> tuple[int, Speed, Member | None]:
        """The index whose member keeps the speed as measured, from ``index`` on downwards, its measured speed, and the
        last that did not keep it.

        After a few tries the smallest tried is given, whether it keeps it or not.
        """
        slow = None
        setting = Setting(conditions=replace(self.setting.conditions, device=device))
        for left in range(CONFIRMATIONS, 0, -1):
            spec = self.spec(index)
            self.say(f"measuring {spec.name} @{spec.input.size}")
            speed = speed_of(time_network(spec, spec.input.size, setting, self.seconds))
            smaller = next((i for i in range(index - 1, -1, -1) if not self.same(i, index)), None)
            if speed.images_per_s >= floor or smaller is None or left == 1:
                return index, speed, slow
            slow = Member(spec=spec, value=self.values[index], speed=speed)
            index = smaller
        raise AssertionError

    def member(self, index: int) -> Member:
        """With its speed."""
        return Member(spec=self.spec(index), value=self.values[index], speed=self.speed(index))


def _values(base: NetSpec, along: str, *, fine: bool) -> list[float]:
    """The scale of each step, from small to large."""
    if along == "phi":
        step = 0.05 if fine else 0.25
        return [round(i * step, 4) for i in range(-round(6 / step), round(8 / step) + 1)]
    if along == "resolution":
        multiple = base.input.multiple
        step = multiple if fine else math.lcm(multiple, 16)
        first = -(-max(base.input.min_size, min(32, base.input.size)) // step) * step
        sizes = {*range(first, 4 * base.input.size + 1, step), base.input.size}
        return [float(size) for size in sorted(sizes)]
    step = 0.05 if fine else 0.1
    return [round(i * step, 4) for i in range(round(0.1 / step), round(8 / step) + 1)]
