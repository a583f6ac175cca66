"""Rows of candidates, as the record of ``fit`` holds them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convscale.arch.spec import NetSpec
from convscale.choice.basis import Basis
from convscale.choice.decide import Option
from convscale.choice.facts import SizedSpec, Speed
from convscale.choice.rows import Rows
from convscale.cost.counting import count
from convscale.images.splits import DataSplits
from convscale.machine import Environment
from convscale.networks.foreign import Foreign
from convscale.networks.resolve import Named
from convscale.pipeline.contender import build
from convscale.pipeline.record import written
from convscale.show.fit_parts import Candidate, Predicted, Timed
from convscale.show.stated import Machine


def options_near(options: Sequence[Option], contenders: Sequence[Option], floor: float, most: int) -> list[Option]:
    """Contenders, and of the other options with a speed those that are nearest to ``floor``; ``most`` in all, as long
    as contenders are fewer.
    """
    chosen = {o.label for o in contenders}
    others = [o for o in options if o.speed is not None and o.label not in chosen]
    others.sort(key=lambda o: abs(math.log((o.images_per_s or 1.0) / floor)))
    return [*contenders, *others[: max(0, most - len(contenders))]]


def row_of_option(o: Option, weights: Path | str | None, basis: Basis, rows: Rows | None) -> Candidate:
    """What became of an option whose speed is known."""
    assert o.speed is not None
    return Candidate(
        name=o.name,
        family=o.spec.family,
        image_size=o.image_size,
        params=o.facts.params,
        macs=o.facts.macs,
        measurement=timed_part(o.speed, o.spec, o.image_size, basis, rows) if o.speed.kind == "measured" else None,
        predicted=predicted_part(o.speed) if o.speed.kind == "predicted" else None,
        kept=o.verdict == "yes",
        reason=o.reason,
        published_top1=o.top1,
        weights=None if weights is None else str(weights),
        spec=o.spec.to_dict() if isinstance(o.spec, NetSpec) else None,
        origin=o.spec.origin if isinstance(o.spec, Foreign) else None,
        licence=o.candidate.licence,
        extra_data=o.candidate.extra_data if o.candidate.licence else None,
    )


def new_row(one: SizedSpec, family: str, splits: DataSplits) -> Candidate:
    """A network before its speed is known."""
    cost = count(build(one.spec, splits), image_size=one.image_size)
    own = one.spec if isinstance(one.spec, NetSpec) else None
    lineage = own.lineage if own else None
    return Candidate(
        name=one.spec.name,
        family=family,
        image_size=one.image_size,
        params=cost.params,
        macs=cost.macs,
        spec=own.to_dict() if own else None,
        origin=one.spec.origin if isinstance(one.spec, Foreign) else None,
        scaling=None
        if lineage is None
        else {"depth": lineage.depth, "width": lineage.width, "resolution": lineage.resolution},
    )


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What a search among networks that start from scratch found, by which every row is judged."""

    floor: float
    """Images/s to keep."""
    speeds: Mapping[str, float]
    """Images/s of those that were up for it, by name: what decided."""
    keepers: Mapping[str, Candidate]
    """The largest that keeps it, by family."""
    sure: Callable[[Candidate], float]
    """Images/s of a network as it comes that hold: as measured, or predicted with the confidence asked for."""
    tuned: bool
    """Whether what decides is the speed in the form that ships."""


def judged_row(row: Candidate, by: Verdicts) -> Candidate:
    """What became of a network that starts from scratch, by the speed that decided; one with weights was judged among
    those.

    Where the form that ships decides, only few of a family are timed in it: smaller ones than its keeper are taken to
    keep the speed as that does, larger ones not to, whatever they do as they come.
    """
    if row.weights is not None:
        return row
    if (speed := by.speeds.get(row.name)) is not None:
        keeps = speed >= by.floor
        return replace(row, kept=keeps, reason=None if keeps else _too_slow(row, speed, by.floor))
    keeper, as_shipped = by.keepers.get(row.family or ""), row.tuned is not None or not by.tuned
    speed = (row.tuned.speed or 0.0) if row.tuned is not None else by.sure(row)
    smaller = keeper is not None and (row.macs or 0) <= (keeper.macs or 0)
    keeps = speed >= by.floor if as_shipped else smaller
    how = "" if as_shipped else " as it comes"
    if keeps and keeper is not None:
        reason = f"fast enough, but so is {keeper.name}"
        if not smaller:
            reason = f"fast enough by so little that {keeper.name}, which is smaller, keeps it more surely"
        elif speed < by.floor:
            reason = f"smaller than {keeper.name}, which is fast enough as it would ship"
    elif speed < by.floor:
        reason = f"{_too_slow(row, speed, by.floor)}{how}"
    elif keeper is not None:
        reason = (
            f"{speed:,.0f} images/s{how}, but larger than {keeper.name}, the largest found to be fast enough as it "
            "would ship"
        )
    else:
        reason = f"{speed:,.0f} images/s{how}; nothing of its family was found to be fast enough as it would ship"
    return replace(row, kept=keeps, reason=reason)


def _too_slow(row: Candidate, speed: float, floor: float) -> str:
    """By the speed that decided; of a predicted one that is not the middle, which a report shows beside it."""
    told = row.predicted.images_per_s if row.predicted is not None and row.timed is None else None
    sure = "" if told is None else f" with the probability asked for ({told:,.0f} predicted)"
    return f"too slow: {speed:,.0f} of {floor:,.0f} images/s{sure}"


def timed_part(speed: Speed, spec: Named, image_size: int, basis: Basis, rows: Rows | None) -> Timed:
    """A speed as a record holds it; its raw times are in ``speeds.jsonl``, or here where it came in a row."""
    if rows is not None:
        return Timed.of(rows.of(spec, image_size))
    return Timed(
        conditions=written(replace(basis.conditions, image_size=image_size)),
        environment=Machine.of(Environment.here(basis.conditions.device)),
        images_per_s=speed.images_per_s,
        iqr_rel=(speed.high - speed.low) / speed.images_per_s,
        warnings=speed.doubts,
        notes=(speed.how,) if speed.how else (),
    )


def predicted_part(speed: Speed) -> Predicted:
    """A predicted speed as a record holds it."""
    return Predicted(
        images_per_s=speed.images_per_s,
        low=speed.low,
        high=speed.high,
        bound_by=speed.bound_by or None,
        doubts=speed.doubts,
    )
