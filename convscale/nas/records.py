"""What a search was asked for, and what became of each trial, as values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convscale import words
from convscale.arch.spec import NetSpec
from convscale.choice.facts import Speed
from convscale.conditions import Conditions
from convscale.errors import UserError, check_number, check_text
from convscale.nas.trial import Result

REWARDS = ("hard", "soft", "hard-like")
"""MnasNet, section 3: keep the target; or accuracy x (cost / target)^w with w = -0.07 on both sides, or 0 and -1."""
SOFT = -0.07
"""Doubling the cost is worth 5 % more accuracy (MnasNet, section 3)."""
STATES = ("trained", "pruned", "too slow", "failed", "running")
_GROWING = ("recipe", "conditions")
"""What has more settings in a later version of this package than in an earlier one."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What makes one network better than another.

    Raises:
        UserError: an unknown form, or a target that is missing or not above 0.
    """

    form: str = "hard"
    """One of ``REWARDS``."""
    by: str = "throughput"
    """``throughput`` of the artefact, or ``macs`` as in the papers."""
    target: float | None = None
    """Images/s, or millions of multiply-accumulates; None: no limit."""
    exponent: float = SOFT
    """Of the soft form."""

    def __post_init__(self) -> None:
        check_text("reward", self.form, REWARDS)
        check_text("reward_by", self.by, ("throughput", "macs"))
        check_number("reward_weight", self.exponent, "a number from -10 to 0", -10, 0)
        what = "min_throughput" if self.by == "throughput" else "target_macs_m"
        if self.target is not None:
            check_number(what, self.target, "a number above 0", 1e-9)
        elif self.form != "hard" or self.by == "macs":
            raise UserError(f"reward {self.form} by {self.by} needs {what}, the cost that it is relative to")

    def ratio(self, images_per_s: float, macs: int) -> float:
        """Cost over target: above 1 a network is too slow, or too large."""
        if self.target is None:
            return 0.0
        return self.target / images_per_s if self.by == "throughput" else macs / (1e6 * self.target)

    def factor(self, ratio: float) -> float:
        """What an accuracy is multiplied by."""
        if self.form == "hard" or self.target is None:
            return 1.0
        exponent = self.exponent if self.form == "soft" else 0.0 if ratio <= 1 else -1.0
        return ratio**exponent

    def keeps(self, ratio: float) -> bool:
        """Whether a network may be trained."""
        return self.form != "hard" or ratio <= 1

    @property
    def floor(self) -> float:
        """Images/s that must be kept; 0: none."""
        return self.target or 0.0 if self.form == "hard" and self.by == "throughput" else 0.0

    def __str__(self) -> str:
        if self.target is None:
            return "the most accurate, whatever its speed"
        unit = "images/s" if self.by == "throughput" else "M MACs"
        if self.form == "hard":
            return f"the most accurate with {'at least' if unit == 'images/s' else 'at most'} {self.target:,.4g} {unit}"
        power = f"{self.exponent:g}" if self.form == "soft" else "0 below and -1 above"
        return f"accuracy x (cost / {self.target:,.4g} {unit})^w, w = {power}"


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What became of a candidate."""

    number: int
    """In the order of asking."""
    genes: tuple[int, ...]
    """Its place in the space."""
    spec: NetSpec
    """The network."""
    state: str
    """One of ``STATES``."""
    speed: Speed | None = None
    """Measured or predicted."""
    conditions: Conditions | None = None
    """Under which the speed holds; None: the study's, as earlier versions wrote it."""
    params: int = 0
    """Parameters."""
    macs: int = 0
    """Multiply-accumulates per image."""
    factor: float = 1.0
    """What its accuracy is multiplied by for its value."""
    seed: int = 0
    """Of its training."""
    parent: int | None = None
    """The trial that its weights grew from; None: it started fresh, of which a note says where it should not have."""
    result: Result | None = None
    """Of its training; None: it was not trained, or not yet."""
    reason: str = ""
    """Why it was given up, or never trained."""

    @property
    def accuracy(self) -> float | None:
        """The best on validation, in [0, 1], after a brief training; None: there was none."""
        return None if self.result is None or self.state not in ("trained", "pruned") else self.result.accuracy

    @property
    def value(self) -> float | None:
        """What is to be highest; None: not trained to the end of its brief training."""
        return None if self.state != "trained" or self.result is None else self.result.accuracy * self.factor

    @property
    def note(self) -> str:
        """What is to be known of its training; empty: nothing."""
        return "" if self.result is None else self.result.note

    @property
    def images_per_s(self) -> float | None:
        """By the middle of a prediction's interval, or as measured."""
        return None if self.speed is None else self.speed.images_per_s

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "number": self.number,
            "name": self.spec.name,
            "state": self.state,
            "accuracy": self.accuracy,
            "value": self.value,
            "factor": self.factor,
            "speed": None if self.speed is None else self.speed.to_dict(),
            "conditions": None if self.conditions is None else self.conditions.to_dict(),
            "params": self.params,
            "macs": self.macs,
            "seed": self.seed,
            "parent": self.parent,
            "curve": [] if self.result is None else list(self.result.curve),
            "seconds": None if self.result is None else self.result.seconds,
            "wait_seconds": None if self.result is None else self.result.wait_seconds,
            "reason": self.reason,
            "note": self.note,
            "spec": self.spec.to_dict(),
        }

    def describe(self) -> str:
        """One line."""
        speed = "" if self.speed is None else f", {self.speed.images_per_s:,.0f} images/s {self.speed.kind}"
        if self.accuracy is None:
            return f"{self.number}: {self.spec.name}{speed}: {self.reason or self.state}"
        given_up = "" if self.state == "trained" else f", {self.reason}"
        note = f" ({self.note})" if self.note else ""
        return f"{self.number}: {self.spec.name}{speed}: {words.percent(self.accuracy, 2)}{given_up}{note}"


def front_of(trials: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Trained networks that no other beats in both accuracy and speed, the fastest first."""
    known = [t for t in trials if t.state == "trained" and t.speed is not None]
    found: list[TrialRecord] = []
    for trial in sorted(known, key=lambda t: (-(t.images_per_s or 0.0), -(t.accuracy or 0.0))):
        if not found or (trial.accuracy or 0.0) > (found[-1].accuracy or 0.0):
            found.append(trial)
    return tuple(found)


def hypervolume(trials: Sequence[TrialRecord]) -> float:
    """What the front is better than: the area below it, in images/s times accuracy (Zitzler and Thiele, 1998)."""
    area = below = 0.0
    for trial in front_of(trials):
        area += (trial.images_per_s or 0.0) * ((trial.accuracy or 0.0) - below)
        below = trial.accuracy or 0.0
    return area


def speed_from(value: Mapping[str, Any] | None) -> Speed | None:
    """The inverse of ``Speed.to_dict``."""
    return None if value is None else Speed(**{**value, "doubts": tuple(value.get("doubts", ()))})


def conditions_from(value: Mapping[str, Any] | None) -> Conditions | None:
    """The inverse of ``Conditions.to_dict``."""
    return None if value is None else Conditions(**value)


def difference(asked: Mapping[str, object], before: Mapping[str, object]) -> str:
    """The first thing in which two requests differ, for a message; empty: none. Data are the same wherever they lie;
    what an earlier version did not write down counts as the same, a setting of a recipe or a condition too.
    """
    digested = bool(asked.get("data_digest") and before.get("data_digest"))
    for key, value in asked.items():
        if key == "data" and digested:
            continue
        old = before.get(key)
        if key in _GROWING and isinstance(value, Mapping) and isinstance(old, Mapping):
            for inner in old:
                if inner in value and old[inner] != value[inner]:
                    return f"{key} with {inner} {old[inner]!r}, not {value[inner]!r}"
        elif key in before and old != value:
            if key == "data_digest":
                return "other data: images or labels have come, gone or changed"
            if key == "calibration":
                return "another calibration" if old and value else f"{'a' if old else 'no'} calibration"
            return f"another {key}" if isinstance(value, Mapping) else f"{key} {old!r}, not {value!r}"
    return ""


def plain(value: object) -> dict[str, Any]:
    """A flat dataclass as a dictionary."""
    assert dataclasses.is_dataclass(value)
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
