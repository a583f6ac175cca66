"""Rows of candidates, as the record of ``fit`` holds them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from convscale.arch.spec import NetSpec
from convscale.choice.basis import Basis
from convscale.choice.decide import Option
from convscale.choice.facts import SizedSpec, Speed
from convscale.choice.rows import Rows
from convscale.cost.counting import count
from convscale.images.splits import DataSplits
from convscale.machine import Environment
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
        licence=o.candidate.licence,
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
        scaling=None
        if lineage is None
        else {"depth": lineage.depth, "width": lineage.width, "resolution": lineage.resolution},
    )


def judged_row(
    row: Candidate, floor: float, kept: Collection[str], final: Collection[str], leaders: Mapping[str, str]
) -> Candidate:
    """What became of a network that starts from scratch; one with weights was judged among those.

    Args:
        row: the network.
        floor: images/s to keep.
        kept: names that keep it.
        final: names that were up for it.
        leaders: the largest that keeps it, by family.
    """
    if row.weights is not None:
        return row
    speed = row.images_per_s or 0.0
    keeps = row.name in kept or (speed >= floor and row.name not in final)
    reason = f"too slow: {speed:,.0f} of {floor:,.0f} images/s"
    if keeps and row.name not in kept:
        reason = f"fast enough, but so is {leaders.get(row.family or '', 'a larger member')}"
    return replace(row, kept=keeps, reason=None if row.name in kept else reason)


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
