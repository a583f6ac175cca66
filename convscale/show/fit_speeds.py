"""How the speeds of a fit's candidates are known, in words: timed here, measured on a device that is not here, or
predicted for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from convscale import words
from convscale.show.fit_parts import Candidate
from convscale.show.fit_record import FitRecord
from convscale.show.stated import Conditions, Machine

SPREADS = {"timed": "IQR", "predicted": "80 % interval", "both": "IQR, or 80 %"}
"""What the figure beside a speed is, by ``kind_of``."""


def kind_of(found: Sequence[Candidate]) -> str:
    """``timed``, ``predicted`` or ``both``, of the candidates that have a speed."""
    kinds = {"predicted" if c.timed is None else "timed" for c in found if c.images_per_s is not None}
    return "both" if len(kinds) > 1 else next(iter(kinds), "timed")


def how_known(fit: FitRecord, found: Sequence[Candidate]) -> str:
    """``exported untrained and timed as they would be shipped``."""
    named = (fit.constraint.conditions.device if fit.constraint.conditions else None) or "another device"
    elsewhere = fit.constraint.confidence is not None
    return {
        "timed": f"measured on {named}" if elsewhere else "exported untrained and timed as they would be shipped",
        "predicted": f"predicted for {named}",
        "both": f"measured on {named} or predicted for it",
    }[kind_of(found)]


def spread_of(c: Candidate) -> str:
    """The spread of a measured speed as a share of it; of a predicted one from where to where it goes."""
    if c.timed is None and c.predicted is not None:
        return f"{words.rate(c.predicted.low)} to {words.rate(c.predicted.high)}"
    return words.percent(c.iqr_rel)


def conditions_of(fit: FitRecord, c: Candidate) -> str:
    """Under what a candidate's speed holds; of a predicted one what was asked for."""
    if c.timed is not None:
        return str(c.timed.conditions or Conditions())
    return str(replace(fit.constraint.conditions or Conditions(), image_size=c.image_size))


def place_of(c: Candidate) -> str:
    """The machine that a candidate's speed was taken on; ``predicted`` where it was not."""
    return "predicted" if c.timed is None else str(c.timed.environment or Machine())


def drawn_text(fit: FitRecord, found: Sequence[Candidate]) -> str:
    """What a picture of the candidates' speeds shows, in sentences."""
    first = next((c for c in found if c.timed is not None), found[0])
    made = first.measurement or first.timed  # as it comes, as most of them were timed
    under = made.conditions if made else fit.constraint.conditions
    shared = str(replace(under or Conditions(), image_size=None))
    return {
        "timed": "the speed of every candidate that was timed, with its interquartile range. All timed with: "
        f"{shared}; {place_of(first)}.",
        "predicted": f"the speed predicted for every candidate, with its 80 % interval. All predicted for: {shared}.",
        "both": "the speed of every candidate: measured on the device, with its interquartile range, or predicted for "
        f"it, with its 80 % interval. All with: {shared}; measured on {place_of(first)}.",
    }[kind_of(found)]
