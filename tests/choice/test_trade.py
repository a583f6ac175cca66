"""What a lower confidence would buy, by hand: medians of 1,000 and 900 images/s with 80 % intervals of a factor 1.25
either way keep 800 with 0.9 and with Phi(ln(900/800) / ln(1.25) x 1.2816) = 0.751.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from convscale.arch.zoo import get_spec
from convscale.choice.candidates import Candidate
from convscale.choice.decide import Choice, Option, decide, trade_of
from convscale.choice.facts import NetworkFacts, Speed
from convscale.cli.choice_text import print_choice
from convscale.conditions import Conditions, Constraint

TRADE = "5.0 points more at a 25% risk, with slow @224: --confidence 0.75"


def _option(name: str, middle: float, top1: float | None, kind: str = "predicted") -> Option:
    candidate = Candidate(name=name, spec=get_spec("resnet18"), image_size=224, group=name, top1=top1)
    speed = Speed(images_per_s=middle, low=middle / 1.25, high=middle * 1.25, kind=kind)
    return Option(candidate=candidate, facts=NetworkFacts(params=1, macs=1, speed=speed))


OPTIONS = [_option("fast", 1000, 75.0), _option("slow", 900, 80.0), _option("too slow", 790, 90.0)]


def _choice(confidence: float, kind: str = "predicted", options: list[Option] = OPTIONS) -> Choice:
    limits = Constraint(min_throughput=800, confidence=confidence)
    judged = decide(options, limits)
    conditions = Conditions(device="l4", batch_size=64)
    return Choice(**vars(judged), constraint=limits, conditions=conditions, kind=kind, device="L4", floor=800.0)


def test_the_trade_is_in_the_first_line_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    choice = _choice(0.8)
    assert choice.best.name == "fast"
    assert choice.trade == TRADE
    assert json.loads(json.dumps(choice.to_dict()))["trade"] == TRADE
    print_choice(choice, False)
    lines = capsys.readouterr().out.splitlines()
    first = " ".join(line.strip() for line in lines[: next(i for i, line in enumerate(lines) if "75.00 %" in line)])
    assert first.endswith(f"; {TRADE}")
    assert first.startswith("fast @224: ")


def test_there_is_no_trade_where_nothing_is_gained() -> None:
    assert _choice(0.7).trade == ""  # it is taken already
    assert _choice(0.7).to_dict()["trade"] is None
    near = [OPTIONS[0], replace(OPTIONS[1], candidate=replace(OPTIONS[1].candidate, top1=75.4))]
    assert _choice(0.8, options=near).trade == ""  # less than half a point
    assert _choice(0.8, "measured", [replace(o, facts=_measured(o)) for o in OPTIONS[:2]]).trade == ""


def _measured(o: Option) -> NetworkFacts:
    assert o.speed is not None
    return replace(o.facts, speed=replace(o.speed, kind="measured"))


def test_beside_what_has_no_published_accuracy_at_its_size_that_of_the_other_is_said() -> None:
    options = decide(OPTIONS, Constraint(min_throughput=800)).options
    assert trade_of(None, options, 800.0) == ("80.0 % as published at a 25% risk, with slow @224: --confidence 0.75")
