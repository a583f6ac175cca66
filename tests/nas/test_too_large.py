"""Candidates of a search that memory does not hold at the batch asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import convscale as cs
from convscale.errors import DoesNotFit
from convscale.images.splits import DataSplits
from convscale.nas.pace import Counted, Pace
from convscale.nas.result import read_study
from convscale.nas.space import SearchSpace
from convscale.show.search_report import write_search_report
from tests.nas.test_study import QUICK, by_macs, simple, untrained  # noqa: F401 - fixtures


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("score", [None, "size"])
def test_they_are_passed_over(
    colours: DataSplits,
    tiny: SearchSpace,
    tmp_path: Path,
    score: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the reward: they can not be run as it was asked."""
    most = sorted(cs.count(spec, 12).macs for spec in tiny.sample(0, count=30))[15]

    def pace(self: Pace, spec: cs.NetSpec) -> Counted:
        counted = by_macs(self, spec)
        if counted.macs > most:
            raise DoesNotFit(f"{spec.name} is too large")
        return counted

    monkeypatch.setattr(Pace, "__call__", pace)
    ask = {**QUICK, "zero_cost": score, "trials": 6, "output": tmp_path / "study"}
    found = cs.search(colours, space=tiny, **ask)
    large = [trial for trial in found.trials if trial.macs > most or trial.macs == 0]
    assert large
    assert {trial.state for trial in large} == {"too slow"}
    assert all(trial.reason == f"{trial.spec.name} is too large" and trial.speed is None for trial in large)
    assert sum(trial.state in ("trained", "pruned") for trial in found.trials) == 6
    assert cs.count(found.best.spec, 12).macs <= most
    write_search_report(found.output)
    assert [trial.state for trial in read_study(found.output).trials] == [trial.state for trial in found.trials]
