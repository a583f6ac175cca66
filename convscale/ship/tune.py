"""Find the settings in which an artefact is fastest on this device, and keep them in its record."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convscale.errors import UserError, nearest
from convscale.files import write_json
from convscale.ship.artifact import MANIFEST, RUNTIMES_OF, Artifact, load_artifact, open_artifact, staged_folder
from convscale.ship.export import export
from convscale.ship.runtime import Runner, installed_runtimes
from convscale.ship.verify import Withheld
from convscale.speed.timing import Environment, available_cores, time_callable

GOALS = ("throughput", "latency")
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
ROUNDS = 5
"""Times that the best and the usual settings are compared, in turns, at the end."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How an artefact is run."""

    runtime: str
    """One that runs its format."""
    threads: int
    """Compute threads in all."""
    streams: int
    """Parts of a batch that run side by side."""
    batch_size: int
    """Images per call."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Settings and the times of calls under them."""

    settings: Settings
    """What was tried."""
    times_s: tuple[float, ...]
    """Seconds per call."""

    @property
    def latency_s(self) -> float:
        """Median seconds per call."""
        return float(np.median(self.times_s))

    @property
    def images_per_s(self) -> float:
        """Images per call over the median seconds."""
        return self.settings.batch_size / self.latency_s

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**dataclasses.asdict(self.settings), "times_s": list(self.times_s), "images_per_s": self.images_per_s, "latency_s": self.latency_s}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search for the fastest settings found."""

    goal: str
    """``throughput`` or ``latency``."""
    trials: tuple[Trial, ...]
    """All that was tried, in order."""
    best: Trial
    """The winner, timed again in turns with the usual settings."""
    usual: Trial
    """The settings an untuned artefact runs in, timed again."""
    environment: Environment
    """The machine and versions."""

    @property
    def gain(self) -> float:
        """How many times faster the best is than the usual, by the goal."""
        if self.goal == "latency":
            return self.usual.latency_s / self.best.latency_s
        return self.best.images_per_s / self.usual.images_per_s

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; trials without their raw times."""
        trials = [{k: v for k, v in trial.to_dict().items() if k != "times_s"} for trial in self.trials]
        environment = {**dataclasses.asdict(self.environment), "versions": dict(self.environment.versions)}
        found = {"goal": self.goal, "gain": self.gain, "best": self.best.to_dict(), "usual": self.usual.to_dict()}
        return {**found, "trials": trials, "environment": environment}


def tune(
    artifact: Artifact | str | os.PathLike[str],
    *,
    goal: str = "throughput",
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    min_seconds: float = 0.5,
    save: bool = True,
    on_trial: Callable[[Trial], object] | None = None,
) -> Tuning:
    """Time an artefact in every installed runtime of its format, with threads, streams and batches, and keep the fastest in its record.

    Args:
        artifact: one, or its folder.
        goal: ``throughput``: most images/s; ``latency``: shortest time for one image.
        batch_sizes: those to try for throughput.
        threads: the most to use; None: one per core.
        runtimes: None: all installed ones that run this format.
        min_seconds: each setting is timed for at least this long.
        save: write the winner into the artefact's record, for :func:`~convscale.ship.artifact.load_artifact` to use.
        on_trial: called after each setting, to show progress.

    Raises:
        UserError: an unknown goal, a runtime that is missing or does not run this format, or no batch size.
    """
    artifact = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
    if goal not in GOALS:
        raise UserError(f"goal {goal!r} is unknown{nearest(goal, GOALS)}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise UserError(f"batch_sizes must be numbers of at least 1, got {list(batch_sizes)}")
    cores = threads or available_cores()
    known = RUNTIMES_OF[artifact.format]
    if unknown := [name for name in runtimes or () if name not in known]:
        raise UserError(f"an artefact of format {artifact.format} runs in {' or '.join(known)}, not in {unknown[0]}")
    chosen = [name for name in known if name in installed_runtimes() and (not runtimes or name in runtimes)]
    if not chosen:
        raise UserError(f"none of the runtimes {', '.join(runtimes or known)} is installed here")
    trials: list[Trial] = []
    for settings in candidates(goal, chosen, cores, batch_sizes):
        trials.append(_time(artifact, settings, min_seconds))
        if on_trial is not None:
            on_trial(trials[-1])
    usual = Settings(runtime=chosen[0], threads=cores, streams=1, batch_size=1 if goal == "latency" else 32)
    best, again = _in_turns([(artifact, min(trials, key=lambda t: _cost(t, goal)).settings), (artifact, usual)])
    found = Tuning(goal=goal, trials=tuple(trials), best=best, usual=again, environment=Environment.here())
    if found.gain < 1:  # what looked best was noise
        found = dataclasses.replace(found, best=again)
    if save:
        s = found.best.settings
        runtime = {"name": s.runtime, "threads": s.threads, "streams": s.streams, "batch_size": s.batch_size}
        artifact.manifest |= {"runtime": runtime, "tuning": found.to_dict()}
        write_json(artifact.folder / MANIFEST, artifact.manifest)
    return found


def candidates(goal: str, runtimes: Sequence[str], cores: int, batch_sizes: Sequence[int]) -> list[Settings]:
    """The settings to try: for throughput all threads, in one stream up to one per thread; for latency one image in one stream."""
    found = []
    for runtime in runtimes:
        if goal == "latency":
            counts = sorted({cores, max(1, cores // 2)}, reverse=True)  # two threads on one core's halves may be slower than one
            found += [Settings(runtime=runtime, threads=n, streams=1, batch_size=1) for n in counts]
            continue
        many = [n for n in sorted({1, 2, cores // 2, cores}) if n >= 1 and cores % n == 0] if runtime in ("onnxruntime", "openvino") else [1]
        found += [Settings(runtime=runtime, threads=cores, streams=n, batch_size=b) for n in many for b in batch_sizes if b >= n]
    return found


def export_fastest(
    net: Any,
    out_dir: str | os.PathLike[str],
    *,
    goal: str = "throughput",
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: int | None = None,
    int8: bool = True,
    min_seconds: float = 0.5,
    overwrite: bool = False,
    **keywords: Any,
) -> tuple[Artifact, dict[str, Tuning | Withheld]]:
    """Export in float and, with calibration images, in INT8 for each runtime; tune each; keep the fastest that passed its gate.

    Args:
        int8: try INT8 too; needs ``calibration_images``.
        keywords: as for :func:`~convscale.ship.export.export`, without the format.

    Returns:
        The artefact under ``out_dir``, and what every form came to: its tuning, or why it was withheld.

    Raises:
        UserError: as for export.
        Withheld: not even the float form passed.
    """
    calibration = keywords.pop("calibration_images", None)
    forms: dict[str, Mapping[str, Any]] = {"onnx-fp32": {"format": "onnx"}}
    if int8 and calibration is not None:
        forms["onnx-int8"] = {"format": "onnx", "int8": True, "calibration_images": calibration}
        if "openvino" in installed_runtimes():
            forms["openvino-int8"] = {"format": "openvino", "int8": True, "calibration_images": calibration}
    found: dict[str, Tuning | Withheld] = {}
    with staged_folder(out_dir, overwrite=overwrite) as folder, tempfile.TemporaryDirectory(dir=folder.parent, prefix=".forms.") as place:
        for name, form in forms.items():
            try:
                artifact = export(net, Path(place) / name, **keywords, **form)
            except Withheld as reason:
                if name == "onnx-fp32":
                    raise
                found[name] = reason
                continue
            found[name] = tune(artifact, goal=goal, batch_sizes=batch_sizes, threads=threads, min_seconds=min_seconds)
        passed = [name for name, result in found.items() if isinstance(result, Tuning)]
        rivals = [(load_artifact(Path(place) / name), name) for name in passed]
        trials = _in_turns([(rival, _settings(rival)) for rival, _ in rivals])
        winner = min(zip(trials, passed, strict=True), key=lambda pair: _cost(pair[0], goal))[1]
        for path in (Path(place) / winner).iterdir():
            shutil.move(path, folder / path.name)
    return load_artifact(out_dir), found


def _time(artifact: Artifact, settings: Settings, min_seconds: float) -> Trial:
    """One setting, timed without the copies in and out."""
    call = _call(artifact, settings)
    return Trial(settings=settings, times_s=time_callable(call, min_seconds=min_seconds, max_seconds=10 * min_seconds + 5))


def _call(artifact: Artifact, settings: Settings) -> Callable[[], object]:
    runner: Runner = open_artifact(artifact, settings.runtime, threads=settings.threads, streams=settings.streams)
    size, channels = artifact.image_size, artifact.preprocessing.channels
    images = np.random.default_rng(0).integers(0, 256, (settings.batch_size, size, size, channels), dtype=np.uint8)
    prepared = runner.prepare(artifact.input_batch(images))
    return lambda: runner.run(prepared)


def _settings(artifact: Artifact) -> Settings:
    """Those in an artefact's record."""
    return Settings(runtime=artifact.runtime, threads=artifact.threads or available_cores(), streams=artifact.streams, batch_size=artifact.batch_size)


def _in_turns(rivals: Sequence[tuple[Artifact, Settings]]) -> list[Trial]:
    """Artefacts under their settings, timed in turns, so that what else the machine does falls on all of them."""
    calls = [_call(artifact, settings) for artifact, settings in rivals]
    times: list[list[float]] = [[] for _ in rivals]
    for _ in range(ROUNDS):
        for call, taken in zip(calls, times, strict=True):
            taken += time_callable(call, min_seconds=0.1, max_seconds=2.0, min_calls=2, warmup_calls=1, stable_within=1e9)
    return [Trial(settings=settings, times_s=tuple(taken)) for (_, settings), taken in zip(rivals, times, strict=True)]


def _cost(trial: Trial, goal: str) -> float:
    """What the goal makes small."""
    return trial.latency_s if goal == "latency" else -trial.images_per_s
