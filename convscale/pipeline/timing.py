"""The speed of one network of ``fit``: as it comes, as it would ship, or predicted; each stands in the run's record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from convscale.arch.small import for_image_size
from convscale.arch.zoo import as_spec
from convscale.choice.basis import Basis
from convscale.choice.decide import Option
from convscale.choice.facts import SizedSpec, Speed
from convscale.choice.measured import speed_of, time_forms
from convscale.choice.rows import by_rows
from convscale.choice.speeds import Say, facts_of
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.pipeline.again import faster
from convscale.pipeline.candidate_rows import new_row, predicted_part, timed_part
from convscale.pipeline.contender import build
from convscale.pipeline.record import RunRecord
from convscale.pipeline.request import FitRequest
from convscale.runtimes.base import file_runtimes
from convscale.show.fit_parts import Candidate as Row
from convscale.show.fit_parts import Timed
from convscale.speed.measuring import measure, measure_calmly, whole_batch
from convscale.stats import reached_with

REFERENCE, REFERENCE_SHARE = "resnet18", 1.0
"""From scratch, where no speed is asked for: this share of this network's speed on the device is. Small images give it
a gentler stem."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Timer:
    """Times or predicts networks under what was asked, and writes down what came out."""

    asked: FitRequest
    splits: DataSplits
    basis: Basis
    constraint: Constraint
    record: RunRecord
    folder: Path
    say: Say
    loaded: bool = False
    """Whether other work kept this machine busy when its speeds began to be taken."""

    @property
    def floor(self) -> float:
        """Images/s to keep."""
        return self.constraint.floor(self.basis.conditions.batch_size)

    @property
    def wanted(self) -> str:
        """What must be kept, in words."""
        sure = f" with probability {self.constraint.confidence:g}" if self.basis.predicted else ""
        return f"{self.constraint}{sure}"

    @property
    def plain(self) -> Conditions:
        """Conditions of a quick timing: one runtime as it comes."""
        c = self.basis.conditions
        named = self.basis.within or file_runtimes(c.device)[0]
        return replace(c, runtime=named, precision="fp32") if self.basis.tuned else c

    def _remark(self, text: str) -> None:
        """A line for people that the record keeps."""
        self.record.add_note(text)
        self.say(text)

    def reference_speed(self) -> float:
        """``REFERENCE_SHARE`` of the reference's speed at the data's size, in two digits."""
        size = self.asked.size_for(self.splits)
        spec = for_image_size(as_spec(REFERENCE), size)
        if self.basis.predicted:
            facts = facts_of([SizedSpec(spec, size)], self.basis)[SizedSpec(spec, size)]
            speed = facts.speed.images_per_s if facts.speed else 0.0
        else:
            net = build(spec, self.splits)
            cond = replace(self.plain, image_size=size)
            times = (whole_batch(measure(net, cond, min_seconds=0.5), cond.batch_size) for _ in range(3))
            speed = median(made.images_per_s for made in times)
        return float(f"{REFERENCE_SHARE * speed:.2g}")

    def _speed(self, one: SizedSpec, family: str, *, anew: bool = False) -> float:
        """Images/s of a network as it comes (timed ``anew``: the better of both), or the one predicted that it has with
        the confidence asked for.

        Raises:
            DoesNotFit: it was to be measured, and memory does not hold it at the batch asked for.
        """
        before = self.record.row(one.spec.name, one.image_size)
        if not anew and before is not None and (before.measurement or before.predicted):
            return self._sure(before)
        row = before or new_row(one, family, self.splits)
        if self.basis.predicted:
            speed, failed = self._predicted_speed(one)
            if speed is None:
                raise UserError(failed or f"{one.spec.name} can not be predicted")
            if speed.kind == "measured":
                row = replace(row, measurement=timed_part(speed, one.spec, one.image_size, self.basis, self.asked.rows))
            else:
                row = replace(row, predicted=predicted_part(speed))
        else:
            net = build(one.spec, self.splits)
            cond = replace(self.plain, image_size=one.image_size)
            made = replace(measure_calmly(net, cond, min_seconds=0.3, max_seconds=5.0), model=one.spec.name)
            row = replace(row, measurement=faster(row.measurement, Timed.of(whole_batch(made, cond.batch_size))))
        self.record.put_row(row)
        self.say(f"{one.spec.name}: {row.images_per_s or 0.0:,.0f} images/s (needed {self.floor:,.0f})")
        return self._sure(row)

    def _predicted_speed(self, one: SizedSpec) -> tuple[Speed | None, str]:
        """The speed on a device that is not here, set by the rows where there are some; or why there is none."""
        rows = self.asked.rows
        facts = facts_of([one, *(rows.measured if rows else ())], self.basis)
        known = (by_rows(facts, rows) if rows else facts)[one]
        return known.speed, known.failed

    def _sure(self, row: Row) -> float:
        """The speed that holds: as measured, or predicted with the confidence asked for."""
        if row.predicted is None or row.predicted.images_per_s is None or row.predicted.low is None:
            return (row.measurement.speed if row.measurement else None) or 0.0
        return reached_with(self.constraint.confidence, row.predicted.images_per_s, row.predicted.low)

    def sure_of(self, o: Option) -> float:
        """The speed of an option that holds: as ``_sure``; 0 where it is not known."""
        if o.speed is None or o.speed.kind != "predicted":
            return o.images_per_s or 0.0
        return reached_with(self.constraint.confidence, o.speed.images_per_s, o.speed.low)

    def _tuned(self, one: SizedSpec, family: str, *, anew: bool = False) -> float:
        """Images/s in the form and settings in which it would ship; timed ``anew``, the better of both."""
        name, size = one.spec.name, one.image_size
        row = self.record.row(name, size) or new_row(one, family, self.splits)
        if row.tuned is None or anew:
            made = time_forms(build(one.spec, self.splits), name, size, self.splits.channels, self.basis, 0.6)
            row = replace(
                row, tuned=faster(row.tuned, replace(Timed.of(made), notes=(speed_of(made).how, *made.notes)))
            )
            self.record.put_row(row)
            self.say(f"{name} as it would ship: {made.images_per_s:,.0f} images/s, {made.form}")
        assert row.tuned is not None
        return row.tuned.speed or 0.0

    def _row(self, name: str, image_size: int) -> Row:
        row = self.record.row(name, image_size)
        assert row is not None, "every contender has a row"
        return row

    def shortfall(self, name: str, speed: float) -> str:
        """By how much the fastest misses what was asked."""
        if speed >= self.floor:  # it is fast enough, but too large
            return f"nothing keeps {self.constraint}: the fastest is {name}"
        return (
            f"nothing keeps {self.constraint}: the fastest is {name} with {speed:,.0f} images/s, "
            f"{1 - speed / self.floor:.0%} below"
        )
