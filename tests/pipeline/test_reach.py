"""What it costs that weights can not be had, by tables made by hand; nothing is traced or timed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import convscale as cs
from convscale.choice.basis import Asked, basis_of
from convscale.choice.candidates import Candidate
from convscale.choice.decide import Option
from convscale.choice.facts import NetworkFacts, SizedSpec, Speed
from convscale.choice.speeds import traced_before
from convscale.conditions import Constraint
from convscale.networks.weight_files import WeightFiles
from convscale.pipeline.finding import Finder
from convscale.pipeline.reach import Reached, best_out_of_reach, reach
from convscale.predictor.fitted import TITLES
from tests.pipeline.test_order import _finder, _option, _record

BEGIN = (
    "the weights of 2 of 3 released networks can not be had here (the hub does not answer; --weights-dir DIR gives "
    "files): "
)


def _candidate(name: str, top1: float) -> Candidate:
    spec = cs.get_spec("resnet18" if name == "far" else "mobilenetv2_100")
    return Candidate(name=name, spec=spec, image_size=224, group=name, top1=top1, licence="MIT")


def _noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, NetworkFacts], here: Option, *, predicted: bool
) -> tuple[str, ...]:
    """What is noted where the weights of one network are here, and of two others, 84 and 81 %, not."""
    unreached = (_candidate("far", 84.0), _candidate("near", 81.0), _candidate("near", 80.0))
    reached = Reached(found=((here.candidate, "a.pth"),), unreached=unreached)
    monkeypatch.setattr(Finder, "_reached", lambda self, files: reached)
    monkeypatch.setattr(Finder, "_judged_options", lambda self, pool: (here,))
    found = {SizedSpec(one.spec, 224): facts[one.name] for one in unreached if one.name in facts}
    monkeypatch.setattr("convscale.pipeline.reach.traced_before", lambda networks, basis: found)
    monkeypatch.setattr(Finder, "_members_instead", lambda self, rival: None)
    finder = _finder(_record(tmp_path, []), Constraint(min_throughput=100), predicted=predicted)
    finder.released(SimpleNamespace())  # type: ignore[arg-type]
    return finder.record.now.choice_notes


@pytest.mark.parametrize(
    ("macs", "cost"),
    [
        # one of 1,000 MACs was measured at 150 images/s; of another family guesses are as good
        ({"far": 1600, "near": 1400}, "the best of them that should keep the speed, near @224, has 1.0 points more"),
        ({"far": 1400, "near": 1400}, "the best of them that should keep the speed, far @224, has 4.0 points more"),
        ({"far": 1600, "near": 1600}, "none of them is known to keep the speed and to be more accurate"),
        ({"far": 1600}, "none of them is known to keep the speed and to be more accurate"),
        ({}, "whether one of them keeps the speed and is more accurate is not known"),
    ],
)
def test_what_should_keep_it_by_its_counts(
    macs: dict[str, int], cost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = _option("here", 150, 80.0)
    here = dataclasses.replace(here, facts=dataclasses.replace(here.facts, macs=1000 * 10**6))
    facts = {name: NetworkFacts(params=1, macs=count * 10**6) for name, count in macs.items()}
    assert _noted(tmp_path, monkeypatch, facts, here, predicted=False) == (BEGIN + cost,)


def test_what_should_keep_it_by_its_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 0.8: 110 (80 %: 90 to 135) images/s keep 100 with Phi(ln(1.1) / ln(110 / 90) x 1.2816) = 0.73 only."""
    speeds = {"far": (90.0, 110.0, 135.0), "near": (100.0, 120.0, 145.0)}
    facts = {
        name: NetworkFacts(params=1, speed=Speed(low=low, images_per_s=middle, high=high, kind="predicted"))
        for name, (low, middle, high) in speeds.items()
    }
    here = _option("here", (150, 160, 170), 78.5, "yes", "predicted")
    assert _noted(tmp_path, monkeypatch, facts, here, predicted=True) == (
        f"{BEGIN}the best of them that should keep the speed, near @224, has 2.5 points more",
    )


@pytest.mark.parametrize(
    ("least", "found", "looked"), [(80.5, None, False), (84.0, None, True)], ids=["some better", "none better"]
)
def test_what_nothing_is_stored_for_is_not_known(least: float, found: None, looked: bool) -> None:
    """Workloads in 8 bits do not travel with the package; where all are less accurate anyway that does not matter."""
    basis = basis_of(Asked(device="l4", runtime="tensorrt", precision="int8"))
    pool, constraint = [_candidate("far", 84.0), _candidate("near", 81.0)], Constraint(min_throughput=1)
    assert best_out_of_reach(pool, least, [], basis, constraint, None) == (found, looked)


@pytest.mark.parametrize("precision", ["amp", "amp_bf16"])
@pytest.mark.parametrize("runtime", ["tensorrt", "onnxruntime"])
def test_runtimes_that_others_stand_in_for_are_looked_up_by_these(
    runtime: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But a compiler that is slower than none is no doubt about them."""
    monkeypatch.setattr("convscale.choice.speeds.compiler_doubt", lambda compiled, eager: "slower")
    basis = basis_of(Asked(device="l4", runtime=runtime, precision=precision))
    stored = basis_of(Asked(device="l4", runtime="compiled", precision=precision))
    pool = [_candidate("far", 84.0), _candidate("near", 81.0)]
    sizes = [SizedSpec(one.spec, 224) for one in pool]
    facts, others = traced_before(sizes, basis), traced_before(sizes, stored)
    assert len(facts) == len(others) == 2
    for one in sizes:
        mine, other = facts[one].speed, others[one].speed
        assert mine is not None
        assert other is not None
        assert (mine.images_per_s, facts[one].macs) == (other.images_per_s, others[one].macs)
        assert mine.high / mine.low > 2.5**2 > other.high / other.low
        assert mine.doubts[0].startswith(f"no table speaks of {TITLES[runtime]}: predicted by compiled PyTorch's")
        assert ("slower" in mine.doubts, "slower" in other.doubts) == (False, True)
    speeds = [facts[one].speed.low for one in sizes]  # pyright: ignore[reportOptionalMemberAccess]
    assert best_out_of_reach(pool, 80.0, [], basis, Constraint(min_throughput=min(speeds) / 2), None) == (pool[0], True)
    assert best_out_of_reach(pool, 80.0, [], basis, Constraint(min_throughput=1e9), None) == (None, True)


def test_where_nothing_that_is_here_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = _option("here", 50, 85.0, "no")
    here = dataclasses.replace(here, facts=dataclasses.replace(here.facts, macs=1000 * 10**6))
    facts = {"near": NetworkFacts(params=1, macs=400 * 10**6)}
    assert _noted(tmp_path, monkeypatch, facts, here, predicted=False) == (
        f"{BEGIN}the best of them that should keep the speed, near @224, is published with 81.0 %",
    )


def test_weights_that_can_not_be_had_are_told_from_those_that_nobody_released(tmp_path: Path) -> None:
    (tmp_path / "here.pth").write_bytes(b"")
    files: Any = WeightFiles(folder=tmp_path)
    files.__dict__["hub_answers"] = False
    figures = ((224, 80.0),)
    pool = [dataclasses.replace(_candidate(name, 80.0), published=figures) for name in ("here", "elsewhere")]
    bare = dataclasses.replace(pool[0], name="bare", licence="")
    found = reach([*pool, bare], files, named=False)
    assert [(c.name, place) for c, place in found.found] == [("here", tmp_path / "here.pth")]
    assert [c.name for c in found.unreached] == ["elsewhere"]
    assert [c.name for c, _ in reach([*pool, bare], files, named=True).found] == ["here", "bare"]
