"""A batch that memory does not hold is halved where it is measured: the speed of half a batch judges no network."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import convscale as cs
from convscale.choice.basis import Asked, basis_of
from convscale.choice.facts import SizedSpec
from convscale.conditions import Conditions, Constraint
from convscale.errors import DoesNotFit, UserError
from convscale.machine import Environment
from convscale.nas.pace import Pace
from convscale.pipeline import finding, ship, timing
from convscale.speed import measuring
from convscale.speed.timing import Measurement
from tests.pipeline.test_order import SPEC, _finder, _record


def _halving(holds: Any) -> Any:
    """``measure`` at 400 images/s, of half the batch where ``holds`` says no of the network."""

    def measure(net: Any, cond: Conditions | None = None, **options: Any) -> Measurement:
        cond = cond or Conditions(batch_size=options["batch_size"], image_size=224)
        batch = cond.batch_size if holds(net) else cond.batch_size // 2
        made = dataclasses.replace(cond, batch_size=batch)
        return Measurement(times_s=(batch / 400,), conditions=made, environment=Environment.here(), model="net")

    return measure


def _small(net: Any) -> bool:
    """Without the thousand classes, MobileNetV2 at half its width has 0.7 M parameters, at full width 2.2."""
    return sum(each.numel() for each in net.parameters()) < 1e6


def test_of_named_networks_those_that_fit_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure_calmly", _halving(_small))
    specs = [SizedSpec(cs.get_spec("mobilenetv2_100"), 224), SizedSpec(SPEC, 224)]
    limits = Constraint(min_throughput=100)
    finder = _finder(_record(tmp_path / "a", []), limits, named=("x",), networks=specs)
    kept = finder.scaled()
    assert [c.name for c in kept.contenders] == ["mobilenetv2_050"]
    assert kept.missed == ""
    assert [row.name for row in finder.record.now.candidates] == ["mobilenetv2_050"]
    said = "mobilenetv2_100 @224 does not fit in memory at batch 8; take a smaller one"
    assert finder.record.now.choice_notes == (f"left out: {said}",)
    with pytest.raises(DoesNotFit, match=said):
        finder._speed(specs[0], "mobilenetv2_100")
    alone = _finder(_record(tmp_path / "b", []), limits, named=("x",), networks=specs[:1])
    with pytest.raises(DoesNotFit, match="no network that was named fits in memory at batch 8; take a smaller batch"):
        alone.scaled()


def test_of_scaled_members_those_that_do_not_fit_keep_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rising = [SPEC, cs.get_spec("mobilenetv2_100")]
    monkeypatch.setattr(finding, "families_for", lambda side: ["one", "two"])
    monkeypatch.setattr(finding, "members", lambda base, side: rising if base == "one" else rising[1:])
    monkeypatch.setattr(timing, "measure_calmly", _halving(_small))
    asked: dict[str, Any] = {"size_for": lambda splits: 224}
    finder = _finder(_record(tmp_path / "a", []), Constraint(min_throughput=100), **asked)
    assert [c.name for c in finder.scaled().contenders] == ["mobilenetv2_050"]
    monkeypatch.setattr(finding, "families_for", lambda side: ["two"])
    alone = _finder(_record(tmp_path / "b", []), Constraint(min_throughput=100), **asked)
    assert alone._members_instead(math.inf) is None
    with pytest.raises(DoesNotFit, match="mobilenetv2_100 @224 does not fit in memory at batch 8"):
        alone.scaled()


def test_a_reference_that_does_not_fit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finder = _finder(_record(tmp_path, []), Constraint(), size_for=lambda splits: 32)
    monkeypatch.setattr(timing, "measure", _halving(lambda net: True))
    assert finder.reference_speed() == 400
    monkeypatch.setattr(timing, "measure", _halving(lambda net: False))
    with pytest.raises(DoesNotFit, match="does not fit in memory at batch 8"):
        finder.reference_speed()


def test_what_is_shipped_is_timed_at_the_batch_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact: Any = SimpleNamespace()
    monkeypatch.setattr(ship, "measure", _halving(lambda net: True))
    assert ship.shipped_speed(artifact, Conditions(batch_size=8)).images_per_s == pytest.approx(400)
    monkeypatch.setattr(ship, "measure", _halving(lambda net: False))
    with pytest.raises(DoesNotFit, match="net @224 does not fit in memory at batch 8"):
        ship.shipped_speed(artifact, Conditions(batch_size=8))


def test_a_candidate_of_a_search_has_no_speed_of_half_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    basis = basis_of(Asked(runtime="onnxruntime"))
    pace = Pace(basis, classes=3, channels=3, confidence=0.8, records=tmp_path / "speeds.jsonl")
    monkeypatch.setattr(measuring, "measure_calmly", _halving(_small))
    assert pace(SPEC).speed.images_per_s == pytest.approx(400)
    with pytest.raises(UserError, match="mobilenetv2_100 @224 does not fit in memory at batch 8; take a smaller one"):
        pace(cs.get_spec("mobilenetv2_100"))
    assert len((tmp_path / "speeds.jsonl").read_text().splitlines()) == 1
