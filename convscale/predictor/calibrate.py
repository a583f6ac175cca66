"""The predictor set to the user's own device by measurements taken there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.predictor.calibration import _SHARED, Calibration
from convscale.predictor.devices import get_device
from convscale.predictor.fitted import fitted_sets, set_name
from convscale.predictor.fitting import NOISE, Part, fit
from convscale.predictor.interval import CARD, card_covariance, card_shares, card_sigmas, network_sigma
from convscale.predictor.roofline import net_s, table_of
from convscale.predictor.workload import load_workload

if TYPE_CHECKING:
    from convscale.arch.spec import NetSpec
    from convscale.speed.records import Record

MANY = 12
"""From how many measured networks on all coefficients are fitted; below, the card's own rates."""
_RIDGE = 0.3


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One network measured on the device to calibrate for."""

    net: nn.Module | NetSpec | str
    """The network."""
    conditions: Conditions
    """What it was measured under."""
    images_per_s: float
    """Images a second."""


def observations_of(records: Iterable[Record], device: str) -> tuple[list[Observation], list[str]]:
    """Turn records, or the rows of a timm CSV, into observations on ``device``; names that nothing here can build are
    returned beside them.
    """
    found: list[Observation] = []
    unknown: list[str] = []
    nets: dict[str, Any] = {}
    for record in records:
        name = record.model
        if name not in nets:
            nets[name] = _net_named(name)
        if nets[name] is None:
            unknown.append(name)
            continue
        conditions = dataclasses.replace(record.measurement.conditions, device=get_device(device).name)
        found.append(Observation(net=nets[name], conditions=conditions, images_per_s=record.measurement.images_per_s))
    return found, unknown


def _net_named(name: str) -> Any:
    from convscale.arch.zoo import get_spec

    try:
        return get_spec(name)
    except UserError:
        pass
    try:
        import timm
        import torch

        with torch.device("meta"):
            return timm.create_model(name)
    except (ImportError, RuntimeError, NotImplementedError):
        return None


def calibrate(observations: Sequence[Observation]) -> Calibration:
    """Set the predictor to a device by what was measured there.

    The most likely card is sought, given what its data sheet is worth and how far single networks usually are off: so
    one measurement moves the card's rates most of the way towards it, and never so far that its own oddity spoils all
    others. From ``MANY`` networks on all coefficients are fitted, still held near what the tables said. A CPU wants a
    dozen: the shipped coefficients are of one other CPU.

    Args:
        observations: networks measured under one device, mode, runtime (eager or compiled PyTorch), layout, precision
            and number of threads; batch and image sizes may differ.

    Raises:
        UserError: none given, conditions that differ or that nothing is predicted for, or a speed that is not positive.
    """
    if not observations:
        raise UserError("nothing to calibrate with: give at least one measured network")
    first = observations[0].conditions
    for item in observations:
        here = item.conditions
        for name in (*_SHARED, "threads"):
            if getattr(here, name) != getattr(first, name):
                raise UserError(
                    f"measurements of one calibration must share their {name}: {getattr(first, name)!r} and "
                    f"{getattr(here, name)!r}"
                )
        if not item.images_per_s > 0:
            raise UserError(f"images_per_s must be positive, got {item.images_per_s!r}")
    if first.runtime not in ("eager", "compiled"):
        raise UserError(f"PyTorch is predicted, eager or compiled; measurements in {first.runtime} say nothing of it")
    sheet = get_device(first.device)
    known = fitted_sets()[set_name(first, sheet)]
    table = table_of([load_workload(item.net, item.conditions).kernels for item in observations])
    measured_s = np.array([item.conditions.batch_size / item.images_per_s for item in observations])
    made = most_likely(
        Part(table=table, latency_s=measured_s, device=sheet),
        known.coefficients,
        known.sigmas,
        sheet.name in known.cards,
    )
    errors = np.log(net_s(table, sheet, made[0]) / measured_s)
    return Calibration(
        device=sheet.name,
        mode=first.mode,
        runtime=first.runtime,
        layout=first.layout,
        precision=first.precision,
        threads=first.threads,
        count=len(observations),
        coefficients=made[0],
        covariance=made[1],
        scale=float(np.exp(np.median(np.log(net_s(table, sheet, made[0]) / net_s(table, sheet, known.coefficients))))),
        spread=float(np.quantile(np.abs(errors), 0.8)),
    )


def most_likely(
    part: Part, start: Mapping[str, float], sigmas: Mapping[str, float], known: bool
) -> tuple[dict[str, float], list[list[float]]]:
    """Coefficients for a card given its measurements, and the covariance of what is still not known of it.

    Args:
        part: the measured networks.
        start: coefficients from the tables.
        sigmas: what ``spread.fit_sigmas`` made of the tables' errors.
        known: whether the tables hold this card.
    """
    prior = card_sigmas(part.device, known)
    noise = network_sigma(part.table, part.device, start, sigmas)
    names = list(CARD) if len(noise) < MANY else list(start)
    ridge = {name: NOISE / prior[name] if name in prior else _RIDGE for name in names}
    weighed = dataclasses.replace(part, weight=NOISE / noise)
    coefficients = fit([weighed], start=start, free=names, ridge=ridge, robust=len(noise) >= MANY)
    return coefficients, card_covariance(prior, card_shares(part.table, part.device, coefficients), noise)
