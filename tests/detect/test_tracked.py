"""A detector's training tells a tracker what a classifier's does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from typer.testing import CliRunner

import convscale as cs
from convscale.cli.app import app
from convscale.detect import train as detect_train
from convscale.errors import UserError
from convscale.learn import trackers
from convscale.learn.recipes import get_recipe
from convscale.learn.train import TrainRun
from tests.detect.sets import coco_set, small_spec
from tests.learn.test_trackers import Recorded


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(trackers, "_KINDS", {**trackers._KINDS, "mlflow": Recorded})
    monkeypatch.setattr(Recorded, "told", [])
    return Recorded.told


def trained(place: Path, output: Path | None, **options: Any) -> TrainRun:
    recipe = get_recipe("detect-small").override({"batch_size": 6, "epochs": 1})
    given: dict[str, Any] = {
        "head": "retinanet",
        "image_size": 64,
        "detector": {"neck_width": 16, "head_depth": 1},
        "workers": 0,
    }
    return cs.train_detector(
        small_spec(), coco_set(place / "set", 8), recipe=recipe, output=output, track="mlflow", **given, **options
    )


def test_a_tracker_is_told_of_a_detectors_training(told: list[Any], tmp_path: Path) -> None:
    run = trained(tmp_path, tmp_path / "run")
    facts, (epoch, values), finished = told
    assert (facts["model"], facts["head"], facts["image_size"]) == (small_spec().name, "retinanet", 64)
    assert (facts["batch_size"], facts["seed"]) == (6, 0)
    assert len(facts["data_digest"]) > 8
    assert (epoch, values["val_map"], finished) == (1, run.history[0]["val_map"], True)


def test_a_training_that_fails_is_told_as_not_finished(
    told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(detect_train, "_run", fails)
    with pytest.raises(UserError, match="the disk is full"):
        trained(tmp_path, tmp_path / "run")
    assert told[1:] == [False]


def test_a_tracker_needs_a_folder(told: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="track 'mlflow' needs an output folder"):
        trained(tmp_path, None)
    assert told == []


def test_the_command_line_hands_the_tracker_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    run = SimpleNamespace(describe=lambda: "done", finished=True)
    monkeypatch.setattr(detect_train, "train_detector", lambda *_, **options: given.update(options) or run)
    words = ["train", "--task", "detection", "--model", "resnet18", "--data-dir", str(coco_set(tmp_path / "set", 8))]
    found = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "run"), "--track", "wandb"])
    assert found.exit_code == 0, found.output
    assert (given["track"], cast(Path, given["output"]).name) == ("wandb", "run")
