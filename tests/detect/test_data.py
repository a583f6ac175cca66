"""Annotations of every form are read, checked, counted; what is wrong is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convscale as cs
from benchmarks.trees import squares
from convscale.detect.coco import find_coco
from convscale.detect.data import turn_boxes
from convscale.detect.evaluate import truths_of
from convscale.detect.faults import Faults
from convscale.images.digest import data_digest
from convscale.images.letterbox import fitted, into_square, letterbox, out_of_square
from tests.detect.sets import coco_set


def picture(path: Path, width: int = 40, height: int = 20, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(path, exif=exif)


def coco(folder: Path, images: list[dict], annotations: list[dict], categories: list[dict] | None = None) -> Path:
    named = [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}] if categories is None else categories
    file = folder / "boxes.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": named}))
    return file


def whole(opened: cs.DetectorSpec | object, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and labels of the picture of a name, whichever split it is in."""
    for split in (opened.train, opened.validation, opened.test):  # pyright: ignore
        for at, path in enumerate(split.paths):
            if Path(path).name == name:
                return split.boxes[at], split.labels[at]
    raise KeyError(name)


def test_cocos_boxes_and_ids_with_gaps(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "b.jpg")
    file = coco(
        tmp_path,
        [{"id": 5, "file_name": "a.jpg", "width": 40, "height": 20}, {"id": 9, "file_name": "b.jpg"}],
        [
            {"id": 1, "image_id": 5, "category_id": 90, "bbox": [2, 3, 10, 4], "area": 17.5},
            {"id": 2, "image_id": 5, "category_id": 3, "bbox": [30, 10, 20, 5], "iscrowd": 1},
        ],
    )
    opened = cs.open_boxes(file)
    assert opened.classes == ("cat", "dog")
    assert opened.train.category_ids == opened.test.category_ids == (3, 90)
    assert cs.open_boxes(file, classes=["dog", "cat"]).train.category_ids == (90, 3)
    assert cs.open_boxes(file, classes=["dog", "cow", "cat"]).train.category_ids == ()
    boxes, labels = whole(opened, "a.jpg")
    areas = [truth.areas for part in (opened.train, opened.test) for truth in truths_of(part) if len(truth.boxes)]
    assert areas[0].tolist() == [17.5, 50]  # pyright: ignore  # of what is left of the box where none is said
    assert boxes.tolist() == [[2, 3, 12, 7], [30, 10, 40, 15]]  # x + width, y + height; what reaches out is cut
    assert labels.tolist() == [2, 1]
    assert whole(opened, "b.jpg")[0].shape == (0, 4)  # background is kept
    notes = "\n".join(opened.notes)
    assert "1 boxes reached outside their picture and were cut" in notes
    assert "1 boxes are crowds" in notes


@pytest.mark.parametrize(
    ("files", "found", "told"),
    [
        (
            ["annotations.json", "test.json", "train.json"],
            {"test": "test.json", "train": "train.json"},
            ["annotations.json is passed over: it names no split, and there is train.json for train"],
        ),
        (
            ["annotations/instances_all.json", "annotations/instances_train2017.json", "val/_annotations.coco.json"],
            {"train": "annotations/instances_train2017.json", "validation": "val/_annotations.coco.json"},
            [
                "annotations/instances_all.json is passed over: it names no split, and there is "
                "annotations/instances_train2017.json for train"
            ],
        ),
        (
            ["instances_val2014.json", "instances_val2017.json", "some.json"],
            {"validation": "instances_val2014.json", "train": "some.json"},
            [
                "instances_val2017.json is passed over: there is instances_val2014.json for validation",
                "some.json names no split; it is the train set",
            ],
        ),
        (
            ["a.json", "b.json"],
            {"train": "a.json"},
            ["b.json is passed over: it names no split, and there is a.json for train"],
        ),
        (["boxes.json"], {"train": "boxes.json"}, []),
    ],
)
def test_files_that_name_their_split_go_first_and_others_are_told(
    tmp_path: Path, files: list[str], found: dict[str, str], told: list[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"annotations": []}')
    faults = Faults()
    assert find_coco(tmp_path, faults) == {split: tmp_path / name for split, name in found.items()}
    assert list(faults.notes()) == told


@pytest.mark.parametrize("name", ["test", "val", "train"])
def test_a_data_folder_that_is_called_as_a_split_leaves_its_files_theirs(tmp_path: Path, name: str) -> None:
    place, faults = tmp_path / name, Faults()
    place.mkdir()
    for split in ("train", "val", "test"):
        (place / f"{split}.json").write_text('{"annotations": []}')
    found = {"train": place / "train.json", "validation": place / "val.json", "test": place / "test.json"}
    assert find_coco(place, faults) == found
    assert faults.notes() == ()


def test_a_set_says_which_of_its_files_were_passed_over(tmp_path: Path) -> None:
    file = coco_set(tmp_path)
    file.with_name("train.json").write_text(file.read_text())
    opened = cs.open_boxes(tmp_path)
    assert opened.notes[0] == "all.json is passed over: it names no split, and there is train.json for train"


def test_yolos_shares_become_pixels(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in "ab":
            picture(tmp_path / "images" / split / f"{name}.jpg")
    labels = tmp_path / "labels" / "train"
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.1 0.1 0.2 0.1 0.2 0.3\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n")
    opened = cs.open_boxes(tmp_path)
    boxes, found = whole(opened, "a.jpg")
    # 40 x 20: centre (20, 10), sides 10 and 10; the second line is an outline from (4, 2) to (8, 6)
    assert np.allclose(boxes, [[15, 5, 25, 15], [4, 2, 8, 6]])
    assert found.tolist() == [2, 1]
    assert len(opened.validation) == 2


def test_a_class_without_names_is_bounded(tmp_path: Path) -> None:
    """One line made as many names as its number says."""
    picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("4000000000 0.5 0.5 0.25 0.5\n")
    with pytest.raises(cs.UserError, match=r"has a box of class 4000000000; without names it is at most 100,000"):
        cs.open_boxes(tmp_path)


def test_vocs_pixels_count_from_one(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        picture(tmp_path / "JPEGImages" / f"{name}.jpg")
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>40</width><height>20</height></size><object>"
            "<name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>40</xmax><ymax>20</ymax>"
            "</bndbox></object></annotation>"
        )
    main = tmp_path / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "train.txt").write_text("a\nb\n")
    (main / "val.txt").write_text("c\n")
    opened = cs.open_boxes(tmp_path)
    boxes, labels = whole(opened, "c.jpg")
    assert boxes.tolist() == [[0, 1, 40, 20]]  # the first pixel is 1, the last one is inside
    assert labels.tolist() == [1]
    assert opened.validation.crowd[0].tolist() == [True]


def voc(folder: Path, lists: dict[str, str]) -> Path:
    """Pictures a to h with one dog each, and lists of them by name."""
    (folder / "Annotations").mkdir(parents=True)
    for name in "abcdefgh":
        picture(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin>"
            "<xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
        )
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in lists.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.mark.parametrize(
    ("lists", "train", "validation", "test"),
    [
        ({"trainval": "abcdef", "test": "gh"}, 5, 1, "gh"),  # a tenth of six, at least one, is carved
        ({"trainval": "abcdef", "val": "ef", "test": "gh"}, 4, 2, "gh"),
        ({"trainval": "abcdefg", "test": "gh"}, 5, 1, "gh"),  # what is listed for the test is not learnt from
        ({"trainval": "abcdef", "train": "abc", "val": "def", "test": "gh"}, 3, 3, "gh"),
    ],
)
def test_trainval_is_vocs_train_set(
    tmp_path: Path, lists: dict[str, str], train: int, validation: int, test: str
) -> None:
    opened = cs.open_boxes(voc(tmp_path, lists))
    assert opened.borrowed is None
    assert (len(opened.train), len(opened.validation)) == (train, validation)
    assert [Path(path).stem for path in opened.test.paths] == list(test)
    assert not {*opened.train.paths, *opened.validation.paths} & set(opened.test.paths)


@pytest.mark.parametrize("form", ["voc", "coco", "yolo"])
def test_a_train_set_that_is_another_one_is_evaluated_on_and_not_trained_on(tmp_path: Path, form: str) -> None:
    place = tmp_path / "set"
    if form == "voc":
        voc(place, {"test": "abcdefgh"})
    elif form == "coco":
        file = coco_set(place, 8)
        file.rename(file.with_name("test.json"))
    else:
        for number in range(8):
            picture(place / "images" / "test" / f"{number}.jpg")
        (place / "labels" / "test").mkdir(parents=True)
        (place / "labels" / "test" / "0.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    opened = cs.open_boxes(place)
    assert (opened.form, opened.borrowed, len(opened.test)) == (form, "test", 8)
    assert "there is no train set; it is the test set" in opened.notes
    with pytest.raises(cs.UserError, match="has no train set, and what has learnt from its test set is not judged"):
        cs.train_detector("resnet18", opened, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wrong_boxes_are_counted_named_and_left_out(tmp_path: Path) -> None:
    images, annotations = [], []
    for number in range(160):
        picture(tmp_path / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg"})
        annotations.append({"id": number, "image_id": number, "category_id": 3, "bbox": [1, 1, 8, 8]})
    annotations[10]["bbox"] = [9, 1, -8, 8]
    annotations[11]["category_id"] = 4
    annotations[12]["bbox"] = [50, 1, 8, 8]
    annotations[13]["bbox"] = [1, 2, 3]
    annotations[14]["image_id"] = 1000
    images[20] = {"id": 19, "file_name": "20.jpg"}
    opened = cs.open_boxes(coco(tmp_path, images, annotations), max_bad_rate=0.05)
    notes = "\n".join(opened.notes)
    assert "left out: 1 boxes have no area (x2 <= x1 or y2 <= y1) (first: " in notes
    assert "10.jpg: [9.0, 1.0, 1.0, 9.0]" in notes
    assert "left out: 1 boxes are of a class that is not listed" in notes
    assert "left out: 1 boxes lie wholly outside their picture" in notes
    assert "left out: 1 boxes are not four finite numbers" in notes
    assert "left out: 2 boxes are of a picture that is not listed" in notes  # of 1000, and of 20, whose id is gone
    assert "left out: 1 picture ids stand there twice; the first counts (first: id 19)" in notes
    assert sum(each.box_count for each in (opened.train, opened.validation, opened.test)) == 154


def test_an_annotation_that_stands_there_twice_counts_once(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(40)]
    for number in range(40):
        picture(tmp_path / f"{number}.jpg")
    boxes = [{"id": n, "image_id": n, "category_id": 3, "bbox": [1, 1, 8, 8]} for n in range(40)]
    boxes[30] = {"id": 7, "image_id": 30, "category_id": 90, "bbox": [2, 2, 8, 8]}
    unnumbered = [{"image_id": 39, "category_id": 3, "bbox": [3, 3, 8, 8]}] * 2
    opened = cs.open_boxes(coco(tmp_path, images, [*boxes, *unnumbered]))
    assert "left out: 1 boxes have an id that stood there before; the first counts (first: id 7)" in opened.notes
    assert len(whole(opened, "30.jpg")[0]) == 0
    assert whole(opened, "7.jpg")[0].tolist() == [[1, 1, 9, 9]]
    assert len(whole(opened, "39.jpg")[0]) == 3  # nothing says that they are the same
    for box in boxes[:5]:
        box["id"] = 7
    with pytest.raises(cs.UserError, match=r"6 of 42 boxes can not be used.*have an id that stood there before"):
        cs.open_boxes(coco(tmp_path, images, [*boxes, *unnumbered]))


def test_splits_with_other_ids_of_the_same_classes_have_none(tmp_path: Path) -> None:
    file = coco_set(tmp_path, 8)
    told = json.loads(file.read_text())
    file.rename(file.with_name("train.json"))
    assert cs.open_boxes(tmp_path).train.category_ids == (1, 7)
    for one in (*told["annotations"], *told["categories"]):
        key = "category_id" if "category_id" in one else "id"
        one[key] = 3 if one[key] == 7 else one[key]
    file.with_name("val.json").write_text(json.dumps(told))
    opened = cs.open_boxes(tmp_path)
    assert (opened.classes, opened.train.category_ids) == (("red", "green"), ())
    assert any("val.json has other ids of the categories than" in note for note in opened.notes)


def test_too_much_that_is_wrong_is_refused(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(10)]
    for number in range(7):
        picture(tmp_path / f"{number}.jpg")
    with pytest.raises(cs.UserError, match=r"3 of 10 pictures can not be used, at most 1.0% may be; most: 3 pictures "):
        cs.open_boxes(coco(tmp_path, images, []))
    annotations = [{"id": n, "image_id": 0, "category_id": 3, "bbox": [4, 4, 0, 3]} for n in range(3)]
    with pytest.raises(cs.UserError, match=r"3 of 3 boxes can not be used.*have no area"):
        cs.open_boxes(coco(tmp_path, images[:7], annotations))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"images": [], "annotations": [], "categories": []}, r"has 0 images"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, r"has no categories"),
        ({"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "x"}]}, r"not found"),
        ({"images": 3}, r"images is 3; it must be a list"),
        ([], r"holds a list, not an object"),
    ],
)
def test_an_annotation_file_that_is_none_is_told(tmp_path: Path, told: object, said: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(told))
    with pytest.raises(cs.UserError, match=said):
        cs.open_boxes(tmp_path / "a.json")


def test_xml_with_entities_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>')
    with pytest.raises(cs.UserError, match="declares a document type"):
        cs.open_boxes(tmp_path)


def test_a_picture_above_the_cap_is_left_out(tmp_path: Path) -> None:
    """20,000 x 20,000 pixels as a header says; nothing of it is decoded."""
    for number in range(4):
        picture(tmp_path / f"{number}.jpg")
    data = bytearray((tmp_path / "3.jpg").read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (20_000).to_bytes(2, "big") * 2
    (tmp_path / "3.jpg").write_bytes(data)
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(4)]
    opened = cs.open_boxes(coco(tmp_path, images, []))
    assert any("20000 x 20000 pixels (400 megapixels) is above the cap" in note for note in opened.notes)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_their_picture(tmp_path: Path, orientation: int) -> None:
    """A white block on the stored picture is found where its turned box says, as Pillow turns the picture."""
    from PIL import ImageOps

    stored = np.zeros((30, 50, 3), np.uint8)
    stored[4:10, 20:45] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.png")))[:, :, 0]
    rows, columns = np.nonzero(upright)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert turn_boxes(np.array([[20.0, 4.0, 45.0, 10.0]]), orientation, (30, 50)).tolist() == [expected]


def test_boxes_drawn_before_exif_are_turned(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", 40, 20, orientation=6)  # upright 20 x 40
    picture(tmp_path / "b.jpg")
    images = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 20}, {"id": 2, "file_name": "b.jpg"}]
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 5]}
    opened = cs.open_boxes(coco(tmp_path, images, [box]))
    assert whole(opened, "a.jpg")[0].tolist() == [[15, 0, 20, 10]]  # the stored left end is the upright top
    images[0] |= {"width": 20, "height": 40}
    opened = cs.open_boxes(coco(tmp_path, images, [box]))
    assert whole(opened, "a.jpg")[0].tolist() == [[0, 0, 10, 5]]


@pytest.mark.parametrize(
    ("size", "orientation", "told"),
    [((20, 20), 6, True), ((40, 20), 3, True), ((40, 20), 6, False), ((20, 20), 1, False), ((40, 20), 1, False)],
)
def test_a_turn_that_no_size_shows_is_said(tmp_path: Path, size: tuple[int, int], orientation: int, told: bool) -> None:
    """A square, or a picture turned by 180 degrees, has the same sides before and after."""
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name, *size, orientation=orientation)
    sides = {"width": size[0], "height": size[1]}
    images = [{"id": 1, "file_name": "a.jpg", **sides}, {"id": 2, "file_name": "b.jpg", **sides}]
    box = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 5]}
    opened = cs.open_boxes(coco(tmp_path, images, [box]))
    said = [note for note in opened.notes if "nothing says whether their boxes were drawn before that" in note]
    assert len(said) == told
    if told:  # the picture without a box is none of them
        assert said[0].startswith("1 pictures are turned by EXIF")
        assert whole(opened, "a.jpg")[0].tolist() == [[0, 0, 10, 5]]


def test_splits_are_carved_by_picture_and_stay(tmp_path: Path) -> None:
    file = coco_set(tmp_path / "set", 30)
    first, second = cs.open_boxes(file), cs.open_boxes(file)
    parts = [set(each.paths) for each in (first.train, first.validation, first.test)]
    assert [len(part) for part in parts] == [24, 3, 3]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert first.test.paths == second.test.paths
    assert first.classes == ("red", "green")  # by id: 1, 7


def test_crowns_that_an_edge_cuts() -> None:
    """Of 50 x 50 pixels 28 x 50 lie in the left square, more than half, and 22 x 50 in the right one."""
    (first, second) = squares(np.array([[100.0, 10, 150, 60], [250, 10, 290, 60]]), (270, 200), 128)
    assert (first[:2], second[:2]) == ((0, 0), (128, 0))
    assert (first[2].tolist(), first[3].tolist()) == ([[100, 10, 128, 60]], [False])
    assert (second[2].tolist(), second[3].tolist()) == ([[0, 10, 22, 60], [122, 10, 128, 60]], [True, True])


def test_a_letterbox_keeps_the_shape() -> None:
    assert fitted(300, 600, 128) == (64, 128)
    assert fitted(1, 5000, 128) == (1, 128)
    pixels = np.full((30, 60, 3), 7, np.uint8)
    square = letterbox(pixels, 64, (1, 2, 3))
    assert square.shape == (64, 64, 3)
    assert (square[:32] == 7).all()
    assert (square[32:] == [1, 2, 3]).all()
    boxes = np.array([[6.0, 3.0, 30.0, 15.0]])
    there = into_square(boxes, 30, 60, 64)
    assert there.tolist() == pytest.approx(boxes * 64 / 60)
    assert np.allclose(out_of_square(there, 30, 60, 64), boxes)
    assert out_of_square(np.array([[0.0, 0.0, 64.0, 64.0]]), 30, 60, 64).tolist() == [[0, 0, 60, 30]]


def test_a_digest_follows_every_box(tmp_path: Path) -> None:
    place = coco_set(tmp_path)
    data = cs.open_boxes(place)
    before = data_digest([data.train])
    assert before == data_digest([cs.open_boxes(place).train])
    moved = tuple(boxes + 1 for boxes in data.train.boxes)
    assert data_digest([dataclasses.replace(data.train, boxes=moved)]) != before
    other = tuple(3 - labels for labels in data.train.labels)
    assert data_digest([dataclasses.replace(data.train, labels=other)]) != before
