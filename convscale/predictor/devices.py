"""Devices by their data sheets: what a prediction knows of a card it never saw run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from convscale.errors import UserError, nearest
from convscale.machine import processor_name


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's data sheet."""

    name: str
    """The name it is asked for by (``rtx-4090``)."""
    title: str
    """The maker's name for it."""
    driver: str
    """Regular expression of the whole name that its driver, or a processor itself, gives it; empty for ``cpu``, the
    processor at hand."""
    kind: str
    """``gpu`` or ``cpu``."""
    generation: str
    """Of its chip: ``volta`` to ``blackwell``, ``cdna2``, ``cdna3``, ``x86``."""
    form: str
    """What it is built for: ``data-centre``, ``desktop``, ``workstation``, ``power-limited``, ``embedded``, or
    ``processor``."""
    tensor_tflops: float
    """Dense half-precision matrix rate with single-precision accumulation, in 1e12 operations/s (an addition and a
    multiplication are two)."""
    tf32_tflops: float
    """Dense TF32 matrix rate, which PyTorch's convolutions take for single precision; where a card has none,
    ``fp32_tflops``."""
    fp32_tflops: float
    """Single-precision rate of the general cores."""
    int8_tops: float
    """Dense matrix rate in 8 bits, in 1e12 operations/s; by dot products of the general cores where it has no matrix
    units for them."""
    bandwidth_gb_s: float
    """Memory bandwidth in 1e9 bytes/s."""
    l2_mb: float
    """Last-level cache in 2**20 bytes."""
    memory_gb: float
    """Memory in 2**30 bytes that programs see: less than is sold where the card ships with ECC in the same memory."""
    units: int
    """Streaming multiprocessors, or cores."""
    clock_ghz: float
    """The clock that ``fp32_tflops`` is stated at."""
    watts: float
    """Board power limit."""
    host_us: float = 20.0
    """Microseconds that the host which such a card sits in takes to call one operator from a module in eager PyTorch:
    an assumption, not of the card's sheet. 20 is of a current desktop or server processor. 55 is what NVIDIA's own
    tables of a V100 say at batch 1 (a DGX-1's Xeon at 2.2 GHz, PyTorch 1.8; a loader is in them), 35 lies between, for
    the first servers with an A100; 60 is a guess for the Arm cores of a Jetson."""
    bfloat16: bool
    """Whether its matrix units take bfloat16."""
    sustained: float = 1.0
    """Share of ``tensor_tflops`` that the power limit lets it hold, where that is far below 1."""
    boost: float = 1.0
    """How much faster than at ``clock_ghz`` it was seen to compute: no kernel is predicted above the sheet's rates
    times this. ``boost_source`` says where."""
    boost_source: str = ""
    """The measurement that shows ``boost``; empty where it is 1."""
    aliases: tuple[str, ...] = ()
    """Other names that it is asked for by."""
    source: str
    """Where the figures stand."""

    @property
    def has_tf32(self) -> bool:
        """Whether its matrix units take TF32: NVIDIA's since Ampere, AMD's since CDNA 3."""
        return self.kind == "gpu" and self.generation not in ("volta", "turing", "cdna2")

    @property
    def special_tflops(self) -> float:
        """Sixteen times the rate of the special-function units, in 1e12 operations/s: a GPU's unit evaluates 16
        exponentials or reciprocals a clock, whatever its single-precision rate is (CUDA C++ programming guide,
        arithmetic throughput: compute capability 7.0 to 12.0; AMD's units do as many). That is ``fp32_tflops`` where a
        unit has 128 lanes, and twice that on Volta, Turing and the A100, which have 64.
        """
        return self.units * 256 * self.clock_ghz / 1e3 if self.kind == "gpu" else self.fp32_tflops


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


def at_hand(name: str) -> bool:
    """Whether a device is this machine's own: ``cpu``, ``cuda`` or ``cuda:N``."""
    return name.partition(":")[0] in ("cpu", "cuda")


def is_processor(name: str) -> bool:
    """Whether a device is ``cpu``, the processor at hand, or one known by its name."""
    return name in devices() and devices()[name].kind == "cpu"


def was_on(device: str, stated: str, driver_name: str) -> bool:
    """Whether a measurement is of a device: by the name that it states, or by what the driver calls its GPU.

    Args:
        device: a known device's name.
        stated: the measurement's device: a known name, ``cpu``, ``cuda`` or ``cuda:N``.
        driver_name: the name that the driver gave it.
    """
    if stated == device:
        return True
    driver = get_device(device).driver
    same_kind = stated.partition(":")[0] == ("cpu" if is_processor(device) else "cuda")
    return same_kind and bool(driver) and re.fullmatch(driver, driver_name, re.IGNORECASE) is not None


def is_processor_here(name: str) -> bool:
    """Whether a known device is the processor of this machine, by whichever name."""
    return was_on(name, "cpu", processor_name())


def _plain(name: str) -> str:
    """A name in lower case with hyphens, without its maker's."""
    return re.sub(r"[\s_-]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
