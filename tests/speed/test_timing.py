"""Timing with a clock that is told what to say."""

from __future__ import annotations

import json
import math

import pytest
import torch

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.speed.timing import DeviceEvents, Measurement, WallClock, time_callable

ENV = Environment(device_name="test cpu", cores=2, versions={"torch": "2.14.1"})


class FakeClock:
    """Seconds that pass only when a call says how long it took."""

    def __init__(self, durations: list[float]) -> None:
        self.now, self.durations, self.calls = 0.0, durations, 0

    def __call__(self) -> float:
        return self.now

    def fn(self) -> None:
        self.now += self.durations[min(self.calls, len(self.durations) - 1)]
        self.calls += 1


def measurement(*times: float, batch_size: int = 8) -> Measurement:
    return Measurement(
        times_s=times,
        conditions=Conditions(batch_size=batch_size, image_size=224, threads=2),
        environment=ENV,
        model="net",
    )


def test_statistics_by_hand() -> None:
    m = measurement(0.1, 0.2, 0.3, 0.4, 0.5)
    assert m.latency_s == pytest.approx(0.3)
    assert m.images_per_s == pytest.approx(8 / 0.3)
    assert m.iqr_rel == pytest.approx((0.4 - 0.2) / 0.3)
    assert m.p99_s == pytest.approx(0.5 - 0.04 * 0.1)
    assert "26.7 images/s" in str(m)
    assert "224 px" in str(m)


def test_an_outlier_moves_p99_not_the_median() -> None:
    m = measurement(*[0.1] * 9, 5.0)
    assert m.latency_s == pytest.approx(0.1)
    assert m.p99_s > 4
    assert m.warnings == ()


def test_wide_spread_and_few_times_warn() -> None:
    assert "wide spread" in measurement(0.1, 0.1, 0.2, 0.2).warnings[0]
    assert "1 time(s)" in measurement(0.1).warnings[0]
    assert measurement(0.1, 0.101, 0.1, 0.102).warnings == ()


def test_round_trip_through_json() -> None:
    m = measurement(0.1, 0.2)
    assert Measurement.from_dict(json.loads(json.dumps(m.to_dict()))) == m


@pytest.mark.parametrize(
    ("key", "text"), [("times_s", "lacks its 'times_s'"), ("conditions", "lacks its 'conditions'")]
)
def test_missing_field_is_named(key: str, text: str) -> None:
    value = measurement(0.1).to_dict()
    del value[key]
    with pytest.raises(UserError, match=text):
        Measurement.from_dict(value)


@pytest.mark.parametrize("times", [(), (0.0,), (0.1, math.nan)])
def test_impossible_times(times: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="times_s"):
        measurement(*times)


def test_warm_up_is_discarded_until_stable() -> None:
    # Two calls always go; then 8, 4, 2 s fall; six equal ones are needed before it counts as stable.
    clock = FakeClock([60, 60, 8, 4, 2] + [1.0] * 100)
    times = time_callable(clock.fn, min_seconds=3, max_seconds=100, min_calls=5, clock=clock)
    assert times == (1.0,) * 5


def test_min_seconds_holds() -> None:
    clock = FakeClock([0.01])
    assert sum(time_callable(clock.fn, min_seconds=2, max_seconds=100, clock=clock)) == pytest.approx(2, abs=0.011)


def test_max_seconds_ends_it_and_one_call_is_always_timed() -> None:
    clock = FakeClock([50.0])
    assert time_callable(clock.fn, min_seconds=1, max_seconds=1, clock=clock) == (50.0,)
    assert clock.calls == 4  # two discarded, one more in the warm-up, one timed


def test_never_stable_still_ends() -> None:
    clock = FakeClock([1.0 * 2 ** (i % 7) for i in range(10_000)])
    times = time_callable(clock.fn, min_seconds=1e9, max_seconds=300, clock=clock)
    assert 0 < sum(times) < 300


def test_limits_must_be_positive() -> None:
    with pytest.raises(UserError, match="min_seconds must be above 0, got 0"):
        time_callable(lambda: None, min_seconds=0)
    with pytest.raises(UserError, match="max_seconds must be above 0, got -1"):
        time_callable(lambda: None, max_seconds=-1)
    with pytest.raises(UserError, match="min_calls must be above 0, got 0"):
        time_callable(lambda: None, min_calls=0)


def test_wall_clock_waits_for_the_device_on_both_sides() -> None:
    log: list[str] = []
    clock = FakeClock([0.0])

    def synchronize() -> None:
        log.append("sync")
        clock.now += 1.0 if "call" in log else 7.0  # 7 s of earlier work must not be charged

    assert WallClock(clock=clock, synchronize=synchronize).time(lambda: log.append("call")) == pytest.approx(1.0)
    assert log == ["sync", "call", "sync"]


def test_device_events_time_the_stream_between_them() -> None:
    log: list[str] = []

    class Event:
        at_ms = 0.0

        def record(self, stream: str) -> None:
            log.append(f"record on {stream}")
            self.at_ms = 25.0 * log.count("call")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return other.at_ms - self.at_ms

    watch = DeviceEvents(event=Event, synchronize=lambda: log.append("drain"), stream=lambda: "its own")
    assert watch.time(lambda: log.append("call")) == pytest.approx(0.025)
    assert log == ["drain", "record on its own", "call", "record on its own", "wait"]


def test_environment_here() -> None:
    env = Environment.here()
    assert env.cores >= 1
    assert env.device_name
    assert env.versions["torch"].startswith("2.")


def test_cuda_events_are_recorded_on_the_stream_of_the_device_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current device's: with cuda:1 measured from cuda:0 they would time an idle card."""
    log: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            log.append(stream)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 4.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"drain {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert DeviceEvents.cuda("cuda:1").time(lambda: log.append("call")) == pytest.approx(0.004)
    assert log == ["drain cuda:1", "stream of cuda:1", "call", "stream of cuda:1", "wait"]
