"""``fit --track``: one run of a tracker for the whole fit, also where it is interrupted and resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from convscale.arch.multipliers import scale_to
from convscale.arch.small import for_image_size
from convscale.arch.zoo import get_spec
from convscale.errors import UserError
from convscale.learn import trackers
from convscale.learn.trackers import Tracked, Tracker
from convscale.pipeline.run import FitRun, fit
from tests.learn.nets import halves_data

pytestmark = pytest.mark.usefixtures("briefly")
SPECS = [
    scale_to(for_image_size(get_spec(name), 12), width=0.25, depth=0.25, name=f"{name}-small")
    for name in ("resnet18", "resnet50d")
]


class Recorded(Tracker):
    """Keeps what it is told."""

    told: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __init__(self, run: Tracked) -> None:
        self.id = run.again or f"run {len([each for each in self.told if each[0] == 'new'])}"
        self.told.append(("goes on", run.again) if run.again else ("new", run.name, dict(run.facts)))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.told.append(("log", epoch, dict(values)))

    def end(self, *, finished: bool) -> None:
        self.told.append(("end", finished))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setattr(trackers, "_KINDS", {**trackers._KINDS, "mlflow": Recorded})
    monkeypatch.setattr(Recorded, "told", [])
    return Recorded.told


def _fit(place: Path, **options: Any) -> FitRun:
    asked: dict[str, Any] = {
        "min_throughput": 1.0,
        "batch_size": 4,
        "threads": 1,
        "epochs": 2,
        "runtime": "onnxruntime",
    }
    asked |= {"overrides": {"batch_size": 32, "precision": "fp32", "layout": "nchw"}, "candidates": SPECS}
    return fit(halves_data(), output=place, **{**asked, **options})


@pytest.mark.slow
def test_a_fit_is_one_run(told: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """Two finalists are compared by a short training each, which no tracker is told of."""
    run = _fit(tmp_path / "mine", track="mlflow")
    assert [each[:2] for each in told] == [("new", "mine"), ("log", 1), ("log", 2), ("log", 2), ("end", True)]
    facts, second, last = told[0][2], told[2][2], told[3][2]
    assert facts["model"] == run.result.winner.name
    assert (facts["epochs"], facts["batch_size"], facts["image_size"], facts["min_throughput"]) == (2, 32, 12, 1.0)
    assert facts["data_digest"] == run.result.data.digest
    assert second["val_top1"] == run.result.history[1].val_top1
    speed = run.result.artifact.measurement
    assert speed is not None
    assert last == {"test_top1": run.result.evaluation.top1, "shipped_images_per_s": speed.speed}
    # what is finished goes on with its run, and is known without a tracker
    del told[:]
    _fit(tmp_path / "mine", track="mlflow", resume=True)
    assert told[0] == ("goes on", "run 0")
    assert json.loads((tmp_path / "mine" / "tracking.json").read_text()) == {"tracker": "mlflow", "id": "run 0"}
    _fit(tmp_path / "mine", resume=True)


def test_a_fit_that_breaks_off_is_said_to(
    told: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, trained: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr("convscale.pipeline.finish.Finish.ship", broken)
    with pytest.raises(UserError, match="no space left"):
        _fit(tmp_path / "mine", track="mlflow", candidates=SPECS[:1])
    assert told[-1] == ("end", False)


def test_a_tracker_that_is_not_there_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--track wandb needs wandb, which is not installed; pip install wandb"):
        _fit(tmp_path / "mine", track="wandb")
    with pytest.raises(UserError, match="tracker 'mlfow' is unknown"):
        _fit(tmp_path / "mine", track="mlfow")
    assert not (tmp_path / "mine").exists()
