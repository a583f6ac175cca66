"""Which backbone: by how likely a prediction keeps the speed, and why where none does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import convscale as cs
from convscale.arch.spec import NetSpec, save_spec
from convscale.choice import detectors as choosing
from convscale.choice.basis import Asked
from convscale.choice.detector_speed import DetectorPrediction
from convscale.choice.detectors import basis_as_shipped, choose_backbone
from convscale.cli.app import app
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.predictor.predict import Prediction
from tests.detect.sets import small_spec

GPU = Conditions(device="rtx-4090", precision="amp", batch_size=8)
MINE = small_spec().name
SPEEDS = {"resnet50": 1000.0, "resnet18": 2000.0, MINE: 3000.0}
"""The middle of the prediction of each; the ends of its interval are a factor of 1.2 away."""


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectors are names, and predictions are ``SPEEDS``."""

    def create(backbone: NetSpec | str, *_: object, image_size: int | None, **__: object) -> object:
        name = backbone if isinstance(backbone, str) else backbone.name
        if name not in SPEEDS:
            raise UserError(f"unknown model {name!r}")
        return SimpleNamespace(eval=lambda: (name, image_size))

    def predicted(made: tuple[str, int | None], cond: Conditions, **_: object) -> DetectorPrediction:
        name, side = made
        middle, cond = SPEEDS[name], replace(cond, image_size=side or 512)
        whole = Prediction(
            images_per_s=middle,
            low=middle / 1.2,
            high=middle * 1.2,
            latency_s=cond.batch_size / middle,
            bound_by="memory",
            shares={},
            doubts=(),
            conditions=cond,
            peak_bytes=1,
        )
        return DetectorPrediction(whole=whole, parts_s={})

    monkeypatch.setattr(choosing, "create_detector", create)
    monkeypatch.setattr(choosing, "predict_detector", predicted)


def test_a_predicted_speed_keeps_by_its_chance(made_up: None) -> None:
    """The middle of a prediction is as often too high as too low."""
    ask: dict[str, Any] = {"predicted": True, "backbones": ["resnet18", "resnet50"]}
    # ln(1000 / 950) over ln(1.2) / 1.2816 is 0.36 deviations: 64 %
    assert choose_backbone(950, GPU, **ask, confidence=0.6).best.backbone == "resnet50"
    found = choose_backbone(950, GPU, **ask)
    assert found.best.backbone == "resnet18"
    assert found.options[0].backbone == "resnet50"
    assert found.options[0].reason == "1,000.0 images/s, 950 are wanted with 80 % (it is 64 % likely)"
    assert choose_backbone(840, GPU, **ask, confidence=0.8).best.backbone == "resnet50"  # 0.96 deviations: 83 %
    with pytest.raises(UserError, match=r"no backbone keeps 2000 .* the fastest, resnet18, reaches 2,000\.0 images/s"):
        choose_backbone(2000, GPU, **ask)
    with pytest.raises(UserError, match=r"confidence is 0\.2; it must be a probability from 0\.5 to 0\.99"):
        choose_backbone(950, GPU, **ask, confidence=0.2)


def test_where_no_detector_can_be_timed_the_first_says_why(made_up: None) -> None:
    with pytest.raises(UserError, match="no detector could be timed; the first, resnet34: unknown model 'resnet34'"):
        choose_backbone(1, GPU, predicted=True, backbones=["resnet34", "resnet101"])
    found = choose_backbone(1, GPU, predicted=True, backbones=["resnet34", "resnet18"])
    assert (found.best.backbone, found.options[0].reason) == ("resnet18", "unknown model 'resnet34'")
    with pytest.raises(UserError, match="is chosen in mode infer, got train"):
        choose_backbone(1, replace(GPU, mode="train"), predicted=True)


def test_it_chooses_at_the_size_that_is_trained_and_says_under_what(made_up: None) -> None:
    """It chose at 256 px where train, measure and predict take 512, and named neither size nor conditions."""
    found = choose_backbone(840, GPU, predicted=True, backbones=["resnet18", "resnet50"], head="retinanet")
    told = found.to_dict()
    assert told["conditions"] == {**GPU.to_dict(), "image_size": 512}
    assert told["head"] == "retinanet"
    with pytest.raises(UserError, match="with head fcos at 512 px; the fastest"):
        choose_backbone(2000, GPU, predicted=True, backbones=["resnet18"])
    base = ("choose", "--task", "detection", "--device", "rtx-4090", "--min-throughput", "9", "--model", "resnet18")
    for size, side in (((), 512), (("--img-size", "128"), 128)):
        said = (
            CliRunner().invoke(app, [*base, *size], catch_exceptions=False, env={"COLUMNS": "200"}).stdout.splitlines()
        )
        assert said[0] == (
            f"resnet18: 2,000.0 images/s with head fcos at {side} px (predicted, without non-maximum suppression)"
        )
        assert said[1] == "  on NVIDIA GeForce RTX 4090: inference, eager, amp (fp16), nchw, batch 256"


def test_the_command_line_hands_it_on(made_up: None, tmp_path: Path) -> None:
    def run(*options: str) -> dict[str, Any]:
        base = ("choose", "--task", "detection", "--device", "rtx-4090", "--json")
        result = CliRunner().invoke(app, [*base, *options], catch_exceptions=False)
        return json.loads(result.stdout)

    two = ("--model", "resnet18", "--model", "resnet50", "--min-throughput", "950")
    assert run(*two)["best"]["backbone"] == "resnet18"
    assert run(*two, "--confidence", "0.6")["best"]["backbone"] == "resnet50"
    save_spec(small_spec(), tmp_path / "net.yaml")
    chosen = run("--model", str(tmp_path / "net.yaml"), "--min-throughput", "10")["best"]
    assert (chosen["backbone"], chosen["top1"]) == (MINE, None)
    for options, said in (
        (("--model", "resnet*"), r"'resnet\*' is a pattern; task detection takes names"),
        (("--mode", "train"), "is chosen in mode infer, got train"),
        (("--licence", "apache-2.0"), "--licence is for classifiers"),
        (("--commercial",), "--commercial is for classifiers"),
        (("--zoo", "own"), "--zoo is for classifiers"),
        (("--no-extra-data",), "--no-extra-data is for classifiers"),
        (("--attention",), "--attention is for classifiers"),
    ):
        with pytest.raises(UserError, match=said):
            run(*options, "--min-throughput", "10")


def test_python_chooses_as_the_command_line_does(made_up: None) -> None:
    """It could not be asked for: the public name knew classifiers alone."""
    ask: dict[str, Any] = {"task": "detection", "device": "rtx-4090", "candidates": ["resnet18", "resnet50"]}
    found = cs.choose(**ask, head="fcos", min_throughput=950)
    assert (found.best.name, found.head, found.num_classes, found.predicted) == ("resnet18", "fcos", 20, True)
    assert [each.name for each in found.rejected] == ["resnet50"]
    assert found.conditions.batch_size == 256
    assert cs.choose(**ask, min_throughput=950, confidence=0.6, num_classes=5).to_dict()["num_classes"] == 5
    small = cs.choose(**{**ask, "candidates": small_spec()}, min_throughput=9, image_sizes=[128], batch_size=4)
    assert (small.best.name, small.conditions.image_size, small.conditions.batch_size) == (MINE, 128, 4)
    for wrong, said in (
        ({"zoo": "own"}, "zoo does not go with task='detection': it is for classification; leave it out"),
        ({"max_latency_ms": 5}, "max_latency_ms does not go with task='detection'"),
        (
            {"task": "classification", "head": "fcos"},
            "head does not go with task='classification': it is for detection",
        ),
        ({"task": "boxes"}, "task 'boxes' is unknown"),
        ({"image_sizes": [128, 256]}, r"image_sizes are \[128, 256\]; task detection chooses at one size"),
        ({"candidates": ["resnet*"]}, r"'resnet\*' is a pattern; task detection takes names"),
        ({"candidates": [3]}, "candidates hold a int; of detectors they must be names or specs"),
        ({"detector": {"head": "ssdlite"}}, "^detector holds 'head', which is an argument of its own"),
        ({"head": "fcoz"}, r"^head 'fcoz' is unknown \(nearest: fcos\)"),
        ({"min_throughput": None}, "min_throughput is missing; a detector's backbone is chosen by"),
    ):
        with pytest.raises(UserError, match=said):
            cs.choose(**{**ask, "min_throughput": 9, **wrong})


def test_here_detectors_are_compared_as_they_ship() -> None:
    """Classifiers are tuned where nothing is named; a detector has one form that is measured."""
    found = basis_as_shipped(Asked()).conditions
    assert (found.runtime, found.precision) == ("onnxruntime", "fp32")
    assert basis_as_shipped(Asked(runtime="openvino")).conditions.runtime == "openvino"
    assert basis_as_shipped(Asked(device="rtx-4090")).conditions.precision == "amp"
