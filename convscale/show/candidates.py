"""Candidates of a choice as points to draw: with their predicted speed, or as they were judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from convscale.arch.spec import NetSpec
from convscale.choice.basis import Basis, device_title
from convscale.choice.candidates import Candidate, candidates_of
from convscale.choice.decide import Choice
from convscale.choice.facts import NetworkFacts, SizedSpec
from convscale.choice.speeds import Say, facts_of
from convscale.errors import UserError
from convscale.show.speed_points import SpeedPoint
from convscale.show.stated import Conditions


def choice_points(choice: Choice) -> list[SpeedPoint]:
    """A choice's options with a speed; the reason why each was chosen or lost stands with it."""
    conditions = Conditions.of(choice.stated_conditions())
    found = [
        (o.candidate, o.facts, (*((o.speed.how,) if o.speed and o.speed.how else ()), o.reason))
        for o in choice.options
        if o.speed is not None
    ]
    return [
        replace(_point(candidate, facts, choice.device, conditions, notes), chosen=candidate is choice.best.candidate)
        for candidate, facts, notes in found
    ]


def predicted_points(
    basis: Basis,
    models: Sequence[str | NetSpec] | None = None,
    *,
    image_sizes: Sequence[int] | None = None,
    progress: Say = lambda text: None,
) -> list[SpeedPoint]:
    """What released weights are predicted to run at on a device, each at the sizes that an accuracy was published for.

    Args:
        basis: of a named device, or by a calibration.
        models: names, patterns, tags or specs; None: all released weights.
        image_sizes: instead of the published ones; without a published accuracy a network stands in the table only.
        progress: told a line now and then.

    Raises:
        UserError: the device is this machine's own, or a name matches nothing.
    """
    if not basis.predicted:
        raise UserError(
            f"device {basis.conditions.device!r} is this machine's own and is not predicted; measure with "
            "`convscale measure --record FILE`"
        )
    pool = [c for c in candidates_of(models, image_sizes) if not c.why_not]
    facts = facts_of([SizedSpec(c.spec, c.image_size) for c in pool], basis, progress)
    title = device_title(basis.conditions.device)
    conditions = Conditions.of(basis.conditions.to_dict())
    return [
        _point(c, known, title, conditions, ())
        for c in pool
        if (known := facts[SizedSpec(c.spec, c.image_size)]).speed is not None
    ]


def _point(
    candidate: Candidate, facts: NetworkFacts, device: str, conditions: Conditions, notes: Sequence[str]
) -> SpeedPoint:
    speed = facts.speed
    assert speed is not None
    return SpeedPoint(
        name=candidate.name,
        images_per_s=speed.images_per_s,
        kind=speed.kind,
        device=device,
        conditions=replace(conditions, image_size=candidate.image_size),
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
