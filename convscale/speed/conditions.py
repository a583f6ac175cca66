"""Under what conditions a speed holds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from convscale.errors import UserError, nearest

MODES = ("infer", "train")
PRECISIONS = ("fp32", "amp", "bf16", "fp16", "int8")
LAYOUTS = ("nchw", "nhwc")
RUNTIMES = ("eager", "compiled", "compiled-frozen", "onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a measured or predicted speed depends on beside the network.

    Raises:
        UserError: a field has an unknown or impossible value; the message names the field, the value and what would be right.
    """

    device: str = "cpu"
    """``cpu``, ``cuda``, ``cuda:N``, or a named GPU for predictions (``rtx-4090``)."""
    mode: str = "infer"
    """``infer`` or ``train`` (forward, backward and optimiser step)."""
    precision: str = "fp32"
    """``fp32``, ``amp`` (the device's autocast type), ``bf16``, ``fp16`` or ``int8``."""
    layout: str = "nchw"
    """``nchw`` or ``nhwc`` (channels last)."""
    batch_size: int = 8
    """Images per call."""
    image_size: int | None = None
    """Side of the square input in pixels; None: the network's own."""
    runtime: str = "eager"
    """``eager``, ``compiled``, ``compiled-frozen``, ``onnxruntime`` or ``openvino``."""
    threads: int | None = None
    """Compute threads on a CPU; None: one per available core."""

    def __post_init__(self) -> None:
        for field, known in (("mode", MODES), ("precision", PRECISIONS), ("layout", LAYOUTS), ("runtime", RUNTIMES)):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"{field} {value!r} is unknown{nearest(str(value), known)}")
        for field in ("batch_size", "image_size", "threads"):
            value = getattr(self, field)
            if value is None and field != "batch_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{field} must be a whole number of at least 1, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)
