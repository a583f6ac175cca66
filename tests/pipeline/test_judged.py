"""What becomes of networks that start from scratch, and of those that were judged before them; nothing is timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from convscale.choice.facts import SizedSpec
from convscale.conditions import Constraint
from convscale.errors import DoesNotFit
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.finding import Finder
from convscale.pipeline.reach import Reached
from convscale.show.fit_parts import Candidate as Row
from convscale.show.fit_parts import Timed
from tests.pipeline.test_order import BASIS, _finder, _member, _option, _record


def test_released_networks_stay_as_they_were_judged(tmp_path: Path) -> None:
    """Scaled members that are looked at instead say nothing of them."""
    (found, small), timed = _member("small", 10, 400.0), Timed(images_per_s=900.0)
    large = Row(name="large.in1k", family="resnet", image_size=224, weights="pretrained", measurement=timed)
    large = dataclasses.replace(large, kept=False, reason="too large: 25.6 M parameters, at most 5 M")
    tried = Row(name="tried", family="small", image_size=224, macs=5, measurement=timed)
    finder = _finder(_record(tmp_path, [large, small, tried]), Constraint(min_throughput=100, max_params_m=5))
    assert [c.name for c in finder._judged([found]).contenders] == ["small"]
    assert [(row.name, row.kept, row.reason) for row in finder.record.now.candidates] == [
        ("large.in1k", False, "too large: 25.6 M parameters, at most 5 M"),
        ("small", True, None),
        ("tried", True, "fast enough, but so is small"),
    ]


def test_named_networks_are_judged_by_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too slow in one runtime as it comes may keep the speed in the form that ships; what keeps it as it
    comes needs no tuning.
    """
    plain = {"fast": 150.0, "tunable": 80.0, "slow": 40.0, "large": 60.0}
    asked: list[str] = []

    def tuned(self: Finder, one: SizedSpec, family: str) -> float:
        asked.append(family)
        if family == "large":
            raise DoesNotFit("large does not fit in memory")
        return 1.5 * plain[family]

    monkeypatch.setattr(Finder, "_speed", lambda self, one, family: plain[family])
    monkeypatch.setattr(Finder, "_tuned", tuned)
    made = [_member(name, number, 0.0) for number, name in enumerate(plain)]
    for floor, contenders, missed in (
        (100, ["tunable", "fast"], ""),
        (500, ["fast"], "nothing keeps at least 500 images/s: the fastest is fast with 225 images/s, 55% below"),
        (9_000, ["fast"], "nothing keeps at least 9,000 images/s: the fastest is fast with 150 images/s, 98% below"),
    ):
        record = _record(tmp_path / str(floor), [row for _, row in made])
        finder = _finder(
            record, Constraint(min_throughput=floor), named=("x",), networks=[one for (one, *_), _ in made]
        )
        finder = dataclasses.replace(finder, basis=SimpleNamespace(**{**vars(BASIS), "tuned": True}))  # type: ignore[arg-type]
        kept = finder.scaled()
        assert [c.name for c in kept.contenders] == contenders
        assert kept.missed == missed
        assert record.now.choice_notes == (("left out: large does not fit in memory",) if floor < 9_000 else ())
    assert asked == ["tunable", "slow", "large", "fast", "tunable", "slow", "large"]


def test_the_front_is_of_networks_within_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Constraint] = []
    monkeypatch.setattr("convscale.pipeline.finding.survey", lambda *given: seen.append(given[4]))
    candidate = _option("a", 100, 80.0).candidate
    reached = Reached(found=((candidate, "pretrained"),), unreached=())
    monkeypatch.setattr(Finder, "_reached", lambda self, files: reached)
    limits = Constraint(max_params_m=5)
    assert _finder(_record(tmp_path, []), limits).front(WeightFiles()) is None
    assert seen == [limits]
