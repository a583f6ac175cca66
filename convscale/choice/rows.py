"""A choice by rows that were measured on a device that is not here: their networks go by them, the others are predicted
and set by them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from convscale.arch.spec import NetSpec
from convscale.choice.basis import Asked, Basis, check_device, device_title
from convscale.choice.decide import Judged, Option
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.choice.measured import speed_of
from convscale.choice.speeds import facts_of
from convscale.errors import UserError
from convscale.networks.foreign import Foreign
from convscale.networks.resolve import Named, find
from convscale.predictor.devices import at_hand, is_processor, was_on
from convscale.predictor.predict import Prediction, with_doubt
from convscale.predictor.traced import network_key
from convscale.speed.records import Record, read_records
from convscale.speed.timing import Measurement
from convscale.stats import Z80
from convscale.words import listed, number, plural

STRENGTH = 4
"""Rows that the predictor's own interval counts for where the scatter of single networks is estimated: a judgement."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Measurements on the device of a basis."""

    path: str
    """The file that they came from."""
    measured: Mapping[SizedSpec, Measurement]
    """By network and size; of several of one the last."""
    unknown: tuple[str, ...] = ()
    """Names that nothing here builds."""
    left_out: int = 0
    """Rows of other numbers of threads than those asked for."""

    def of(self, network: Named, image_size: int) -> Measurement:
        """The measurement of a network that has a row, whatever its weights."""
        key = (measured_key(network), image_size)
        return {(measured_key(spec), size): m for (spec, size), m in self.measured.items()}[key]


def asked_by_rows(asked: Asked, records: Sequence[Record], path: str | os.PathLike[str]) -> Asked:
    """The conditions asked for, with the rows' runtime where none was named, and on a processor with their threads.

    Raises:
        UserError: there are no rows, none of the threads asked for, or they are of several runtimes, or on a processor
            of several numbers of threads of which none is asked for.
    """
    if not records:
        raise UserError(f"{path} has no rows; the measure.py of a kit writes them")
    asked = replace(asked, by_rows=True)
    if asked.threads is None and _elsewhere(asked.device):
        counts = _thread_counts(records)
        if len(counts) > 1:
            raise UserError(f"{path} has rows of {_all_of(counts)} threads; give --threads, by which of them to go")
        asked = replace(asked, threads=counts[0])
    records = _of_threads(records, asked.threads, path)
    if asked.runtime is not None or asked.compiled:
        return asked
    names = sorted({record.measurement.conditions.runtime for record in records})
    if len(names) > 1:
        raise UserError(f"{path} has rows of the runtimes {listed(names)}; give each a file")
    return replace(asked, runtime=names[0])


def _thread_counts(records: Sequence[Record]) -> list[int | None]:
    """Numbers of threads that records were measured with, in order; None: it was not written down."""
    return sorted({record.measurement.conditions.threads for record in records}, key=lambda count: count or 0)


def _all_of(counts: Sequence[int | None]) -> str:
    """``4, 8 and 28``."""
    return listed("unknown" if count is None else str(count) for count in counts)


def _of_threads(records: Sequence[Record], threads: int | None, path: str | os.PathLike[str]) -> Sequence[Record]:
    """The records of so many threads; None: all of them.

    Raises:
        UserError: there are none.
    """
    found = [record for record in records if threads is None or record.measurement.conditions.threads == threads]
    if not found:
        counts = _all_of(_thread_counts(records))
        raise UserError(f"{path} has no row of {threads} threads; its rows are of {counts}")
    return found


def _elsewhere(device: str) -> bool:
    """Whether a device is a processor that is not here."""
    return not at_hand(device) and is_processor(check_device(device))


def rows_of(records: Sequence[Record], basis: Basis, path: str | os.PathLike[str], named: object = None) -> Rows:
    """Records as rows of a basis.

    Args:
        records: of a file.
        basis: what they must have been measured under.
        path: the file, for messages.
        named: the candidates as the user names them. A function that builds a network (``package.module:function``) is
            called for a row only where it is among them: a file does not choose what code runs.

    Raises:
        UserError: the basis is not a predicted one, a row is of another device, batch, precision, runtime, layout or
            mode, or none is of its number of threads.
    """
    if not basis.predicted:
        raise UserError(
            f"device {basis.conditions.device!r} is measured here; rows of a device that is not here go with its name, "
            "and records of this one with records"
        )
    measured: dict[SizedSpec, Measurement] = {}
    unknown: list[str] = []
    for record in records:
        _check_row(record, basis, path)
    kept = _of_threads(records, basis.conditions.threads, path)
    for record in kept:
        spec, size = _network_of(record, names_in(named)), record.measurement.conditions.image_size
        if spec is None or not isinstance(size, int):
            unknown.append(record.model)
        else:
            measured[SizedSpec(spec, size)] = record.measurement
    if not measured:
        raise UserError(f"{path} has no row of a network that is known here; of {', '.join(unknown[:3])} nothing is")
    left_out = len(records) - len(kept)
    return Rows(path=os.fspath(path), measured=measured, unknown=tuple(unknown), left_out=left_out)


def read_rows(path: str | os.PathLike[str], asked: Asked) -> tuple[list[Record], Asked]:
    """The records of a file, and the conditions asked for completed by them.

    Raises:
        UserError: the file is missing or damaged (the line is named), or has no rows.
    """
    records = read_records(path)
    return records, asked_by_rows(asked, records, path)


def names_in(named: object) -> frozenset[str]:
    """The texts among candidates as a user gives them: one, several, or none."""
    if isinstance(named, str):
        return frozenset((named,))
    return (
        frozenset(item for item in named if isinstance(item, str)) if isinstance(named, list | tuple) else frozenset()
    )


def _network_of(record: Record, named: frozenset[str]) -> Named | None:
    """What a row is of: its spec, or what its name stands for; None where nothing here builds that."""
    try:
        found = find(record.model) if record.spec is None else NetSpec.from_dict(dict(record.spec))
    except UserError:
        return None
    own = isinstance(found, Foreign) and found.origin == "factory"
    return None if own and record.model not in named else found


def _check_row(record: Record, basis: Basis, path: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: the row was measured on another device or under other conditions.
    """
    c, under = basis.conditions, record.measurement.conditions
    name = record.measurement.environment.device_name
    if not was_on(c.device, under.device, name):
        raise UserError(f"{path}: {record.model} was measured on {name!r}, the choice is for {device_title(c.device)}")
    for field in ("batch_size", "precision", "runtime", "mode", "layout"):
        if (here := getattr(under, field)) != (wanted := getattr(c, field)):
            what = {"batch_size": "batch"}.get(field, field)
            kits = "; kits make no rows in 8 bits: leave measured or int8 out" if wanted == "int8" else ""
            raise UserError(f"{path}: {record.model} was measured in {what} {here}, asked is {what} {wanted}{kits}")


def measured_key(network: Named) -> str:
    """Equal for what is one network to measure, whatever its weights."""
    return network_key(network) or f"other {network.name}"


def log_ratios(rows: Rows, facts: Mapping[SizedSpec, NetworkFacts]) -> list[float]:
    """Of each measured network the logarithm of its measured over its predicted speed."""
    found = []
    for network, measurement in rows.measured.items():
        speed = facts[network].speed
        if speed is not None:
            found.append(math.log(measurement.images_per_s / speed.images_per_s))
    return found


def set_by(predicted: Speed, ratios: Sequence[float]) -> Speed:
    """A prediction, set by how far predictions of other networks on the device were off.

    With n log ratios r of measured over predicted speeds, their mean R, and s = (half the log width of the 80 %
    interval) / 1.2816, half of the variance s^2 is taken to be the device's, common to all networks, and half each
    network's own (normal in the logarithm). Then

    - the middle is multiplied by exp(R n / (n + 1)): the common error, shrunk towards none;
    - what is left of the common variance is s^2 / 2 / (n + 1);
    - a network's own variance is (``STRENGTH`` s^2 / 2 + sum of (r - R)^2) / (``STRENGTH`` + n - 1): the rows' scatter,
      held near what the predictor expects;
    - the ends lie 1.2816 times the root of the sum of both away from the middle, in the logarithm.

    Without rows nothing changes. Rows that scatter more than was expected widen the interval.
    """
    n = len(ratios)
    if n == 0:
        return predicted
    mean = sum(ratios) / n
    variance = (math.log(predicted.high / predicted.low) / 2 / Z80) ** 2
    common = variance / 2 / (n + 1)
    own = (STRENGTH * variance / 2 + sum((r - mean) ** 2 for r in ratios)) / (STRENGTH + n - 1)
    middle = predicted.images_per_s * math.exp(mean * n / (n + 1))
    half = Z80 * math.sqrt(common + own)
    return replace(predicted, images_per_s=middle, low=middle * math.exp(-half), high=middle * math.exp(half))


def by_rows(facts: Mapping[SizedSpec, NetworkFacts], rows: Rows) -> dict[SizedSpec, NetworkFacts]:
    """Facts with measured speeds where there is a row of the network, whatever its name, and elsewhere predictions that
    are set by the rows.
    """
    ratios = log_ratios(rows, facts)
    measured = {(measured_key(spec), size): speed_of(m) for (spec, size), m in rows.measured.items()}
    made = {}
    for network, known in facts.items():
        speed = measured.get((measured_key(network.spec), network.image_size))
        if speed is None and known.speed is not None:
            speed = set_by(known.speed, ratios)
        made[network] = replace(known, speed=speed)
    return made


def set_in_another(told: Prediction, rows: Rows, basis: Basis) -> Prediction:
    """A prediction in another precision than the rows', set by them as by rows of its own: how far the device is from
    what is predicted of it is taken to be no matter of precision, and a doubt says so.

    Args:
        told: for the device of the rows.
        basis: what the rows were measured under.
    """
    ratios = log_ratios(rows, facts_of(rows.measured, basis))
    known = Speed(images_per_s=told.images_per_s, low=told.low, high=told.high, kind="predicted")
    moved = set_by(known, ratios)
    made = replace(
        told,
        images_per_s=moved.images_per_s,
        low=moved.low,
        high=moved.high,
        latency_s=told.latency_s * told.images_per_s / moved.images_per_s,
        calibrated=told.calibrated or bool(ratios),
    )
    under = basis.conditions.precision
    return with_doubt(made, f"set by networks that were measured in {under}, not in {told.conditions.precision}")


def note_of(rows: Rows, facts: Mapping[SizedSpec, NetworkFacts]) -> str:
    """What the rows did to the other predictions, in words; ``facts`` as predicted."""
    ratios = log_ratios(rows, facts)
    n = len(ratios)
    factor = math.exp(sum(ratios) / n * n / (n + 1)) if n else 1.0
    left = f"; left out, since nothing here builds them: {', '.join(rows.unknown[:3])}" if rows.unknown else ""
    if rows.left_out:
        left += f"; {plural(rows.left_out, 'row')} of other numbers of threads left out"
    return (
        f"{plural(n, 'network')} measured ({os.path.basename(rows.path)}); the others are predicted, their speeds "
        f"times {number(factor)} by these{left}"
    )


def kind_of(options: Sequence[Option]) -> str:
    """``measured``, ``predicted``, or ``measured and predicted``."""
    return " and ".join(sorted({o.speed.kind for o in options if o.speed})) or "predicted"


def with_kinds(judged: Judged) -> Judged:
    """The same with the measured ones' reasons saying so."""

    def said(option: Option) -> Option:
        if option.speed is None or option.speed.kind != "measured" or " measured" in option.reason:
            return option
        return replace(option, reason=f"{option.reason} (its speed was measured)")

    parts = {name: tuple(map(said, getattr(judged, name))) for name in ("maybe", "alternatives", "rejected", "options")}
    best = said(judged.best)
    front = tuple(best if o is judged.best else said(o) for o in judged.front)
    options = tuple(best if o is judged.best else new for o, new in zip(judged.options, parts["options"], strict=True))
    return Judged(best=best, front=front, **{**parts, "options": options})


def as_it_is(option: Option) -> Option:
    """The option: it is judged as it was counted."""
    return option
