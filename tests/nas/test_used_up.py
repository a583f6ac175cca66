"""Searches in spaces of fewer networks than are asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import convscale as cs
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.nas.engines import local
from convscale.nas.space import SearchSpace
from convscale.nas.trial import Result
from tests.nas.test_study import QUICK, simple, untrained

__all__ = ["simple", "untrained"]


def of_depths(tiny: SearchSpace, widths: tuple[int, ...], depths: tuple[int, ...]) -> SearchSpace:
    """Plain networks, with so many widths and depths of the first stage, and one to five blocks in the second."""
    first, second = tiny.stages
    stages = (
        replace(first, kinds=("basic",), widths=widths, depths=depths),
        replace(second, kinds=("basic",), widths=(16,), depths=(1, 2, 3, 4, 5)),
    )
    return replace(tiny, stages=stages)


@pytest.mark.parametrize(("widths", "depths", "count"), [((8,), (1,), 5), ((8, 16), (1, 2), 20)])
def test_a_space_that_is_used_up_ends_the_search(
    widths: tuple[int, ...], depths: tuple[int, ...], count: int, colours: DataSplits, tiny: SearchSpace,
    tmp_path: Path, untrained: None,
) -> None:  # fmt: skip
    """With what was trained, whether fewer are left than are scored for the first trials or not."""
    space, said = of_depths(tiny, widths, depths), list[str]()
    assert len(space) == count
    ask = {**QUICK, "zero_cost": "size", "epochs": 1, "space": space, "trials": 30, "output": tmp_path / "a"}
    found = cs.search(colours, say=said.append, **ask)
    assert [trial.state for trial in found.trials] == ["trained"] * count
    assert len({trial.genes for trial in found.trials}) == count
    ended = (
        f"the search ends: all that is found in the space was tried: {count} networks; a larger space would be right"
    )
    assert said.count(ended) == 1
    assert cs.search(colours, resume=True, **ask).trials == found.trials


def test_a_space_that_is_used_up_before_anything_is_trained(
    colours: DataSplits, tiny: SearchSpace, tmp_path: Path, simple: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest keeps the speed and can not be trained, the others are too slow."""
    monkeypatch.setattr(local, "run_job", lambda job, splits=None: Result(number=job.number, failed="no"))
    space = of_depths(tiny, (8,), (1,))
    fast = sorted(1e9 / cs.count(spec, 12).macs for spec in space.sample(0, count=5))[-1]
    ask = {**QUICK, "zero_cost": "size", "space": space, "min_throughput": 0.999 * fast, "output": tmp_path / "a"}
    with pytest.raises(UserError, match="all that is found in the space was tried: 5 networks"):
        cs.search(colours, trials=30, **ask)
