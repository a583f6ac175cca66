"""What becomes of networks that start from scratch, and of those that were judged before them; nothing is timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

import convscale as cs
from convscale.choice.facts import SizedSpec
from convscale.conditions import Constraint
from convscale.errors import DoesNotFit, UserError
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.finding import Finder
from convscale.pipeline.reach import Reached
from convscale.show.fit_parts import Candidate as Row
from convscale.show.fit_parts import Predicted, Timed
from tests.pipeline.test_order import BASIS, SPEC, _finder, _member, _option, _record


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


def _others(folder: Path, keeper: Row, rows: list[Row], *, tuned: bool = False) -> list[tuple[str, bool, str | None]]:
    """What is said of a family's members beside the one of 30 MACs that was found to keep 1,000 images/s at 0.8."""
    found = (SizedSpec(dataclasses.replace(SPEC, name="keeper"), 224), "a", 1100.0)
    finder = _finder(_record(folder, [keeper, *rows]), Constraint(min_throughput=1000, confidence=0.8))
    finder = dataclasses.replace(finder, basis=SimpleNamespace(**{**vars(BASIS), "tuned": tuned}))  # type: ignore[arg-type]
    finder._judged([found])
    first, *others = finder.record.now.candidates
    assert (first.name, first.kept, first.reason) == ("keeper", True, None)
    return [(row.name, bool(row.kept), row.reason) for row in others]


def test_members_are_judged_by_what_the_form_that_ships_decided(tmp_path: Path) -> None:
    """The largest found to keep it says of smaller ones that they do and of larger ones that they do not, whatever one
    runtime as it comes says; what was timed as it would ship goes by that.
    """

    def row(name: str, macs: int, plain: float, tuned: float | None = None) -> Row:
        shipped = None if tuned is None else Timed(images_per_s=tuned)
        timed = Timed(images_per_s=plain)
        return Row(name=name, family="a", image_size=224, macs=macs, measurement=timed, tuned=shipped)

    assert _others(
        tmp_path,
        row("keeper", 30, 700.0, 1100.0),
        [
            row("small", 10, 1500.0),
            row("small, slow as it comes", 20, 900.0),
            row("large", 40, 600.0),
            row("large, fast as it comes", 50, 1200.0),
            row("large, tuned", 60, 1300.0, 950.0),
            row("large, just fast enough", 35, 800.0, 1001.0),
            dataclasses.replace(row("of another family", 5, 1200.0), family="b"),
        ],
        tuned=True,
    ) == [
        ("small", True, "fast enough, but so is keeper"),
        ("small, slow as it comes", True, "smaller than keeper, which is fast enough as it would ship"),
        ("large", False, "too slow: 600 of 1,000 images/s as it comes"),
        (
            "large, fast as it comes",
            False,
            "1,200 images/s as it comes, but larger than keeper, the largest found to be fast enough as it would ship",
        ),
        ("large, tuned", False, "too slow: 950 of 1,000 images/s"),
        (
            "large, just fast enough",
            True,
            "fast enough by so little that keeper, which is smaller, keeps it more surely",
        ),
        (
            "of another family",
            False,
            "1,200 images/s as it comes; nothing of its family was found to be fast enough as it would ship",
        ),
    ]


def test_members_are_judged_by_the_confidence_that_decided(tmp_path: Path) -> None:
    """By hand: the end is a half of the middle, so of 1,500 are reached with 0.8 1,500 / 2 ** (0.8416 / 1.2816)."""

    def row(name: str, macs: int, middle: float) -> Row:
        told = Predicted(images_per_s=middle, low=middle / 2, high=2 * middle)
        return Row(name=name, family="a", image_size=224, macs=macs, predicted=told)

    assert _others(tmp_path, row("keeper", 30, 1735.0), [row("small", 10, 3000.0), row("large", 40, 1500.0)]) == [
        ("small", True, "fast enough, but so is keeper"),
        ("large", False, "too slow: 951 of 1,000 images/s with the probability asked for (1,500 predicted)"),
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


def test_scaled_members_take_over_where_all_weights_are_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here such weights are not even timed, unlike those of a device that is not here, which are predicted."""
    large = _option("resnet50.a1_in1k", 100, 80.0, "no")
    large = dataclasses.replace(
        large, facts=dataclasses.replace(large.facts, speed=None), reason="too large: 25.6 M parameters, at most 2 M"
    )
    reached = Reached(found=((large.candidate, "pretrained"),), unreached=())
    monkeypatch.setattr(Finder, "_reached", lambda self, files: reached)
    monkeypatch.setattr(Finder, "_judged_options", lambda self, pool: (large,))
    tiny = cs.scale("tresnet_m", width=0.25, depth=0.3, image_size=96, name="tiny")
    monkeypatch.setattr("convscale.pipeline.finding.families_for", lambda size: ("tresnet_m",))
    monkeypatch.setattr("convscale.pipeline.finding.members", lambda base, size: [tiny, cs.get_spec("tresnet_xl")])

    def speed(self: Finder, one: SizedSpec, family: str, **_again: object) -> float:
        self.record.put_row(Row(name=one.spec.name, family=family, image_size=one.image_size, macs=1))
        return 300.0

    monkeypatch.setattr(Finder, "_speed", speed)
    asked = {"size_for": lambda splits: 96, "size": None}
    nothing = "nothing keeps at least 600 images/s, at most 2 M parameters"
    for floor, missed in ((200, ""), (600, f"{nothing}: the fastest is tiny with 300 images/s, 50% below")):
        limits = Constraint(min_throughput=floor, max_params_m=2)
        finder = _finder(_record(tmp_path / str(floor), []), limits, **asked)
        kept = finder.released(WeightFiles())
        assert kept is not None
        assert ([c.name for c in kept.contenders], [c.weights for c in kept.contenders]) == (["tiny"], [None])
        assert kept.missed == missed
        (note,) = finder.record.now.choice_notes
        assert note == (
            "no released network can be used (resnet50.a1_in1k @224: too large: 25.6 M parameters, at most 2 M): "
            "scaled networks are tried, which start from scratch"
        )
    for refused, named in ((Constraint(min_throughput=1), None), (Constraint(max_params_m=2), ("resnet50",))):
        finder = _finder(_record(tmp_path / "refused", []), refused, **{**asked, "named": named})
        with pytest.raises(UserError, match=r"no candidate can be used; resnet50\.a1_in1k @224: too large"):
            finder.released(WeightFiles())


def test_the_front_is_of_networks_within_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Constraint] = []
    monkeypatch.setattr("convscale.pipeline.finding.survey", lambda *given: seen.append(given[4]))
    candidate = _option("a", 100, 80.0).candidate
    reached = Reached(found=((candidate, "pretrained"),), unreached=())
    monkeypatch.setattr(Finder, "_reached", lambda self, files: reached)
    limits = Constraint(max_params_m=5)
    assert _finder(_record(tmp_path, []), limits).front(WeightFiles()) is None
    assert seen == [limits]
