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

import numpy as np

from convscale.choice.basis import Basis
from convscale.choice.decide import Option, beats, front_of, judge, merit
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.choice.speeds import Say
from convscale.conditions import Constraint
from convscale.errors import UserError, first_line
from convscale.images.preprocess import Preprocessing
from convscale.machine import Environment, available_cores
from convscale.networks.inputs import input_facts
from convscale.networks.names import spec_beside
from convscale.networks.resolve import Network
from convscale.runtimes.base import file_runtimes, installed_runtimes
from convscale.speed.records import Record, append_record, read_records
from convscale.speed.timing import Measurement
from convscale.words import listed

SLACK_KIN, SLACK = 1.6, 2.5
"""How far a guess may be off, as a factor: with a measured network of the same family, and without."""
FEW = 4
"""Among at most so many networks a second one that is measured for nothing but the scale costs more than it saves."""
_MACS_PER_S, _BYTES_PER_S = 1e11, 2e10  # only their ratio matters: guesses are scaled by what was measured


class Bench:
    """Times networks, each once; reuses and appends records where it is given a file."""

    def __init__(
        self,
        basis: Basis,
        facts: Mapping[SizedSpec, NetworkFacts],
        *,
        records: str | os.PathLike[str] | None = None,
        seconds: float = 1.0,
        reuse: bool = True,
        say: Say = lambda text: None,
    ) -> None:
        """
        Args:
            basis, facts: of the networks.
            records: a file of measurements, to which new ones are appended.
            seconds: timed seconds per network, at least.
            reuse: take what the file holds.
            say: is told of what the file holds and can not be taken.
        """
        self.basis, self.facts, self.seconds = basis, facts, seconds
        self.path = None if records is None else Path(records)
        self.speeds: dict[SizedSpec, Speed] = {}
        self.failed: dict[SizedSpec, str] = {}
        self.reused = 0
        self.timed = 0
        self._kept = self._read(say) if reuse else []

    def __call__(self, network: SizedSpec) -> Speed | None:
        """The speed of a network, or None where it can not run.

        Raises:
            UserError: the very first can not run: the conditions are to blame.
        """
        if network in self.speeds or network in self.failed:
            return self.speeds.get(network)
        try:
            speed = self._recorded(network) or self._time(network)
        except UserError as error:
            if not self.speeds:
                raise
            self.failed[network] = str(error)
            return None
        self.speeds[network] = speed
        return speed

    def _time(self, network: SizedSpec) -> Speed:
        measurement = time_network(network, self.basis, self.seconds)
        self.timed += 1
        if self.path is not None:
            counts = self.facts[network]
            record = Record(
                model=network.spec.name,
                measurement=measurement,
                params=counts.params,
                macs=counts.macs,
                spec=spec_beside(network.spec),
            )
            append_record(self.path, record)
        return speed_of(measurement)

    def _read(self, say: Say) -> list[Record]:
        """Records of this machine and these versions."""
        if self.path is None or not self.path.exists():
            return []
        here = Environment.here(self.basis.conditions.device)
        return [record for record in read_records(self.path, torn=say) if record.measurement.environment == here]

    def _recorded(self, network: SizedSpec) -> Speed | None:
        """From a record of the same conditions and network: its name and counts tell it."""
        c, counts = self.basis.conditions, self.facts[network]
        wanted = replace(c, image_size=network.image_size, threads=c.threads or available_cores())
        for record in reversed(self._kept):
            measured = record.measurement
            under = measured.conditions
            if self.basis.tuned:  # which form and runtime won is the record's to say
                under = replace(under, runtime=wanted.runtime, precision=wanted.precision)
            same_network = record.model == network.spec.name and (record.params, record.macs) == (
                counts.params,
                counts.macs,
            )
            chosen_from = chosen_among(self.basis) if self.basis.tuned else ""
            if same_network and under == wanted and measured.chosen_from == chosen_from:
                self.reused += 1
                return speed_of(measured)
        return None


def time_network(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
    """In the basis's runtime, or in the fastest form that the network can be shipped in.

    Raises:
        DoesNotFit: memory does not hold it at the basis's batch: with another it would be another speed.
    """
    from convscale.speed.measuring import measure, whole_batch

    if basis.tuned:
        return time_fastest(network, basis, seconds)
    cond = replace(basis.conditions, image_size=network.image_size)
    return whole_batch(measure(network.spec, cond, min_seconds=seconds, max_seconds=10 * seconds), cond.batch_size)


def chosen_among(basis: Basis) -> str:
    """What a tuned measurement is the fastest of, in words."""
    able = file_runtimes(basis.conditions.device)
    files = [basis.within] if basis.within else [name for name in able if name in installed_runtimes()]
    forms = listed(["float", *["bfloat16"] * basis.bf16, *["8 bits"] * basis.int8])
    return f"the fastest of {listed(files)}, {forms}"


def time_fastest(network: SizedSpec, basis: Basis, seconds: float) -> Measurement:
    """The network exported untrained in every form, tuned at the basis's batch: the fastest."""
    spec, image_size = network
    return time_forms(spec, spec.name, image_size, input_facts(spec).channels, basis, seconds)


def time_forms(net: Network, name: str, image_size: int, channels: int, basis: Basis, seconds: float) -> Measurement:
    """A network with any weights exported in every form and tuned at the basis's batch: the fastest.

    8-bit ranges come from noise and the gates of 8 bits and bfloat16 stand open: a speed does not depend on either, and
    there is nothing trained to lose. Symmetric activations, which lose more, do not compete: what they lose is not
    known yet.

    Args:
        net: a spec or a module.
        name: what to call it.
        image_size: side in pixels.
        channels: of its images.
        basis: a tuned one.
        seconds: timed seconds per form, at least half of it.
    """
    import tempfile

    from convscale.ship.forms import Search, TooSlow, export_forms, fastest_of, form_names, forms_in

    c = basis.conditions
    threads = c.threads or available_cores()
    able = form_names(net, int8=basis.int8, bf16=basis.bf16, image_size=image_size, device=c.device)
    names = forms_in(basis.within, able)
    half = (0.5,) * channels  # a speed does not depend on it
    options: dict[str, Any] = {
        "preprocessing": Preprocessing(image_size=image_size, channels=channels, mean=half, std=half)
    }
    if basis.int8:
        shape = (_NOISE, image_size, image_size, channels)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        options |= {"calibration_images": noise, "max_drop": 100.0}
    with tempfile.TemporaryDirectory() as folder:
        search = Search(
            batch_sizes=(c.batch_size,),
            threads=threads,
            min_seconds=seconds / 2,
            runtimes=None if basis.within is None else (basis.within,),
            device=c.device,
        )
        options |= {"twins": False, "for_speed": True, "image_size": image_size}
        forms = export_forms(net, folder, names, search=search, **options)
        fastest = fastest_of(forms, **vars(search))
    best, winner = fastest.again[fastest.winner], fastest.winner
    streams = f", {best.settings.streams} streams" if best.settings.streams > 1 else ""
    return Measurement(
        times_s=best.times_s,
        conditions=replace(
            c,
            image_size=image_size,
            threads=threads,
            runtime=best.settings.runtime,
            precision=next((name for name in ("int8", "bf16") if name in winner), "fp32"),
        ),
        environment=Environment.here(c.device),
        model=name,
        form=f"{winner} in {best.settings.runtime}{streams}",
        chosen_from=chosen_among(basis),
        notes=tuple(
            f"{name} can not be made: {first_line(reason)}"
            for name, reason in fastest.forms.items()
            if isinstance(reason, UserError) and not isinstance(reason, TooSlow)
        ),
    )


_NOISE = 32
"""Images of noise that 8-bit ranges are taken from; NNCF's own minimum here."""


def speed_of(measurement: Measurement) -> Speed:
    """A measurement's speed; the interval holds the middle half of the calls."""
    fast, slow = np.quantile(measurement.times_s, (0.25, 0.75))
    batch = measurement.conditions.batch_size
    return Speed(
        images_per_s=measurement.images_per_s,
        low=batch / float(slow),
        high=batch / float(fast),
        kind="measured",
        how=measurement.form,
        doubts=(*measurement.warnings, *measurement.notes),
    )


def guess(
    network: SizedSpec, facts: Mapping[SizedSpec, NetworkFacts], speeds: Mapping[SizedSpec, Speed]
) -> tuple[float, float] | None:
    """(images/s, by what factor it may be off) from counts, scaled by what was measured; None while nothing was."""
    if not speeds:
        return None
    kin = [other for other in speeds if other.spec.family == network.spec.family]
    ratios = [math.log(speeds[other].images_per_s * _raw_s(facts[other])) for other in kin or speeds]
    return math.exp(sum(ratios) / len(ratios)) / _raw_s(facts[network]), SLACK_KIN if kin else SLACK


def _raw_s(facts: NetworkFacts) -> float:
    return facts.macs / _MACS_PER_S + facts.traffic / _BYTES_PER_S + 1e-9


def explore(
    options: Sequence[Option],
    constraint: Constraint,
    bench: Callable[[SizedSpec], Speed | None],
    *,
    budget: int,
    say: Say,
) -> list[Option]:
    """Measure up to ``budget`` networks, those that can change the answer first; options come back with speeds or
    guesses.

    Two small networks set the scale of the guesses, among few networks one does. Then, again and again, the most
    accurate network that is guessed to keep the constraint and is better than the best that was measured to; when there
    is none left, those that only might. What remains of the budget goes to the front.
    """
    networks: list[SizedSpec] = list(
        dict.fromkeys(sized_spec_of(o) for o in options if judge(o, constraint)[0] == "unknown")
    )
    facts = {sized_spec_of(o): o.facts for o in options}
    speeds: dict[SizedSpec, Speed] = {}
    failed: set[SizedSpec] = set()
    by_size = sorted(networks, key=lambda network: _raw_s(facts[network]))
    seeds = list(dict.fromkeys(by_size[:: max(1, len(by_size) // 3)][: 2 if len(by_size) > FEW else 1]))
    floor = constraint.floor(options[0].batch_size) if options else 0.0
    while len(speeds) + len(failed) < budget:
        current = [updated(o, facts, speeds) for o in options if sized_spec_of(o) not in failed]
        network = (
            seeds.pop(0)
            if seeds
            else _next([o for o in current if sized_spec_of(o) in set(networks)], constraint, floor, speeds)
        )
        if network is None:
            break
        say(
            f"measuring {len(speeds) + 1} of at most {min(budget, len(networks))}: "
            f"{network.spec.name} @{network.image_size}"
        )
        speed = bench(network)
        if speed is None:
            failed.add(network)
        else:
            speeds[network] = speed
    return [updated(o, facts, speeds) for o in options]


def sized_spec_of(option: Option) -> SizedSpec:
    """What its speed depends on."""
    return SizedSpec(option.spec, option.image_size)


def updated(option: Option, facts: Mapping[SizedSpec, NetworkFacts], speeds: Mapping[SizedSpec, Speed]) -> Option:
    """The option with its speed, or a guess."""
    network = sized_spec_of(option)
    if network in speeds:
        return replace(option, facts=replace(option.facts, speed=speeds[network], estimate=None))
    guessed = guess(network, facts, speeds)
    return replace(option, facts=replace(option.facts, estimate=guessed[0] if guessed else None))


def might_keep(option: Option, floor: float, speeds: Mapping[SizedSpec, Speed]) -> bool:
    """Whether a network that was not measured may keep ``floor`` images/s, by a generous guess."""
    if option.facts.estimate is None:
        return True
    kin = any(network.spec.family == option.spec.family for network in speeds)
    return option.facts.estimate * (SLACK_KIN if kin else SLACK) >= floor


def _next(
    options: Sequence[Option], constraint: Constraint, floor: float, speeds: Mapping[SizedSpec, Speed]
) -> SizedSpec | None:
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
            likely = [o for o in left if (o.facts.estimate or math.inf) >= floor]
            pick = max(likely, key=merit) if likely else max(left, key=lambda o: o.facts.estimate or 0.0)
            return sized_spec_of(pick)
    supposed = [
        o if o.speed else replace(o, facts=replace(o.facts, speed=_supposed(o)))
        for o in options
        if o.speed or o.facts.estimate
    ]
    for o in sorted(front_of(supposed), key=lambda o: -merit(o)):
        if sized_spec_of(o) not in speeds and (o.images_per_s or 0) >= floor:
            return sized_spec_of(o)
    return None


def _supposed(option: Option) -> Speed:
    value = option.facts.estimate or 0.0
    return Speed(images_per_s=value, low=value, high=value, kind="measured")
