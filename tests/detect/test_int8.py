"""A detector in 8 bits, quantised for real by each library: what is shipped is what was judged, by mAP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convscale as cs
from convscale.artifact.artifact import Artifact
from convscale.detect.ship import squares
from convscale.images.letterbox import fill_of
from convscale.learn.recipes import get_recipe
from convscale.nn.detectors import Detector
from convscale.ship import detectors
from convscale.ship.box_metrics import Found, Truth, coco_metrics, matched
from tests.detect.sets import CLASSES, coco_set, small_detector

SIDE = 64
Pictures = tuple[np.ndarray, list[Truth]]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Detector, Pictures, Pictures]:
    """A detector that has learnt a little, pictures that calibrate it, and others that judge it."""
    folder = tmp_path_factory.mktemp("set")
    data = cs.open_boxes(coco_set(folder / "train", 100))
    detector = small_detector("fcos")
    recipe = get_recipe("detect-small").override({"batch_size": 8, "epochs": 25, "augment": "none", "ema_decay": 0.0})
    cs.train_detector(detector, data, recipe=recipe, workers=0)
    fill = fill_of(detector.detector_spec.mean)
    others = cs.open_boxes(coco_set(folder / "others", 60, seed=1)).train
    return detector.eval(), squares(data.train, SIDE, fill, most=48), squares(others, SIDE, fill)


def said_by(artifact: Artifact, images: np.ndarray) -> list[Found]:
    return [Found(boxes=each.boxes, scores=each.scores, labels=each.labels) for each in artifact.detect(images)]


def mean_precision(truths: Sequence[Truth], found: Sequence[Found]) -> float:
    return coco_metrics(truths, found, len(CLASSES)).map


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "route", "kept"), [("onnx", "nncf", 0), ("onnx", "onnxruntime", 1), ("openvino", "nncf", 1)]
)
def test_eight_bits_ship_as_they_were_judged(
    form: str,
    route: str,
    kept: int,
    known: tuple[Detector, Pictures, Pictures],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the stopwatch is left out, and where a layer is to stay in float the first try is said to lose too much."""
    pytest.importorskip(route)
    detector, (calibration, _), (images, truths) = known
    real = detectors.search_float_layers

    def search(ranked: Any, total: int, attempt: Callable[[Sequence[Any]], float], most: float) -> Any:
        def tried(layers: Sequence[Any]) -> float:
            lost = attempt(layers)
            return 99.0 if len(layers) < kept else lost

        return real(ranked, total, tried, most)

    monkeypatch.setattr(detectors, "routes_of", lambda _: [route])
    monkeypatch.setattr(detectors, "check_pays", lambda *_: None)
    plain = cs.export(detector, tmp_path / "float", format=form, classes=CLASSES)
    with monkeypatch.context() as patch:
        patch.setattr(detectors, "search_float_layers", search)
        made = cs.export(
            detector,
            tmp_path / "int8",
            format=form,
            classes=CLASSES,
            int8=True,
            max_drop=5.0,
            calibration_images=calibration,
            verify_images=images,
            verify_labels=truths,
        )
    record = made.manifest.get("int8")
    assert isinstance(record, dict)
    assert (made.precision, record["route"], record["calibration_images"]) == ("int8", route, len(calibration))
    assert made.cut is not None
    assert made.cut.nms == "inside"

    # what was judged is what is there
    checked = made.verification
    assert checked is not None
    before, after = said_by(plain, images), said_by(made, images)
    assert mean_precision(truths, before) > 0.3
    assert checked["map_before"] == pytest.approx(mean_precision(truths, before), abs=2e-3)
    assert checked["map_after"] == pytest.approx(mean_precision(truths, after), abs=2e-3)
    assert checked["map_after"] > checked["map_before"] - 0.05
    assert record["steps"][-1]["drop_points"] == pytest.approx(
        100 * (checked["map_before"] - checked["map_after"]), abs=0.2
    )

    # its boxes are the float network's, rounded: nearly all there, none to the bit
    sure = sum(len(each.above(0.3).boxes) for each in before)
    again = sum(matched(a.above(0.3), b.above(0.25), 0.5) for a, b in zip(before, after, strict=True))
    assert sure > 20
    assert again > 0.9 * sure
    assert checked["found_again"] == pytest.approx(again / sure, abs=0.05)
    assert 0 < checked["max_score"] < 0.3

    # and its layers compute in 8 bits, but for those that were left in float
    assert [len(step["float_layers"]) for step in record["steps"]] == [*range(kept), kept]
    if form == "onnx":
        assert record["layers"] - kept - 1 <= quantised(made) <= record["layers"] - kept  # NNCF leaves one alone
    else:
        assert (made.folder / "model.xml").read_text().count('type="FakeQuantize"') > record["layers"] / 2


def quantised(artifact: Artifact) -> int:
    """Convolutions whose weights and inputs come from 8 bits."""
    import onnx

    graph = onnx.load(artifact.model_path).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    return sum(all(makers.get(name) == "DequantizeLinear" for name in node.input[:2]) for node in convolutions)
