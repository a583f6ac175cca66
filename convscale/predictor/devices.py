"""Devices by their data sheets: what a prediction knows of a card it never saw run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from convscale.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's data sheet."""

    name: str
    """The name it is asked for by (``rtx-4090``)."""
    title: str
    """The maker's name for it."""
    driver: str
    """Regular expression of the whole name that its driver gives it; empty for a CPU."""
    kind: str
    """``gpu`` or ``cpu``."""
    tensor_tflops: float
    """Dense half-precision matrix rate with single-precision accumulation, in 1e12 operations/s (an addition and a
    multiplication are two)."""
    tf32_tflops: float
    """Dense TF32 matrix rate, which PyTorch's convolutions take for single precision; where a card has none,
    ``fp32_tflops``."""
    fp32_tflops: float
    """Single-precision rate of the general cores."""
    bandwidth_gb_s: float
    """Memory bandwidth in 1e9 bytes/s."""
    l2_mb: float
    """Last-level cache in 2**20 bytes."""
    memory_gb: float
    """Memory in 2**30 bytes."""
    units: int
    """Streaming multiprocessors, or cores."""
    watts: float
    """Board power limit."""
    bfloat16: bool
    """Whether its matrix units take bfloat16."""
    sustained: float = 1.0
    """Share of ``tensor_tflops`` that the power limit lets it hold, where that is far below 1."""
    source: str
    """Where the figures stand."""


@cache
def devices() -> dict[str, Device]:
    """All known devices by name, in the order of the data file."""
    records = json.loads((files("convscale.predictor") / "devices.json").read_text(encoding="utf-8"))["devices"]
    return {record["name"]: Device(**record) for record in records}


def get_device(name: str) -> Device:
    """The device of that name; spaces, underscores and letter case do not matter.

    Raises:
        UserError: unknown; the message names the nearest.
    """
    known = devices()
    plain = str(name).strip().lower().replace(" ", "-").replace("_", "-")
    if plain not in known:
        raise UserError(f"device {name!r} is unknown{nearest(plain, known)}")
    return known[plain]
