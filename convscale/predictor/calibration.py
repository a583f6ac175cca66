"""What measurements on a device changed in the predictor, as a value."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convscale.conditions import Conditions
from convscale.errors import UserError, check_number, check_text, check_whole, first_line, short
from convscale.files import write_json
from convscale.predictor.devices import get_device
from convscale.predictor.roofline import MOVING, PRIOR, RATES
from convscale.read import OWN, object_of, read_json

FORMAT = 5
"""Of what is written. Formats 3 and 4 are read too: coefficients of 3 had the names on the left of ``RENAMED``, and
neither had those of ``NEWER``."""
NEWER = {"sheet": 1e-6, "batch_norm_train.reads": 1.0, **{f"work.{kind}": 1e-6 for kind in MOVING}}
"""Coefficients that came with format 5, as they were when nothing spoke of them."""
RENAMED = {
    "compute.conv1": "compute.conv_1x1",
    "compute.group": "compute.grouped",
    "compute.even": "compute.grouped_pow2",
    "compute.packed": "compute.grouped_packed",
    "compute.direct": "compute.depthwise_native",
    "compute.wide": "depthwise.wide",
    "window0": "depthwise.window0",
    "direct.generic": "depthwise_native.generic",
    "direct.weight": "depthwise.weight",
    "direct.input": "depthwise.input",
    "stats0": "batch_norm_train.channels0",
    "group0": "grouped.width0",
    "memory.conv1": "memory.conv_1x1",
    "memory.group": "memory.grouped",
    "memory.even": "memory.grouped_pow2",
    "memory.packed": "memory.grouped_packed",
    "memory.direct": "memory.depthwise_native",
    "memory.norm": "memory.batch_norm",
    "memory.stats": "memory.batch_norm_train",
    "memory.layer-norm": "memory.layer_norm",
    "memory.group-norm": "memory.group_norm",
    "memory.point": "memory.pointwise",
    "memory.uneven": "memory.pointwise_mixed",
    "memory.fused-reduce": "memory.fused_reduce",
    "memory.fused-mean": "memory.fused_mean",
    "transform.conv1": "transform.conv_1x1",
    "transform.group": "transform.grouped",
    "transform.even": "transform.grouped_pow2",
    "transform.packed": "transform.grouped_packed",
    "small.norm": "small.batch_norm",
    "small.stats": "small.batch_norm_train",
}
"""Coefficients that changed their names with the kinds of kernels that they speak of."""
_LEAST, _MOST = 1e-6, 1e6
"""Of a coefficient; those that ship lie between 0.1 and 150."""
SHARED = ("device", "mode", "runtime", "layout", "precision")
"""Conditions that a calibration holds for; a CPU's threads are those that it was measured with."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What measurements on a device changed in the predictor; holds for one mode, runtime, layout, precision and number
    of threads.
    """

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
        for name in SHARED:
            if (made := getattr(self, name)) != (asked := getattr(conditions, name)):
                raise UserError(
                    f"the calibration was made for {name} {made!r}, not {asked!r}; measure and calibrate for that"
                )
        if conditions.threads not in (None, self.threads):
            raise UserError(
                f"the calibration was made with {self.threads or 'all'} threads, not {conditions.threads}; measure and "
                "calibrate for that"
            )

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        values = dataclasses.asdict(self)
        return {"format": FORMAT, **values, "coefficients": dict(self.coefficients)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        """From what ``to_dict`` gave.

        Raises:
            UserError: a newer format, or fields missing.
        """
        if value.get("format") not in (3, 4, FORMAT):
            raise UserError(
                f"a calibration has format {value.get('format')!r}, this version of convscale reads 3 to {FORMAT}"
            )
        try:
            made = cls(**{key: item for key, item in value.items() if key != "format"})
            coefficients = {
                RENAMED.get(name, name): check_number(name, number, f"from {_LEAST:g} to {_MOST:g}", _LEAST, _MOST)
                for name, number in made.coefficients.items()
            }
            _check(made)
        except (TypeError, AttributeError) as error:
            raise UserError(f"not a calibration: {first_line(error)}") from error
        if value["format"] != FORMAT:
            coefficients = _without_boost({**NEWER, **coefficients}, made.device)
        if missing := sorted(PRIOR.keys() - coefficients.keys()):
            raise UserError(f"not a calibration: coefficients are missing ({', '.join(missing[:3])})")
        return dataclasses.replace(made, coefficients=coefficients)


def _without_boost(coefficients: dict[str, float], device: str) -> dict[str, float]:
    """Coefficients from before data sheets knew how far above their clocks cards run."""
    boost = get_device(device).boost
    made = {"peak": coefficients.get("peak", 1.0) / boost, "special": coefficients.get("special", 1.0) * boost}
    return {**coefficients, **{name: value for name, value in made.items() if name in coefficients}}


def _check(made: Calibration) -> None:
    """Raise UserError where a part can not be used."""
    for name in SHARED:
        check_text(name, getattr(made, name))
    check_whole("count", made.count)
    if made.threads is not None:
        check_whole("threads", made.threads)
    check_number("scale", made.scale, "a factor above 0", _LEAST, _MOST)
    check_number("spread", made.spread, "a log error of at least 0", 0, _MOST)
    rows, square = made.covariance, [len(RATES)] * len(RATES)
    if not isinstance(rows, list | tuple) or [len(r) if isinstance(r, list | tuple) else 0 for r in rows] != square:
        raise UserError(f"covariance is {short(rows)}; it must be {len(RATES)} rows of {len(RATES)} numbers")
    for number in (number for row in rows for number in row):
        check_number("covariance", number, f"numbers up to {_MOST:g}", -_MOST, _MOST)


def save_calibration(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write a calibration as JSON."""
    write_json(path, calibration.to_dict())


def calibration_of(given: Calibration | str | os.PathLike[str] | None) -> Calibration | None:
    """A calibration as a user gives it: itself, its file, or none.

    Raises:
        UserError: it is none of them; as for :func:`load_calibration`.
    """
    if given is None or isinstance(given, Calibration):
        return given
    if not isinstance(given, str | os.PathLike):
        raise UserError(
            f"calibration is {short(given)}; it must be what calibrate gave, or a file of `convscale calibrate`"
        )
    return load_calibration(given)


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read a calibration.

    Raises:
        UserError: no such file, or not a calibration.
    """
    values = object_of(read_json(path, "calibration", OWN), f"calibration {path}")
    try:
        return Calibration.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"calibration {path}: {error}") from error
