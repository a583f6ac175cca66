"""The coefficients that travel with the package, fitted to measured tables; and what can be predicted with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from types import MappingProxyType

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.predictor.devices import Device, get_device

RUNTIMES = ("eager", "compiled")
"""Runtimes that can be predicted: PyTorch, as it is or behind its compiler."""
PRECISIONS = ("amp", "bf16", "fp16", "fp32")
"""Precisions that can be predicted."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Coefficients of one mode and layout with how far they were off on families they were not fitted on."""

    coefficients: Mapping[str, float]
    """Names as in ``roofline.PRIOR``."""
    sigmas: Mapping[str, float]
    """How far it was off on families left out, as in ``interval.fit_sigmas``."""
    devices: tuple[str, ...]
    """Devices that the tables were measured on."""


@cache
def fitted_sets() -> Mapping[str, Fitted]:
    """All fitted sets: eager-nchw, eager-nhwc, compiled, train-nchw, train-nhwc, cpu."""
    record = json.loads((files("convscale.predictor") / "coefficients.json").read_text(encoding="utf-8"))
    return MappingProxyType(
        {name: Fitted(**{**value, "devices": tuple(value["devices"])}) for name, value in record["sets"].items()}
    )


def set_name(conditions: Conditions, device: Device) -> str:
    """Which fitted set holds for conditions on a device."""
    if device.kind == "cpu":
        return "cpu"
    if conditions.mode == "train":
        return f"train-{conditions.layout}"
    return "compiled" if conditions.runtime == "compiled" else f"eager-{conditions.layout}"


def check_predicted(conditions: Conditions) -> tuple[Conditions, Device]:
    """The conditions with the device's own name, and its data sheet.

    Raises:
        UserError: an unknown device (the message names the nearest), or a runtime or precision that nothing is
            predicted for.
    """
    device = get_device(conditions.device)
    if conditions.runtime not in RUNTIMES:
        raise UserError(f"runtime {conditions.runtime!r} is not predicted; {' and '.join(RUNTIMES)} PyTorch are")
    if conditions.precision not in PRECISIONS:
        raise UserError(
            f"precision {conditions.precision!r} is not predicted; {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]} are"
        )
    return replace(conditions, device=device.name), device


def known_by(device: str) -> tuple[str, ...]:
    """The fitted sets whose tables were measured on a device; none: only its data sheet is known."""
    return tuple(name for name, fitted in fitted_sets().items() if device in fitted.devices)
