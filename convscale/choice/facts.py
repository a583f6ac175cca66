"""What is known of a network at a size: its counts, and its speed on a basis."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from convscale.networks.resolve import Named


class SizedSpec(NamedTuple):
    """A network at an image size: what a speed depends on beside the basis."""

    spec: Named
    image_size: int
    """Side in pixels."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A speed, measured or predicted, and how far it may be off."""

    images_per_s: float
    low: float
    """Lower end: of the 80 % interval of a prediction, of the middle half of a measurement's calls."""
    high: float
    """Upper end."""
    kind: str
    """``measured`` or ``predicted``."""
    bound_by: str = ""
    """What binds a predicted network."""
    how: str = ""
    """Of a tuned network: the form, the runtime and its streams."""
    doubts: tuple[str, ...] = ()
    """Reasons to trust it less."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self), "doubts": list(self.doubts)}


@dataclass(frozen=True, kw_only=True)
class NetworkFacts:
    """What is known of a network at a size."""

    params: int = 0
    """Parameters."""
    macs: int = 0
    """Multiply-accumulates per image, in the basis's mode."""
    traffic: int = 0
    """Bytes read and written per image."""
    memory_bytes: int = 0
    """Most bytes alive at once in a call at the basis's batch."""
    speed: Speed | None = None
    """None: not measured or predicted."""
    fused: bool = False
    """Whether all of this is of its re-parameterised form for inference, its branches merged."""
    failed: str = ""
    """Why it could not be traced, built or timed."""
    estimate: float | None = None
    """A guess in images/s from counts and the measured networks: good for deciding what to measure, never reported as a
    speed."""

    def to_row(self) -> dict[str, object]:
        """As plain JSON values, fields at their default left out; the inverse of :meth:`from_row`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "speed"}
        row = {name: value for name, value in values.items() if value}
        return row if self.speed is None else {**row, "speed": self.speed.to_dict()}

    @classmethod
    def from_row(cls, row: Mapping[str, object]) -> NetworkFacts:
        """From what :meth:`to_row` gave."""
        made = cls(**{**row, "speed": None})  # pyright: ignore[reportArgumentType]
        speed = row.get("speed")
        if not isinstance(speed, Mapping):
            return made
        return dataclasses.replace(made, speed=Speed(**{**speed, "doubts": tuple(speed.get("doubts", ()))}))
