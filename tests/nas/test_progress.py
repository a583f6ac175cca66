"""What a search says while it runs, and how its report shows what came when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

import convscale as cs
from convscale.choice.facts import Speed
from convscale.images.splits import DataSplits
from convscale.nas.engines import local
from convscale.nas.records import TrialRecord, hypervolume
from convscale.nas.request import Effort
from convscale.nas.result import read_study
from convscale.nas.space import SearchSpace
from convscale.nas.trial import Result
from convscale.nas.walk import Walk
from convscale.show.page import Figures
from convscale.show.search_report import _growth, _over_time
from tests.nas.test_study import QUICK, simple, untrained

if TYPE_CHECKING:
    from convscale.nas.result import Study

__all__ = ["simple", "untrained"]


@pytest.fixture
def trials(tiny: SearchSpace) -> tuple[TrialRecord, ...]:
    """Five that were trained, a minute each."""
    rows = [(100, 0.9), (200, 0.8), (150, 0.7), (300, 0.5), (90, 0.9)]
    return tuple(
        TrialRecord(
            number=at,
            genes=(),
            spec=tiny.sample(0),
            state="trained",
            speed=Speed(images_per_s=speed, low=speed, high=speed, kind="measured"),
            result=Result(number=at, curve=(accuracy,), seconds=60.0),
        )
        for at, (speed, accuracy) in enumerate(rows)
    )


def test_a_result_stays_until_there_is_another(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search that was to go on, and was killed, had no result any more."""
    ask = {"space": tiny, "output": tmp_path / "a", **QUICK}
    first = cs.search(colours, trials=4, **ask)

    def killed(*_: object) -> Result:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(local, "run_job", killed)
        with pytest.raises(KeyboardInterrupt):
            cs.search(colours, trials=8, resume=True, **ask)
    kept = read_study(tmp_path / "a")
    assert (kept.best, len(kept.trials)) == (first.best, 4)
    again = cs.search(colours, trials=8, resume=True, **ask)
    assert len(read_study(tmp_path / "a").trials) == len(again.trials) == 8


def test_the_area_below_the_front_by_hand(trials: tuple[TrialRecord, ...]) -> None:
    assert hypervolume(trials) == pytest.approx(300 * 0.5 + 200 * 0.3 + 100 * 0.1)
    assert hypervolume([]) == 0


def test_the_front_over_time(trials: tuple[TrialRecord, ...]) -> None:
    """(150, 0.7) lies below (200, 0.8), and (90, 0.9) below (100, 0.9): neither lets it grow."""
    study, figures = cast("Study", SimpleNamespace(trials=trials)), Figures()
    assert _growth(study) == [(1, pytest.approx(90 / 220)), (2, pytest.approx(170 / 220)), (4, pytest.approx(1.0))]
    section = _over_time(study, figures)
    assert section is not None
    said = "The front has 2 networks after a quarter, 2 networks after half, 3 networks after all of the candidates."
    assert said in section.body
    (drawn,) = figures.scripts
    assert '"x":[1.0,2.0,4.0,5.0]' in drawn.json  # to the end of the search
    assert '"yaxis":"y2"' in drawn.json


@pytest.mark.parametrize(
    ("minutes", "wanted", "left"),
    [(None, 10, "3.5"), (5.0, None, "4.0"), (5.0, 10, "3.5"), (2.0, 10, "1.0"), (None, 3, "0.0")],
)
def test_the_time_left(minutes: float | None, wanted: int | None, left: str, trials: tuple[TrialRecord, ...]) -> None:
    """Two trials in the minute of this call; with one of an earlier call three are over."""
    states = ("trained", "pruned", "too slow", "failed", "running")
    records = [replace(trial, state=state) for trial, state in zip(trials, states, strict=True)]
    asked = SimpleNamespace(request=SimpleNamespace(effort=Effort(trials=wanted, minutes=minutes)), told=2)
    assert Walk._left(cast("Walk", asked), records, 60.0) == f", {left} min left"


def test_a_search_for_trials_says_how_long_they_will_take(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, untrained: None
) -> None:
    lines: list[str] = []
    cs.search(colours, space=tiny, trials=3, output=tmp_path / "a", say=lines.append, **QUICK)
    told = [line for line in lines if line.endswith("min left")]
    assert len(told) == 3
    assert told[-1].endswith(", 0.0 min left")
