"""How fast candidates of a search are: measured here in one runtime, or predicted for a device that is not here."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

from convscale.arch.spec import NetSpec
from convscale.choice.basis import Basis
from convscale.choice.facts import SizedSpec, Speed
from convscale.choice.measured import speed_of, time_forms
from convscale.choice.speeds import facts_of
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.runtimes.base import file_runtimes, installed_runtimes
from convscale.speed.records import Record, append_record

_SECONDS, _MOST_SECONDS = 0.3, 4.0
"""Of timed calls of a candidate."""
_MOST_GAIN = 3.0
"""More than that is a machine that was busy for a moment."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A candidate's counts and speed."""

    speed: Speed
    params: int
    """Parameters."""
    macs: int
    """Multiply-accumulates per image."""
    conditions: Conditions | None = None
    """Under which the speed was measured or predicted; None: the study's."""


class Pace:
    """Gives candidates their speed.

    Where the fastest form of all runtimes is asked for, that would take half a minute a candidate. So candidates are
    measured as an ONNX file in the runtime that is the fastest for the first of them. What ships is faster by a factor
    that hardly differs between networks of a space: it is measured on two of them, and the network found is timed in
    all forms.

    Args:
        basis: the conditions, and whether speeds are measured or predicted.
        classes: the data's.
        channels: of its images.
        confidence: with what probability a predicted speed must hold.
        records: file of JSON lines that measurements are added to.
        runtime: what an earlier call chose; empty: to be chosen.
        factor: how many times faster the form that ships is, as an earlier call found; None: to be found.
        calibration: digest of the calibration that all speeds must go by; None: of the basis's file as it is now.
    """

    def __init__(
        self,
        basis: Basis,
        *,
        classes: int,
        channels: int,
        confidence: float,
        records: Path,
        runtime: str = "",
        factor: float | None = None,
        calibration: str | None = None,
    ) -> None:
        self.basis, self.classes, self.channels = basis, classes, channels
        self.confidence, self.records, self.runtime = confidence, records, runtime
        self.factor = factor
        self.calibration = calibration or basis.calibration_digest
        self.seconds = 0.0
        self._known: dict[NetSpec, Counted] = {}

    def __call__(self, spec: NetSpec) -> Counted:
        """The speed of a candidate at its own size, found once.

        Raises:
            UserError: it can not be traced or timed, or the calibration has changed since the search began.
            DoesNotFit: memory does not hold it at the batch asked for.
        """
        if spec not in self._known:
            began = time.perf_counter()
            self._known[spec] = self._predicted(spec) if self.basis.predicted else self._measured(spec)
            self.seconds += time.perf_counter() - began
        return self._known[spec]

    def sure(self, speed: Speed) -> float:
        """Images/s that a network keeps: as measured, times the factor of the form that ships; or those that a
        prediction holds with the confidence asked for.
        """
        if speed.kind != "predicted":
            return speed.images_per_s * (self.factor or 1.0)
        deviations = NormalDist().inv_cdf(self.confidence) / NormalDist().inv_cdf(0.9)
        return speed.images_per_s * (speed.low / speed.images_per_s) ** deviations

    def check_calibration(self) -> None:
        """
        Raises:
            UserError: the calibration that speeds are predicted by is not the one that the search began with.
        """
        by = self.basis.calibration
        if by is not None and (not os.path.isfile(by) or self.basis.calibration_digest != self.calibration):
            raise UserError(
                f"calibration {by} has changed since the search began, whose speeds go by the earlier one; put that "
                "back, or begin another search"
            )

    def _predicted(self, spec: NetSpec) -> Counted:
        one = SizedSpec(spec, spec.input.size)
        self.check_calibration()
        facts = facts_of([one], self.basis)[one]
        self.check_calibration()  # it may have been written anew while the network was traced
        if facts.speed is None:
            raise UserError(facts.failed or f"{spec.name} can not be predicted")
        conditions = replace(self.basis.conditions, image_size=spec.input.size)
        return Counted(speed=facts.speed, params=facts.params, macs=facts.macs, conditions=conditions)

    def _measured(self, spec: NetSpec) -> Counted:
        from convscale.cost.counting import count
        from convscale.nn.net import create_model
        from convscale.speed.measuring import measure_calmly, whole_batch

        net = create_model(spec, num_classes=self.classes, in_chans=self.channels)
        cost = count(net, image_size=spec.input.size)
        named = [self.runtime] if self.runtime else self._runtimes()
        timed = []
        for runtime in named:
            under = self._conditions(spec, runtime)
            made = measure_calmly(net, under, min_seconds=_SECONDS, max_seconds=_MOST_SECONDS)
            timed.append(whole_batch(replace(made, model=spec.name), under.batch_size))
        best = max(timed, key=lambda one: one.images_per_s)
        self.runtime = best.conditions.runtime
        record = Record(model=spec.name, measurement=best, params=cost.params, macs=cost.macs, spec=spec.to_dict())
        append_record(self.records, record)
        return Counted(speed=speed_of(best), params=cost.params, macs=cost.macs, conditions=best.conditions)

    def _runtimes(self) -> list[str]:
        if not self.basis.tuned:
            return [self.basis.conditions.runtime]
        installed = [n for n in file_runtimes(self.basis.conditions.device) if n in installed_runtimes()]
        return [self.basis.within] if self.basis.within else installed

    def _conditions(self, spec: NetSpec, runtime: str) -> Conditions:
        c = replace(self.basis.conditions, image_size=spec.input.size, runtime=runtime)
        return replace(c, precision="fp32") if self.basis.tuned else c

    @property
    def tuned(self) -> bool:
        """Whether what ships is found by timing all forms."""
        return self.basis.tuned and not self.basis.predicted

    def find_factor(self, specs: Sequence[NetSpec]) -> float:
        """How many times faster the form that ships is, by the least of some networks; kept."""
        gains = [self.shipped(spec).images_per_s / self(spec).speed.images_per_s for spec in specs]
        self.factor = min(max(1.0, min(gains)), _MOST_GAIN)
        return self.factor

    def shipped(self, spec: NetSpec) -> Speed:
        """The network found, in the fastest form that it can ship in where that is asked for."""
        if not self.tuned:
            return self(spec).speed
        from convscale.nn.net import create_model

        net = create_model(spec, num_classes=self.classes, in_chans=self.channels)
        return speed_of(time_forms(net, spec.name, spec.input.size, self.channels, self.basis, 2 * _SECONDS))
