"""The predictor set to the user's own device by measurements taken there."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_spec
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.networks.foreign import Foreign, build_foreign, timm_has
from convscale.networks.resolve import find
from convscale.predictor.calibration import SHARED, Calibration
from convscale.predictor.devices import get_device, was_on
from convscale.predictor.fitted import STAND_IN_FACTOR, STAND_INS
from convscale.predictor.fitting import NOISE, Part, fit
from convscale.predictor.interval import RATES, network_sigma, rate_covariance, rate_shares, rate_sigmas
from convscale.predictor.latency import basis_of, call_times
from convscale.predictor.loading import workload_for
from convscale.predictor.roofline import FIXED, net_s, table_of
from convscale.stats import Z80

if TYPE_CHECKING:
    from convscale.cost.subject import Network
    from convscale.speed.records import Record

MANY = 12
"""From how many measured networks on all coefficients are fitted; below, the card's own rates."""
_OWN = ("convscale", "kit", "")
"""Sources of records that were made here, by ``measure``, ``confirm`` or a kit; others are tables."""
_RIDGE = 0.3
_NO_SHEET = 1e-6
"""Of a processor: its sheet is of another one, or of another number of cores."""
_SHEET_SIGMA = 0.1
"""Log error expected of a GPU's clocks against its data sheet's, below which no kernel is predicted: cards of the
tables run up to 1.12 times as fast (``boost`` in ``devices.json``). So a card that is faster than its sheet says is
found, and one that is as predicted keeps the sheet for all other networks."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One network measured on the device to calibrate for."""

    net: Network
    """The network."""
    conditions: Conditions
    """What it was measured under."""
    images_per_s: float
    """Images a second."""


def observations_of(records: Iterable[Record], device: str) -> tuple[list[Observation], list[str]]:
    """Turn records, or the rows of a timm CSV, into observations on ``device``; names that nothing here can build are
    returned beside them. So are functions of the user's own: a file of rows has no code run that it names. Give those
    to :func:`calibrate` as observations.

    Raises:
        UserError: a record is of another device; a table does not say its device.
    """
    card = get_device(device)
    observations: list[Observation] = []
    unknown: list[str] = []
    nets: dict[tuple[str, bool], Network | None] = {}
    for record in records:
        measured, own = record.measurement, record.source in _OWN
        name = measured.environment.device_name
        if own and not was_on(card.name, measured.conditions.device, name):
            raise UserError(
                f"{record.model} was measured on {name!r}, the calibration is for {card.title}; give only rows of that"
            )
        key = record.model if record.spec is None else json.dumps(record.spec, sort_keys=True), own
        if key not in nets:
            found = _net_measured if own else _net_named
            nets[key] = found(record.model) if record.spec is None else _net_of(record.spec)
        net = nets[key]
        if net is None:
            unknown.append(record.model)
            continue
        conditions = dataclasses.replace(measured.conditions, device=card.name)
        observations.append(Observation(net=net, conditions=conditions, images_per_s=measured.images_per_s))
    return observations, unknown


def _net_of(spec: Mapping[str, Any]) -> NetSpec | None:
    """The network that a record's own spec describes, or None where this version can not read it."""
    try:
        return NetSpec.from_dict(dict(spec))
    except UserError:
        return None


def _net_measured(name: str) -> Network | None:
    """What a record made here is of, in the form that was timed: timm's for inference with its branches merged."""
    try:
        found = find(name)
    except UserError:
        return None
    if isinstance(found, NetSpec):
        return found
    return found if found.origin == "timm" and timm_has(found.name) else None


def _net_named(name: str) -> Network | None:
    """Of a table's name: our spec, else timm's network as it is trained where timm is installed, else None."""
    try:
        return get_spec(name)
    except UserError:
        pass
    if "/" in name or ":" in name:  # an address, which timm would go to
        return None
    try:
        return build_foreign(Foreign(name, "timm"), meta=True)
    except UserError:
        return None


def calibrate(observations: Sequence[Observation], say: Callable[[str], None] = lambda text: None) -> Calibration:
    """Set the predictor to a device by what was measured there.

    The most likely card is sought, given what its data sheet is worth and how far single networks usually are off: so
    one measurement moves the card's rates most of the way towards it, and never so far that its own oddity spoils all
    others. From ``MANY`` networks on all coefficients are fitted, still held near what the tables said. A CPU wants a
    dozen: the shipped coefficients are of two other CPUs.

    A measurement whose time is the host's launches, not the GPU's work, says nothing of the GPU and is left out.

    Args:
        observations: networks measured under one device, mode, runtime (one that is predicted), layout, precision
            and number of threads; batch and image sizes may differ.
        say: told which measurements are left out.

    Raises:
        UserError: none given, none that says anything of the device, conditions that differ or that nothing is
            predicted for, or a speed that is not positive.
    """
    if not observations:
        raise UserError("nothing to calibrate with: give at least one measured network")
    first = observations[0].conditions
    for item in observations:
        for name in (*SHARED, "threads"):
            if (here := getattr(item.conditions, name)) != (there := getattr(first, name)):
                raise UserError(f"measurements of one calibration must share their {name}: {here!r} and {there!r}")
        if not item.images_per_s > 0:
            raise UserError(f"images_per_s must be positive, got {item.images_per_s!r}")
    basis = basis_of(first)
    first, sheet, known = basis.conditions, basis.device, basis.fitted
    kernels = [workload_for(item.net, item.conditions).kernels for item in observations]
    waits = call_times(table_of(kernels), len(kernels), basis).waiting_s > 0
    if waits.any():
        names = [_title(item) for item, late in zip(observations, waits, strict=True) if late]
        some = f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        why = f"the host's launches are predicted to take longer than the GPU's work there: {some}"
        if waits.all():
            raise UserError(f"nothing to calibrate with, since {why}; measure larger batches or images")
        say(f"left out, since {why}")
    observations = [item for item, late in zip(observations, waits, strict=True) if not late]
    table = table_of([some for some, late in zip(kernels, waits, strict=True) if not late])
    measured_s = np.array([item.conditions.batch_size / item.images_per_s for item in observations])
    coefficients, covariance = most_likely(
        Part(table=table, latency_s=measured_s, device=sheet),
        basis.coefficients,
        known.sigmas,
        sheet.name in known.devices,
        math.log(STAND_IN_FACTOR) / Z80 if first.runtime in STAND_INS else 0.0,
    )
    before_s, after_s = net_s(table, sheet, basis.coefficients), net_s(table, sheet, coefficients)
    return Calibration(
        device=sheet.name,
        mode=first.mode,
        runtime=first.runtime,
        layout=first.layout,
        precision=first.precision,
        threads=first.threads,
        count=len(observations),
        coefficients=coefficients,
        covariance=covariance,
        scale=float(np.exp(np.median(np.log(after_s / before_s)))),
        spread=float(np.quantile(np.abs(np.log(after_s / measured_s)), 0.8)),
    )


def _title(item: Observation) -> str:
    """An observation's network and batch, for people."""
    name = item.net if isinstance(item.net, str) else getattr(item.net, "name", None) or type(item.net).__name__
    return f"{name} (batch {item.conditions.batch_size})"


def most_likely(
    part: Part, start: Mapping[str, float], sigmas: Mapping[str, float], known: bool, further: float = 0.0
) -> tuple[dict[str, float], list[list[float]]]:
    """Coefficients for a card given its measurements, and the covariance of what is still not known of it.

    Args:
        part: the measured networks.
        start: coefficients from the tables.
        sigmas: what ``interval.fit_sigmas`` made of the tables' errors.
        known: whether the tables hold this card.
        further: log error that each rate has beside; see ``interval.rate_sigmas``.
    """
    prior = rate_sigmas(part.device, known, further)
    gpu = part.device.kind == "gpu"
    start = start if gpu else {**start, "sheet": _NO_SHEET}
    noise = network_sigma(part.table, part.device, start, sigmas)
    many = len(noise) >= MANY
    names = [name for name in start if name not in FIXED] if many else list(RATES)
    names += ["sheet"] if gpu else []
    expected = {**prior, "sheet": math.hypot(_SHEET_SIGMA, further)}
    ridge = {name: NOISE / expected[name] if name in expected else _RIDGE for name in names}
    weighed = dataclasses.replace(part, weight=NOISE / noise)
    coefficients = fit([weighed], start=start, free=names, ridge=ridge, robust=many)
    return coefficients, rate_covariance(prior, rate_shares(part.table, part.device, coefficients), noise)
