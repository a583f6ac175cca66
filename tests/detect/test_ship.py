"""A detector's artefact says what the detector says, in every form, and in rows, results and drawings."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convscale as cs
from convscale.artifact.artifact import Artifact
from convscale.artifact.promise import Promise
from convscale.detect.boxes import BoxSplits
from convscale.detect.evaluate import evaluate_detector
from convscale.detect.ship import squares
from convscale.errors import MissingExtra
from convscale.images.letterbox import fill_of, letterbox, out_of_square
from convscale.machine import code_commit
from convscale.maps.files import Explainer
from convscale.nn.detectors import Detector
from convscale.ship import detectors
from convscale.ship.box_metrics import Found, matched
from convscale.ship.detectors import BoxesWithheld
from convscale.ship.pays import Slower
from convscale.ship.request import ExportRequest
from convscale.ship.stream import classify_stream
from convscale.ship.tune import Settings, Trial
from tests.detect.sets import CLASSES, coco_set, cut_off, small_detector


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> BoxSplits:
    return cs.open_boxes(coco_set(tmp_path_factory.mktemp("set") / "set", 12))


def sure_detector(head: str, seed: int = 2) -> Detector:
    """Untrained, with scores high enough to give boxes."""
    torch.manual_seed(seed)
    detector = small_detector(head).eval()
    for name, parameter in detector.head.named_parameters():  # pyright: ignore
        if "cls_logits" in name:
            parameter.data = torch.zeros_like(parameter) if parameter.ndim == 1 else parameter.data * 4
    return detector


@pytest.fixture(scope="module")
def detector() -> Detector:
    return sure_detector("fcos")


@pytest.fixture(scope="module")
def artifact(detector: Detector, data: BoxSplits, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    images, truths = squares(data.train, 64, fill_of(detector.detector_spec.mean))
    out = tmp_path_factory.mktemp("onnx") / "art"
    return cs.export(detector, out, classes=CLASSES, verify_images=images, verify_labels=truths)


def own_boxes(detector: Detector, pixels: np.ndarray) -> Found:
    square = letterbox(pixels, 64, fill_of(detector.detector_spec.mean))
    with torch.no_grad():
        said = detector([torch.from_numpy(square).permute(2, 0, 1).float() / 255])[0]
    return Found(**{name: value.numpy() for name, value in said.items()})


def assert_own(detector: Detector, path: str, names: Any, scores: Any, boxes: Any) -> None:
    """That what was said of a file has the detector's own boxes of it, which PyTorch computes of this picture alone."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    own = own_boxes(detector, pixels)
    there = out_of_square(own.boxes, pixels.shape[0], pixels.shape[1], 64)
    large = (there[:, 2:] - there[:, :2]).min(1) > 0.5
    known = Found(boxes=there[large], scores=own.scores[large], labels=own.labels[large]).above(0.3)
    labels = np.array([CLASSES.index(name) + 1 for name in names])
    said = Found(boxes=np.array(boxes), scores=np.array(scores), labels=labels)
    assert len(known.boxes) > 3
    assert matched(known, said, 0.99) == len(known.boxes)


def test_the_file_takes_any_batch_and_has_suppression_inside(artifact: Artifact, detector: Detector) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact.model_path)
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert isinstance(taken.shape[0], str)
    assert taken.shape[1:] == [3, 64, 64]
    assert given.shape[1:] == [100, 6]
    batch = np.random.default_rng(0).normal(size=(5, 3, 64, 64)).astype(np.float32)
    whole = session.run(None, {taken.name: batch})[0]
    alone = session.run(None, {taken.name: batch[3:4]})[0]
    assert (whole[:, :, 4] > 0.3).sum() > 20
    assert np.allclose(whole[3], alone[0], atol=1e-3)


def test_boxes_are_the_detectors_in_the_pictures_own_pixels(
    artifact: Artifact, detector: Detector, data: BoxSplits
) -> None:
    for path, answer in zip(data.test.paths, artifact.classify(list(data.test.paths)), strict=True):
        assert_own(detector, path, answer.labels, answer.probabilities, answer.boxes)


def test_the_record_says_how_it_was_checked(artifact: Artifact) -> None:
    checked = artifact.verification
    assert checked is not None
    assert checked["passed"]
    assert checked["boxes"] > 20
    assert checked["found_again"] >= 0.999
    assert checked["map_before"] == pytest.approx(checked["map_after"], abs=1e-3)
    assert artifact.manifest["schema"] == 2
    assert artifact.manifest["commit"] == code_commit()
    assert artifact.is_detector
    assert artifact.cut is not None
    assert artifact.cut.nms == "inside"
    card = (artifact.folder / "README.md").read_text()
    assert "A detector of 2 classes (fcos over" in card
    assert "Non-maximum suppression is inside" in card


@pytest.mark.slow
@pytest.mark.parametrize("head", ["retinanet", "ssdlite"])
def test_other_heads_ship_with_suppression_outside(head: str, tmp_path: Path) -> None:
    made = cs.export(sure_detector(head), tmp_path / "art", nms="outside", bake=True)
    checked = made.verification
    assert checked is not None
    assert checked["nms"] == "outside"
    assert checked["found_again"] >= 0.999
    answers = made(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    assert [sorted(each) for each in answers] == [["boxes", "labels", "scores"]] * 3


def test_openvino_says_the_same(artifact: Artifact, detector: Detector, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    made = cs.export(detector, tmp_path / "art", format="openvino", classes=CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    for a, b in zip(made.detect(images), artifact.detect(images), strict=True):
        first, second = (Found(boxes=e.boxes, scores=e.scores, labels=e.labels).above(0.3) for e in (a, b))
        assert len(first.boxes) == len(second.boxes) > 3
        assert matched(first, second, 0.99) == len(first.boxes)


def test_an_artefact_that_says_something_else_is_withheld(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of another detector in the place of its own."""
    monkeypatch.setattr(
        detectors, "_write", lambda job, graph, folder: shutil.copy(artifact.model_path, folder / "model.onnx")
    )
    other = sure_detector("fcos", seed=3)
    with pytest.raises(BoxesWithheld, match=r"scores differ by|boxes are found again with an IoU of 0.99"):
        cs.export(other, tmp_path / "art")
    assert not (tmp_path / "art").exists()


def test_rows_results_and_drawings(artifact: Artifact, data: BoxSplits, tmp_path: Path) -> None:
    from convscale.ship.box_outputs import draw_results, write_coco_results

    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    paths, out = [*data.train.paths[:3], str(bad)], tmp_path / "boxes.jsonl"
    done = cs.classify(paths, artifact, out)
    assert (done.images, done.errors) == (4, 1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    first = artifact.classify(paths[0])[0]
    assert [each["class"] for each in rows[0]["boxes"]] == list(first.labels)
    assert np.allclose([each["box"] for each in rows[0]["boxes"]], first.boxes, atol=0.01)
    assert "error" in rows[3]
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) // 2])  # a run that was stopped in the middle of a row
    again = cs.classify(paths, artifact, out, resume=True)
    assert again.resumed > 0
    assert out.read_bytes() == whole
    count = write_coco_results(out, tmp_path / "results.json", artifact.classes)
    results = json.loads((tmp_path / "results.json").read_text())
    assert count == len(results) == sum(len(row.get("boxes", ())) for row in rows)
    said = [each["class"] for row in rows for each in row.get("boxes", ())]
    assert set(said) == set(artifact.classes)
    for ids in ((), (1, 7), (40, 4)):  # those of the data, where it has some
        write_coco_results(out, tmp_path / "numbered.json", artifact.classes, ids)
        numbered = json.loads((tmp_path / "numbered.json").read_text())
        assert [each["category_id"] for each in numbered] == [
            dict(zip(artifact.classes, ids or (1, 2), strict=True))[name] for name in said
        ]
    x1, y1, x2, y2 = rows[0]["boxes"][0]["box"]
    assert results[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.011)
    assert results[0]["image_id"] == 1  # one name is no number, so they are counted
    assert draw_results(out, tmp_path / "drawn", artifact.classes) == 3
    assert draw_results(out, tmp_path / "drawn", artifact.classes) == 0
    drawn = np.asarray(Image.open(tmp_path / "drawn" / f"{Path(paths[0]).stem}.png"))
    assert drawn.shape == np.asarray(Image.open(paths[0])).shape
    with pytest.raises(cs.UserError, match="boxes have no form in csv"):
        cs.classify(paths, artifact, tmp_path / "boxes.csv")


def test_a_call_has_as_many_pictures_as_are_asked_for(artifact: Artifact, detector: Detector, data: BoxSplits) -> None:
    made, paths, batches = cs.load_artifact(artifact.folder), list(data.train.paths), list[int]()
    made.batch_size, runner = 4, made.runner

    def counted(batch: np.ndarray) -> tuple[np.ndarray, ...]:
        batches.append(len(batch))
        return runner(batch)

    made._runner = counted  # pyright: ignore
    few, many = (list(classify_stream(paths, made, batch_size=size, workers=1)) for size in (None, 8))
    assert (len(paths), batches) == (10, [4, 4, 2, 8, 2])
    for path, *rows in zip(paths, few, many, strict=True):
        for row in rows:
            assert row.path == path
            assert_own(detector, path, row.classes, row.probabilities, row.boxes)
        assert np.allclose(rows[0].probabilities, rows[1].probabilities, atol=1e-3)
    batches.clear()
    maps = [cs.evaluate_detector(made, data, split="train", batch_size=size).map for size in (None, 8)]
    assert batches == [4, 4, 2, 8, 2]
    assert maps[0] == pytest.approx(maps[1])


def test_an_artefact_is_not_judged_by_pictures_that_can_not_be_read(artifact: Artifact, tmp_path: Path) -> None:
    data = cs.open_boxes(coco_set(tmp_path / "set", 12), max_bad_rate=0.5)
    cut_off(data.train.paths[0])
    ev = cs.evaluate_detector(artifact, data, split="train")
    left = data.train.box_count - len(data.train.boxes[0])
    assert (ev.n, ev.boxes, len(ev.bad), np.isnan(ev.quality[0])) == (9, left, 1, True)


def test_drawings_are_of_the_rows_beside_them(artifact: Artifact, data: BoxSplits, tmp_path: Path) -> None:
    """--overwrite left the drawings of the run before."""
    from typer.testing import CliRunner

    from convscale.cli.app import app

    paths, out, drawn = data.train.paths[:3], tmp_path / "boxes.jsonl", tmp_path / "drawn"
    copies = [drawn / f"{Path(path).stem}.png" for path in paths]

    def run(*more: str, draw: Path = drawn) -> None:
        words = ("classify", *paths, "--model", artifact.folder, "--output", out, "--draw", draw, *more)
        CliRunner().invoke(app, [str(each) for each in words], catch_exceptions=False)

    def spoil() -> None:
        for copy in copies:
            copy.write_bytes(b"of the run before")

    run()
    right, rows = [copy.read_bytes() for copy in copies], out.read_bytes()
    spoil()
    run("--overwrite")
    assert [copy.read_bytes() for copy in copies] == right
    copies[0].write_bytes(b"drawn since")
    copies[1].unlink()  # a run that was stopped there
    run("--resume")
    assert [copy.read_bytes() for copy in copies] == [b"drawn since", *right[1:]]
    spoil()
    time.sleep(0.02)  # longer than the clock of files takes
    out.write_bytes(rows[: len(rows) // 2])  # --overwrite, stopped before anything was drawn
    run("--resume")
    assert ([copy.read_bytes() for copy in copies], out.read_bytes()) == (right, rows)
    out.unlink()
    with pytest.raises(cs.UserError, match=r"drawn exists and is not empty; use --resume, --overwrite or another name"):
        run()
    before = Path(paths[0]).read_bytes()
    assert Path(paths[0]).suffix == ".png"
    with pytest.raises(cs.UserError, match="is one of the pictures; draw into another folder than theirs"):
        run("--overwrite", draw=Path(paths[0]).parent)
    assert Path(paths[0]).read_bytes() == before
    with pytest.raises(cs.UserError, match="--coco and --draw go with --engine local"):
        run("--engine", "ray")


def test_a_detector_that_finds_nothing_says_so(
    detector: Detector, artifact: Artifact, data: BoxSplits, tmp_path: Path
) -> None:
    silent = cs.create_detector(dataclasses.replace(detector.detector_spec, score_threshold=0.999)).eval()
    shutil.copytree(artifact.folder, tmp_path / "art")
    record = json.loads((tmp_path / "art" / "artifact.json").read_text())
    record["detection"]["score_threshold"] = 0.999
    (tmp_path / "art" / "artifact.json").write_text(json.dumps(record))
    made = cs.load_artifact(tmp_path / "art")
    images = np.zeros((2, 64, 64, 3), np.uint8)
    checked = detectors.verify_boxes(silent, made, images)
    assert checked.passed
    assert "no box above 0.3 to compare" in checked.reason
    answer = made.classify(data.test.paths[0])[0]
    assert (answer.labels, answer.boxes, answer.error) == ((), (), "")
    assert cs.evaluate_detector(made, data, split="train").map == 0


def test_what_judges_boxes_is_missed_before_any_are_looked_for(
    detector: Detector, artifact: Artifact, data: BoxSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found out behind the whole test set."""
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(Detector, "forward", lambda *_: pytest.fail("boxes were looked for"))
    monkeypatch.setattr(Artifact, "classify", lambda *_, **__: pytest.fail("boxes were looked for"))
    missed = r"^mean average precision of boxes needs faster_coco_eval, .*; pip install \"convscale\[detect\]\"$"
    for net in (detector, artifact):
        with pytest.raises(MissingExtra, match=missed):
            evaluate_detector(net, data)
    pixels, truths = squares(data.test, 64, fill_of(detector.detector_spec.mean))
    with pytest.raises(MissingExtra, match=missed):
        cs.export(detector, tmp_path / "a", classes=CLASSES, verify_images=pixels, verify_labels=truths)
    assert not (tmp_path / "a").exists()


def test_what_can_not_be_shipped_is_told(detector: Detector, artifact: Artifact, tmp_path: Path) -> None:
    for form in ("onnx", "torch"):
        with pytest.raises(cs.UserError, match="nms 'both' is unknown"):
            cs.export(detector, tmp_path / "art", nms="both", format=form)
    with pytest.raises(cs.UserError, match="image_size is 96; a detector's is its own, 64"):
        cs.export(detector, tmp_path / "art", image_size=96)
    with pytest.raises(cs.UserError, match="names 3 classes, the detector has 2"):
        cs.export(detector, tmp_path / "art", classes=["a", "b", "c"])
    promise = Promise(
        device="cpu", runtime="onnxruntime", precision="fp32", batch_size=1, image_size=64, images_per_s=9.0, low=8.0,
        high=10.0,
    )  # fmt: skip
    for name, value in {
        "thresholds": [0.5, 0.5],
        "temperatures": [1.0, 1.0],
        "strided_stem": True,
        "with_features": True,
        "preprocessing": artifact.preprocessing,
        "promise": promise,
    }.items():
        with pytest.raises(cs.UserError, match=f"^{name} is for classifiers; a detector has none, leave it out$"):
            cs.export(detector, tmp_path / "art", **{name: value})  # pyright: ignore[reportArgumentType]
    for request in (ExportRequest(bf16=True, format="openvino"), ExportRequest(int8=True, qat=True)):
        with pytest.raises(cs.UserError, match=r"^(bf16|int8='qat') is for classifiers; a detector has none"):
            detectors.export_detector(detector, tmp_path / "art", request, None)
    assert not (tmp_path / "art").exists()
    with pytest.raises(cs.UserError, match="it gives boxes, not logits"):
        artifact.logits(np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(cs.UserError, match="is a detector's, which gives boxes alone; explain its checkpoint"):
        Explainer.open(artifact.folder)
    with pytest.raises(cs.UserError, match=r"images must be a uint8 array \(N, 64, 64, 3\)"):
        artifact(np.zeros((1, 32, 64, 3), np.uint8))


@pytest.mark.parametrize("passes", [True, False])
def test_int8_boxes_are_checked_in_each_runtime_too(
    passes: bool, detector: Detector, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing and quantising take long, and are left out: what counts is which runtimes are asked."""
    said = {"calibration_images": 32, "steps": [{"float_layers": [], "drop_points": 0.0}]}
    real, asked = detectors._verify, []

    def verify(job: object, made: Artifact) -> object:
        asked.append(made.runtime)
        found = real(job, made)  # pyright: ignore[reportArgumentType]
        return dataclasses.replace(found, passed=passes or made.runtime == "onnxruntime")

    monkeypatch.setattr(
        detectors, "_write", lambda job, graph, folder: shutil.copy(artifact.model_path, folder / "model.onnx")
    )
    monkeypatch.setattr(detectors, "_float_form", lambda *_: artifact)
    monkeypatch.setattr(detectors, "check_pays", lambda *_: None)
    monkeypatch.setattr(detectors, "_quantise", lambda *_: said)
    monkeypatch.setattr(detectors, "_verify", verify)
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    made = cs.export(detector, tmp_path / "art", int8=True, calibration_images=noise)
    assert asked == ["onnxruntime", "openvino"]
    assert made.checked_in == (("onnxruntime", "openvino") if passes else ("onnxruntime",))


@pytest.mark.parametrize("nms", ["inside", pytest.param("outside", marks=pytest.mark.slow)])
def test_int8_that_is_slower_than_float_is_not_written(
    nms: str, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantising is left out: the float file stands for the 8-bit one."""
    rivals: list[tuple[str, str, str]] = []
    some = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)

    def quantise(job: object, folded: object, folder: Path, *_: object) -> dict[str, object]:
        (folder / "float.onnx").rename(folder / "model.onnx")
        return {}

    def in_turns(pairs: list[tuple[Artifact, Settings]]) -> list[Trial]:
        (_, how), (rival, same) = pairs
        assert how == same
        said = detectors.verify_boxes(detector, rival, some, batch_sizes=(1,))
        rivals.append((said.reason.partition(",")[0], rival.precision, how.runtime))
        return [Trial(settings=how, times_s=(seconds,)) for seconds in (2.0, 1.0)]

    passing = detectors.BoxVerification(
        n=9, images="given", batch_sizes=(1,), boxes=5, sure=0.3, least_iou=0.5, found_again=1.0, made_up=0.0,
        max_score=0.0, precision="int8", max_drop=0.5, passed=True,
    )  # fmt: skip
    monkeypatch.setattr(detectors, "_quantise", quantise)
    monkeypatch.setattr(detectors, "_verify", lambda *_: passing)
    monkeypatch.setattr("convscale.ship.pays.in_turns", in_turns)
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(Slower, match=r"slower than float here: 4 against 8 images/s in onnxruntime \(batch 8"):
        cs.export(detector, tmp_path / "art", int8=True, calibration_images=noise, nms=nms)
    ((said, precision, runtime),) = rivals
    assert (precision, runtime) == ("fp32", "onnxruntime")
    assert re.match(r"100\.00 % of \d+ boxes", said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nms": "none"}, "nms 'none' is unknown"),
        ({"max_detections": 0}, "max_detections is 0"),
        ({"score_threshold": 2}, "score_threshold is 2"),
    ],
)
def test_a_damaged_record_is_told(artifact: Artifact, change: dict[str, object], said: str, tmp_path: Path) -> None:
    shutil.copytree(artifact.folder, tmp_path / "art")
    record = json.loads((tmp_path / "art" / "artifact.json").read_text())
    record["detection"] |= change
    (tmp_path / "art" / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(cs.UserError, match=said):
        cs.load_artifact(tmp_path / "art")


@pytest.mark.parametrize(
    ("after", "passed", "said"),
    [(0.496, True, "INT8 loses 0.40 points of mAP on 9 pictures, 0.5 are allowed"), (0.49, False, "loses 1.00 points")],
)
def test_int8_may_lose_so_many_points_of_map(after: float, passed: bool, said: str) -> None:
    checked = detectors.BoxVerification(
        n=9, images="given", batch_sizes=(1,), boxes=5, sure=0.3, least_iou=0.5, found_again=0.2, made_up=0.8,
        max_score=0.4, map_before=0.5, map_after=after, precision="int8", max_drop=0.5,
    )  # fmt: skip
    verdict, reason = detectors._judge(checked)
    assert verdict is passed
    assert said in reason


def test_int8_without_truth_is_judged_by_its_boxes() -> None:
    checked = detectors.BoxVerification(
        n=9, images="given", batch_sizes=(1,), boxes=5, sure=0.3, least_iou=0.5, found_again=0.95, made_up=0.1,
        max_score=0.4, precision="int8", max_drop=5.0,
    )  # fmt: skip
    verdict, reason = detectors._judge(checked)
    assert not verdict
    assert "INT8 loses 10.00 points of boxes above 0.3 (no truth)" in reason  # the worse of 5 lost and 10 made up
