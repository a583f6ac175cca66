"""The decision itself: known speeds and a constraint become a choice, a front, and a reason for every rival."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

from convscale.choice.candidates import Candidate, describe_accuracy, plain
from convscale.choice.facts import NetworkFacts, Speed
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError
from convscale.networks.resolve import Named
from convscale.stats import chance_above
from convscale.words import exact, odds


@dataclass(frozen=True, kw_only=True)
class Option:
    """A candidate with what is known of its cost, and what became of it."""

    candidate: Candidate
    """The network and its size."""
    facts: NetworkFacts
    """Its counts and speed."""
    verdict: str = ""
    """``yes``: it keeps the constraint; ``maybe``: its interval crosses it; ``no``; ``unknown``: not measured."""
    reason: str = ""
    """Why it was chosen or lost."""
    batch_size: int = 1
    """Images a call that its speed is of."""

    @property
    def name(self) -> str:
        """``arch.tag`` or the spec's name."""
        return self.candidate.name

    @property
    def label(self) -> str:
        """Name and image size."""
        return self.candidate.label

    @property
    def spec(self) -> Named:
        """The architecture."""
        return self.candidate.spec

    @property
    def image_size(self) -> int:
        """Side in pixels."""
        return self.candidate.image_size

    @property
    def top1(self) -> float | None:
        """Percent; None: none is claimed."""
        return self.candidate.top1

    @property
    def accuracy(self) -> float:
        """What is published of the weights, percent: at this image size, else the best at another, which is a hint."""
        return self.top1 or max((top1 for _, top1 in self.candidate.published), default=0.0)

    @property
    def speed(self) -> Speed | None:
        """None: neither measured nor predicted."""
        return self.facts.speed

    @property
    def images_per_s(self) -> float | None:
        """The speed's middle."""
        return None if self.speed is None else self.speed.images_per_s

    @property
    def low(self) -> float | None:
        """Lower end of the speed."""
        return None if self.speed is None else self.speed.low

    @property
    def high(self) -> float | None:
        """Upper end of the speed."""
        return None if self.speed is None else self.speed.high

    @property
    def licence(self) -> str:
        """Of its weights; empty where there are none."""
        return self.candidate.licence

    @property
    def latency_ms(self) -> float | None:
        """Milliseconds per call of the batch."""
        return None if self.speed is None else self.batch_size * 1e3 / self.speed.images_per_s

    @property
    def params_m(self) -> float:
        """Millions of parameters."""
        return self.facts.params / 1e6

    @property
    def memory_gb(self) -> float:
        """2**30 bytes at the batch."""
        return self.facts.memory_bytes / 2**30

    def chance(self, floor: float) -> float | None:
        """Probability that it keeps ``floor`` images/s, by a prediction's own interval; None for a measured speed."""
        if self.speed is None or self.speed.kind != "predicted":
            return None
        return chance_above(floor, self.speed.images_per_s, self.speed.low, self.speed.high)

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            **plain(self.candidate),
            "params": self.facts.params,
            "macs": self.facts.macs,
            "memory_bytes": self.facts.memory_bytes,
            "fused": self.facts.fused,
            "speed": None if self.speed is None else self.speed.to_dict(),
            "latency_ms": self.latency_ms,
            "verdict": self.verdict,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """A hardware-aligned relative of a candidate: channels in multiples of 8."""

    of: Option
    """The candidate."""
    option: Option
    """The relative: another network, so no accuracy is claimed."""

    @property
    def gain(self) -> float:
        """Its speed over the candidate's, same image size."""
        assert self.option.images_per_s
        assert self.of.images_per_s
        return self.option.images_per_s / self.of.images_per_s

    def __str__(self) -> str:
        kind = self.option.speed.kind if self.option.speed else ""
        return (
            f"{self.option.label}: {self.gain:.2f} x the speed of {self.of.candidate.spec.name} ({kind}), "
            f"{self.option.facts.macs / max(self.of.facts.macs, 1):.2f} x its multiply-accumulates; a network to "
            "train, no accuracy claimed"
        )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What became of every option."""

    best: Option
    """The most accurate that keeps the constraint."""
    front: tuple[Option, ...]
    """Those that no other beats in both accuracy and speed, fastest first, whether they keep the speed or not."""
    maybe: tuple[Option, ...]
    """Would beat ``best`` or are not comparable with it, and their interval crosses the constraint, or they were not
    measured: measure these."""
    alternatives: tuple[Option, ...]
    """Keep the constraint and are not beaten by ``best``, but no accuracy is claimed for them: only training or
    evaluating can tell."""
    rejected: tuple[Option, ...]
    """All others, each with its reason."""
    options: tuple[Option, ...] = field(default=(), repr=False)
    """All of them, in the order of the candidates."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Choice(Judged):
    """What to take, what it was compared with, and how sure that is."""

    constraint: Constraint
    conditions: Conditions
    kind: str
    """Whether speeds are ``measured`` or ``predicted``; ``measured and predicted`` only where rows of the device were
    given, and each option's speed says which it is."""
    device: str
    """The device in words."""
    aligned: tuple[Aligned, ...] = ()
    """Hardware-aligned relatives of candidates with odd channels, the largest gain first."""
    notes: tuple[str, ...] = ()
    """What the reader must know beside."""
    floor: float = 0.0
    """Images/s that the constraint comes to."""
    chosen_from: str = ""
    """What each network's form and runtime were chosen from, where they were tuned; ``conditions`` then does not say
    them."""

    def stated_conditions(self) -> dict[str, object]:
        """As plain JSON values; for tuned networks the precision is what their forms were chosen from."""
        return {**self.conditions.to_dict(), **({"precision": self.chosen_from} if self.chosen_from else {})}

    @property
    def certain(self) -> bool:
        """Whether the best keeps the constraint: as measured, or with the probability asked for."""
        return self.best.verdict == "yes"

    @property
    def missed(self) -> str:
        """A sentence where no prediction keeps the constraint with the confidence asked for; else empty."""
        if self.certain or not self.floor or (chance := self.best.chance(self.floor)) is None:
            return ""  # of measured speeds the median keeps it, or there would be no choice
        asked = f"{self.constraint} with the confidence {self.constraint.confidence:g}"
        return f"nothing keeps {asked}; {self.best.label} is {odds(chance)} likely to"

    @property
    def trade(self) -> str:
        """What a lower confidence would buy, in a line; empty where speeds were measured or nothing is gained."""
        mine = self.best.top1
        if not self.floor or mine is None or self.best.chance(self.floor) is None:
            return ""
        return trade_of(mine, self.options, self.floor)

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "constraint": {key: value for key, value in vars(self.constraint).items() if value is not None},
            "conditions": self.stated_conditions(),
            "device": self.device,
            "kind": self.kind,
            "certain": self.certain,
            "missed": self.missed or None,
            "chance": self.best.chance(self.floor) if self.floor else None,
            "trade": self.trade or None,
            "best": self.best.to_dict(),
            **{
                key: [o.to_dict() for o in getattr(self, key)] for key in ("front", "maybe", "alternatives", "rejected")
            },
            "aligned": [{"of": a.of.label, "gain": a.gain, **a.option.to_dict()} for a in self.aligned],
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """A few lines: the choice, what it keeps, and how many others there were."""
        others = (("maybe", self.maybe), ("without an accuracy", self.alternatives), ("rejected", self.rejected))
        counts = ", ".join(f"{len(options):,} {name}" for name, options in others)
        return f"<Choice {self}\n  of {len(self.options):,} candidates for {self.constraint}: {counts}>"

    def _repr_html_(self) -> str:
        """For notebooks: the choice in a sentence, and the front as a table."""
        rows = "".join(
            f"<tr><td>{'<b>' if o.label == self.best.label else ''}{escape(o.label)}</td>"
            f"<td>{'' if o.top1 is None else f'{o.top1:.2f} %'}</td><td>{exact(o.images_per_s or 0)}</td>"
            f"<td>{escape(o.verdict)}</td></tr>"
            for o in self.front
        )
        head = "<tr><th>network</th><th>top-1</th><th>images/s</th><th>keeps it</th></tr>"
        return f"<p>{escape(str(self))}</p><table>{head}{rows}</table>"

    def __str__(self) -> str:
        speed = describe_speed(self.best.speed)
        return (
            f"{self.best.label}: {describe_accuracy(self.best.candidate)}, {speed} on {self.device}; {self.best.reason}"
        )


class NothingKeeps(UserError):
    """No option keeps the constraint; all of them are here, judged."""

    def __init__(self, message: str, options: tuple[Option, ...]) -> None:
        super().__init__(message)
        self.options = options


def trade_of(mine: float | None, options: Sequence[Option], floor: float) -> str:
    """What a lower confidence would buy, in a line: the best published accuracy of those that are at least as likely as
    not to keep ``floor`` images/s; empty where that is not half a point more than ``mine``.

    Args:
        mine: published accuracy of what was chosen, percent; None: there is none at its image size.
        options: as judged.
        floor: images/s to keep.
    """
    least = 0.0 if mine is None else mine + 0.5
    risky = [(o, o.top1, o.chance(floor)) for o in options if o.verdict == "maybe"]
    better = [(o, top1, chance) for o, top1, chance in risky if top1 and top1 >= least and chance and 0.5 <= chance < 1]
    if not better:
        return ""
    option, top1, chance = max(better, key=lambda entry: entry[1:])
    gain = f"{top1:.1f} % as published" if mine is None else f"{top1 - mine:.1f} points more"
    return f"{gain} at a {1 - chance:.0%} risk, with {option.label}: --confidence {math.floor(100 * chance) / 100:g}"


def describe_speed(speed: Speed | None) -> str:
    """``2,130 images/s predicted (80 %: 2,010 to 2,250)``."""
    if speed is None:
        return "speed not known"
    span = "80 %" if speed.kind == "predicted" else "middle half"
    how = f" as {speed.how}" if speed.how else ""
    return f"{exact(speed.images_per_s)} images/s {speed.kind}{how} ({span}: {exact(speed.low)} to {exact(speed.high)})"


def beats(a: Option, b: Option) -> bool | None:
    """Whether ``a`` is the better network, speed aside; None where nobody can tell without training or evaluating.

    Published accuracies compare anything; without them, only sizes of one group do: a larger member is the more
    accurate one (EfficientNet, section 3).
    """
    if a.top1 is not None and b.top1 is not None:
        return a.top1 > b.top1
    if a.candidate.group == b.candidate.group:
        return a.facts.macs > b.facts.macs
    return None


def front_of(options: Sequence[Option]) -> tuple[Option, ...]:
    """The options with a speed that no other beats in both speed and accuracy (within a group: size), fastest first.

    With any published accuracy among them, those without one are left out.
    """
    timed = [o for o in options if o.images_per_s is not None and not o.candidate.why_not]
    claimed = [o for o in timed if o.top1 is not None]
    fronts: list[Option] = []
    for group in [claimed] if claimed else _groups(timed).values():
        best: list[Option] = []
        for o in sorted(group, key=lambda o: (-(o.images_per_s or 0), -merit(o))):
            if not best or beats(o, best[-1]):
                best.append(o)
        fronts += best
    return tuple(sorted(fronts, key=lambda o: -(o.images_per_s or 0)))


def _groups(options: Sequence[Option]) -> dict[str, list[Option]]:
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(option.candidate.group, []).append(option)
    return groups


def merit(option: Option) -> float:
    """What options of one group are ranked by: accuracy, and multiply-accumulates where none is claimed."""
    return option.facts.macs if option.top1 is None else option.top1


def judge(option: Option, constraint: Constraint) -> tuple[str, str]:
    """(verdict, reason) of an option against the constraint, speed last."""
    if option.candidate.why_not:
        return "no", option.candidate.why_not
    if option.facts.failed:
        return "no", option.facts.failed
    if constraint.max_params_m and option.params_m > constraint.max_params_m:
        return "no", f"too large: {option.params_m:.1f} M parameters, at most {constraint.max_params_m:g} M"
    if constraint.max_memory_gb and option.memory_gb > constraint.max_memory_gb:
        return (
            "no",
            f"takes {option.memory_gb:.2f} GB at batch {option.batch_size}, at most {constraint.max_memory_gb:g} GB",
        )
    floor = constraint.floor(option.batch_size)
    speed = option.speed
    if speed is None:
        guess = option.facts.estimate
        guess = None if guess is None else float(f"{guess:.2g}")
        about = f": by its counts and the measured networks about {exact(guess)} images/s" if guess else ""
        return "unknown", f"not measured{about}" + (f", needed {exact(floor)}" if floor and guess else "")
    chance = option.chance(floor) if floor else None
    if not floor or (speed.low >= floor if chance is None else chance >= constraint.confidence):
        return "yes", "keeps it"
    if speed.high < floor:
        return "no", f"too slow: {describe_speed(speed)}, needed {exact(floor)}"
    likelihood = "" if chance is None else f", {odds(chance)} likely"
    return "maybe", f"maybe fast enough: {describe_speed(speed)}, needed {exact(floor)}{likelihood}"


def decide(
    options: Sequence[Option], constraint: Constraint, *, likely: Callable[[Option], bool] = lambda option: True
) -> Judged:
    """Judge all options and pick.

    Args:
        options: with what is known of each.
        constraint: what must be kept.
        likely: whether an option that was not measured might keep the constraint; others are rejected rather than
            called a maybe.

    Raises:
        UserError: nothing keeps the constraint, not even by the middle of its interval; the fastest and its speed are
            named.
    """
    judged = [_with(o, *judge(o, constraint)) for o in options]
    keepers = [o for o in judged if o.verdict == "yes"]
    if not keepers:  # the middle of an interval has to do, and the choice says that it is not certain
        floor = max((constraint.floor(o.batch_size) for o in judged), default=0.0)
        keepers = [o for o in judged if o.verdict == "maybe" and (o.images_per_s or 0) >= floor]
    if not keepers:
        raise NothingKeeps(_nothing(judged, constraint), tuple(judged))
    best = _pick(keepers)
    leaders = {group: max(members, key=_merit_in_group) for group, members in _groups(keepers).items()}
    maybe, alternatives, rejected = [], [], []
    for o in judged:
        if o is best:
            continue
        better = beats(o, best)
        leader = leaders.get(o.candidate.group)
        if o.verdict == "no" or (o.verdict == "unknown" and not likely(o)):
            rejected.append(o)
        elif better is False:
            rejected.append(_with(o, o.verdict, _lost(o, best)))
        elif o.top1 is None and leader is not None and leader is not o and beats(leader, o):
            rejected.append(_with(o, o.verdict, _lost(o, leader)))
        elif o.verdict in ("maybe", "unknown"):
            maybe.append(o)
        else:
            elsewhere = ", ".join(f"{top1:.2f} % at {size}" for size, top1 in o.candidate.published)
            why = f"no accuracy is claimed at {o.image_size} px" + (f" (published: {elsewhere})" if elsewhere else "")
            why = "; ".join(o.candidate.notes) or why
            alternatives.append(_with(o, o.verdict, f"keeps it, but {why}"))
    won = _with(best, best.verdict, _why(best, keepers, constraint))
    others = (*maybe, *alternatives, *rejected)
    everything = [won if o is best else next((x for x in others if x.candidate is o.candidate), o) for o in judged]
    return Judged(
        best=won,
        front=tuple(next((x for x in everything if x.candidate is o.candidate), o) for o in front_of(judged)),
        maybe=tuple(sorted(maybe, key=_promise)),
        alternatives=tuple(sorted(alternatives, key=_promise)),
        rejected=tuple(rejected),
        options=tuple(everything),
    )


def _with(option: Option, verdict: str, reason: str) -> Option:
    return replace(option, verdict=verdict, reason=reason)


def _merit_in_group(option: Option) -> tuple[float, float]:
    return (float(option.facts.macs), option.top1 or 0.0)


def _promise(option: Option) -> tuple[float, ...]:
    """What to show first: known accuracies, then weights that reach most at another size, then the largest."""
    hint = max((top1 for _, top1 in option.candidate.published), default=0.0)
    return (-(option.top1 or 0.0), -hint, -option.facts.macs)


def _pick(keepers: Sequence[Option]) -> Option:
    """The most accurate; among equals the faster. With no accuracy at all, the largest of the group leaders."""
    claimed = [o for o in keepers if o.top1 is not None]
    if claimed:
        return max(claimed, key=lambda o: (o.top1 or 0.0, o.images_per_s or 0.0))
    return max(keepers, key=lambda o: (o.facts.macs, o.images_per_s or 0.0))


def _why(best: Option, keepers: Sequence[Option], constraint: Constraint) -> str:
    rivals = sum(o.top1 is not None for o in keepers) if best.top1 is not None else len(keepers)
    if best.top1 is not None:
        why = (
            f"the most accurate of {rivals} that keep {constraint}"
            if rivals > 1
            else f"the only one with a known accuracy that keeps {constraint}"
        )
    elif len({o.candidate.group for o in keepers}) == 1:
        why = (
            f"the largest of {rivals} of its family that keep {constraint}"
            if rivals > 1
            else f"the only one that keeps {constraint}"
        )
    else:
        why = f"the largest of {rivals} that keep {constraint}; families compare by training only"
    if best.verdict == "maybe":
        chance = best.chance(constraint.floor(best.batch_size))
        why += "; not certain: its interval crosses the constraint" + (
            f" ({odds(chance)} likely)" if chance is not None else ""
        )
    return why


def _lost(o: Option, to: Option) -> str:
    prefix = {"yes": "keeps it, but ", "maybe": "maybe fast enough, but ", "unknown": "not measured: "}[o.verdict]
    if o.top1 is not None and to.top1 is not None:
        gap = to.top1 - o.top1
        return prefix + (
            f"{gap:.2f} points less accurate than {to.label}"
            if gap > 0
            else f"no more accurate than {to.label}, which is faster"
        )
    return prefix + f"{to.label}, larger and of the same {'weights' if to.name == o.name else 'family'}, keeps it too"


def _nothing(judged: Sequence[Option], constraint: Constraint) -> str:
    without_speed = replace(constraint, min_throughput=None, max_latency_ms=None)
    allowed = [o for o in judged if o.images_per_s is not None and judge(o, without_speed)[0] != "no"]
    if allowed:
        fastest = max(allowed, key=lambda o: o.images_per_s or 0.0)
        return (
            f"no candidate keeps {constraint}; the fastest is {fastest.label} with {describe_speed(fastest.speed)}: "
            "lower the constraint or the size"
        )
    smallest = min((o for o in judged if o.facts.params), key=lambda o: o.facts.memory_bytes, default=None)
    if smallest is None:
        return (
            f"no candidate can be used; {judged[0].label}: {judged[0].reason}"
            if judged
            else "there are no candidates; name at least one network"
        )
    return (
        f"no candidate keeps {constraint}; the smallest is {smallest.label} with {smallest.params_m:.1f} M parameters "
        f"and {smallest.memory_gb:.2f} GB at batch {smallest.batch_size}"
    )
