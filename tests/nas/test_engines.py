"""What trials take of a Ray cluster, by a stand-in for Ray that runs them here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import convscale as cs
from convscale.errors import UserError
from convscale.machine import available_cores
from convscale.nas.engines import ray as ray_engine
from convscale.nas.engines.base import Place
from convscale.nas.engines.start import engine_for, threads_of
from convscale.nas.space import SearchSpace
from tests.nas.test_study import QUICK, by_name, job, simple

__all__ = ["simple"]


class FakeRay:
    """Answers at once, on the machines that it is told of."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self.machines, self.up = machines, False
        self.begun: dict[str, Any] = {}
        self.options_of: list[dict[str, Any]] = []
        self.jobs: list[dict[str, Any]] = []
        self.call: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def is_initialized(self) -> bool:
        return self.up

    def init(self, **given: Any) -> None:
        self.up, self.begun = True, given

    def shutdown(self) -> None:
        self.up = False

    def nodes(self) -> list[dict[str, Any]]:
        here = {"CPU": self.begun.get("num_cpus", 0)}
        return [{"Alive": True, "Resources": each} for each in self.machines or (here,)] + [
            {"Alive": False, "Resources": {"CPU": 999, "GPU": 99}}
        ]

    def remote(self, **given: Any) -> Callable[[Callable[[dict[str, Any]], dict[str, Any]]], Any]:
        self.options_of.append(given)
        fake = self

        class Task:
            @staticmethod
            def remote(job: dict[str, Any]) -> int:
                fake.jobs.append(job)
                return len(fake.jobs) - 1

        def task(call: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
            fake.call = call
            return Task

        return task

    def wait(self, running: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        return running[:num_returns], running[num_returns:]

    def get(self, number: int) -> dict[str, Any]:
        return self.call(self.jobs[number])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    def made(*machines: dict[str, float]) -> FakeRay:
        one = FakeRay(*machines)
        monkeypatch.setitem(sys.modules, "ray", one)
        return one

    return made


def took(fake: FakeRay, place: Place, tiny: SearchSpace) -> list[float]:
    """Cores and GPUs that a trial takes, and threads that it computes with."""
    engine = engine_for(place, None)  # pyright: ignore[reportArgumentType] - a cluster reads its own
    list(engine.run([job(0, Path("x"), tiny)], lambda: True))
    engine.close()
    given = fake.options_of[-1]
    return [given["num_cpus"], given["num_gpus"], fake.jobs[-1]["threads"]]


def test_a_trial_takes_the_cores_that_it_computes_with(fake: Callable[..., FakeRay], tiny: SearchSpace) -> None:
    here = available_cores()
    for workers, cores in ((1, here), (2, max(1, here // 2)), (5 * here, 1)):
        one = fake()
        assert took(one, Place(engine="ray", workers=workers), tiny) == [cores, 0.0, cores]
        assert one.begun["num_cpus"] == max(here, workers)
        assert not one.up
    assert took(fake({"CPU": 8}, {"CPU": 4}), Place(engine="ray", workers=3), tiny) == [4, 0.0, 4]
    assert took(fake({"CPU": 8}, {"CPU": 4}), Place(engine="ray", workers=1), tiny) == [8, 0.0, 8]
    assert took(fake({"CPU": 8}), Place(engine="ray", workers=1, threads=3), tiny) == [3, 0.0, 3]
    assert threads_of(Place(engine="ray", workers=2)) is None
    assert threads_of(Place(workers=2)) == max(1, here // 2)


def test_a_trial_on_a_card_takes_one_and_its_machines_cores(fake: Callable[..., FakeRay], tiny: SearchSpace) -> None:
    place = Place(engine="ray", workers=2, gpus=1.0, device="cuda")
    assert took(one := fake({"CPU": 64}, {"CPU": 16, "GPU": 2}), place, tiny) == [8, 1.0, 8]
    assert one.options_of[-1]["max_calls"] == 1  # a process that is used again keeps to the card of its first trial
    assert took(one := fake({"CPU": 64}), Place(engine="ray"), tiny) == [64, 0.0, 64]
    assert one.options_of[-1]["max_calls"] == 0


@pytest.mark.parametrize(
    ("workers", "gpus", "machines", "threads"),
    [
        (3, 0, [{"CPU": 8}, {"CPU": 8}], 4),  # a third of 16 is 5, of which two fit
        (5, 0, [{"CPU": 7}, {"CPU": 3}], 1),
        (4, 0, [{"CPU": 7}, {"CPU": 3}], 2),
        (9, 0, [{"CPU": 4}, {"CPU": 4}], 1),
        (2, 1, [{"CPU": 16, "GPU": 1}, {"CPU": 4, "GPU": 1}], 4),  # not both on the larger one
        (8, 1, [{"CPU": 16, "GPU": 2}], 8),  # two have a card, the others wait for one
        (3, 1, [{"CPU": 64}, {"CPU": 16, "GPU": 2}, {"CPU": 6, "GPU": 4}], 6),
    ],
)
def test_all_workers_run_at_a_time(
    workers: int, gpus: int, machines: list[dict[str, float]], threads: int,
    fake: Callable[..., FakeRay], tiny: SearchSpace,
) -> None:  # fmt: skip
    place = Place(engine="ray", workers=workers, gpus=float(gpus), device="cuda" if gpus else "cpu")
    assert took(fake(*machines), place, tiny) == [threads, float(gpus), threads]


def test_what_no_machine_has_is_said_and_not_waited_for(fake: Callable[..., FakeRay], tiny: SearchSpace) -> None:
    one = fake({"CPU": 8})
    with pytest.raises(UserError, match="no machine of the Ray cluster has a GPU, and training_device is cuda; add"):
        engine_for(Place(engine="ray", gpus=1.0, device="cuda"), None)  # pyright: ignore[reportArgumentType]
    assert not one.up
    fake({"CPU": 8})
    with pytest.raises(UserError, match="threads_per_trial is 9, and no machine of the Ray cluster has more than 8"):
        engine_for(Place(engine="ray", threads=9), None)  # pyright: ignore[reportArgumentType]


def test_a_cluster_of_its_own_whatever_else_runs_here(
    fake: Callable[..., FakeRay], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray joined the cluster that ran, and refused the number of cores with a traceback."""
    one = fake()
    engine_for(Place(engine="ray"), None).close()  # pyright: ignore[reportArgumentType]
    assert one.begun["address"] == "local"

    def init(**given: Any) -> None:
        raise ValueError("no room in /tmp/ray\nand more")

    monkeypatch.setattr(one, "init", init)
    with pytest.raises(UserError, match=r"^no Ray cluster can be started on this machine: no room in /tmp/ray; engine"):
        engine_for(Place(engine="ray"), None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_machine_without_a_card_searches_on_those_of_a_cluster(
    device: str, fake: Callable[..., FakeRay], colour_folder: Path, tiny: SearchSpace, tmp_path: Path, simple: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ray_engine, "run_job", by_name)
    one = fake({"CPU": 4}, {"CPU": 4, "GPU": 1})
    ask = {**QUICK, "space": tiny, "trials": 2, "epochs": 1, "training_device": device}
    study = cs.search(colour_folder, output=tmp_path / "a", engine="ray", **ask)
    assert [trial.state for trial in study.trials] == ["trained", "trained"]
    assert [(each["device"], each["threads"]) for each in one.jobs] == [("cuda", 4)] * 2
    assert [each["num_gpus"] for each in one.options_of] == [1.0]
    assert one.jobs[0]["recipe"]["precision"] == "amp"
    with pytest.raises(UserError, match=f"device '{device}' is not there: torch sees no CUDA GPU; use device cpu"):
        cs.search(colour_folder, output=tmp_path / "b", **ask)
