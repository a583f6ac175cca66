"""Which candidates to measure: few, and those that can change the answer. Counts say where to look, measurements say
what is so.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convscale.arch.spec import NetSpec
from convscale.choice.decide import Option, beats, front_of, judge, merit
from convscale.choice.speeds import Known, Say, Setting, Speed, Unit
from convscale.conditions import Constraint
from convscale.errors import UserError, first_line

SLACK_KIN, SLACK = 1.6, 2.5
"""How far a guess may be off, as a factor: with a measured network of the same family, and without."""
_MACS_PER_S, _BYTES_PER_S = 1e11, 2e10  # only their ratio matters: guesses are scaled by what was measured


class Bench:
    """Times networks, each once; reuses and appends records where it is given a file."""

    def __init__(
        self,
        setting: Setting,
        known: Mapping[Unit, Known],
        *,
        records: str | os.PathLike[str] | None = None,
        seconds: float = 1.0,
    ) -> None:
        self.setting, self.known, self.seconds = setting, known, seconds
        self.path = None if records is None else Path(records)
        self.speeds: dict[Unit, Speed] = {}
        self.failed: dict[Unit, str] = {}
        self.reused = 0
        self.timed = 0
        self._kept = self._read()

    def __call__(self, unit: Unit) -> Speed | None:
        """The speed of a network, or None where it can not run.

        Raises:
            UserError: the very first can not run: the conditions are to blame.
        """
        if unit in self.speeds or unit in self.failed:
            return self.speeds.get(unit)
        try:
            found = self._recorded(unit) or self._time(unit)
        except UserError as error:
            if not self.speeds:
                raise
            self.failed[unit] = str(error)
            return None
        self.speeds[unit] = found
        return found

    def _time(self, unit: Unit) -> Speed:
        from convscale.speed.records import Record, append_record

        measurement = time_network(*unit, self.setting, self.seconds)
        self.timed += 1
        if self.path is not None:
            known = self.known[unit]
            append_record(
                self.path, Record(model=unit[0].name, measurement=measurement, params=known.params, macs=known.macs)
            )
        return speed_of(measurement)

    def _read(self) -> list[Any]:
        if self.path is None or not self.path.exists():
            return []
        from convscale.machine import Environment
        from convscale.speed.records import read_records

        here = Environment.here(self.setting.conditions.device)
        return [record for record in read_records(self.path) if record.measurement.environment == here]

    def _recorded(self, unit: Unit) -> Speed | None:
        """From a record of the same machine, versions, conditions and network: its name and counts tell it."""
        from convscale.machine import available_cores

        c, known = self.setting.conditions, self.known[unit]
        wanted = replace(c, image_size=unit[1], threads=c.threads or available_cores())
        for record in reversed(self._kept):
            held = record.measurement.conditions
            if self.setting.tuned:  # which form and runtime won is the record's to say
                held = replace(held, runtime=wanted.runtime, precision=wanted.precision)
            same = (
                record.model == unit[0].name
                and held == wanted
                and (record.params, record.macs) == (known.params, known.macs)
                and self.setting.tuned == any(note.startswith(TUNED) for note in record.measurement.notes)
                and (not self.setting.tuned or tuned_mark(self.setting) in record.measurement.notes)
            )
            if same:
                self.reused += 1
                return speed_of(record.measurement)
        return None


def time_network(spec: NetSpec, image_size: int, setting: Setting, seconds: float) -> Any:
    """A ``Measurement`` in the setting's runtime, or of the fastest form that the network can be shipped in."""
    from convscale.speed.measuring import measure

    if setting.tuned:
        return time_fastest(spec, image_size, setting, seconds)
    return measure(
        spec, replace(setting.conditions, image_size=image_size), min_seconds=seconds, max_seconds=10 * seconds
    )


TUNED = "the fastest of "
"""How the note of a tuned measurement begins."""


def tuned_mark(setting: Setting) -> str:
    """The note that tells what a tuned measurement was chosen from."""
    from convscale.runtimes.base import installed_runtimes

    files = [name for name in ("onnxruntime", "openvino") if name in installed_runtimes()]
    return f"{TUNED}{' and '.join(files)}, {'float and 8 bits' if setting.int8 else 'float'}"


def time_fastest(spec: NetSpec, image_size: int, setting: Setting, seconds: float) -> Any:
    """A ``Measurement`` of the network exported untrained in every form, tuned at the setting's batch: the fastest.

    8-bit ranges come from noise and the gate on accuracy stands open: a speed does not depend on either, and there is
    nothing trained to lose.
    """
    import tempfile

    from numpy import random, uint8

    from convscale.machine import Environment, available_cores
    from convscale.ship.export import export
    from convscale.ship.forms import FORMS, form_names
    from convscale.ship.tune import tune
    from convscale.speed.timing import Measurement

    c = setting.conditions
    threads = c.threads or available_cores()
    forms = {
        name: {k: v for k, v in vars(FORMS[name]).items() if v}
        for name in form_names(spec, int8=setting.int8, image_size=image_size)
    }
    noise = (
        random.default_rng(0).integers(0, 256, (_NOISE, image_size, image_size, 3), dtype=uint8)
        if setting.int8
        else None
    )
    for form in forms.values():
        if form.get("int8"):
            form.update(calibration_images=noise, max_drop=100.0)
    found, left_out = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms.items():
            try:
                artifact = export(spec, Path(folder) / name, image_size=image_size, **form)
            except Exception as error:
                if "int8" not in form:
                    raise
                # A runtime may refuse what the quantiser made of one network; the other forms can still be shipped.
                left_out.append(f"{name} can not be made: {first_line(error)}")
                continue
            tuned = tune(artifact, batch_sizes=(c.batch_size,), threads=threads, min_seconds=seconds / 2, save=False)
            found.append((tuned.best, name, artifact.precision))
    best, name, precision = min(found, key=lambda item: item[0].latency_s)
    how = f"{name} in {best.settings.runtime}" + (
        f", {best.settings.streams} streams" if best.settings.streams > 1 else ""
    )
    return Measurement(
        times_s=best.times_s,
        conditions=replace(
            c, image_size=image_size, threads=threads, runtime=best.settings.runtime, precision=precision
        ),
        environment=Environment.here(),
        model=spec.name,
        notes=(tuned_mark(setting), f"{_HOW}{how}", *left_out),
    )


_NOISE = 32
_HOW = "as "


def speed_of(measurement: Any) -> Speed:
    """A measurement's speed; the interval holds the middle half of the calls."""
    from numpy import quantile

    fast, slow = quantile(measurement.times_s, (0.25, 0.75))
    batch = measurement.conditions.batch_size
    return Speed(
        images_per_s=measurement.images_per_s,
        low=batch / float(slow),
        high=batch / float(fast),
        kind="measured",
        how=next((note.removeprefix(_HOW) for note in measurement.notes if note.startswith(_HOW)), ""),
        doubts=(*measurement.warnings, *(note for note in measurement.notes if not note.startswith((_HOW, TUNED)))),
    )


def guess(unit: Unit, known: Mapping[Unit, Known], speeds: Mapping[Unit, Speed]) -> tuple[float, float] | None:
    """(images/s, by what factor it may be off) from counts, scaled by what was measured; None while nothing was."""
    if not speeds:
        return None
    kin = [other for other in speeds if other[0].family == unit[0].family]
    ratios = [math.log(speeds[other].images_per_s * _raw_s(known[other])) for other in kin or speeds]
    return math.exp(sum(ratios) / len(ratios)) / _raw_s(known[unit]), SLACK_KIN if kin else SLACK


def _raw_s(known: Known) -> float:
    return known.macs / _MACS_PER_S + known.traffic / _BYTES_PER_S + 1e-9


def explore(
    options: Sequence[Option], constraint: Constraint, bench: Callable[[Unit], Speed | None], *, budget: int, say: Say
) -> list[Option]:
    """Measure up to ``budget`` networks, those that can change the answer first; options come back with speeds or
    guesses.

    Two small networks set the scale of the guesses. Then, again and again, the most accurate network that is guessed to
    keep the constraint and is better than the best that was measured to; when there is none left, those that only
    might. What remains of the budget goes to the front.
    """
    units: list[Unit] = list(
        dict.fromkeys((o.spec, o.image_size) for o in options if judge(o, constraint)[0] == "unknown")
    )
    known = {unit_of(o): o.known for o in options}
    speeds: dict[Unit, Speed] = {}
    failed: set[Unit] = set()
    by_size = sorted(units, key=lambda unit: _raw_s(known[unit]))
    seeds = list(dict.fromkeys([by_size[0], by_size[len(by_size) // 3]])) if by_size else []
    floor = constraint.floor(options[0].batch_size) if options else 0.0
    while len(speeds) + len(failed) < budget:
        current = [updated(o, known, speeds) for o in options if unit_of(o) not in failed]
        unit = (
            seeds.pop(0)
            if seeds
            else _next([o for o in current if unit_of(o) in set(units)], constraint, floor, speeds)
        )
        if unit is None:
            break
        say(f"measuring {len(speeds) + 1} of at most {min(budget, len(units))}: {unit[0].name} @{unit[1]}")
        found = bench(unit)
        if found is None:
            failed.add(unit)
        else:
            speeds[unit] = found
    return [updated(o, known, speeds) for o in options]


def unit_of(option: Option) -> Unit:
    """What its speed depends on."""
    return option.spec, option.image_size


def updated(option: Option, known: Mapping[Unit, Known], speeds: Mapping[Unit, Speed]) -> Option:
    """The option with its speed, or a guess."""
    unit = unit_of(option)
    if unit in speeds:
        return replace(option, known=replace(option.known, speed=speeds[unit], estimate=None))
    guessed = guess(unit, known, speeds)
    return replace(option, known=replace(option.known, estimate=guessed[0] if guessed else None))


def might_keep(option: Option, floor: float, speeds: Mapping[Unit, Speed]) -> bool:
    """Whether a network that was not measured may keep ``floor`` images/s, by a generous guess."""
    if option.known.estimate is None:
        return True
    kin = any(unit[0].family == option.spec.family for unit in speeds)
    return option.known.estimate * (SLACK_KIN if kin else SLACK) >= floor


def _next(options: Sequence[Option], constraint: Constraint, floor: float, speeds: Mapping[Unit, Speed]) -> Unit | None:
    """The network to measure next, or None when no other can change the answer."""
    claimed = [o for o in options if o.top1 is not None]
    named = {o.candidate.group for o in claimed}
    boards = [claimed]
    for group in dict.fromkeys(o.candidate.group for o in options if o.candidate.group not in named):
        boards.append([o for o in options if o.candidate.group == group])
    for board in boards:
        keepers = [o for o in board if o.speed is not None and judge(o, constraint)[0] == "yes"]
        best = max(keepers, key=merit, default=None)
        left = [
            o for o in board if o.speed is None and (best is None or beats(o, best)) and might_keep(o, floor, speeds)
        ]
        if left:
            likely = [o for o in left if (o.known.estimate or math.inf) >= floor]
            pick = max(likely, key=merit) if likely else max(left, key=lambda o: o.known.estimate or 0.0)
            return unit_of(pick)
    supposed = [
        o if o.speed else replace(o, known=replace(o.known, speed=_supposed(o)))
        for o in options
        if o.speed or o.known.estimate
    ]
    for o in sorted(front_of(supposed), key=lambda o: -merit(o)):
        if unit_of(o) not in speeds and (o.images_per_s or 0) >= floor:
            return unit_of(o)
    return None


def _supposed(option: Option) -> Speed:
    value = option.known.estimate or 0.0
    return Speed(images_per_s=value, low=value, high=value, kind="measured")
