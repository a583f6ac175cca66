"""The day the device is there: what an artefact was promised, and what it runs at."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.promise import Promise
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.predictor.devices import devices, get_device
from convscale.speed.measuring import measure
from convscale.speed.records import append_record
from convscale.speed.timing import Measurement
from convscale.words import exact


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """A promise beside a measurement."""

    promise: Promise
    """What was predicted."""
    measurement: Measurement
    """What was measured, under the conditions of the promise, in the artefact's own runtime."""

    @property
    def images_per_s(self) -> float:
        """As measured."""
        return self.measurement.images_per_s

    @property
    def inside(self) -> bool:
        """Whether the measured speed lies in the 80 % interval of the prediction."""
        return self.promise.low <= self.images_per_s <= self.promise.high

    @property
    def keeps(self) -> bool:
        """Whether it keeps what was asked for; True where nothing was."""
        return self.promise.asked is None or self.images_per_s >= self.promise.asked

    def __str__(self) -> str:
        told = self.promise
        where = "inside" if self.inside else "above" if self.images_per_s > told.high else "below"
        kept = (
            "" if told.asked is None else f"; {'keeps' if self.keeps else 'misses'} the {exact(told.asked)} asked for"
        )
        runtime = self.measurement.conditions.runtime
        other = "" if runtime == told.runtime else f" (promised for {told.runtime}, measured in {runtime})"
        return (
            f"{exact(self.images_per_s)} images/s measured, {self.images_per_s / told.images_per_s:.2f} x the "
            f"{exact(told.images_per_s)} promised, {where} the interval {exact(told.low)} to {exact(told.high)}"
            f"{kept}{other}"
        )

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "promise": self.promise.to_dict(),
            "measurement": self.measurement.to_dict(),
            "images_per_s": self.images_per_s,
            "inside": self.inside,
            "keeps": self.keeps,
        }


def confirm(
    artifact: Artifact | str | os.PathLike[str],
    device: str | None = None,
    *,
    seconds: float = 2.0,
    record: str | os.PathLike[str] | None = None,
) -> Confirmation:
    """Measure an artefact on the device that it was promised for, and compare.

    Args:
        artifact: opened, or its folder.
        device: ``cuda``, ``cuda:N`` or ``cpu``; None: the kind of device that the promise is of.
        seconds: timed seconds, at least.
        record: JSON-lines file to append the measurement to; ``convscale calibrate --measurement`` takes it.

    Raises:
        UserError: the artefact carries no promise, or this is another device than it was promised for.
    """
    opened = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
    promise = opened.promise
    if promise is None:
        raise UserError(
            f"artefact {opened.folder} carries no promise; `convscale fit --device NAME` makes one for a device that "
            "is not here"
        )
    place = device or ("cpu" if get_device(promise.device).kind == "cpu" else "cuda")
    check_promised_device(promise, place)
    if opened.device != place:
        opened = load_artifact(opened.folder, device=place)
    measured = measure(
        opened, device=place, batch_size=promise.batch_size, min_seconds=seconds, max_seconds=30 * seconds
    )
    if record is not None:
        append_record(record, measured)
    return Confirmation(promise=promise, measurement=measured)


def check_promised_device(promise: Promise, device: str) -> None:
    """
    Raises:
        UserError: ``device`` of this machine is another one than the promised.
    """
    wanted = devices().get(promise.device)
    if wanted is None or wanted.kind == "cpu":
        if device != "cpu":
            raise UserError(f"the speed was promised for {promise.title}, not for device {device!r}; use cpu")
        return
    if not device.startswith("cuda"):
        raise UserError(f"the speed was promised for {promise.title}; device {device!r} is another, use cuda there")
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"the speed was promised for {promise.title}; torch sees no CUDA GPU here")
    name = Environment.here(device).device_name
    if not re.fullmatch(wanted.driver, name, re.IGNORECASE):
        raise UserError(f"the speed was promised for {promise.title}; this is {name}: it says nothing of that one")
