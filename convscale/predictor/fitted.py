"""The coefficients that travel with the package, fitted to measured tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING

from convscale.conditions import Conditions
from convscale.predictor.devices import Device

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Coefficients of one mode and layout with how far they were off on families they were not fitted on."""

    coefficients: Mapping[str, float]
    """Names as in ``roofline.PRIOR``."""
    sigmas: Mapping[str, float]
    """How far it was off on families left out, as in ``spread.fit_sigmas``."""
    cards: tuple[str, ...]
    """Devices that the tables were measured on."""


@cache
def fitted_sets() -> Mapping[str, Fitted]:
    """All fitted sets: eager-nchw, eager-nhwc, compiled, train-nchw, train-nhwc, cpu."""
    record = json.loads((files("convscale.predictor") / "coefficients.json").read_text(encoding="utf-8"))
    return MappingProxyType(
        {name: Fitted(**{**value, "cards": tuple(value["cards"])}) for name, value in record["sets"].items()}
    )


def set_name(conditions: Conditions, device: Device) -> str:
    """Which fitted set holds for conditions on a device."""
    if device.kind == "cpu":
        return "cpu"
    if conditions.mode == "train":
        return f"train-{conditions.layout}"
    return "compiled" if conditions.runtime != "eager" else f"eager-{conditions.layout}"
