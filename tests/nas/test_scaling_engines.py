"""Coefficients found by several workers, or on a cluster: what one worker finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import convscale as cs
from convscale.errors import UserError
from convscale.images.splits import DataSplits
from convscale.nas.engines import local, start
from convscale.nas.engines import ray as ray_engine
from convscale.nas.trial import Job, More, Result
from tests.nas.test_coefficients import deeper_is_better, luck_fades, points_in
from tests.nas.test_engines import FakeRay, fake

__all__ = ["deeper_is_better", "fake", "luck_fades"]

COLUMNS = 200
ASK: dict[str, Any] = {"cost": "macs", "image_size": 32}


@pytest.fixture
def groups(luck_fades: list[Job], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many trainings were given to processes together; of each such group the last is done first."""
    seen: list[int] = []

    class Backwards:
        def __init__(self, workers: int) -> None:
            assert workers == 3

        def run(self, jobs: Sequence[Job], more: More) -> Iterator[Result]:
            seen.append(len(jobs))
            assert all(job.data and Path(job.data).is_dir() for job in jobs)
            yield from (local.run_job(job, None) for job in reversed(jobs))

        def close(self) -> None: ...

    monkeypatch.setattr(start, "Processes", Backwards)
    return seen


@pytest.mark.parametrize(
    ("method", "trials", "expected"),
    # by threes, a proposal alone, since it knows all before it; the best three and EfficientNet's twice more
    [("grid", 5, [3, 2, 3, 3]), ("bayes", 7, [3, 3, 1, 4, 4])],
)
def test_several_workers_find_what_one_finds(
    method: str, trials: int, expected: list[int], colours: DataSplits, colour_folder: Path, tmp_path: Path,
    groups: list[int],
) -> None:  # fmt: skip
    ask = {**ASK, "method": method, "trials": trials}
    one = cs.find_scaling("mobilenetv2_050", colour_folder, output=tmp_path / "one", **ask)
    assert groups == []
    several = cs.find_scaling("mobilenetv2_050", colour_folder, output=tmp_path / "three", workers=3, **ask)
    assert several == one
    assert points_in(tmp_path / "three") == points_in(tmp_path / "one")
    assert groups == expected


def test_a_group_that_is_cut_is_gone_on_with(
    colour_folder: Path, tmp_path: Path, groups: list[int], luck_fades: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second group one of two was done; of the finals, two of three; one worker ends it."""
    ask = {**ASK, "trials": 5}
    whole = cs.find_scaling("mobilenetv2_050", colour_folder, output=tmp_path / "whole", **ask)
    run = local.run_job
    for stop in (4, 3):  # 3 and 1 trainings, then the fifth and 2 more
        left = stop

        def stopped(job: Job, splits: DataSplits | None = None) -> Result:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            return run(job, splits)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(local, "run_job", stopped)
        with pytest.raises(KeyboardInterrupt):
            cs.find_scaling(
                "mobilenetv2_050", colour_folder, output=tmp_path / "cut", workers=3, resume=stop == 3, **ask
            )
    monkeypatch.setattr(local, "run_job", run)
    assert sorted(len(point["accuracies"]) for point in points_in(tmp_path / "cut")) == [1] * 3 + [2] * 2
    before = len(luck_fades)
    again = cs.find_scaling("mobilenetv2_050", colour_folder, output=tmp_path / "cut", resume=True, **ask)
    assert len(luck_fades) - before == 4
    assert again == whole
    assert points_in(tmp_path / "cut") == points_in(tmp_path / "whole")


def test_a_cluster_finds_it_too(
    colour_folder: Path, tmp_path: Path, deeper_is_better: list[Job], fake: Callable[..., FakeRay],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ray_engine, "run_job", lambda job: local.run_job(job, None))  # pyright: ignore
    cluster = fake({"CPU": 4, "GPU": 2})
    ask = {**ASK, "trials": 3, "recipe": "small-adamw"}
    here = cs.find_scaling("mobilenetv2_050", colour_folder, output=tmp_path / "here", **ask)
    there = cs.find_scaling(
        "mobilenetv2_050", colour_folder, output=tmp_path / "there", engine="ray", workers=2, training_device="cuda",
        **ask,
    )  # fmt: skip
    assert there == here
    assert points_in(tmp_path / "there") == points_in(tmp_path / "here")
    assert {(each["num_cpus"], each["num_gpus"]) for each in cluster.options_of} == {(2, 1.0)}
    assert {each["device"] for each in cluster.jobs} == {"cuda"}
    assert not cluster.up


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_real_trainings_give_the_same(engine: str, colour_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    ask: dict[str, Any] = {**ASK, "trials": 2, "epochs": 1, "recipe": "small-adamw", "threads_per_trial": 1}
    here = cs.find_scaling("mobilenetv2_050", colour_folder, output=tmp_path / "here", **ask)
    there = cs.find_scaling(
        "mobilenetv2_050", colour_folder, output=tmp_path / "there", engine=engine, workers=2, **ask
    )
    assert there == here
    kept = [[point["accuracies"] for point in points_in(tmp_path / name)] for name in ("here", "there")]
    assert kept[0] == kept[1]
    assert [len(each) for each in kept[0]] == [3, 3]


def test_bad_places_are_one_line(
    colours: DataSplits, colour_folder: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    with pytest.raises(UserError, match="splits in memory are trained on in this process alone"):
        cs.find_scaling("mobilenetv2_050", colours, output=tmp_path / "a", workers=2, **ASK)
    ask = ["search", "--scaling", "mobilenetv2_050", "--data-dir", colour_folder, "--output", tmp_path / "a"]
    for more, said in (
        (("--engine", "ray", "--address", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
        (("--engine", "spark"), "engine 'spark' is unknown"),
        (("--workers", "0"), "workers is 0"),
    ):
        code, _, err = call(*ask, *more)
        assert (code, said in err, len(err.splitlines())) == (2, True, 1), err
    assert not (tmp_path / "a").exists()


def test_the_command_takes_workers(
    colour_folder: Path, tmp_path: Path, groups: list[int], call: Callable[..., tuple[int, str, str]]
) -> None:
    ask = ["search", "--scaling", "mobilenetv2_050", "--data-dir", colour_folder, "--output", tmp_path / "a"]
    code, out, err = call(*ask, "--cost", "macs", "--img-size", "32", "--trials", "3", "--workers", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["alpha"] == pytest.approx(2.0)
    assert groups == [3, 3, 3]
