"""Coefficients of scaling: what a budget means, and rules as values."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import convscale as cs
from convscale.arch.rules import load_rule, save_rule
from convscale.arch.small import for_image_size
from convscale.choice.facts import Speed
from convscale.errors import DoesNotFit, UserError
from convscale.files import new_output_dir
from convscale.images.splits import DataSplits
from convscale.learn.recipe import Recipe
from convscale.machine import code_commit
from convscale.nas.directions import at_cost, directions, reach, spread
from convscale.nas.engines import local
from convscale.nas.pace import Counted, Pace
from convscale.nas.points import PUBLISHED
from convscale.nas.trial import Job, Result
from convscale.show.runs import runs_below

COLUMNS = 120


def test_the_grid_by_hand() -> None:
    found = directions(4)
    assert len(found) == 15  # ways to give four parts to three: 6 choose 2
    assert all(sum(shares) == pytest.approx(1) for shares in found)
    assert spread(found, 3) == [(0, 0, 1), (0, 1, 0), (1, 0, 0)]


def test_multipliers_hold_the_invariant() -> None:
    """EfficientNet, section 3.3: alpha * beta^2 * gamma^2 is the budget."""
    for shares in directions(4):
        alpha, beta, gamma = at_cost(2.0, shares)
        assert alpha * beta**2 * gamma**2 == pytest.approx(2.0)
        assert min(alpha, beta, gamma) >= 1


def test_the_published_rule() -> None:
    """1.2 * 1.1^2 * 1.15^2 = 1.92; its shares are what its logarithms say."""
    assert PUBLISHED.alpha * PUBLISHED.beta**2 * PUBLISHED.gamma**2 == pytest.approx(1.92, abs=0.002)
    assert at_cost(1.92027, PUBLISHED.shares) == pytest.approx((1.2, 1.1, 1.15), abs=1e-4)


def test_a_budget_is_reached_where_rounding_lets_it() -> None:
    nominal, cost = reach(lambda at: at**1.5, 2.0)
    assert cost == pytest.approx(2.0, rel=0.02)
    assert nominal == pytest.approx(2.0 ** (2 / 3), rel=0.02)
    _, stepped = reach(lambda at: 1.0 + 0.6 * math.floor(2 * math.log(at)), 2.0)
    assert stepped == pytest.approx(2.2)  # of 1, 1.6, 2.2 ... the nearest


def test_a_rule_scales_like_its_coefficients(tmp_path: Path) -> None:
    rule = cs.ScalingRule(alpha=1.3, beta=1.05, gamma=1.1, name="mine", cost="time", conditions="rtx-4090")
    expected = cs.scale("efficientnet_b0", phi=2, alpha=1.3, beta=1.05, gamma=1.1)
    assert cs.scale("efficientnet_b0", phi=2, rule=rule) == expected
    for suffix in (".yaml", ".json"):
        save_rule(rule, tmp_path / f"mine{suffix}")
        assert load_rule(tmp_path / f"mine{suffix}") == rule
        assert cs.scale("efficientnet_b0", phi=2, rule=str(tmp_path / f"mine{suffix}")) == expected


def test_bad_rules_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ScalingRule.beta is 0.9; it must be from 1 to 64"):
        cs.ScalingRule(alpha=1.2, beta=0.9, gamma=1.1)
    (tmp_path / "bad.yaml").write_text("alpha: 1.2\nbeta: 1.1\n")
    with pytest.raises(UserError, match=r"bad.yaml: rule lacks the field 'gamma'"):
        cs.scale("efficientnet_b0", phi=1, rule=str(tmp_path / "bad.yaml"))
    with pytest.raises(UserError, match="scaling rule 'compond' is unknown"):
        cs.scale("efficientnet_b0", phi=1, rule="compond")


@pytest.fixture
def deeper_is_better(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Trainings whose accuracy is the network's depth, and a device on which time is depth x width^2 x side^2."""
    jobs: list[Job] = []

    def run(job: Job, splits: DataSplits) -> Result:
        jobs.append(job)
        depth = sum(cs.NetSpec.from_dict(dict(job.spec)).depths)
        return Result(number=job.number, curve=(depth / 1000 + job.seed / 1e6,), seconds=1.0)

    def pace(self: Pace, spec: cs.NetSpec) -> Counted:
        seconds = sum(spec.depths) * spec.widths[-1] ** 2 * spec.input.size**2
        speed = Speed(images_per_s=1 / seconds, low=0.0, high=1.0, kind="measured")
        return Counted(speed=speed, params=1, macs=1)

    monkeypatch.setattr(local, "run_job", run)
    monkeypatch.setattr(Pace, "__call__", pace)
    return jobs


def test_coefficients_by_time(colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job]) -> None:
    rule = cs.find_scaling("efficientnet_b0", colours, budget=2.0, image_size=224, output=tmp_path / "a")
    assert rule.shares == pytest.approx((1, 0, 0))
    depths = sum(cs.scale("efficientnet_b0", phi=1, rule=rule).depths) / 16
    assert depths == pytest.approx(2.0, rel=0.1)
    assert rule.cost == "time"
    assert any("this one gains" in note for note in rule.notes)
    assert load_rule(tmp_path / "a" / "rule.yaml") == rule
    points = json.loads((tmp_path / "a" / "scaling.json").read_text())["points"]
    assert len(points) == 16
    trained = [len(point["accuracies"]) for point in points]
    assert sorted(trained) == [1] * 12 + [3] * 4  # the best three, and EfficientNet's


def test_coefficients_by_macs_and_what_goes_on(
    colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job]
) -> None:
    ask = {"cost": "macs", "output": tmp_path / "a", "image_size": 32, "trials": 4}
    rule = cs.find_scaling("mobilenetv2_050", colours, minutes=1e-6, **ask)
    assert len(deeper_is_better) == 1
    (told,) = runs_below(tmp_path)
    assert (told.kind, told.state, told.network) == ("scaling", "done", "mobilenetv2_050-32px")
    record = tmp_path / "a" / "scaling.json"
    whole = record.read_text()
    record.write_text(json.dumps({**json.loads(whole), "rule": None, "points": []}))  # as it stands while it runs
    (told,) = runs_below(tmp_path)
    assert (told.state, told.accuracy, told.seconds) == ("unfinished", None, None)
    record.write_text(whole)
    rule = cs.find_scaling("mobilenetv2_050", colours, resume=True, **ask)
    (told,) = runs_below(tmp_path)
    written = json.loads((tmp_path / "a" / "scaling.json").read_text())
    best = max(
        sum(point["accuracies"]) / len(point["accuracies"]) for point in written["points"] if point["accuracies"]
    )
    assert (told.state, told.accuracy, told.metric) == ("done", best, "top-1, validation")
    assert told.commit == written["commit"] == code_commit()
    assert len(deeper_is_better) == 4 + 2 * 3  # four ways, then the best three, of them EfficientNet's, twice more
    assert rule.alpha * rule.beta**2 * rule.gamma**2 == pytest.approx(2.0)
    with pytest.raises(UserError, match=r"was begun with budget 2.0, not 3.0; ask for the same, or name another"):
        cs.find_scaling("mobilenetv2_050", colours, resume=True, budget=3.0, **ask)
    other = dataclasses.replace(colours, train=colours.train.subset(range(1, len(colours.train))))
    with pytest.raises(UserError, match="was begun with other data: images or labels have come, gone or changed"):
        cs.find_scaling("mobilenetv2_050", other, resume=True, **ask)
    path = tmp_path / "a" / "scaling.json"
    kept = json.loads(path.read_text())
    del kept["asked"]["data_digest"]  # as earlier versions wrote it
    path.write_text(json.dumps(kept))
    cs.find_scaling("mobilenetv2_050", other, resume=True, **ask)
    assert len(deeper_is_better) == 4 + 2 * 3


def test_costs_of_two_devices_are_not_mixed(colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job]) -> None:
    """A time is of its conditions; multiply-accumulates are of none."""
    ask = {"trials": 3, "image_size": 32, "minutes": 1e-6, "training_device": "cpu"}
    by_time, by_macs = {**ask, "output": tmp_path / "time"}, {**ask, "output": tmp_path / "macs", "cost": "macs"}
    for each in (by_time, by_macs):
        cs.find_scaling("mobilenetv2_050", colours, device="l4", **each)
    for other, what in (
        ({"device": "t4"}, "device 'l4', not 't4'"),
        ({"device": "l4", "batch_size": 32}, "batch_size 64, not 32"),
    ):
        with pytest.raises(UserError, match=f"was begun with conditions with {what}; ask for the same, or name"):
            cs.find_scaling("mobilenetv2_050", colours, resume=True, **{**by_time, **other})
    cs.find_scaling("mobilenetv2_050", colours, device="t4", resume=True, **by_macs)
    cs.find_scaling("mobilenetv2_050", colours, device="l4", resume=True, **by_time)


def test_another_recipe_or_baseline_is_not_gone_on_with(
    colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job]
) -> None:
    """A setting of recipes that an earlier version did not have counts as the same; a field of a network does not: what
    is not written down of it has its usual value.
    """
    ask: dict[str, Any] = {"cost": "macs", "image_size": 32, "trials": 2, "output": tmp_path / "a"}
    base = cs.get_spec("mobilenetv2_050")
    cs.find_scaling(base, colours, minutes=1e-6, **ask)
    path = tmp_path / "a" / "scaling.json"
    kept = json.loads(path.read_text())
    del kept["asked"]["recipe"]["compile"]
    path.write_text(json.dumps(kept))
    padded = dataclasses.replace(base, padding="same")
    assert padded.to_dict() == {**base.to_dict(), "padding": "same"}
    with pytest.raises(UserError, match="was begun with another base; ask for the same, or name another"):
        cs.find_scaling(padded, colours, resume=True, **ask)
    with pytest.raises(UserError, match="was begun with recipe with epochs 3, not 2; ask"):
        cs.find_scaling(base, colours, resume=True, epochs=2, **ask)
    cs.find_scaling(base, colours, resume=True, **ask)
    assert [len(point["accuracies"]) for point in points_in(tmp_path / "a")] == [3, 3]


@pytest.fixture
def luck_fades(deeper_is_better: list[Job], monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The same, but the first seed gives 0.5 more than any other: a mean over three seeds is below one lucky one."""
    run = local.run_job

    def lucky(job: Job, splits: DataSplits) -> Result:
        found = run(job, splits)
        return dataclasses.replace(found, curve=(found.accuracy + (0.5 if job.seed == 0 else 0.0),))

    monkeypatch.setattr(local, "run_job", lucky)
    return deeper_is_better


def stop_at(count: int, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]) -> None:
    """The training of this number, from 1 on, is interrupted, once."""
    run = local.run_job

    def stopped(job: Job, splits: DataSplits) -> Result:
        if len(jobs) == count - 1:
            jobs.append(job)
            raise KeyboardInterrupt
        return run(job, splits)

    monkeypatch.setattr(local, "run_job", stopped)


def points_in(folder: Path) -> list[dict]:
    return json.loads((folder / "scaling.json").read_text())["points"]


def test_the_rule_is_one_of_the_finalists(colours: DataSplits, tmp_path: Path, luck_fades: list[Job]) -> None:
    """Not the fourth best, whose one seed is above the means of the best three."""
    ask = {"cost": "macs", "image_size": 32}
    rule = cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "a", **ask)
    points = points_in(tmp_path / "a")
    assert rule.shares == pytest.approx((1, 0, 0))
    deepest = max(points, key=lambda point: point["accuracies"][0])
    assert len(deepest["accuracies"]) == 3
    assert deepest["shares"] == pytest.approx([1, 0, 0])
    assert max(point["accuracies"][0] for point in points if len(point["accuracies"]) == 1) > sum(
        deepest["accuracies"]
    ) / len(deepest["accuracies"])


@pytest.mark.parametrize(
    ("method", "trials", "at"),
    [
        ("grid", None, 18),  # the second of the finalists' second seeds
        ("bayes", 8, 7),  # the first that the estimator proposes is laid out
        ("bayes", 8, 10),
    ],
)
def test_what_is_gone_on_with_is_what_it_would_have_been(
    method: str, trials: int | None, at: int, colours: DataSplits, tmp_path: Path, luck_fades: list[Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ask = {"cost": "macs", "image_size": 32, "method": method, "trials": trials}
    whole = cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "whole", **ask)
    stop_at(len(luck_fades) + at, monkeypatch, luck_fades)
    with pytest.raises(KeyboardInterrupt):
        cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "cut", **ask)
    again = cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "cut", resume=True, **ask)
    assert points_in(tmp_path / "cut") == points_in(tmp_path / "whole")
    assert again == whole
    assert len(points_in(tmp_path / "cut")) == (trials or 16)
    record = tmp_path / "cut" / "scaling.json"
    value = json.loads(record.read_text())
    record.write_text(json.dumps({**value, "points": value["points"][:-1]}))
    stop_at(len(luck_fades) + 1, monkeypatch, luck_fades)
    with pytest.raises(KeyboardInterrupt):  # the rule that it had stays until there is another
        cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "cut", resume=True, **ask)
    assert json.loads(record.read_text())["rule"] == value["rule"] == json.loads(json.dumps(whole.to_dict()))


@pytest.mark.parametrize("method", ["grid", "bayes"])
def test_ways_that_can_not_be_trained_are_left_out(
    method: str, colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deepest does not fit in memory; the next two have losses that are not finite with their second seed."""
    run, pace, said = local.run_job, Pace.__call__, list[str]()

    def fails(job: Job, splits: DataSplits) -> Result:
        found = run(job, splits)
        beyond = job.seed == 1 and found.accuracy > 0.0275
        return dataclasses.replace(found, failed="the loss is not finite") if beyond else found

    def fits(self: Pace, spec: cs.NetSpec) -> Counted:
        if sum(spec.depths) >= 32:
            raise DoesNotFit(f"{spec.name} is too large")
        return pace(self, spec)

    monkeypatch.setattr(local, "run_job", fails)
    monkeypatch.setattr(Pace, "__call__", fits)
    ask = {"image_size": 224, "output": tmp_path / "a", "method": method, "trials": 16 if method == "grid" else 9}
    rule = cs.find_scaling("efficientnet_b0", colours, say=said.append, **ask)
    points = points_in(tmp_path / "a")
    failed = [point for point in points if point["failed"]]
    assert {point["failed"].split()[-1] for point in failed} >= {"large"}
    assert ["left out: " in text for text in said].count(True) == len(failed)
    assert 1.0 < rule.alpha < 2.0
    whole = [point for point in points if len(point["accuracies"]) == 3]
    assert all(not point["failed"] for point in whole)
    assert len(whole) >= 3
    if method == "grid":
        assert {len(point["accuracies"]) for point in failed} == {0, 1}
        assert "; 3 more can not be trained; this one" in rule.notes[0]
    jobs = len(deeper_is_better)
    again = cs.find_scaling("efficientnet_b0", colours, resume=True, **ask)
    assert (again, points_in(tmp_path / "a"), len(deeper_is_better)) == (rule, points, jobs)


def test_where_no_way_can_be_trained_it_ends_and_may_be_gone_on_with(
    colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = {"cost": "macs", "image_size": 32, "output": tmp_path / "a", "trials": 5}
    with monkeypatch.context() as patch:
        patch.setattr(local, "run_job", lambda job, splits: Result(number=job.number, failed="no space is left"))
        with pytest.raises(UserError, match="none of 4 ways to scale can be trained; the first: no space is left"):
            cs.find_scaling("mobilenetv2_050", colours, **ask)
    cs.find_scaling("mobilenetv2_050", colours, resume=True, **ask)
    assert [point["failed"] for point in points_in(tmp_path / "a")] == [""] * 5


def test_the_notes_say_what_it_is_compared_with(
    colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job]
) -> None:
    """Time is depth x width^2 x side^2 there, and all of the budget goes into depth."""
    ask = {"image_size": 32, "trials": 4}
    rule = cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "a", **ask)
    published = "shares of depth, width and resolution beside EfficientNet's published ones, which were found by FLOPs"
    assert any(note.startswith(published) for note in rule.notes)
    (note,) = [note for note in rule.notes if "the direction that FLOPs would choose" in note]
    base = for_image_size(cs.get_spec("mobilenetv2_050"), 32)
    macs = [cs.count(net, 32).macs for net in (cs.scale(base, phi=1, rule=rule), base)]
    assert rule.shares == pytest.approx((1, 0, 0))
    assert note.startswith(
        f"it has {macs[0] / macs[1]:.2f} times the baseline's multiply-accumulates; 2 times by FLOPs"
    )
    assert "in the same direction is depth x 2, width x 1, resolution x 1;" in note
    by_macs = cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "b", cost="macs", **ask)
    assert not any("the direction that FLOPs would choose" in note for note in by_macs.notes)


def test_by_optunas_estimator(colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job]) -> None:
    ask = {"cost": "macs", "method": "bayes", "image_size": 32, "trials": 8}
    rule = cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "a", **ask)
    points = json.loads((tmp_path / "a" / "scaling.json").read_text())["points"]
    assert len(points) == 8
    assert rule.shares[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cost": "flops"}, "cost 'flops' is unknown"),
        ({"budget": 1.0}, "budget is 1.0; it must be a number above 1"),
        ({"trials": 1}, "trials is 1; ways to scale are compared"),
        ({"model": "efficientnet_b00"}, "nearest: efficientnet_b0"),
        ({"recipe": Recipe(name="mine", compile="graphs")}, "recipe mine: compile is graphs, CUDA graphs, and device"),
        ({"most_images": 0}, "most_images is 0; it must be"),
        ({"image_size": 0}, "image size is 0; it must be"),
    ],
)
def test_bad_input_is_one_line(given: dict, message: str, colours: DataSplits, tmp_path: Path) -> None:
    """And takes nothing from a folder that is to be replaced."""
    place = new_output_dir(tmp_path / "a")
    (place / "rule.yaml").write_text("of hours")
    ask = {"model": "efficientnet_b0", "data": colours, "output": place, "overwrite": True, **given}
    with pytest.raises(UserError, match=message):
        cs.find_scaling(**ask)
    assert (place / "rule.yaml").read_text() == "of hours"


def test_the_commands(
    call: Callable[..., tuple[int, str, str]], colour_folder: Path, tmp_path: Path, deeper_is_better: list[Job]
) -> None:
    place = tmp_path / "a"
    ask = ["search", "--scaling", "mobilenetv2_050", "--data-dir", colour_folder, "--output", place, "--img-size", "32"]
    code, out, err = call(*ask, "--cost", "macs", "--trials", "3", "--json")
    assert code == 0, err
    rule = json.loads(out)
    assert rule["alpha"] == pytest.approx(2.0)
    code, out, err = call("scale", "mobilenetv2_050", "--phi", "1", "--rule", place / "rule.yaml", "--json")
    assert code == 0, err
    assert json.loads(out) == cs.scale("mobilenetv2_050", phi=1, rule=load_rule(place / "rule.yaml")).to_dict()
    code, _, err = call(*ask, "--space", "small", "--trials", "3")
    assert (code, err.count("\n")) == (2, 1)
