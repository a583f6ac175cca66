"""Splits by their folders' names, classes in classes, single images, copies, and folders that are only evaluated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from convscale.errors import UserError
from convscale.images import walk
from convscale.images.sources import open_dataset, open_evaluation

MakeTree = Callable[..., Path]
TWO = {"cat": 2, "dog": 3}


@pytest.mark.parametrize(
    "folders",
    [
        ("Train", "Val", "Test"),
        ("training", "valid", "testing"),
        ("TRAIN", "Validation", "eval"),
        ("Training", "DEV", "TEST"),
    ],
)
def test_splits_by_case_and_synonym(make_tree: MakeTree, folders: tuple[str, str, str]) -> None:
    sizes = ({"cat": 4, "dog": 5}, TWO, {"cat": 1, "dog": 2})
    data = open_dataset(make_tree(dict(zip(folders, sizes, strict=True)) | {"docs": {"x": 1}}))
    assert data.classes == ("cat", "dog")
    counts = [split.class_counts().tolist() for split in (data.train, data.validation, data.test)]
    assert counts == [[4, 5], [2, 3], [1, 2]]
    assert data.preflight.count(walk.NO_SPLIT) == 1


def test_one_split_twice_is_refused(make_tree: MakeTree) -> None:
    with pytest.raises(UserError, match="both Train/ and training/ are there"):
        open_dataset(make_tree({"training": TWO, "Train": TWO}))


def test_a_class_may_be_called_train(make_tree: MakeTree) -> None:
    data = open_dataset(make_tree({"car": 10, "plane": 10, "train": 10}))
    assert data.classes == ("car", "plane", "train")
    assert len(data.whole()) == 30


def test_classes_in_classes_are_refused(make_tree: MakeTree) -> None:
    root = make_tree({"Train2019": TWO, "Test2019": TWO})
    with pytest.raises(UserError, match=r"Test2019/ and Train2019/ hold the same folders \(cat, dog\)") as caught:
        open_dataset(root)
    assert "\n" not in str(caught.value)
    data = open_dataset(make_tree({"cat": {"images": 5}, "dog": {"images": 5}}, root="b"))
    assert data.classes == ("cat", "dog")


def test_a_class_of_one_image_stays_in_train(make_tree: MakeTree) -> None:
    data = open_dataset(make_tree({"a": 20, "b": 1, "c": 2}))
    assert data.train.class_counts().tolist() == [16, 1, 1]
    assert data.validation.class_counts().tolist() == [2, 0, 1]
    assert data.test.class_counts().tolist() == [2, 0, 0]
    (note,) = [note for note in data.notes if "too few" in note]
    assert "stay in train first: b (1), c (2);" in note


def test_copies_across_splits_and_labels_are_said(make_tree: MakeTree) -> None:
    root = make_tree({"train": {"a": 5, "b": 5}, "val": {"a": 2, "b": 2}, "test": {"a": 2, "b": 2}})
    assert open_dataset(root).notes == ()
    shutil.copy(root / "train" / "a" / "000.jpg", root / "test" / "a" / "copy.jpg")
    shutil.copy(root / "train" / "b" / "001.jpg", root / "train" / "a" / "other.jpg")
    across, labels = open_dataset(root).notes
    assert across == (
        "1 pair of the same picture in two splits, where results are too good for it (1 equal, 0 alike): "
        f"{root}/train/a/000.jpg (train) and {root}/test/a/copy.jpg (test)"
    )
    assert labels == (
        "1 pair of the same picture with different labels (1 equal, 0 alike): "
        f"{root}/train/a/other.jpg (a) and {root}/train/b/001.jpg (b)"
    )
    assert open_dataset(root, compare=False).notes == ()


CLASSES = ("a", "b", "c")


@pytest.mark.parametrize(
    ("layout", "place", "split", "name", "counts"),
    [
        ({"test": {"a": 1, "c": 2}}, ".", None, "test", [1, 0, 2]),
        ({"Val": {"a": 1, "c": 2}}, ".", None, "validation", [1, 0, 2]),
        ({"test": {"a": 1, "c": 2}, "val": {"b": 4}}, ".", "all", "all", [1, 4, 2]),
        ({"test": {"a": 1, "c": 2}}, "test", None, "test", [1, 0, 2]),
        ({"test": {"a": 30, "b": 30, "c": 30}}, "test", None, "test", [30, 30, 30]),
        ({"train": {"a": 9}, "val": {"a": 1, "b": 2}}, "val", "validation", "validation", [1, 2, 0]),
        ({"b": 1}, ".", None, "all", [0, 1, 0]),
        ({"a": 1, "b": 1, "c": 2}, ".", "test", "all", [1, 1, 2]),
        # what a network may have been trained on gives the images that were carved then
        ({"a": 20, "b": 20, "c": 10}, ".", None, "test", [2, 2, 1]),
        ({"a": 20, "b": 20, "c": 10}, ".", "all", "all", [20, 20, 10]),
        ({"train": {"a": 20, "b": 20, "c": 10}, "val": {"a": 1, "b": 1, "c": 1}}, ".", "test", "test", [2, 2, 1]),
        ({"train": {"a": 20, "b": 20, "c": 10}, "val": {"a": 1}}, "train", None, "test", [2, 2, 1]),
    ],
)
def test_what_is_evaluated(
    make_tree: MakeTree, layout: dict, place: str, split: str | None, name: str, counts: list[int]
) -> None:
    found = open_evaluation(make_tree(layout) / place, classes=CLASSES, split=split)
    assert found.split.split == name
    assert found.split.classes == CLASSES
    assert found.split.class_counts().tolist() == counts


def test_the_carved_test_set_is_that_of_training(make_tree: MakeTree) -> None:
    root = make_tree({"a": 20, "b": 20, "c": 1})
    found = open_evaluation(root, classes=CLASSES)
    data = open_dataset(root)
    assert [found.split.name(n) for n in range(len(found.split))] == [data.test.name(n) for n in range(len(data.test))]
    assert found.train_labels is not None
    assert found.train_labels.tolist() == data.train.labels.tolist()


def test_another_carved_set_than_that_of_training_is_said(make_tree: MakeTree) -> None:
    root = make_tree({"a": 20, "b": 20, "c": 10})
    trained = open_dataset(root).digests()
    assert trained["carved"] == ["validation", "test"]
    for given in (trained, None):
        notes = open_evaluation(root, classes=CLASSES, trained_on=given).notes
        assert notes == open_dataset(root, compare=False).notes
    (root / "a" / "007.jpg").unlink()
    for split in (None, "test", "validation", "train"):
        *_, said = open_evaluation(root, classes=CLASSES, split=split, trained_on=trained).notes
        assert said.startswith("this is not the data that the network was trained on: images or labels have come, gone")
        assert f"so another {split or 'test'} set is carved, and" in said
    assert open_evaluation(root, classes=CLASSES, split="all", trained_on=trained).notes == ()
    assert len(open_evaluation(root, classes=CLASSES).notes) == 1  # nothing is known of an older checkpoint's


def test_only_sets_that_are_carved_can_become_others(make_tree: MakeTree) -> None:
    root = make_tree({"train": {"a": 20, "b": 20, "c": 10}, "test": {"a": 3, "b": 3, "c": 3}})
    trained = open_dataset(root).digests()
    assert trained["carved"] == ["validation"]
    (root / "test" / "a" / "000.jpg").unlink()
    assert open_dataset(root).digests() == trained | {"test": open_dataset(root).digests()["test"]}
    assert open_dataset(root).digests() != trained
    assert open_evaluation(root, classes=CLASSES, trained_on=trained).notes == ()
    assert len(open_evaluation(root, classes=CLASSES, split="validation", trained_on=trained).notes) == 1
    (root / "train" / "b" / "000.jpg").rename(root / "train" / "b" / "100.jpg")
    assert open_evaluation(root, classes=CLASSES, trained_on=trained).notes == ()
    assert len(open_evaluation(root, classes=CLASSES, split="validation", trained_on=trained).notes) == 2
    other = make_tree({"a": 20, "b": 20, "c": 10}, root="other")  # what is carved there was not trained on
    assert len(open_evaluation(other, classes=CLASSES, trained_on=trained).notes) == 1


def test_a_folder_called_test_is_taken_whole_unless_it_was_trained_on(make_tree: MakeTree) -> None:
    root = make_tree({"test": {"a": 20, "b": 20, "c": 10}}) / "test"
    found = open_evaluation(root, classes=CLASSES)
    assert len(found.split) == 50
    assert found.notes == (
        f"all images are taken: {root} is a test set by its name; if the network was trained on some of them, give the "
        "folder another name",
    )
    data = open_dataset(root)
    carved = open_evaluation(root, classes=CLASSES, trained_on=data.digests())
    assert [carved.split.name(n) for n in range(len(carved.split))] == [
        data.test.name(n) for n in range(len(data.test))
    ]
    assert carved.notes == data.notes
    for few in ({"a": 1, "b": 1, "c": 1}, {"a": 20, "b": 20, "c": 11}):
        other = make_tree({"test": few}, root=f"with-{few['c']}") / "test"
        assert len(open_evaluation(other, classes=CLASSES, trained_on=data.digests()).split) == sum(few.values())


def test_what_can_not_be_evaluated(make_tree: MakeTree) -> None:
    root = make_tree({"test": {"a": 2, "zebra": 2}})
    with pytest.raises(UserError, match=r"class folder\(s\) zebra are not among the checkpoint's 3 classes: a, b, c"):
        open_evaluation(root, classes=CLASSES)
    with pytest.raises(UserError, match="is a test set by its name; use --split test"):
        open_evaluation(make_tree({"test": {"a": 2}}, root="b") / "test", classes=CLASSES, split="validation")
    with pytest.raises(UserError, match="there is test/ but no train/ beside it"):
        open_evaluation(make_tree({"test": {"a": 2}}, root="c"), classes=CLASSES, split="validation")
