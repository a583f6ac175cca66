"""Speeds that a search goes by: their calibration, which stays that of its beginning, their form and conditions."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

import convscale as cs
from convscale.choice.facts import Speed
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.nas.engines import local
from convscale.nas.pace import Pace
from convscale.nas.result import read_study
from convscale.nas.space import SearchSpace
from convscale.nas.trial import Job, Result
from convscale.nas.walk import Walk
from tests.nas.test_coefficients import deeper_is_better, points_in
from tests.nas.test_study import QUICK, by_macs, by_name, simple, untrained
from tests.predictor.calibrations import calibration_file

__all__ = ["deeper_is_better", "simple", "untrained"]


def other_calibration(path: Path) -> Path:
    """The same of one measurement more, beside it."""
    value = json.loads(path.read_text(encoding="utf-8"))
    other = path.with_name("other.json")
    other.write_text(json.dumps({**value, "count": value["count"] + 1}), encoding="utf-8")
    return other


def test_a_study_by_another_calibration(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, untrained: None
) -> None:
    """Its speeds would be of two predictors; where an earlier version did not say which one it was, it goes on."""
    place, by = tmp_path / "a", calibration_file(tmp_path, "i9-10940x")
    ask = {**QUICK, "device": "i9-10940x", "space": tiny, "epochs": 1, "output": place, "resume": True}
    cs.search(colours, trials=4, calibration=by, **{**ask, "resume": False})
    asked = json.loads((place / "study.json").read_text(encoding="utf-8"))["asked"]
    assert asked["calibration"] == hashlib.sha256(by.read_bytes()).hexdigest()
    other = other_calibration(by)
    with pytest.raises(UserError, match="was begun with another calibration; ask for the same, or name another"):
        cs.search(colours, trials=4, calibration=other, **ask)
    with pytest.raises(UserError, match="was begun with a calibration; ask"):
        cs.search(colours, trials=4, **ask)
    again = by.rename(tmp_path / "moved.json")
    assert len(cs.search(colours, trials=4, calibration=again, **ask).trials) == 4
    value = json.loads((place / "study.json").read_text(encoding="utf-8"))
    del value["asked"]["calibration"]
    (place / "study.json").write_text(json.dumps(value), encoding="utf-8")
    assert len(cs.search(colours, trials=4, calibration=other, **ask).trials) == 4


def test_a_calibration_that_changes_while_a_search_runs(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``calibrate`` writes the file anew: the study would have mixed two, and said that it was of the second."""
    place, by = tmp_path / "a", calibration_file(tmp_path, "i9-10940x")
    first, now = by.read_bytes(), other_calibration(by).read_bytes()
    report = Walk._report

    def changed(self: Walk, number: int) -> None:
        report(self, number)
        by.write_bytes(now)

    monkeypatch.setattr(local, "run_job", by_name)
    monkeypatch.setattr(Walk, "_report", changed)
    ask = {**QUICK, "device": "i9-10940x", "space": tiny, "epochs": 1, "output": place, "calibration": by}
    with pytest.raises(UserError, match=r"json has changed since the search began, whose speeds go by the earlier one"):
        cs.search(colours, trials=40, **ask)
    asked = json.loads((place / "study.json").read_text(encoding="utf-8"))["asked"]
    assert asked["calibration"] == hashlib.sha256(first).hexdigest()


def test_a_calibration_that_changes_before_anything_is_trained(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network is left out for it, and a file that is gone is as one that was changed."""
    place, by = tmp_path / "a", calibration_file(tmp_path, "i9-10940x")
    needed = Walk._need_one_that_keeps

    def gone(self: Walk) -> None:
        by.unlink()
        needed(self)

    monkeypatch.setattr(local, "run_job", by_name)
    monkeypatch.setattr(Walk, "_need_one_that_keeps", gone)
    ask = {**QUICK, "device": "i9-10940x", "space": tiny, "epochs": 1, "output": place, "calibration": by}
    said: list[str] = []
    with pytest.raises(UserError, match=r"json has changed since the search began, whose speeds go by the earlier one"):
        cs.search(colours, trials=4, min_throughput=1.0, say=said.append, **ask)
    assert not any("left out" in line for line in said)


def test_a_calibration_that_changes_while_coefficients_are_looked_for(
    colours: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later cost is by another predictor; with the first one put back the search goes on to its end."""
    place, by = tmp_path / "a", calibration_file(tmp_path, "i9-10940x", 4)
    first, now = by.read_bytes(), other_calibration(by).read_bytes()

    def run(job: Job, splits: DataSplits) -> Result:
        by.write_bytes(now)
        return Result(number=job.number, curve=(0.5,), seconds=1.0)

    monkeypatch.setattr(local, "run_job", run)
    ask = {"trials": 2, "image_size": 32, "output": place, "training_device": "cpu", "device": "i9-10940x"}
    with pytest.raises(UserError, match=r"json has changed since the search began, whose speeds go by the earlier one"):
        cs.find_scaling("mobilenetv2_050", colours, calibration=by, **ask)
    assert len(points_in(place)) == 1
    assert json.loads((place / "scaling.json").read_text())["asked"]["calibration"] == hashlib.sha256(first).hexdigest()
    monkeypatch.setattr(local, "run_job", lambda job, splits: Result(number=job.number, curve=(0.5,)))
    by.write_bytes(first)
    cs.find_scaling("mobilenetv2_050", colours, calibration=by, resume=True, **ask)
    assert [len(point["accuracies"]) for point in points_in(place)] == [3, 3]


def test_costs_by_two_calibrations_are_not_mixed(
    colours: DataSplits, tmp_path: Path, deeper_is_better: list[Job]
) -> None:
    """A time is of what predicts it, multiply-accumulates are of nothing; an earlier version did not say."""
    by = calibration_file(tmp_path, "i9-10940x", 4)
    other = other_calibration(by)
    ask = {"trials": 3, "image_size": 32, "minutes": 1e-6, "training_device": "cpu", "device": "i9-10940x"}
    by_time, by_macs = {**ask, "output": tmp_path / "time"}, {**ask, "output": tmp_path / "macs", "cost": "macs"}
    for each in (by_time, by_macs):
        cs.find_scaling("mobilenetv2_050", colours, calibration=by, **each)
    with pytest.raises(UserError, match="was begun with another calibration; ask for the same, or name another"):
        cs.find_scaling("mobilenetv2_050", colours, calibration=other, resume=True, **by_time)
    cs.find_scaling("mobilenetv2_050", colours, calibration=other, resume=True, **by_macs)
    path = tmp_path / "time" / "scaling.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    assert value["asked"].pop("calibration") == hashlib.sha256(by.read_bytes()).hexdigest()
    path.write_text(json.dumps(value), encoding="utf-8")
    cs.find_scaling("mobilenetv2_050", colours, calibration=other, resume=True, **by_time)


@pytest.mark.parametrize("form", ["hard-like", "soft"])
def test_what_keeps_the_speed_as_it_would_ship_pays_nothing(
    form: str, colours: DataSplits, tiny: SearchSpace, tmp_path: Path, untrained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ships is twice as fast here, whatever the reward."""

    def shipped(self: Pace, spec: cs.NetSpec) -> Speed:
        speed = 2 * by_macs(self, spec).speed.images_per_s
        return Speed(images_per_s=speed, low=speed, high=speed, kind="measured", how="a form")

    monkeypatch.setattr(Pace, "shipped", shipped)
    ask = {**QUICK, "device": "cpu", "space": tiny, "min_throughput": 16_000, "reward": form, "trials": 8}
    found = cs.search(colours, output=tmp_path / "a", **ask)
    ratios = {trial.number: 16_000 / (2 * (trial.images_per_s or 0)) for trial in found.trials}
    assert any(ratio < 1 and (found.trials[at].images_per_s or 0) < 16_000 for at, ratio in ratios.items())
    for trial in found.trials:
        assert trial.factor == pytest.approx(found.reward.factor(ratios[trial.number]))
    value = json.loads((tmp_path / "a" / "study.json").read_text(encoding="utf-8"))
    assert value["factor"] == 2.0
    value["factor"] = None  # as an earlier version began such a search: it goes on as it was
    (tmp_path / "a" / "study.json").write_text(json.dumps(value))
    monkeypatch.setattr(Pace, "find_factor", lambda *_: pytest.fail("its trials have none"))
    assert len(cs.search(colours, output=tmp_path / "a", resume=True, **{**ask, "trials": 9}).trials) == 9


def test_a_trial_s_record_has_the_conditions_of_its_speed(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of earlier versions have none, and are read."""
    monkeypatch.setattr(local, "run_job", by_name)
    by = calibration_file(tmp_path, "i9-10940x")
    ask = {**QUICK, "device": "i9-10940x", "space": tiny, "epochs": 1, "calibration": by, "trials": 2}
    found = cs.search(colours, output=tmp_path / "a", **ask)
    expected = replace(found.basis.conditions, image_size=12)
    assert [trial.conditions for trial in found.trials] == [expected] * 2
    assert found.trials[0].to_dict()["conditions"] == expected.to_dict()
    assert read_study(tmp_path / "a").trials == found.trials
    path = tmp_path / "a" / "study.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    for row in value["result"]["trials"]:
        del row["conditions"], row["note"]
    path.write_text(json.dumps(value))
    assert read_study(tmp_path / "a").trials == tuple(replace(trial, conditions=None) for trial in found.trials)
