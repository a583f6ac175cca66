"""The day the device arrives: an artefact measured there, against what was promised."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from convscale._version import __version__
from convscale.artifact.artifact import Artifact, load_artifact, open_artifact
from convscale.artifact.promise import Promise
from convscale.conditions import Conditions, sides
from convscale.errors import UserError
from convscale.machine import Environment, available_cores, check_own, processor_name
from convscale.predictor.devices import devices, get_device, is_processor, was_on
from convscale.predictor.predict import Prediction
from convscale.runtimes.base import Opening, runtime_of, runtimes_of
from convscale.speed.records import Record, append_record
from convscale.speed.timing import Measurement, WallClock, time_callable
from convscale.stats import chance_above
from convscale.words import exact, percent

SAME_RATE = ({"amp", "fp16"}, {"fp32"}, {"bf16"}, {"int8"})
"""Precisions whose matrices are multiplied at one rate: a promise of one may be checked on an artefact in the other."""


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What became of a promise."""

    promise: Promise
    """What was promised."""
    measurement: Measurement
    """What was measured, with its raw times."""
    notes: tuple[str, ...] = ()
    """What differs between the two, each a sentence."""

    @property
    def images_per_s(self) -> float:
        """Measured."""
        return self.measurement.images_per_s

    @property
    def ratio(self) -> float:
        """Measured over promised."""
        return self.images_per_s / self.promise.images_per_s

    @property
    def inside(self) -> bool:
        """Whether the measured speed lies between the promise's ends (``Promise.expected``)."""
        low, high = self.promise.expected
        return low <= self.images_per_s <= high

    @property
    def kept(self) -> bool:
        """Whether it reaches what was asked for; where nothing was, the promise's lower end."""
        return self.images_per_s >= self.promise.floor

    def __str__(self) -> str:
        p = self.promise
        asked = (
            f"{'keeps' if self.kept else 'misses'} the {exact(p.floor)} asked for"
            if p.min_throughput is not None
            else f"{'is not slower' if self.kept else 'is slower'} than promised (nothing was asked for)"
        )
        below, found = self.images_per_s < p.images_per_s, self.measurement.environment.device_name
        where = f"{'inside' if self.inside else 'below' if below else 'above'} the interval"
        if p.measured:
            where = "as fast as then" if self.inside else "slower than then" if below else "faster than then"
        return (
            f"{exact(self.images_per_s)} images/s measured on {found}: {asked}; {exact(p.images_per_s)} were "
            f"{'measured before training' if p.measured else 'predicted'} ({p.span}), so it is "
            f"{percent(self.ratio, 0)} of that and {where}"
        )

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "kept": self.kept,
            "inside": self.inside,
            "ratio": self.ratio,
            "images_per_s": self.images_per_s,
            "promise": self.promise.to_dict(),
            "measurement": self.measurement.to_dict(),
            "notes": list(self.notes),
        }


def promise_of(prediction: Prediction, min_throughput: float | None = None, calibration: str = "") -> Promise:
    """What an artefact of a predicted network is to be held to.

    Args:
        prediction: of the network at the size, batch and runtime in which it ships.
        min_throughput: images/s that were asked for.
        calibration: the calibration that the prediction went by, in words, where it went by one.
    """
    c = prediction.conditions
    assert c.image_size is not None, "a prediction has a size"
    sure = None
    if min_throughput is not None:
        sure = chance_above(min_throughput, prediction.images_per_s, prediction.low, prediction.high)
    return Promise(
        device=c.device,
        runtime=c.runtime,
        precision=c.precision,
        layout=c.layout,
        batch_size=c.batch_size,
        image_size=c.image_size,
        threads=c.threads,
        images_per_s=prediction.images_per_s,
        low=prediction.low,
        high=prediction.high,
        min_throughput=min_throughput,
        confidence=sure,
        doubts=prediction.doubts,
        calibration=calibration or ("measurements on the device" if prediction.calibrated else ""),
        versions={"convscale": __version__},
    )


def confirm(
    artifact: Artifact | str | os.PathLike[str],
    device: str | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    min_seconds: float = 1.0,
    max_seconds: float = 30.0,
) -> Confirmation:
    """Measure an artefact on the device that a speed was promised for, in the promised runtime, batch and threads.

    Where the promised runtime does not open the artefact's format (``compiled`` opens no ONNX file), the artefact's own
    is taken, and the notes say so. The model alone is timed: on a GPU the batch lies there before. CUDA was not
    measured by this project.

    Args:
        artifact: the artefact's folder, or it opened.
        device: ``cuda``, ``cuda:N`` or ``cpu``; None: the kind that was promised for.
        output: a JSON-lines file that the measurement is appended to; ``convscale calibrate --measurement`` takes it.
        min_seconds: the timed calls together last at least this long.
        max_seconds: and warm-up and timed calls at most about this long.

    Raises:
        UserError: nothing was promised, this is another device than was promised for, or the artefact can not run so.
    """
    check_own(device or "cpu", "can not be measured here")
    opened = artifact if isinstance(artifact, Artifact) else load_artifact(artifact, device=device or "cpu")
    folder = opened.folder
    promise = opened.promise
    if promise is None:
        raise UserError(
            f"artefact {folder} carries no promise; `convscale measure {folder}` measures it, and export(promise=...) "
            "puts one in"
        )
    device = device or ("cpu" if is_processor(promise.device) else "cuda")
    _check_card(promise, device)
    # What fit ships for a card is a file, whatever runtime its speed was predicted in.
    runtime = promise.runtime if promise.runtime in runtimes_of(opened.format, device) else None
    art = load_artifact(folder, runtime=runtime, threads=promise.threads, device=device)
    found = _measured(art, promise, device, min_seconds, max_seconds)
    if output is not None:
        append_record(output, record_of(art, found))
    return Confirmation(promise=promise, measurement=found, notes=_differences(art, promise))


def record_of(artifact: Artifact, found: Measurement) -> Record:
    """A measured artefact as a record, with its network's spec where the artefact keeps one."""
    return Record(model=found.model, measurement=found, spec=artifact.manifest.get("spec"))


def _check_card(promise: Promise, device: str) -> None:
    """
    Raises:
        UserError: the device here is another than was promised for.
    """
    title = get_device(promise.device).title if promise.device in devices() else promise.device
    kind = "cpu" if is_processor(promise.device) else "cuda"
    if device.partition(":")[0] != kind:
        raise UserError(f"the speed was promised for {title}, got device {device!r}; confirm it with device {kind}")
    if promise.device == "cpu":
        return
    here = processor_name() if kind == "cpu" else card_name(device)
    if not was_on(promise.device, device, here):
        raise UserError(
            f"the speed was promised for {title}, this {'processor' if kind == 'cpu' else 'card'} is {here!r}; confirm "
            "it there, or `convscale measure` the artefact here"
        )


def card_name(device: str) -> str:
    """The name that the driver gives a CUDA device: by PyTorch where it is installed, else by ``nvidia-smi``.

    Raises:
        UserError: neither sees such a card.
    """
    try:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(device)
    except (ImportError, RuntimeError, AssertionError):
        pass  # a machine that only runs artefacts has no PyTorch, and its card may be numbered beyond those here
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        number = device.partition(":")[2] or "0"
        asked = [tool, "--query-gpu=name", "--format=csv,noheader", "-i", number]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip().splitlines()[0].strip()
    raise UserError(f"device {device!r} is not there: neither PyTorch nor nvidia-smi sees it; is its driver installed?")


def _measured(art: Artifact, promise: Promise, device: str, min_seconds: float, max_seconds: float) -> Measurement:
    """The artefact timed at the promised batch, on seeded noise."""
    threads = promise.threads or available_cores()
    # A tuning was made for a processor: its streams go with its own runtime, threads and device.
    streams = art.streams if device == "cpu" and art.streams <= threads else 1
    how = Opening(threads=threads, device=device, streams=streams, batch_size=promise.batch_size)
    runner = open_artifact(art, art.runtime, how)
    shape = (promise.batch_size, *sides(art.image_size), art.preprocessing.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    call = _call(runner, art.input_batch(images))
    times = time_callable(
        call,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        stopwatch=WallClock(synchronize=runner.synchronize),
    )
    environment = Environment.here("cpu")
    if device != "cpu":
        environment = replace(environment, device_name=card_name(device))
    return Measurement(
        times_s=times,
        conditions=Conditions(
            device=device,
            precision=art.computed_in(art.runtime),
            batch_size=promise.batch_size,
            image_size=art.image_size,
            runtime=art.runtime,
            threads=threads,
        ),
        environment=environment,
        model=art.manifest.model,
        notes=(f"{streams} streams share the threads",) if streams > 1 else (),
    )


def _call(runner: Any, batch: np.ndarray) -> Callable[[], object]:
    prepared = runner.prepare(batch)
    return lambda: runner.run(prepared)


def _differences(art: Artifact, promise: Promise) -> tuple[str, ...]:
    """What a reader must know before he compares the two."""
    found, computed = list(art.fallbacks(art.runtime)), art.computed_in(art.runtime)
    if art.runtime != promise.runtime:
        found.append(f"promised in {promise.runtime}, measured in {art.runtime}")
    if not any({computed, promise.precision} <= same for same in SAME_RATE):
        found.append(f"promised in {promise.precision}, the artefact is in {computed}")
    stored = art.precision == "fp16" and art.format == "onnx" and art.manifest.computes != "fp16"
    if stored and "fp16" not in runtime_of(art.runtime).precisions:
        found.append("the artefact stores half precision and computes in single")
    if promise.layout != "nchw":
        found.append(f"promised in {promise.layout}; {art.runtime} lays out memory itself")
    return tuple(found)
