"""What is looked at once the winner is known: its input beside the images, and its speed on a machine that is busy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from convscale import machine
from convscale.conditions import Conditions
from convscale.machine import Environment
from convscale.pipeline.finish import Finish, _origin
from convscale.pipeline.steps import Fit
from convscale.show.fit_parts import Candidate, Winner
from convscale.speed.timing import Measurement
from tests.pipeline.test_order import BASIS, SPLITS, _record


@pytest.mark.parametrize(
    ("supposed", "size", "told"),
    [(4, 224, [224]), (224, 4, []), (224, 192, [192]), (224, 224, [224]), (4, 4, [])],
)
def test_images_are_compared_with_the_input_of_the_winner(
    supposed: int, size: int, told: list[int], tmp_path: Path
) -> None:
    """They are larger than 4 px and smaller than the others."""
    record, said = _record(tmp_path, []), list[Any]()
    asked: Any = SimpleNamespace(size_for=lambda splits: supposed, progress=said.append)
    fit = Fit(asked=asked, record=record, splits=SPLITS, folder=tmp_path, basis=BASIS, files=None)
    fit.check()
    before = record.now.data_warnings or ()
    said.clear()
    record.put(winner=Winner(name="a", image_size=size))
    for _ in range(2):  # a resumed run says the same
        fit.check_input()
    lines = [text for text in record.now.data_warnings or () if "smaller than the input" in text]
    assert [f"input of {side} px" in line for side, line in zip(told, lines, strict=True)] == [True] * len(told)
    assert len(said) == (1 if told and supposed != size else 0)
    others = [text for text in before if "smaller than the input" not in text]
    assert [text for text in record.now.data_warnings or () if text in others] == others


def _timed(speed: float) -> Measurement:
    cond = Conditions(device="cpu", batch_size=8, runtime="onnxruntime")
    return Measurement(times_s=(8 / speed,) * 4, conditions=cond, environment=Environment.here())


@pytest.mark.parametrize(("loaded", "more"), [("", ""), ("this machine is busy (x)", "; this machine is busy (x)")])
def test_a_miss_on_a_busy_machine_says_so(
    loaded: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter((80.0, 90.0))
    monkeypatch.setattr("convscale.pipeline.finish.busy_now", lambda: loaded)
    monkeypatch.setattr("convscale.pipeline.finish.shipped_speed", lambda *given: _timed(next(speeds)))
    nothing: Any = None
    finish = Finish(
        asked=nothing,
        record=_record(tmp_path, []),
        splits=nothing,
        folder=tmp_path,
        basis=BASIS,
        min_throughput=100.0,
        say=print,
    )
    measured = finish._time(nothing)
    first = "timed twice: 80 images/s at first, too slow for what was asked"
    assert measured.notes == ((first, loaded) if loaded else (first,))
    assert finish._shortfall(measured) == f"what is shipped runs at 90 images/s, 10% below the 100 asked for{more}"


@pytest.mark.parametrize(("others", "busy"), [(1.2, True), (0.9, False)])
def test_own_work_makes_no_machine_busy(others: float, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, of which others keep so many at work for two seconds, in which this process works 1.5."""
    clock, cores, own = iter((0.0, 2.0)), iter((10.0, 11.5 + 2 * others)), iter((3.0, 4.5))
    monkeypatch.setattr(machine, "available_cores", lambda: 2)
    monkeypatch.setattr(machine, "_core_seconds", lambda: next(cores))
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(machine.os, "times", lambda: (next(own), 0.0, 0.0, 0.0, 0.0))
    said = "this machine is busy (others keep 1.2 of 2 cores at work): speeds measured now may be too low"
    assert machine.busy_now() == (said if busy else "")


def test_a_system_that_does_not_tell_has_no_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_core_seconds", lambda: None)
    assert machine.busy_now(0.0) == ""


def _row(**given: Any) -> Candidate:
    return Candidate(name="convnext_nano.in12k", image_size=224, **given)


@pytest.mark.parametrize(
    ("chosen", "facts"),
    [
        (None, {}),
        (_row(), {"starting weights": "none, trained from scratch"}),
        (_row(weights="/home/me/mine.pth", licence=""), {"starting weights": "mine.pth"}),
        (
            _row(weights="pretrained", licence="cc-by-nc-4.0", extra_data="ImageNet-12k"),
            {
                "starting weights": "convnext_nano.in12k",
                "licence of the starting weights": "cc-by-nc-4.0",
                "extra data": "ImageNet-12k",
            },
        ),
        (
            _row(weights="pretrained", licence="mit"),  # as an older record has it
            {"starting weights": "convnext_nano.in12k", "licence of the starting weights": "mit"},
        ),
    ],
)
def test_the_card_says_what_the_training_started_from(chosen: Candidate | None, facts: dict[str, str]) -> None:
    assert _origin(chosen) == facts


def test_a_file_of_the_users_own_has_no_released_weights_licence() -> None:
    """The network's name may be that of weights somebody released; the file is not theirs."""
    chosen = _row(weights="/home/me/mine.pth", licence="apache-2.0", extra_data="")
    assert _origin(chosen, own=True) == {"starting weights": "mine.pth"}
