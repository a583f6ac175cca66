"""Devices by their data sheets: what a prediction knows of a card it never saw run."""

from __future__ import annotations

import json
import re
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
    aliases: tuple[str, ...] = ()
    """Other names that it is asked for by."""
    source: str
    """Where the figures stand."""


@cache
def devices() -> dict[str, Device]:
    """All known devices by name, in the order of the data file."""
    records = json.loads((files("convscale.predictor") / "devices.json").read_text(encoding="utf-8"))["devices"]
    return {record["name"]: Device(**{**record, "aliases": tuple(record.get("aliases", ()))}) for record in records}


def get_device(name: str) -> Device:
    """The device of that name, an alias, its maker's name or its driver's; spaces, underscores and letter case do not
    matter (``RTX 4090``, ``NVIDIA GeForce RTX 4090``).

    Raises:
        UserError: unknown; the message names the nearest.
    """
    asked = _plain(str(name))
    for device in devices().values():
        if asked in map(_plain, (device.name, device.title, *device.aliases)):
            return device
        if device.driver and re.fullmatch(device.driver, str(name).strip(), re.IGNORECASE):
            return device
    raise UserError(f"device {name!r} is unknown{nearest(asked, devices())}")


def _plain(name: str) -> str:
    """A name in lower case with hyphens, without its maker's."""
    return re.sub(r"[\s_-]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
