"""The largest member of a family that keeps a speed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from convscale.arch.rules import ScalingRule, as_rule
from convscale.arch.scaling import scale
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import as_spec
from convscale.choice.basis import Basis
from convscale.choice.decide import describe_speed
from convscale.choice.facts import SizedSpec, Speed
from convscale.choice.measured import Bench, speed_of, time_network
from convscale.choice.speeds import Say, facts_of
from convscale.conditions import Constraint, check_seconds
from convscale.errors import DoesNotFit, UserError, nearest
from convscale.predictor.devices import devices, is_processor_here
from convscale.stats import chance_above, largest_true
from convscale.words import exact, odds

ALONG = ("phi", "depth", "width", "resolution")
CONFIRMATIONS = 6
"""Networks measured at most, from the predicted answer downwards."""
AHEAD = 4
"""Members beyond the crossing that are looked at as well: channels that suit the hardware can make a larger network the
faster one."""
_MIDDLE = 0.5
"""The confidence by which the middle of an interval decides."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A scaled network and its speed."""

    spec: NetSpec
    """The network."""
    value: float
    """Phi, the multiplier of depth or width, or the image's side in pixels."""
    speed: Speed

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values; the spec in full, so that it can be built elsewhere."""
        return {
            "name": self.spec.name,
            "value": self.value,
            "image_size": self.spec.input.size,
            "speed": self.speed.to_dict(),
            "spec": self.spec.to_dict(),
        }


@dataclass(frozen=True, kw_only=True)
class Largest:
    """What ``largest`` found."""

    along: str
    """What was scaled: ``phi``, ``depth``, ``width`` or ``resolution``."""
    found: Member
    """The largest whose speed keeps the constraint: measured, or predicted with the confidence asked for."""
    sure: Member | None
    """The largest of this and smaller ones whose whole interval keeps it; None: none does."""
    following: Member | None
    """The next larger one that was tried, which does not keep it; None: the range ended first."""
    floor: float
    """Images/s asked for."""
    basis: Basis
    """The conditions, and how speeds were found."""
    tried: int
    """Networks timed or predicted on the way."""
    confirmed: Speed | None = None
    """``found`` measured, where the device predicted for is this machine's own; None: it is not, nothing was
    predicted, or it could not be measured."""
    unconfirmed: str = ""
    """Why ``found`` could not be measured, though the device is this machine's own."""

    @property
    def chance(self) -> float | None:
        """Probability that ``found`` keeps it, by its prediction's interval; None: it was measured."""
        speed = self.found.speed
        if self.confirmed is not None or speed.kind != "predicted":
            return None
        return chance_above(self.floor, speed.images_per_s, speed.low, speed.high)

    @property
    def missed(self) -> str:
        """That it does not keep the speed as measured, in a sentence; empty where it does."""
        if self.confirmed is None or self.confirmed.images_per_s >= self.floor:
            return ""
        return (
            f"{self.spec.name} does not keep {exact(self.floor)} images/s on this machine: "
            f"{describe_speed(self.confirmed)}"
        )

    @property
    def spec(self) -> NetSpec:
        """The found network."""
        return self.found.spec

    @property
    def value(self) -> float:
        """Its phi, multiplier or size."""
        return self.found.value

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        members = {
            key: None if (m := getattr(self, key)) is None else m.to_dict() for key in ("found", "sure", "following")
        }
        return {
            "along": self.along,
            "floor": self.floor,
            "conditions": self.basis.conditions.to_dict(),
            "chance": self.chance,
            "tried": self.tried,
            **members,
            "confirmed": None if self.confirmed is None else self.confirmed.to_dict(),
            "unconfirmed": self.unconfirmed or None,
            "missed": self.missed or None,
        }

    def __str__(self) -> str:
        name = {"phi": "phi {:g}", "depth": "depth x {:g}", "width": "width x {:g}", "resolution": "{:g} px"}[
            self.along
        ]
        lines = [
            f"{name.format(self.value)}: {self.spec.name} @{self.spec.input.size}, {describe_speed(self.found.speed)}, "
            f"needed {exact(self.floor)}{'' if self.chance is None else f', {odds(self.chance)} likely'}"
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
            kept = "does NOT keep it, nor did the larger ones that were measured" if self.missed else "keeps it"
            lines.append(f"on this machine: {describe_speed(self.confirmed)}, {kept}")
        if self.unconfirmed:
            lines.append(f"not measured on this machine: {self.unconfirmed}")
        if self.following is not None:
            lines.append(f"the next, {name.format(self.following.value)}: {describe_speed(self.following.speed)}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Direction:
    """Along what a family's members lie."""

    along: str = "phi"
    """``phi`` (by ``rule``), ``depth``, ``width`` or ``resolution``."""
    rule: str | os.PathLike[str] | ScalingRule = "compound"
    """As in ``scale``: ``compound``, ``fast``, ``depth``, ``width`` or ``resolution``; a rule, or its file, which is
    read."""

    def __post_init__(self) -> None:
        if self.along not in ALONG:
            raise UserError(f"along {self.along!r} is unknown{nearest(str(self.along), ALONG)}")
        object.__setattr__(self, "rule", as_rule(self.rule))


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured, and who is told."""

    records: str | os.PathLike[str] | None = None
    """JSON-lines file whose measurements are reused and appended to."""
    seconds: float = 1.0
    """Timed seconds per network, at least."""
    confirm: bool = True
    """Measure what was predicted, where that is possible."""
    say: Say = lambda text: None
    """Told a line now and then."""

    def __post_init__(self) -> None:
        check_seconds(self.seconds)


def largest_under(
    base: NetSpec | str, basis: Basis, constraint: Constraint, direction: Direction, effort: Effort
) -> Largest:
    """The largest scale of a network that keeps a speed: predicted for a named device, measured on this machine's own
    device.

    Where the device that is predicted for turns out to be this machine's own (its CPU by a calibration, or its GPU),
    the largest by the middle of its interval is measured, and the next smaller ones while it does not keep the speed.
    A prediction alone must keep it with the constraint's confidence.

    The crossing is found by bisection, because speed falls as a network grows; widths and sizes round, so a few members
    beyond it are tried as well. Steps: phi and multipliers 0.05 (measured: 0.25 and 0.1), sizes the network's own
    multiple (measured: about 16 px).

    Raises:
        UserError: an unknown name, no limit on speed, or even the smallest member is too slow.
    """
    floor = constraint.floor(basis.conditions.batch_size)
    if not floor:
        raise UserError("scaling to a speed needs min_throughput or max_latency_ms")
    walk = _Walk(as_spec(base), basis, direction, effort)
    last = len(walk.values) - 1
    start = walk.values.index({"phi": 0.0, "resolution": float(walk.base.input.size)}.get(direction.along, 1.0))

    def largest(confidence: float, last: int, start: int) -> int:
        index = crossing(last, lambda i: walk.keeps(i, floor, confidence), start=min(start, last), same=walk.same)
        if index is None:
            smallest, asked = walk.member(0), confidence == constraint.confidence
            chance = f" with the confidence {confidence:g}" if basis.predicted and asked else ""
            raise UserError(
                f"no {walk.base.name} scaled along {direction.along} keeps {exact(floor)} images/s{chance}; "
                f"the smallest, {smallest.spec.name}, has {describe_speed(smallest.speed)}"
            )
        return index

    here = own_device(basis) if effort.confirm and basis.predicted else ""
    index = largest(_MIDDLE if here else constraint.confidence, last, start)
    index, measured, slow = walk.confirmed(index, floor, here) if here else (index, None, None)
    if here and measured is None:
        index = largest(constraint.confidence, index, index)
    # A measured interval is the spread of calls, not doubt about the median: only predictions are searched twice.
    sure = index if walk.speed(index).low >= floor else None
    if sure is None and basis.predicted:
        sure = crossing(index, lambda i: walk.speed(i).low >= floor, start=index, same=walk.same)
    after = next((i for i in range(index + 1, last + 1) if not walk.same(index, i)), None)
    after = None if after is None or walk.spec(after) in walk.too_large else after
    return Largest(
        along=direction.along,
        found=walk.member(index),
        sure=None if sure is None else walk.member(sure),
        following=slow or (None if after is None else walk.member(after)),
        floor=floor,
        basis=basis,
        tried=len(walk.speeds),
        confirmed=measured,
        unconfirmed=walk.unconfirmed,
    )


def own_device(basis: Basis) -> str:
    """``cpu`` or ``cuda`` where the device that a basis predicts for is this machine's own, by the name that its
    driver gives it; else nothing.
    """
    device = devices()[basis.conditions.device]
    if device.kind == "cpu":
        return "cpu" if is_processor_here(device.name) else ""
    if not Path("/proc/driver/nvidia").exists():
        return ""
    import torch

    if not torch.cuda.is_available():
        return ""
    return "cuda" if re.fullmatch(device.driver, torch.cuda.get_device_name(0)) else ""


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
    edge = largest_true(keeps, 0, last, start=start)
    if edge is None:
        return None
    low = edge
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

    def __init__(self, base: NetSpec, basis: Basis, direction: Direction, effort: Effort) -> None:
        self.base, self.basis, self.direction, self.effort = base, basis, direction, effort
        self.values = _values(base, direction.along, fine=basis.predicted)
        self.specs: dict[int, NetSpec] = {}
        self.speeds: dict[NetSpec, Speed] = {}
        self.too_large: dict[NetSpec, str] = {}
        self.unconfirmed = ""
        self.said = set[str]()

    def spec(self, index: int) -> NetSpec:
        """The member at an index."""
        if index not in self.specs:
            value = self.values[index]
            along = self.direction.along
            if along == "phi":
                made = scale(self.base, phi=value, rule=as_rule(self.direction.rule)) if value else self.base
            elif along == "resolution":
                made = replace(self.base, input=replace(self.base.input, size=int(value)))
            elif value == 1:
                made = self.base
            else:
                made = scale(self.base, depth=value) if along == "depth" else scale(self.base, width=value)
            self.specs[index] = made
        return self.specs[index]

    def same(self, a: int, b: int) -> bool:
        """Whether rounding makes two indices one network."""
        return self.spec(a) == self.spec(b)

    def speed(self, index: int) -> Speed:
        """The speed of the member at an index.

        Raises:
            DoesNotFit: it was to be measured, and memory does not hold it.
        """
        spec = self.spec(index)
        if spec in self.too_large:
            raise DoesNotFit(self.too_large[spec])
        if spec not in self.speeds:
            try:
                self.speeds[spec] = self._speed(SizedSpec(spec, spec.input.size))
            except DoesNotFit as error:
                self.too_large[spec] = str(error)
                raise
        return self.speeds[spec]

    def keeps(self, index: int, floor: float, confidence: float) -> bool:
        """Whether the member at an index keeps a speed, a predicted one with a probability; one that memory does not
        hold keeps none.
        """
        try:
            speed = self.speed(index)
        except DoesNotFit as error:
            self.effort.say(str(error))
            return False
        if speed.kind != "predicted":
            return speed.images_per_s >= floor
        return chance_above(floor, speed.images_per_s, speed.low, speed.high) >= confidence

    def _speed(self, network: SizedSpec) -> Speed:
        label = f"{network.spec.name} @{network.image_size}"
        self.effort.say(f"{'predicting' if self.basis.predicted else 'measuring'} {label}")
        facts = facts_of([network], self.basis)
        if self.basis.predicted:
            speed = facts[network].speed
        else:
            records, seconds = self.effort.records, self.effort.seconds
            speed = Bench(self.basis, facts, records=records, seconds=seconds, say=self._say_once)(network)
        if speed is None:
            raise UserError(facts[network].failed or f"{label} can not be timed")
        return speed

    def _say_once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.effort.say(text)

    def confirmed(self, index: int, floor: float, device: str) -> tuple[int, Speed | None, Member | None]:
        """The index whose member keeps the speed as measured, from ``index`` on downwards, its measured speed, and the
        last that did not keep it.

        After a few tries the smallest tried is given, whether it keeps it or not. One that can not be measured has no
        speed, and ``unconfirmed`` says why.

        Raises:
            DoesNotFit: memory does not hold even that.
        """
        slow = None
        basis = Basis(conditions=replace(self.basis.conditions, device=device))
        for left in range(CONFIRMATIONS, 0, -1):
            spec = self.spec(index)
            self.effort.say(f"measuring {spec.name} @{spec.input.size}")
            smaller = next((i for i in range(index - 1, -1, -1) if not self.same(i, index)), None)
            try:
                speed = speed_of(time_network(SizedSpec(spec, spec.input.size), basis, self.effort.seconds))
            except DoesNotFit as error:
                if smaller is None or left == 1:
                    raise
                self.effort.say(str(error))
                self.too_large[spec] = str(error)
            except UserError as error:  # the runtime does not take a module in that precision, say
                self.unconfirmed = str(error)
                return index, None, slow
            else:
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
