"""Time a callable, and keep the raw times with the conditions they hold under. Knows no runtime."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np

from convscale.conditions import Conditions
from convscale.errors import UserError, check_number, check_text, check_whole
from convscale.machine import Environment

WIDE_IQR = 0.10
"""An interquartile range above this share of the median is called wide (the rule of torch.utils.benchmark)."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The raw times of repeated calls, each over one batch, and what they depend on.

    Raises:
        UserError: there is no time, or one is not a positive number of seconds.
    """

    times_s: tuple[float, ...]
    """Seconds of each call, in the order taken, warm-up left out."""
    conditions: Conditions
    """Resolved: image size and threads are filled in."""
    environment: Environment
    """The machine and versions."""
    model: str = ""
    """The network's name, where it has one."""
    notes: tuple[str, ...] = ()
    """What the reader must know beside: a batch that was halved, a baked softmax, a table it was read from."""
    form: str = ""
    """The form and settings that were timed, where several were tried: ``openvino-int8 in openvino, 2 streams``."""
    chosen_from: str = ""
    """What that form is the fastest of, in words; empty: nothing was chosen."""
    peak_bytes: int | None = None
    """Most bytes that a GPU's tensors held at once meanwhile, weights included; None where it was not watched."""

    def __post_init__(self) -> None:
        if not self.times_s or not all(np.isfinite(t) and t > 0 for t in self.times_s):
            raise UserError(f"times_s must be positive numbers of seconds, at least one, got {self.times_s!r}")

    @property
    def latency_s(self) -> float:
        """Median seconds per call."""
        return float(np.median(self.times_s))

    @property
    def images_per_s(self) -> float:
        """Images per call over the median seconds."""
        return self.conditions.batch_size / self.latency_s

    @property
    def iqr_rel(self) -> float:
        """Interquartile range as a share of the median; 0 where there is one time."""
        low, high = np.quantile(self.times_s, (0.25, 0.75))
        return float(high - low) / self.latency_s

    @property
    def p99_s(self) -> float:
        """99th percentile of the seconds per call (interpolated; the slowest call where there are few)."""
        return float(np.quantile(self.times_s, 0.99))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why not to trust the median, one line each; empty when there is no reason."""
        found = []
        if len(self.times_s) < 4:
            found.append(f"only {len(self.times_s)} time(s): the spread is not known")
        elif self.iqr_rel > WIDE_IQR:
            found.append(
                f"wide spread: the interquartile range is {self.iqr_rel:.0%} of the median; is something else running?"
            )
        return tuple(found)

    def __str__(self) -> str:
        c = self.conditions
        threads = f", {c.threads} threads" if c.threads else ""
        return (
            f"{self.images_per_s:.1f} images/s ± {self.iqr_rel / 2:.0%} ({self.model or 'network'}, {c.mode}, "
            f"{c.runtime}, {c.precision}, "
            f"{c.layout}, batch {c.batch_size}, {c.image_size} px{threads}, {self.environment.device_name})"
        )

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values; the inverse of :meth:`from_dict`."""
        return {
            "model": self.model,
            "conditions": self.conditions.to_dict(),
            "environment": {**dataclasses.asdict(self.environment), "versions": dict(self.environment.versions)},
            "times_s": list(self.times_s),
            "notes": list(self.notes),
            **({"form": self.form, "chosen_from": self.chosen_from} if self.chosen_from else {}),
            "peak_bytes": self.peak_bytes,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Measurement:
        """From what :meth:`to_dict` gave.

        Raises:
            UserError: a field is missing, unknown or impossible.
        """
        try:
            environment = Environment(**value["environment"])
            check_text("environment.device_name", environment.device_name)
            check_whole("environment.cores", environment.cores)
            if not isinstance(environment.versions, Mapping):
                raise TypeError("environment.versions must be an object")
            if (peak := value.get("peak_bytes")) is not None:
                check_number("peak_bytes", peak, "a number of bytes", 0)
            return cls(
                model=check_text("model", value.get("model", "")),
                conditions=Conditions(**value["conditions"]),
                environment=environment,
                times_s=tuple(float(t) for t in value["times_s"]),
                **_chosen(value),
                peak_bytes=peak,
            )
        except KeyError as error:
            raise UserError(f"a measurement lacks its {error.args[0]!r}") from error
        except (TypeError, AttributeError) as error:
            raise UserError(f"a measurement can not be read: {error}") from error


class _Chosen(TypedDict):
    """How a measurement's form was chosen, and what else its reader must know."""

    notes: tuple[str, ...]
    form: str
    chosen_from: str


def _chosen(value: Mapping[str, Any]) -> _Chosen:
    """Notes, form and what it was chosen from; version 0.1.0 wrote the last two as notes."""
    notes = [str(note) for note in value.get("notes", ())]
    if "chosen_from" in value or not any(note.startswith(_OLD_CHOSEN) for note in notes):
        form, chosen = (check_text(key, value.get(key, "")) for key in ("form", "chosen_from"))
        return {"notes": tuple(notes), "form": form, "chosen_from": chosen}
    chosen = next(note for note in notes if note.startswith(_OLD_CHOSEN))
    form = next((note for note in notes if note.startswith(_OLD_FORM)), "")
    return {
        "notes": tuple(note for note in notes if note not in (chosen, form)),
        "form": form.removeprefix(_OLD_FORM),
        "chosen_from": chosen,
    }


_OLD_CHOSEN, _OLD_FORM = "the fastest of ", "as "


class Stopwatch(Protocol):
    """Gives the seconds one call takes, work that the call only enqueues included."""

    def time(self, fn: Callable[[], object]) -> float: ...


@dataclass(frozen=True, kw_only=True)
class WallClock:
    """Host time around a call that has finished when ``synchronize`` returns."""

    clock: Callable[[], float] = time.perf_counter
    """A monotonic clock in seconds."""
    synchronize: Callable[[], object] | None = None
    """Waits for the device; None for work that is done when the call returns."""

    def time(self, fn: Callable[[], object]) -> float:
        # What was queued before must not be charged to this call, so the device is drained on both sides.
        if self.synchronize is not None:
            self.synchronize()
        start = self.clock()
        fn()
        if self.synchronize is not None:
            self.synchronize()
        return self.clock() - start


@dataclass(frozen=True, kw_only=True)
class DeviceEvents:
    """Device time between two events recorded around a call: free of the host's wake-up after a synchronisation.

    The device is drained before the first event; otherwise the host would run ahead and the time of starting kernels
    would hide behind earlier work, which a single request never enjoys.
    """

    event: Callable[[], Any]
    """Makes an event with ``record(stream)``, ``synchronize()`` and ``elapsed_time(other)`` in milliseconds."""
    synchronize: Callable[[], object]
    """Waits for the device."""
    stream: Callable[[], Any] = lambda: None
    """The stream that the calls run on; without one an event would be recorded on whatever device is the current one.
    """

    @classmethod
    def cuda(cls, device: str) -> DeviceEvents:
        """Events of a CUDA device. Not measured on a GPU by this project."""
        import torch

        return cls(
            event=lambda: torch.cuda.Event(enable_timing=True),
            synchronize=lambda: torch.cuda.synchronize(device),
            stream=lambda: torch.cuda.current_stream(device),
        )

    def time(self, fn: Callable[[], object]) -> float:
        start, end = self.event(), self.event()
        self.synchronize()
        start.record(self.stream())
        fn()
        end.record(self.stream())
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def time_callable(
    fn: Callable[[], object],
    *,
    min_seconds: float = 1.0,
    max_seconds: float = 30.0,
    min_calls: int = 5,
    warmup_calls: int = 2,
    stable_within: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
    stopwatch: Stopwatch | None = None,
) -> tuple[float, ...]:
    """Call ``fn`` until its time is stable, then time it repeatedly.

    Warm-up ends when the median of the last three calls is within ``stable_within`` of the median of the three before,
    or when a third of ``max_seconds`` is spent; the first ``warmup_calls`` (compilation, allocation, clocks rising) are
    always discarded.

    Args:
        min_seconds: the timed calls together last at least this long, and are at least ``min_calls``, unless
            ``max_seconds`` comes first.
        max_seconds: no further call starts once warm-up and timed calls have lasted this long; one call is always
            timed.
        clock: seconds; for tests.
        stopwatch: how a call is timed; None: host time with ``clock``.

    Returns:
        Seconds of each timed call, in order.

    Raises:
        UserError: a limit is not positive.
    """
    for name, value in (("min_seconds", min_seconds), ("max_seconds", max_seconds), ("min_calls", min_calls)):
        if not value > 0:
            raise UserError(f"{name} must be above 0, got {value!r}")
    watch = stopwatch or WallClock(clock=clock)
    for _ in range(warmup_calls):
        watch.time(fn)
    # The first calls may compile for a minute and are no part of the budget.
    begin = clock()
    recent: list[float] = []
    while clock() - begin < max_seconds / 3 and not _stable(recent, stable_within):
        recent.append(watch.time(fn))
    times: list[float] = []
    while not times or ((sum(times) < min_seconds or len(times) < min_calls) and clock() - begin < max_seconds):
        times.append(watch.time(fn))
    return tuple(times)


def _stable(times: list[float], within: float) -> bool:
    """Whether the last three calls took as long as the three before."""
    if len(times) < 6:
        return False
    before, now = np.median(times[-6:-3]), np.median(times[-3:])
    return bool(abs(now - before) <= within * before)
