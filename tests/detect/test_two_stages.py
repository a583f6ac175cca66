"""Faster R-CNN ships: its file says what torchvision's own two stages say, box by box, at any batch."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import convscale as cs
from convscale.artifact.artifact import Artifact
from convscale.artifact.boxes import suppress
from convscale.choice.detector_speed import _READING, _files, measure_detector, predict_detector
from convscale.detect.boxes import BoxSplits
from convscale.detect.ship import squares
from convscale.formats import two_stage
from convscale.images.letterbox import fill_of
from convscale.nn.detector_graph import DetectorGraph, SecondStage
from convscale.nn.detectors import Detector
from convscale.ship.box_metrics import Found, matched
from convscale.ship.detectors import BoxesWithheld
from tests.detect.sets import CLASSES, coco_set, small_detector

SIDE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> BoxSplits:
    return cs.open_boxes(coco_set(tmp_path_factory.mktemp("set") / "set", 12))


def two_stages(seed: int = 2) -> Detector:
    """Untrained, whose second stage is sure of some boxes and moves them."""
    torch.manual_seed(seed)
    detector = small_detector("faster_rcnn").eval()
    predictor = detector.roi_heads.box_predictor  # pyright: ignore
    predictor.cls_score.weight.data *= 40
    predictor.bbox_pred.weight.data *= 10
    return detector


@pytest.fixture(scope="module")
def detector() -> Detector:
    return two_stages()


@pytest.fixture(scope="module")
def artifact(detector: Detector, data: BoxSplits, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    images, truths = squares(data.train, SIDE, fill_of(detector.detector_spec.mean))
    out = tmp_path_factory.mktemp("onnx") / "art"
    return cs.export(detector, out, classes=CLASSES, verify_images=images, verify_labels=truths)


@pytest.mark.slow
def test_the_file_takes_any_batch_and_holds_both_stages(artifact: Artifact) -> None:
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact.model_path)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert isinstance(taken.shape[0], str)
    assert (taken.shape[1:], given.shape[1:]) == ([3, SIDE, SIDE], [100, 6])
    kinds = [node.op_type for node in onnx.load(artifact.model_path).graph.node]
    assert kinds.count("NonMaxSuppression") == 2
    assert kinds.count("RoiAlign") == 4
    batch = np.random.default_rng(0).normal(size=(5, 3, SIDE, SIDE)).astype(np.float32)
    whole, alone = (session.run(None, {taken.name: each})[0] for each in (batch, batch[3:4]))
    assert (whole[:, :, 4] > 0.3).sum() > 20
    assert np.allclose(whole[3], alone[0], atol=1e-3)


@pytest.mark.slow
def test_its_boxes_are_torchvisions(detector: Detector, artifact: Artifact) -> None:
    """FasterRCNN.forward itself, on pictures of noise: every box above 0.3, its score and label."""
    pixels = np.random.default_rng(1).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
    pixels[:, 10:40, 20:50] = (230, 20, 20)
    with torch.no_grad():
        own = detector(list(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255))
    sure = 0
    for mine, said in zip(own, artifact.detect(pixels), strict=True):
        known = Found(**{name: value.numpy() for name, value in mine.items()}).above(0.3)
        large = (known.boxes[:, 2:] - known.boxes[:, :2]).min(1) > 0.5
        known = Found(boxes=known.boxes[large], scores=known.scores[large], labels=known.labels[large])
        found = Found(boxes=said.boxes, scores=said.scores, labels=said.labels)
        assert matched(known, found, 0.99) == len(known.boxes)
        np.testing.assert_allclose(said.scores[:5], mine["scores"].numpy()[:5], atol=1e-3)
        sure += len(known.boxes)
    assert sure > 20


@pytest.mark.slow
def test_the_record_says_how_it_was_checked(artifact: Artifact) -> None:
    checked = artifact.verification
    assert checked is not None
    assert checked["passed"]
    assert checked["boxes"] > 20
    assert checked["found_again"] >= 0.999
    assert checked["map_before"] == pytest.approx(checked["map_after"], abs=1e-3)
    assert artifact.cut is not None
    assert (artifact.cut.nms, artifact.cut.head) == ("inside", "faster_rcnn")


def test_boxes_are_read_from_the_map_of_their_size() -> None:
    """Lin et al. 2017, equation 1: 224 px is level 4 (stride 16), half of that level 3, twice level 5; ends hold."""
    stage = SecondStage(small_detector("faster_rcnn"))
    maps = [torch.full((1, 1, 8, 8), float(stride)) for stride in stage.strides]
    assert stage.strides == [4, 8, 16, 32]
    sides = torch.tensor([0.0, 20.0, 60.0, 111.0, 112.0, 223.0, 224.0, 447.0, 448.0, 2000.0])
    boxes = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], 1)
    read = stage._pooled(torch.cat([torch.zeros(len(sides), 1), boxes], 1), maps)
    assert read.shape == (10, 1, 7, 7)
    inside = [row[0, 0, 0].item() for row in read]  # what lies outside a map is 0, the first corner is not
    assert inside == [4, 4, 4, 4, 8, 8, 16, 16, 32, 32]


@pytest.mark.slow
@pytest.mark.parametrize(("nms", "bake", "half"), [("outside", True, False), ("inside", True, True)])
def test_other_forms(detector: Detector, nms: str, bake: bool, half: bool, tmp_path: Path) -> None:
    made = cs.export(detector, tmp_path / "art", nms=nms, bake=bake, half=half)
    checked = made.verification
    assert checked is not None
    assert checked["nms"] == nms
    assert checked["found_again"] >= 0.999
    answers = made(np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8))
    assert [sorted(each) for each in answers] == [["boxes", "labels", "scores"]] * 3


@pytest.mark.slow
def test_openvino_says_the_same(artifact: Artifact, detector: Detector, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    made = cs.export(detector, tmp_path / "art", format="openvino", classes=CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
    for a, b in zip(made.detect(images), artifact.detect(images), strict=True):
        first, second = (Found(boxes=e.boxes, scores=e.scores, labels=e.labels).above(0.3) for e in (a, b))
        assert len(first.boxes) == len(second.boxes) > 3
        assert matched(first, second, 0.99) == len(first.boxes)


def test_one_that_says_something_else_is_withheld(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convscale.ship import detectors

    monkeypatch.setattr(
        detectors, "_write", lambda job, graph, folder: shutil.copy(artifact.model_path, folder / "model.onnx")
    )
    with pytest.raises(BoxesWithheld, match=r"scores differ by|boxes are found again with an IoU of 0.99"):
        cs.export(two_stages(seed=3), tmp_path / "art")
    assert not (tmp_path / "art").exists()


def test_what_it_has_no_form_for_is_told(detector: Detector, data: BoxSplits, tmp_path: Path) -> None:
    images, truths = squares(data.train, SIDE, fill_of(detector.detector_spec.mean))
    with pytest.raises(cs.UserError, match=r"ships as onnx or openvino, in float: .* got format torch"):
        cs.export(detector, tmp_path / "art", format="torch")
    with pytest.raises(cs.UserError, match=r"ships as onnx or openvino, in float: .* got int8"):
        cs.export(
            detector,
            tmp_path / "art",
            int8=True,
            calibration_images=np.repeat(images, 8, 0),
            verify_images=images,
            verify_labels=truths,
        )
    assert not (tmp_path / "art").exists()


def test_its_graph_is_torchvisions_but_for_the_suppression_between() -> None:
    """With a threshold that no IoU is above torchvision's own first stage hands its best proposals on, too."""
    detector = two_stages()
    detector.rpn.nms_thresh = 1.0  # pyright: ignore
    spec = detector.detector_spec
    images = torch.rand(3, 3, SIDE, SIDE)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (spec.mean, spec.std))
    with torch.no_grad():
        expected = detector(list(images))
        boxes, scores, labels = DetectorGraph(detector).eval()((images - mean) / std)
    assert boxes.shape == (3, 2000, 4)
    for at, each in enumerate(expected):
        sure = scores[at] > (spec.score_threshold or 0)
        some = boxes[at][sure], scores[at][sure], labels[at][sure]
        kept = suppress(*(part.numpy() for part in some), spec.nms_threshold or 0, spec.max_detections or 0)
        assert len(each["boxes"]) > 10
        torch.testing.assert_close(some[0][kept], each["boxes"], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(some[1][kept], each["scores"], atol=1e-4, rtol=1e-4)
        assert torch.equal(some[2][kept], each["labels"])


def test_its_second_stage_is_counted_for_all_proposals() -> None:
    """By hand: at 64 px 341 places under the first head's three convolutions, 1,000 boxes of 7 x 7 x 64 through two
    layers of 1,024 and the outputs of three classes with the background.
    """
    detector = small_detector("faster_rcnn").eval()
    places = 16**2 + 8**2 + 4**2 + 2**2 + 1
    first = places * (9 * 64 * 64 + 64 * 3 + 64 * 12)
    second = 1000 * (7 * 7 * 64 * 1024 + 1024 * 1024 + 1024 * (3 + 12))
    neck = cs.count(DetectorGraph(detector).stages()["neck"], image_size=SIDE).macs
    found = cs.count(detector)
    assert found.macs == neck + first + second
    assert dict(found.unsupported) == {"torchvision.roi_align.default": 4}
    assert found.params == sum(each.numel() for each in detector.parameters())


@pytest.mark.parametrize("precision", ["amp", "fp32"])
def test_its_speed_is_predicted_with_a_doubt(precision: str) -> None:
    cond = cs.Conditions(device="rtx-4090", precision=precision, batch_size=8)
    detector = small_detector("faster_rcnn")
    found = predict_detector(detector, cond)
    plain = cs.predict(DetectorGraph(detector), "rtx-4090", precision=precision, batch_size=8, runtime="eager")
    assert found.whole.doubts == (*plain.doubts, _READING)
    assert "unknown operators: torchvision.roi_align.default" in plain.doubts
    # 1,000 boxes of 7 x 7 x 64 numbers from each of four maps, 4 bytes a pixel, at 1,008 GB/s
    one_s = 8 * 1000 * 4 * 7 * 7 * 64 * 4 / 1008e9
    assert found.whole.latency_s == pytest.approx(plain.latency_s + 4 * one_s)
    assert found.whole.images_per_s == pytest.approx(8 / found.whole.latency_s)
    assert 8 / found.whole.low == pytest.approx(8 / plain.low + 16 * one_s)
    assert found.whole.high == plain.high
    assert sum(found.whole.shares.values()) == pytest.approx(1)
    assert list(found.parts_s) == ["backbone", "neck", "heads"]
    assert sum(found.parts_s.values()) == pytest.approx(found.whole.latency_s)


@pytest.mark.slow
def test_its_speed_is_measured_part_by_part(detector: Detector, tmp_path: Path) -> None:
    """The whole that is timed gives torchvision's own boxes."""
    import onnxruntime

    path = _files(DetectorGraph(detector).eval(), detector, tmp_path)["nms"]
    session = onnxruntime.InferenceSession(path)
    spec, images = detector.detector_spec, torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (spec.mean, spec.std))
    (rows,) = session.run(None, {session.get_inputs()[0].name: ((images - mean) / std).numpy()})
    with torch.no_grad():
        own = detector(list(images))
    for mine, row in zip(own, rows, strict=True):
        np.testing.assert_allclose(row[:5, 4], mine["scores"].numpy()[:5], atol=1e-3)
    cond = cs.Conditions(device="cpu", runtime="onnxruntime", batch_size=2)
    speed = measure_detector(detector, cond, min_seconds=0.01, max_seconds=0.02)
    assert list(speed.parts_s) == ["backbone", "neck", "heads", "nms"]
    assert speed.parts_s["heads"] > speed.parts_s["neck"]  # 137 million multiply-accumulates a picture against 5
    assert sum(speed.parts_s.values()) == pytest.approx(speed.whole.latency_s, rel=0.5)


def test_files_are_joined_by_name() -> None:
    """Names of the first that the second has too are told apart; what is shared keeps its name."""
    from onnx import TensorProto, helper

    def model(node: str, taken: str, given: str) -> object:
        info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in (taken, given)]
        nodes = [helper.make_node("Neg", [taken], ["x"]), helper.make_node(node, ["x"], [given])]
        return helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:]))

    joined = two_stage._joined(model("Exp", "images", "detections"), model("Sqrt", "proposals", "boxes"), ())
    told = [(node.op_type, list(node.input), list(node.output)) for node in joined.graph.node]
    assert told == [
        ("Neg", ["images"], ["first_x"]),
        ("Exp", ["first_x"], ["proposals"]),
        ("Neg", ["proposals"], ["x"]),
        ("Sqrt", ["x"], ["boxes"]),
    ]
    assert [each.name for each in joined.graph.output] == ["boxes"]
