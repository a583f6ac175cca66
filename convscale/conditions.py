"""Under what conditions a speed holds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from convscale.errors import MOST_THREADS, MOST_WHOLE, UserError, check_number, nearest, short
from convscale.words import exact

MODES = ("infer", "train")
PRECISIONS = ("fp32", "amp", "amp_bf16", "bf16", "fp16", "int8")
LAYOUTS = ("nchw", "nhwc")
BEST = "best"
"""The runtime that stands for the fastest of all forms and runtimes in which a network can be shipped."""

Size = int | tuple[int, int]
"""An image size in pixels: the side of a square, or (height, width)."""


def sides(size: Size) -> tuple[int, int]:
    """Height and width in pixels.

    Raises:
        UserError: not one or two whole numbers of at least 1.
    """
    both = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(both) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in both):
        raise UserError(f"image_size must be a whole number of pixels of at least 1, or (height, width), got {size!r}")
    if max(both) > MOST_WHOLE:
        raise UserError(f"image_size is {short(size)}; it must be at most {MOST_WHOLE} pixels")
    return both


def as_size(height: int, width: int) -> Size:
    """One number for a square, else (height, width)."""
    return height if height == width else (height, width)


def size_text(size: Size) -> str:
    """``224``, or ``192x256`` (height x width)."""
    height, width = sides(size)
    return str(height) if height == width else f"{height}x{width}"


def precision_text(precision: str) -> str:
    """A precision for people: autocast says to which type."""
    return {"amp": "amp (fp16)", "amp_bf16": "amp (bf16)"}.get(precision, precision)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a measured or predicted speed depends on beside the network.

    Raises:
        UserError: a field has an unknown or impossible value; the message names the field, the value and what would be
            right.
    """

    device: str = "cpu"
    """``cpu``, ``cuda``, ``cuda:N``, or a named GPU for predictions (``rtx-4090``)."""
    mode: str = "infer"
    """``infer`` or ``train`` (forward, backward and optimiser step)."""
    precision: str = "fp32"
    """``fp32``, ``amp`` (autocast: to float16 on a GPU), ``amp_bf16`` (autocast to bfloat16), ``bf16``, ``fp16`` or
    ``int8``."""
    layout: str = "nchw"
    """``nchw`` or ``nhwc`` (channels last)."""
    batch_size: int = 8
    """Images per call."""
    image_size: Size | None = None
    """Side of the square input in pixels, or (height, width); None: the network's own."""
    runtime: str = "eager"
    """A runtime's name (``eager``, ``onnxruntime`` ...; the registry in ``convscale.runtimes`` checks it), or ``best``:
    the fastest of the forms and runtimes that the network can be shipped in."""
    threads: int | None = None
    """Compute threads on a CPU; None: one per available core."""

    def __post_init__(self) -> None:
        for field, known in (("mode", MODES), ("precision", PRECISIONS), ("layout", LAYOUTS)):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"{field} {value!r} is unknown{nearest(str(value), known)}")
        if not isinstance(self.device, str) or not self.device:
            raise UserError(f"device must be a name such as 'cpu' or 'cuda', got {self.device!r}")
        if not isinstance(self.runtime, str) or not self.runtime:
            raise UserError(f"runtime must be a name such as 'eager' or 'onnxruntime', got {self.runtime!r}")
        if self.image_size is not None:
            object.__setattr__(self, "image_size", as_size(*sides(self.image_size)))
        for field in ("batch_size", "threads"):
            value = getattr(self, field)
            if value is None and field != "batch_size":
                continue
            most = MOST_THREADS if field == "threads" else MOST_WHOLE
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                above = f" and at most {most}" if isinstance(value, int) and value > most else ""
                raise UserError(f"{field} must be a whole number of at least 1{above}, got {short(value)}")

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What a choice must keep.

    Raises:
        UserError: a limit is not a finite number above 0.
    """

    min_throughput: float | None = None
    """Images/s."""
    max_latency_ms: float | None = None
    """Milliseconds per call of the whole batch, median."""
    max_memory_gb: float | None = None
    """2**30 bytes alive at once in a call, as counted (weights, maps, and in training what is kept for backward),
    workspaces not included."""
    max_params_m: float | None = None
    """Millions of parameters."""
    confidence: float = 0.8
    """With what probability a predicted speed must keep the limits on speed; measured ones are what they are."""

    def __post_init__(self) -> None:
        check_number("confidence", self.confidence, "a probability from 0.5 to 0.99", 0.5, 0.99)
        for name in ("min_throughput", "max_latency_ms", "max_memory_gb", "max_params_m"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise UserError(f"{name} is {value!r}; it must be a finite number above 0")

    def floor(self, batch_size: int) -> float:
        """Images/s that throughput and latency together ask for; 0 where neither is limited."""
        by_latency = batch_size * 1e3 / self.max_latency_ms if self.max_latency_ms else 0.0
        return max(self.min_throughput or 0.0, by_latency)

    def __str__(self) -> str:
        parts = [
            f"at least {exact(self.min_throughput)} images/s" if self.min_throughput else "",
            f"at most {exact(self.max_latency_ms)} ms a call" if self.max_latency_ms else "",
            f"at most {exact(self.max_memory_gb)} GB of memory" if self.max_memory_gb else "",
            f"at most {exact(self.max_params_m)} M parameters" if self.max_params_m else "",
        ]
        return ", ".join(part for part in parts if part) or "no constraint"


def check_seconds(*values: float) -> None:
    """
    Raises:
        UserError: a limit in seconds is not a finite number above 0.
    """
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"seconds to time are {value!r}; they must be a finite number above 0")
