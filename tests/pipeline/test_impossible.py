"""A speed that nothing keeps: the fastest there is gets trained, by tables made by hand; nothing is timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import convscale as cs
from convscale.choice.candidates import Candidate
from convscale.choice.decide import Option
from convscale.choice.facts import SizedSpec
from convscale.conditions import Constraint
from convscale.errors import UserError
from convscale.pipeline.data_head import judged_on_data, params_on
from convscale.pipeline.finding import Finder
from convscale.pipeline.reach import Reached
from convscale.pipeline.smaller import least_sizes
from convscale.show.fit_parts import Candidate as Row
from tests.pipeline.test_order import BASIS, SPEC, SPLITS, _finder, _option, _record

TINY = dataclasses.replace(SPEC, name="tiny")


def _at(o: Option, size: int, speed: float) -> Option:
    """The option on other images, of which nobody published a figure."""
    other = dataclasses.replace(o.candidate, image_size=size, top1=None)
    return dataclasses.replace(o, candidate=other, facts=_option("x", speed, 1.0).facts)


def _found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, float], floor: float = 10_000.0
) -> tuple[Any, Finder]:
    """What is kept where weights have 100 and 80 images/s at 224 px, 480 and 430 at 96, and a member so many as it
    comes (``plain``) and as it would ship (``tuned``).
    """
    options = [_option("a", 100, 80.0, "no"), _option("b", 80, 70.0, "no")]
    small = {"a": _at(options[0], 96, 480.0), "b": _at(options[1], 96, 430.0)}
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=floor), size=None, size_for=lambda splits: 224)
    finder = dataclasses.replace(finder, basis=SimpleNamespace(**{**vars(BASIS), "tuned": True}))  # type: ignore[arg-type]
    reached = Reached(found=tuple((o.candidate, "pretrained") for o in options), unreached=())
    monkeypatch.setattr(Finder, "_reached", lambda self, files: reached)

    def candidates(self: Finder, wanted: Any, sizes: Any) -> list[Candidate]:
        (one,), (size,) = wanted, sizes
        assert size == 96
        return [small[one].candidate]

    def judged(self: Finder, pool: list[Candidate]) -> tuple[Option, ...]:
        return tuple(small[c.name] if c.image_size == 96 else o for c in pool for o in options if o.name == c.name)

    def speed(self: Finder, one: SizedSpec, family: str, **_again: object) -> float:
        self.record.put_row(Row(name=one.spec.name, family=family, image_size=one.image_size, macs=1))
        return members["plain"]

    monkeypatch.setattr(Finder, "_candidates", candidates)
    monkeypatch.setattr(Finder, "_judged_options", judged)
    monkeypatch.setattr("convscale.pipeline.finding.families_for", lambda side: ("mobilenetv2_100",))
    monkeypatch.setattr("convscale.pipeline.finding.members", lambda base, side: [TINY])
    monkeypatch.setattr(Finder, "_speed", speed)
    monkeypatch.setattr(Finder, "_tuned", lambda self, one, family, **_: members["tuned"])
    return finder.released(SimpleNamespace()), finder  # type: ignore[arg-type]


def test_weights_are_tried_at_the_smallest_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At their published size the fastest had 100 images/s, and trained it was, 99 % below."""
    kept, finder = _found(tmp_path, monkeypatch, {"plain": 200.0, "tuned": 300.0})
    assert [(c.name, c.image_size, c.weights) for c in kept.contenders] == [("a", 96, "pretrained")]
    assert kept.missed == "nothing keeps at least 10,000 images/s: the fastest is a @96 with 480 images/s, 95% below"
    assert {row.name for row in finder.record.now.candidates if row.kept} == set()


def test_a_scaled_member_that_is_faster_than_all_weights_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it comes it has 200, less than the weights; in the form that ships 600."""
    kept, finder = _found(tmp_path, monkeypatch, {"plain": 200.0, "tuned": 600.0})
    assert [(c.name, c.weights) for c in kept.contenders] == [("tiny", None)]
    assert kept.missed == "nothing keeps at least 10,000 images/s: the fastest is tiny with 600 images/s, 94% below"
    assert finder.record.now.choice_notes == (
        "no released network is as fast as the fastest small scaled one; the scaled one starts from scratch",
    )


def test_members_that_keep_it_in_the_form_that_ships_are_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 bits can bring ten times the speed, where twice was thought the most."""
    kept, _ = _found(tmp_path, monkeypatch, {"plain": 200.0, "tuned": 2_100.0}, 2_000.0)
    assert ([c.name for c in kept.contenders], kept.missed) == (["tiny"], "")


def test_the_smallest_images_are_for_those_that_should_be_the_fastest_at_them() -> None:
    """By pixels at 96 px: 100 images/s at 224 px are 544, 90 at 288 are 810, and 300 at 96 have their speed."""
    options = [_option("a", 100, 80.0, "no"), _option("b", 20, 80.0, "no"), _option("c", 10, 80.0, "no")]
    options += [_at(_option("d", 1, 80.0, "no"), 288, 90.0), _at(_option("e", 1, 80.0, "no"), 96, 300.0)]
    assert list(least_sizes(options, lambda o: o.images_per_s or 0.0, None)) == ["d", "a", "b"]
    large = dataclasses.replace(options[0], facts=dataclasses.replace(options[0].facts, params=9_000_000))
    assert list(least_sizes([large, *options[1:]], lambda o: o.images_per_s or 0.0, 8.0)) == ["d", "b", "c"]


def test_what_was_named_and_is_not_compared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, untraced, refused = (_option(name, 200, 80.0) for name in ("good", "untraced", "refused"))
    failed = dataclasses.replace(untraced.facts, speed=None, failed="operator aten::x can not be traced")
    untraced = dataclasses.replace(untraced, facts=failed, verdict="no")
    refused = dataclasses.replace(
        refused, candidate=dataclasses.replace(refused.candidate, why_not="refused takes multiples of 32"), verdict="no"
    )
    large = dataclasses.replace(
        _option("large", 200, 90.0, "no"), facts=dataclasses.replace(good.facts, params=60_000_000)
    )
    options = [good, untraced, refused, large]
    reached = Reached(found=tuple((o.candidate, "pretrained") for o in options), unreached=())
    monkeypatch.setattr(Finder, "_reached", lambda self, files: reached)
    monkeypatch.setattr(Finder, "_judged_options", lambda self, pool: tuple(options))
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=150, max_params_m=4), named=("good",))
    kept = finder.released(SimpleNamespace())  # type: ignore[arg-type]
    assert kept is not None
    assert [c.name for c in kept.contenders] == ["good"]
    assert finder.record.now.choice_notes == (
        "left out: untraced @224: operator aten::x can not be traced",
        "left out: refused @224: refused takes multiples of 32",
        "left out: large @224: too large: 60.0 M parameters, at most 4 M",
    )


RESNET18 = 11_689_512
"""Parameters with 1000 classes, by timm's table; the head has 512 features."""


def _resnet18(params: int = RESNET18) -> Option:
    o = _option("resnet18.a1_in1k", 200, 70.0)
    facts = dataclasses.replace(o.facts, params=params)
    return dataclasses.replace(o, candidate=dataclasses.replace(o.candidate, spec=cs.get_spec("resnet18")), facts=facts)


def test_a_limit_on_parameters_is_for_what_ships(tmp_path: Path) -> None:
    classes, channels = len(SPLITS.classes), SPLITS.channels
    wanted = RESNET18 - (1000 - classes) * 513 - (3 - channels) * 64 * 49  # without most of its head, by hand
    assert params_on(SPLITS, cs.get_spec("resnet18")) == wanted
    assert judged_on_data(_resnet18(), SPLITS, 11.5).facts.params == wanted
    for limit in (None, 1.0, 12.0):  # it does not matter
        assert judged_on_data(_resnet18(), SPLITS, limit).facts.params == RESNET18
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=100, max_params_m=11.5))
    assert finder._within(cs.get_spec("resnet18"), 224)
    finder._write_options([_resnet18()], [_resnet18()], {"resnet18.a1_in1k": None})
    assert [row.params for row in finder.record.now.candidates] == [wanted]


def test_what_can_not_run_at_the_smallest_images_stays_at_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> Any:
        raise UserError("a does not run at 96 px")

    option = _option("a", 100, 80.0, "no")
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=10_000), size=None, offer=None)
    monkeypatch.setattr(Finder, "_candidates", lambda self, wanted, sizes: [option.candidate])
    monkeypatch.setattr(Finder, "_judged_options", refuse)
    assert finder._on_smaller_images((option,)) == ((option,), [])
