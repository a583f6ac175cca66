"""Find the settings in which an artefact is fastest on this device, and keep them in its record.

Every setting is timed briefly, one after the other; those that came near the best are then timed in turns, round after
round, beside the usual ones. So a machine that is busy for a moment neither throws the best out nor lets another win.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from convscale.artifact.artifact import Artifact, load_artifact, open_artifact
from convscale.artifact.facts import alone_with, state_fact
from convscale.conditions import Size, size_text
from convscale.errors import UserError, nearest
from convscale.machine import Environment, available_cores
from convscale.runtimes.base import Opening, Runner, installed_runtimes, runtime_of, runtimes_of
from convscale.speed.timing import Measurement
from convscale.words import listed

GOALS = ("throughput", "latency")
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
NEAR = 1.2
"""Settings that cost at most this many times the cheapest at first sight are looked at again."""
FINALISTS = 4
"""At most so many of them."""
ROUNDS = 7
"""Times that these and the usual settings are timed, in turns."""
LOOK_S = 0.3
"""Timed seconds of a form where only those far from the best are to be left out."""
MAX_SECONDS = 10.0
"""A setting gets no further call once it took so long."""


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

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            **dataclasses.asdict(self.settings),
            "times_s": list(self.times_s),
            "images_per_s": self.images_per_s,
            "latency_s": self.latency_s,
        }


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a search for the fastest settings found."""

    goal: str
    """``throughput`` or ``latency``."""
    trials: tuple[Trial, ...]
    """All that was tried, in order."""
    best: Trial
    """The winner, timed again in turns with its rivals."""
    usual: Trial
    """The settings an untuned artefact runs in, timed in the same turns."""
    environment: Environment
    """The machine and versions."""
    failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Runtimes that could not run it, or in which its INT8 has not passed, and why."""

    @property
    def gain(self) -> float:
        """How many times faster the best is than the usual, by the goal."""
        if self.goal == "latency":
            return self.usual.latency_s / self.best.latency_s
        return self.best.images_per_s / self.usual.images_per_s

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values; trials without their raw times."""
        trials = [{k: v for k, v in trial.to_dict().items() if k != "times_s"} for trial in self.trials]
        environment = {**dataclasses.asdict(self.environment), "versions": dict(self.environment.versions)}
        found = {"goal": self.goal, "gain": self.gain, "best": self.best.to_dict(), "usual": self.usual.to_dict()}
        return {**found, "trials": trials, "environment": environment, "failed": dict(self.failed)}


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
    """Time an artefact in every installed runtime of its format, with threads, streams and batches, and keep the
    fastest in its record. One in 8 bits in those alone in which it passed its gate.

    Args:
        artifact: one, or its folder.
        goal: ``throughput``: most images/s; ``latency``: shortest time for one image.
        batch_sizes: those to try for throughput.
        threads: the most to use; None: one per core.
        runtimes: None: all installed ones that run this format.
        min_seconds: each setting is timed for at least this long.
        save: write the winner into the artefact's record, for :func:`~convscale.artifact.artifact.load_artifact` to
            use.
        on_trial: called after each setting, to show progress.

    Raises:
        UserError: an unknown goal, a runtime that is missing, does not run this format or has not passed this INT8, no
            batch size, no runtime that can run it; or another run writes the artefact.
    """
    artifact = artifact if isinstance(artifact, Artifact) else load_artifact(artifact)
    if goal not in GOALS:
        raise UserError(f"goal {goal!r} is unknown{nearest(goal, GOALS)}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise UserError(f"batch_sizes must be numbers of at least 1, got {list(batch_sizes)}")
    cores = threads or available_cores()
    known = runtimes_of(artifact.format, artifact.device)
    if unknown := [name for name in runtimes or () if name not in known]:
        raise UserError(f"an artefact of format {artifact.format} runs in {listed(known, 'or')}, not in {unknown[0]}")
    usable = [name for name in installed_runtimes() if runtime_of(name).runs_on(artifact.device)]
    asked = [name for name in known if not runtimes or name in runtimes]
    unheld = {name: not_passed(artifact, name) for name in asked if name not in artifact.checked_in}
    chosen = [name for name in asked if name in usable and name not in unheld]
    if not chosen and all(name in unheld for name in asked):
        raise UserError(unheld[asked[0]])
    if not chosen:
        raise UserError(f"none of the runtimes {', '.join(n for n in asked if n not in unheld)} is installed here")
    with alone_with(artifact.folder) if save else nullcontext():
        trials: list[Trial] = []
        opened: Opened = {}
        failed: dict[str, str] = {}
        for settings in candidates(goal, chosen, cores, batch_sizes):
            if settings.runtime in failed:
                continue
            try:
                trials.append(Trial(settings=settings, times_s=_first_look(artifact, settings, min_seconds, opened)))
            except UserError as error:
                failed[settings.runtime] = str(error)
                if len(failed) == len(chosen):
                    raise
                continue
            if on_trial is not None:
                on_trial(trials[-1])
        opened.clear()
        usual = Settings(
            runtime=next(name for name in chosen if name not in failed),
            threads=cores,
            streams=1,
            batch_size=usual_batch(goal, batch_sizes),
        )
        finalists = [trial.settings for trial in near_best(trials, goal) if trial.settings != usual]
        *again, usual_again = in_turns([(artifact, settings) for settings in (*finalists, usual)])
        best = min((usual_again, *again), key=lambda trial: cost(trial, goal))
        found = Tuning(
            goal=goal,
            trials=tuple(trials),
            best=best,
            usual=usual_again,
            environment=_environment(artifact.device),
            failed=failed | {name: why for name, why in unheld.items() if name in usable},
        )
        if save:
            s = found.best.settings
            runtime = {"name": s.runtime, "threads": s.threads, "streams": s.streams, "batch_size": s.batch_size}
            runtime["device"] = artifact.device.partition(":")[0]
            computed = artifact.computed_in(s.runtime)  # here, whatever the file is in
            tuning = {**found.to_dict(), "precision": computed}
            state_fact(artifact, "speed", describe(found, artifact.image_size), runtime=runtime, tuning=tuning)
    return found


def _environment(device: str) -> Environment:
    """The machine with a device's name; what only runs artefacts has no PyTorch to ask for a card's."""
    here = Environment.here("cpu")
    if device == "cpu":
        return here
    from convscale.ship.confirm import card_name

    return dataclasses.replace(here, device_name=card_name(device))


def not_passed(artifact: Artifact, runtime: str) -> str:
    """Why an INT8 artefact is not run in a runtime."""
    held, name = " and ".join(artifact.checked_in), artifact.folder.name
    return f"artefact {name} passed its INT8 gate in {held}, not in {runtime}; run it in {held}, or export it again"


def describe(found: Tuning, image_size: Size) -> str:
    """The best speed with its conditions, as a model card states it."""
    return _stated(found.best, found.environment, image_size, f"tuned for {found.goal}")


def _stated(trial: Trial, machine: Environment, image_size: Size, what: str) -> str:
    s = trial.settings
    versions = machine.versions.get(s.runtime) or machine.versions.get("torch", "")
    streams = f" in {s.streams} streams" if s.streams > 1 else ""
    speed = f"{trial.images_per_s:,.1f} images/s, {1000 * trial.latency_s:.1f} ms a call"
    how = f"{s.runtime} {versions}, batch {s.batch_size}, {size_text(image_size)} px, {s.threads} threads{streams}"
    return f"{speed} ({how}; {machine.device_name}, {machine.cores} cores; {what}, model only)"


def state_speed(artifact: Artifact, made: Measurement) -> None:
    """Put a speed that was taken after the tuning into an artefact's model card, in the place of the tuning's.

    Raises:
        UserError: it is another artefact than the one that was opened, or another run writes it.
    """
    settings = dataclasses.replace(settings_of(artifact), batch_size=made.conditions.batch_size)
    trial = Trial(settings=settings, times_s=tuple(made.times_s))
    with alone_with(artifact.folder):
        text = _stated(trial, made.environment, artifact.image_size, "tuned, and timed once more at the end")
        state_fact(artifact, "speed", text)


def candidates(goal: str, runtimes: Sequence[str], cores: int, batch_sizes: Sequence[int]) -> list[Settings]:
    """The settings to try: for throughput all threads, in one stream up to one per thread; for latency one image in one
    stream.
    """
    found = []
    for runtime in runtimes:
        if goal == "latency":
            counts = sorted(
                {cores, max(1, cores // 2)}, reverse=True
            )  # two threads on one core's halves may be slower than one
            found += [Settings(runtime=runtime, threads=n, streams=1, batch_size=1) for n in counts]
            continue
        many = (
            [n for n in sorted({1, 2, cores // 2, cores}) if n >= 1 and cores % n == 0]
            if runtime_of(runtime).streams
            else [1]
        )
        found += [
            Settings(runtime=runtime, threads=cores, streams=n, batch_size=b)
            for n in many
            for b in batch_sizes
            if b >= n
        ]
    return found


def usual_batch(goal: str, batch_sizes: Sequence[int]) -> int:
    """The batch of an artefact that was not tuned, as near as the sizes allow."""
    return 1 if goal == "latency" else min(batch_sizes, key=lambda size: abs(size - 32))


def cost(trial: Trial, goal: str, quantile: float = 0.5) -> float:
    """What the goal makes small, in seconds: per call for latency, per image for throughput."""
    seconds = float(np.quantile(trial.times_s, quantile))
    return seconds if goal == "latency" else seconds / trial.settings.batch_size


def near_best(trials: Sequence[Trial], goal: str) -> list[Trial]:
    """The few that could be the best, cheapest first. Judged by their faster calls: what else a machine does only makes
    calls slower.
    """
    order = sorted(trials, key=lambda trial: cost(trial, goal, 0.25))
    limit = NEAR * cost(order[0], goal, 0.25)
    return [trial for trial in order[:FINALISTS] if cost(trial, goal, 0.25) <= limit]


def in_turns(rivals: Sequence[tuple[Artifact, Settings]], rounds: int = ROUNDS, seconds: float = 0.2) -> list[Trial]:
    """Artefacts under their settings, timed in turns, so that what else the machine does falls on all of them."""
    opened: Opened = {}
    calls = [_call(artifact, settings, opened) for artifact, settings in rivals]
    times: list[list[float]] = [[] for _ in rivals]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            call()  # the caches are somebody else's still
            taken += _timed(call, seconds, least=2)
    return [Trial(settings=settings, times_s=tuple(taken)) for (_, settings), taken in zip(rivals, times, strict=True)]


def first_look(artifact: Artifact, settings: Settings, seconds: float = LOOK_S) -> float:
    """Seconds per image, taken in a moment, of the faster calls: what else a machine does only makes calls slower. Good
    for leaving out what is far from the best, for no more.
    """
    times = _first_look(artifact, settings, seconds, {})
    return float(np.quantile(times, 0.25)) / settings.batch_size


def settings_of(artifact: Artifact) -> Settings:
    """Those in an artefact's record."""
    return Settings(
        runtime=artifact.runtime,
        threads=artifact.threads or available_cores(),
        streams=artifact.streams,
        batch_size=artifact.batch_size,
    )


Opened = dict[tuple[str, str, int, int, int | None], Runner]
"""Runners that are open, by folder, runtime, threads, streams, and batch where the runtime compiles for it."""


def _key(artifact: Artifact, settings: Settings) -> tuple[str, str, int, int, int | None]:
    batch_size = settings.batch_size if runtime_of(settings.runtime).knows_batch else None
    return str(artifact.folder), settings.runtime, settings.threads, settings.streams, batch_size


def _call(artifact: Artifact, settings: Settings, opened: Opened) -> Callable[[], object]:
    """A call to time, without the copies in and out. A runner that is open already serves other batches too."""
    key = _key(artifact, settings)
    if key not in opened:
        how = Opening(
            threads=settings.threads,
            device=artifact.device,
            streams=settings.streams,
            batch_size=settings.batch_size,
        )
        opened[key] = open_artifact(artifact, settings.runtime, how)
    runner = opened[key]
    taken = artifact.preprocessing
    shape = (settings.batch_size, taken.height, taken.width, taken.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    prepared = runner.prepare(artifact.input_batch(images))

    def call() -> None:
        runner.run(prepared)
        if runner.synchronize is not None:
            runner.synchronize()

    return call


def _first_look(artifact: Artifact, settings: Settings, seconds: float, opened: Opened) -> tuple[float, ...]:
    """Times of a few calls, the first two (allocation, compilation) left out. One runner is open at a time: large
    networks would fill the memory.
    """
    if _key(artifact, settings) not in opened:
        opened.clear()
    call = _call(artifact, settings, opened)
    for _ in range(2):
        call()
    return tuple(_timed(call, seconds, least=3))


def _timed(call: Callable[[], object], seconds: float, least: int) -> list[float]:
    """Times of at least ``least`` calls and ``seconds``, unless that would take very long."""
    times: list[float] = []
    while not times or ((sum(times) < seconds or len(times) < least) and sum(times) < MAX_SECONDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
