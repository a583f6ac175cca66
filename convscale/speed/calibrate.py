"""The predictor set to the user's own device by measurements taken there."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from convscale.errors import UserError
from convscale.files import write_json
from convscale.speed.conditions import Conditions
from convscale.speed.device import get_device
from convscale.speed.fit import NOISE, Part, fit
from convscale.speed.predict import fitted_sets, load_workload, set_name
from convscale.speed.roofline import net_s, table_of
from convscale.speed.spread import CARD, card_covariance, card_shares, card_sigmas, network_sigma

if TYPE_CHECKING:
    from convscale.arch.spec import NetSpec
    from convscale.speed.records import Record

FORMAT = 3
MANY = 12
"""From how many measured networks on all coefficients are fitted; below, the card's own rates."""
_RIDGE = 0.3
_SHARED = ("device", "mode", "runtime", "layout", "precision")
"""Conditions that a calibration holds for; a CPU's threads are those that it was measured with."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One network measured on the device to calibrate for."""

    net: nn.Module | NetSpec | str
    """The network."""
    conditions: Conditions
    """What it was measured under."""
    images_per_s: float
    """Images a second."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What measurements on a device changed in the predictor; holds for one mode, runtime, layout, precision and number of threads."""

    device: str
    """The device's name."""
    mode: str
    """``infer`` or ``train``."""
    runtime: str
    """``eager`` or ``compiled``."""
    layout: str
    """``nchw`` or ``nhwc``."""
    precision: str
    """``amp``, ``fp32``, ``bf16`` or ``fp16``."""
    threads: int | None
    """Of a CPU, as measured and so as predicted; None: one per core."""
    count: int
    """Measured networks it rests on."""
    coefficients: Mapping[str, float]
    """Coefficients fitted to the measurements, held near the shipped ones."""
    covariance: Sequence[Sequence[float]]
    """What is still not known of the card: covariance of the log errors of its peak, bandwidth and launch time."""
    scale: float = 1.0
    """Factor that it puts on the predicted times of the measured networks, in the middle; for people to read."""
    spread: float = 0.0
    """80th percentile of the absolute log error left on the measured networks."""

    def require(self, conditions: Conditions) -> None:
        """Raise UserError when it was made for other conditions."""
        for name in _SHARED:
            if (made := getattr(self, name)) != (asked := getattr(conditions, name)):
                raise UserError(f"the calibration was made for {name} {made!r}, not {asked!r}; measure and calibrate for that")
        if conditions.threads not in (None, self.threads):
            raise UserError(
                f"the calibration was made with {self.threads or 'all'} threads, not {conditions.threads}; measure and calibrate for that"
            )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = dataclasses.asdict(self)
        return {"format": FORMAT, **values, "coefficients": dict(self.coefficients)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        """From what ``to_dict`` gave.

        Raises:
            UserError: a newer format, or fields missing.
        """
        if value.get("format") != FORMAT:
            raise UserError(f"a calibration has format {value.get('format')!r}, this version of convscale reads {FORMAT}")
        try:
            return cls(**{key: item for key, item in value.items() if key != "format"})
        except TypeError as error:
            raise UserError(f"not a calibration: {error}") from error


def save_calibration(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write a calibration as JSON."""
    write_json(path, calibration.to_dict())


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read a calibration.

    Raises:
        UserError: no such file, or not a calibration.
    """
    try:
        return Calibration.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise error if isinstance(error, UserError) else UserError(f"calibration {path} can not be read: {error}") from error


def observations_of(records: Iterable[Record], device: str) -> tuple[list[Observation], list[str]]:
    """Turn records, or the rows of a timm CSV, into observations on ``device``; names that nothing here can build are returned beside them."""
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

    The most likely card is sought, given what its data sheet is worth and how far single networks usually are off: so one measurement moves the
    card's rates most of the way towards it, and never so far that its own oddity spoils all others. From ``MANY`` networks on all coefficients are
    fitted, still held near what the tables said. A CPU wants a dozen: the shipped coefficients are of one other CPU.

    Args:
        observations: networks measured under one device, mode, runtime (eager or compiled PyTorch), layout, precision and number of threads; batch
            and image sizes may differ.

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
                raise UserError(f"measurements of one calibration must share their {name}: {getattr(first, name)!r} and {getattr(here, name)!r}")
        if not item.images_per_s > 0:
            raise UserError(f"images_per_s must be positive, got {item.images_per_s!r}")
    if first.runtime not in ("eager", "compiled"):
        raise UserError(f"PyTorch is predicted, eager or compiled; measurements in {first.runtime} say nothing of it")
    sheet = get_device(first.device)
    known = fitted_sets()[set_name(first, sheet)]
    table = table_of([load_workload(item.net, item.conditions).kernels for item in observations])
    measured_s = np.array([item.conditions.batch_size / item.images_per_s for item in observations])
    made = most_likely(Part(table=table, latency_s=measured_s, device=sheet), known.coefficients, known.sigmas, sheet.name in known.cards)
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


def most_likely(part: Part, start: Mapping[str, float], sigmas: Mapping[str, float], known: bool) -> tuple[dict[str, float], list[list[float]]]:
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
