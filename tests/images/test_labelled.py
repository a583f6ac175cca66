"""COCO, VOC, NUS-WIDE and Open Images as their makers pack them, from trees made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from convscale.errors import UserError
from convscale.images.sources import open_dataset, open_evaluation
from convscale.images.splits import Split

UNKNOWN = None


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.stem) * 20 % 256, 99, 9)).save(path)


def labels(split: Split) -> dict[str, list[float | None]]:
    """By the file's stem; None: not known."""
    rows = split.labels.tolist()
    return {
        Path(split.name(at)).stem: [UNKNOWN if math.isnan(value) else value for value in row]
        for at, row in enumerate(rows)
    }


def coco(root: Path, part: str = "train2017", **changes: Any) -> Path:
    """Three categories whose ids have gaps, four images, of which one has nothing on it."""
    images = [{"id": 7 + at, "file_name": f"{part}-{at}.jpg"} for at in range(4)]
    marks = [(7, 90), (7, 1), (8, 3), (9, 3), (9, 3)]
    about: dict[str, Any] = {
        "images": images,
        "annotations": [
            {"image_id": image, "category_id": category, "bbox": [0, 0, 1, 1]} for image, category in marks
        ],
        "categories": [{"id": 90, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 3, "name": "cow"}],
    } | changes
    for image in images:
        picture(root / part / image["file_name"])
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(about))
    return root


def test_coco(tmp_path: Path) -> None:
    """Classes stand in the order of their ids; an image without a box is kept as background."""
    coco(coco(tmp_path), "val2017")
    data = open_dataset(tmp_path)
    assert data.classes == ("dog", "cow", "cat")
    assert data.multilabel
    assert labels(data.validation) == {
        "val2017-0": [1, 0, 1], "val2017-1": [0, 1, 0], "val2017-2": [0, 1, 0], "val2017-3": [0, 0, 0],
    }  # fmt: skip
    found = open_evaluation(tmp_path, classes=("dog", "cow", "cat"), split="validation")
    assert len(found.split) == 4


def test_images_that_are_not_there_are_counted(tmp_path: Path) -> None:
    coco(coco(tmp_path), "val2017")
    (tmp_path / "val2017" / "val2017-1.jpg").unlink()
    data = open_dataset(tmp_path, dataset="coco")
    assert len(data.validation) == 3
    assert any("1 of 4 images" in note and "val2017-1.jpg" in note for note in data.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "lists 0 images|annotation is of image 7, which is not"),
        ({"images": [], "annotations": []}, "lists 0 images; it must list at least one"),
        ({"annotations": [{"image_id": 7, "category_id": 4}]}, "annotation is of category 4, which is not in its list"),
        ({"annotations": {}}, "annotations must be a list of objects"),
        ({"categories": []}, "categories must have names"),
        ({"images": [{"id": 7, "file_name": "../../etc/passwd"}]}, "leads out of the set's folder"),
        ({"images": [{"id": 7, "file_name": "a.jpg"}] * 2}, "image id 7 is there twice"),
        ({"images": [{"id": "7", "file_name": "a.jpg"}]}, "id is '7'; it must be a whole number"),
        ({"images": [{"id": n, "file_name": f"{n}.jpg"} for n in (7, 8, 9)]}, "none of the 3 images"),
    ],
)
def test_bad_coco_is_one_line(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(coco(tmp_path, **changes))


def test_voc(tmp_path: Path) -> None:
    """What is difficult is not known."""
    root = tmp_path / "VOCdevkit" / "VOC2007"
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        for name, values in (("cat", (1, -1, 0)), ("dog", (-1, 1, 1))):
            lines = [f"{split}{at}  {value}" if value >= 0 else f"{split}{at} -1" for at, value in enumerate(values)]
            (main / f"{name}_{split}.txt").write_text("\n".join(lines[:count]) + "\n")
        for at in range(count):
            picture(root / "JPEGImages" / f"{split}{at}.jpg")
    data = open_dataset(tmp_path)
    assert data.classes == ("cat", "dog")
    assert labels(data.train) == {"train0": [1, 0], "train1": [0, 1], "train2": [UNKNOWN, 1]}
    assert (len(data.validation), len(data.test)) == (2, 2)
    assert data.train.class_counts().tolist() == [1, 2]
    (main / "dog_train.txt").write_text("train0 1\ntrain2 1\ntrain1 1\n")
    with pytest.raises(UserError, match=r"dog_train\.txt lists other images"):
        open_dataset(tmp_path)
    (main / "dog_train.txt").write_text("train0 2\n")
    with pytest.raises(UserError, match="line 1: 'train0 2'; it must be an image and -1, 0 or 1"):
        open_dataset(tmp_path)


def test_nus_wide(tmp_path: Path) -> None:
    (tmp_path / "ImageList").mkdir()
    truth = tmp_path / "Groundtruth" / "TrainTestLabels"
    truth.mkdir(parents=True)
    for ending in ("Train", "Test"):
        images = [f"actor\\{ending}_{at}.jpg" for at in range(4)]
        (tmp_path / "ImageList" / f"{ending}Imagelist.txt").write_text("\r\n".join(images))
        (truth / f"Labels_sky_{ending}.txt").write_text("1\n0\n1\n0\n")
        (truth / f"Labels_sea_{ending}.txt").write_text("0\n0\n1\n1\n")
        for image in images:
            picture(tmp_path / "Flickr" / image.replace("\\", "/"))
    data = open_dataset(tmp_path)
    assert data.classes == ("sea", "sky")
    assert labels(data.test) == {"Test_0": [0, 1], "Test_1": [0, 0], "Test_2": [1, 1], "Test_3": [1, 0]}
    (truth / "Labels_sea_Train.txt").write_text("0\n0\n1\n")
    with pytest.raises(UserError, match=r"Labels_sea_Train\.txt must have 0 or 1 for each of the 4 images"):
        open_dataset(tmp_path)


def test_open_images(tmp_path: Path) -> None:
    """What nobody verified is not known; a class's key stands where its name is another's too."""
    head = "ImageID,Source,LabelName,Confidence\n"
    said = {
        "train": "a,verification,/m/1,1\na,verification,/m/2,0\nb,verification,/m/2,1\nc,crowdsource,/m/3,1\n",
        "validation": "d,verification,/m/1,0\nd,verification,/m/9,1\n",
        "test": "e,verification,/m/3,1\n",
    }
    for split, text in said.items():
        (tmp_path / f"{split}-annotations-human-imagelabels.csv").write_text(head + text)
        for line in text.splitlines():
            picture(tmp_path / split / f"{line[0]}.jpg")
    (tmp_path / "oidv7-class-descriptions.csv").write_text('LabelName,DisplayName\n/m/1,Cat\n/m/2,"Bat"\n/m/3,Bat\n')
    data = open_dataset(tmp_path)
    assert data.classes == ("Cat", "Bat (/m/2)", "Bat (/m/3)")
    assert labels(data.train) == {
        "a": [1, 0, UNKNOWN], "b": [UNKNOWN, 1, UNKNOWN], "c": [UNKNOWN, UNKNOWN, 1],
    }  # fmt: skip
    assert labels(data.validation) == {"d": [0, UNKNOWN, UNKNOWN]}
    (tmp_path / "test-annotations-human-imagelabels.csv").write_text(head + "e,x,/m/1,0.7\n")
    with pytest.raises(UserError, match=r"line 2: Confidence is '0\.7'; it must be 0 or 1"):
        open_dataset(tmp_path)
