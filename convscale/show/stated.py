"""What a speed holds under, as it was written down: any part may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from convscale import words
from convscale.conditions import Size, size_text
from convscale.machine import Environment
from convscale.show.json_values import Open, from_json


@dataclass(frozen=True, kw_only=True)
class Conditions(Open):
    """What a speed holds under."""

    device: str | None = None
    mode: str | None = None
    precision: str | None = None
    layout: str | None = None
    batch_size: int | None = None
    image_size: Size | None = None
    """A side in pixels, or height and width."""
    runtime: str | None = None
    threads: int | None = None

    def __str__(self) -> str:
        """In words: ``onnxruntime, fp32, nchw, batch 8, 32 px, 2 threads, cpu``."""
        parts = (
            self.runtime,
            "training" if self.mode == "train" else None,
            self.precision,
            self.layout,
            f"batch {self.batch_size}" if self.batch_size else None,
            f"{size_text(self.image_size)} px" if self.image_size else None,
            words.plural(self.threads, "thread") if self.threads else None,
            self.device,
        )
        return ", ".join(part for part in parts if part) or "conditions not recorded"

    @classmethod
    def of(cls, value: Mapping[str, object]) -> Conditions:
        """From JSON values.

        Raises:
            UserError: a value is of the wrong kind.
        """
        return from_json(cls, value, "conditions")


@dataclass(frozen=True, kw_only=True)
class Machine(Open):
    """Where a speed was taken."""

    device_name: str | None = None
    cores: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """In words: ``Xeon ... (2 cores)``."""
        if not self.device_name and not self.cores:
            return "machine not recorded"
        name = self.device_name or "unnamed device"
        return f"{name} ({words.plural(self.cores, 'core')})" if self.cores else name

    @classmethod
    def of(cls, environment: Environment) -> Machine:
        """The same of this process."""
        return cls(device_name=environment.device_name, cores=environment.cores, versions=dict(environment.versions))
