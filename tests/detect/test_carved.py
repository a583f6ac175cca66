"""Sets of pictures with boxes that are carved from the train set: another one than that of the training is said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import convscale as cs
from convscale.cli.detect import evaluate_boxes, export_boxes
from convscale.detect.ship import for_int8
from convscale.errors import Stopped, UserError
from convscale.images.digest import data_digest
from convscale.images.preprocess import Preprocessing
from tests.detect.sets import coco_set


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return coco_set(tmp_path)


@pytest.mark.parametrize("name", ["val", "test", "train"])
def test_pictures_that_calibrate_do_not_judge(
    file: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a validation set alone had 8 bits judged by the very pictures that calibrated them, in silence."""
    given: dict[str, Any] = {}

    def stop(*_: Any, **options: Any) -> None:
        given.update(options)
        raise Stopped("enough")

    monkeypatch.setattr("convscale.ship.export.export", stop)
    monkeypatch.setattr("convscale.detect.ship.MIN_CALIBRATION", 4)
    file = file.rename(file.with_name(f"{name}.json"))
    data = cs.open_boxes(file.parent)
    preprocessing = Preprocessing(image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    loaded: Any = SimpleNamespace(net=None, classes=data.classes, meta={}, preprocessing=preprocessing)
    with pytest.raises(Stopped):
        export_boxes(loaded, file.parent / "out", file.parent, {}, {"int8": True}, False)
    calibrating, judging = (
        {image.tobytes() for image in given[f"{what}_images"]} for what in ("calibration", "verify")
    )
    assert calibrating.isdisjoint(judging)
    # Of 24 pictures: validation borrowed, 2 carved from it as test set, 11 of 22 calibrate, the other 13 judge; test
    # borrowed, 2 carved as validation set; train, 2 carved for each.
    sizes = {"val": (11, 13), "test": (22, 2), "train": (20, 2)}[name]
    assert (len(calibrating), len(judging), len(given["verify_labels"])) == (*sizes, sizes[1])
    text = " ".join(capsys.readouterr().err.split())
    said = {"val": "pictures of the validation set calibrate", "test": "pictures of the test set calibrate"}
    assert (said[name] in text) if name in said else ("there is no train set" not in text)


@pytest.mark.parametrize(("least", "calibrating"), [(11, 11), (12, 12), (21, 21), (22, None)])
def test_of_few_borrowed_pictures_as_many_calibrate_as_are_needed(
    file: Path, monkeypatch: pytest.MonkeyPatch, least: int, calibrating: int | None
) -> None:
    """Half of them were too few, and the refusal spoke of a train set that there was not. 22 of 24 are borrowed."""
    monkeypatch.setattr("convscale.detect.ship.MIN_CALIBRATION", least)
    data = cs.open_boxes(file.rename(file.with_name("val.json")).parent)
    if calibrating is None:
        with pytest.raises(UserError, match=r"needs 22 pictures .* and the validation set has 22 for both"):
            for_int8(data)
        return
    known, judging, _ = for_int8(data)
    assert (len(known), len({*known.paths} & {*judging.paths})) == (calibrating, 0)


def _without_a_picture(file: Path) -> None:
    told = json.loads(file.read_text())
    told["images"] = [each for each in told["images"] if each["id"] != 7]
    told["annotations"] = [each for each in told["annotations"] if each["image_id"] != 7]
    file.write_text(json.dumps(told))


def test_what_is_carved_is_known(file: Path, tmp_path: Path) -> None:
    data = cs.open_boxes(file)
    assert data.carved == ("validation", "test")
    assert data.digests() == {
        **{name: data_digest((getattr(data, name),)) for name in ("train", "validation", "test")},
        "carved": ["validation", "test"],
    }
    for split in ("train", "val"):
        coco_set(tmp_path / "both" / split, 6).rename(tmp_path / "both" / split / "_annotations.coco.json")
        (tmp_path / "both" / split / "images").rename(tmp_path / "both" / split / "moved")
        for picture in (tmp_path / "both" / split / "moved").iterdir():
            picture.rename(tmp_path / "both" / split / picture.name)
    assert cs.open_boxes(tmp_path / "both").carved == ("test",)


@pytest.mark.parametrize("known", ["splits", "data_digest"])
def test_another_carved_set_than_that_of_training_is_said(
    file: Path, known: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a checkpoint that was written before the splits were known each by itself."""

    def stop(*given: Any, **options: Any) -> None:
        raise Stopped("enough")

    monkeypatch.setattr("convscale.detect.evaluate.evaluate_detector", stop)
    monkeypatch.setattr("convscale.ship.export.export", stop)
    data = cs.open_boxes(file)
    meta = {"splits": data.digests(), "data_digest": data_digest((data.train, data.validation))}
    preprocessing = Preprocessing(image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    loaded: Any = SimpleNamespace(
        net=None, classes=data.classes, meta={known: meta[known]}, preprocessing=preprocessing
    )

    def said() -> list[int]:
        """The number of notes of ``evaluate`` on three splits, and of ``export``."""
        found = []
        for split in ("test", None, "validation"):
            with pytest.raises(Stopped):
                evaluate_boxes(loaded, file, file, split, 1, "cpu", 0, False, [])
            text = " ".join(capsys.readouterr().err.split())
            found.append(text.count(f"so another {split or 'test'} set is carved"))
        with pytest.raises(Stopped):
            export_boxes(loaded, file.parent / "out", file, {}, {"int8": False}, False)
        found.append(" ".join(capsys.readouterr().err.split()).count("so another test set is carved"))
        return found

    assert said() == [0, 0, 0, 0]
    _without_a_picture(file)
    assert said() == [1, 1, 1, 1]
