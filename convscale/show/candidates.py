"""Candidates of a choice as points to draw: with their predicted speed, or as they were judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from convscale.arch.spec import NetSpec
from convscale.choice.candidates import Candidate, candidates_of
from convscale.choice.choose import setting_of
from convscale.choice.decide import Choice
from convscale.choice.speeds import Known, device_title, known
from convscale.errors import UserError
from convscale.show.speed_points import SpeedPoint


def choice_points(choice: Choice) -> list[SpeedPoint]:
    """A choice's options with a speed; the reason why each was chosen or lost stands with it."""
    conditions = choice.to_dict()["conditions"]
    found = [
        (o.candidate, o.known, (*((o.speed.how,) if o.speed and o.speed.how else ()), o.reason))
        for o in choice.options
        if o.speed is not None
    ]
    return [
        replace(_point(candidate, facts, choice.device, conditions, notes), chosen=candidate is choice.best.candidate)
        for candidate, facts, notes in found
    ]


def predicted_points(
    device: str,
    models: Sequence[str | NetSpec] | None = None,
    *,
    image_sizes: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **conditions: Any,
) -> list[SpeedPoint]:
    """What released weights are predicted to run at on a device, each at the sizes that an accuracy was published for.

    Args:
        device: a named GPU.
        models: names, patterns, tags or specs; None: all released weights.
        image_sizes: instead of the published ones; without a published accuracy a network stands in the table only.
        conditions: ``batch_size``, ``precision``, ``layout``, ``compiled``, ``mode``, ``calibration``; see
            ``choice.setting_of``.

    Raises:
        UserError: the device is this machine's own, or unknown, or a name matches nothing.
    """
    setting = setting_of(device, **conditions)
    if not setting.predicted:
        raise UserError(
            f"device {device!r} is this machine's own and is not predicted; measure with `convscale measure --record "
            "FILE`"
        )
    pool = [c for c in candidates_of(models, image_sizes) if not c.why_not]
    facts = known([(c.spec, c.image_size) for c in pool], setting, progress)
    title = device_title(setting.conditions.device)
    return [
        _point(c, facts[c.spec, c.image_size], title, setting.conditions.to_dict(), ())
        for c in pool
        if facts[c.spec, c.image_size].speed is not None
    ]


def _point(
    candidate: Candidate, facts: Known, device: str, conditions: dict[str, Any], notes: Sequence[str]
) -> SpeedPoint:
    speed = facts.speed
    assert speed is not None
    return SpeedPoint(
        name=candidate.name,
        images_per_s=speed.images_per_s,
        kind=speed.kind,
        device=device,
        conditions={**conditions, "image_size": candidate.image_size},
        low=speed.low,
        high=speed.high,
        top1=candidate.top1,
        weights=candidate.name if candidate.top1 is not None else "",
        accuracy_source=candidate.source,
        params=facts.params,
        macs=facts.macs,
        bound_by=speed.bound_by,
        notes=(*speed.doubts, *(note for note in notes if note)),
    )
