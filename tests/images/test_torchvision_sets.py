"""torchvision's sets of files, from tiny ones in their published layouts; labels and class names by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscale.errors import UserError
from convscale.images.sources import open_dataset
from convscale.images.splits import FileSplit, Split


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (200, 30, 30)).save(path)


def _names(split: Split) -> list[str]:
    assert isinstance(split, FileSplit)
    return [Path(path).stem for path in split.paths]


def test_food101(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("test", 2)):
        listed = {name: [f"{name}/{split}{number}" for number in range(count)] for name in ("waffles", "apple_pie")}
        for names in listed.values():
            for name in names:
                _picture(tmp_path / "food-101" / "images" / f"{name}.jpg")
        (tmp_path / "food-101" / "meta").mkdir(exist_ok=True)
        (tmp_path / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(listed))
    data = open_dataset(tmp_path)
    assert data.classes == ("apple_pie", "waffles")
    assert data.test.labels.tolist() == [1, 1, 0, 0]
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 4)
    (tmp_path / "food-101" / "meta" / "test.json").write_text(
        json.dumps({"apple_pie": ["apple_pie/test0"], "zebra": ["waffles/test0"]})
    )
    with pytest.raises(
        UserError,
        match="the test set's classes are not the train set's, in this order: 'zebra' stands where train has 'waffles'",
    ):
        open_dataset(tmp_path)
    (tmp_path / "food-101" / "meta" / "test.json").write_text("{")
    with pytest.raises(UserError, match="Food101 can not be opened from local files"):
        open_dataset(tmp_path, dataset="food101")


def test_oxford_iiit_pet(tmp_path: Path) -> None:
    notes = tmp_path / "oxford-iiit-pet" / "annotations"
    notes.mkdir(parents=True)
    names = {
        "trainval": ["Abyssinian_1", "Abyssinian_2", "great_pyrenees_1", "great_pyrenees_2"],
        "test": ["great_pyrenees_9", "Abyssinian_9"],
    }
    for split, images in names.items():
        (notes / f"{split}.txt").write_text("\n".join(f"{name} {1 + (name[0] == 'g')} 1 1" for name in images))
        for name in images:
            _picture(tmp_path / "oxford-iiit-pet" / "images" / f"{name}.jpg")
    data = open_dataset(tmp_path, dataset="OxfordIIITPet")
    assert data.classes == ("Abyssinian", "Great Pyrenees")
    assert _names(data.test) == ["great_pyrenees_9", "Abyssinian_9"]
    assert data.test.labels.tolist() == [1, 0]


def test_fgvc_aircraft_has_its_own_validation_set(tmp_path: Path) -> None:
    place = tmp_path / "fgvc-aircraft-2013b" / "data"
    for number in range(6):
        _picture(place / "images" / f"{number}.jpg")
    (place / "variants.txt").write_text("Boeing 707\nA320\n")
    for split, lines in (
        ("train", "0 A320\n1 Boeing 707\n"),
        ("val", "2 A320\n3 A320\n"),
        ("test", "4 Boeing 707\n5 A320\n"),
    ):
        (place / f"images_variant_{split}.txt").write_text(lines)
    data = open_dataset(tmp_path, compare=False)  # all pictures are the same one here
    assert data.classes == ("Boeing 707", "A320")
    assert data.train.labels.tolist() == [1, 0]
    assert (_names(data.validation), data.validation.labels.tolist()) == (["2", "3"], [1, 1])
    assert data.notes == ()


def test_flowers102(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    place = tmp_path / "flowers-102"
    for number in range(1, 7):
        _picture(place / "jpg" / f"image_{number:05d}.jpg")
    savemat(place / "imagelabels.mat", {"labels": np.array([1, 2, 1, 2, 1, 2])})
    savemat(place / "setid.mat", {"trnid": np.array([1, 2]), "valid": np.array([3, 4]), "tstid": np.array([6, 5])})
    monkeypatch.setattr(
        "torchvision.datasets.flowers102.check_integrity", lambda *_: True
    )  # its checksums are torchvision's business
    data = open_dataset(tmp_path)
    assert len(data.classes) in (2, 102)  # torchvision names the flowers since 0.22
    assert (_names(data.test), data.test.labels.tolist()) == (["image_00006", "image_00005"], [1, 0])
    assert data.validation.classes == data.train.classes


def test_stanford_cars(tmp_path: Path) -> None:
    from scipy.io import savemat

    place = tmp_path / "stanford_cars"
    (place / "devkit").mkdir(parents=True)
    savemat(place / "devkit" / "cars_meta.mat", {"class_names": np.array(["Acura", "Volvo"], dtype=object)})
    kind = [("fname", object), ("class", np.uint8)]
    annotations = {
        split: np.array([(f"{n}.jpg", 1 + (n + start) % 2) for n in range(4)], dtype=kind)
        for start, split in enumerate(("train", "test"))
    }
    savemat(place / "devkit" / "cars_train_annos.mat", {"annotations": annotations["train"]})
    savemat(place / "cars_test_annos_withlabels.mat", {"annotations": annotations["test"]})
    for folder in ("cars_train", "cars_test"):
        for number in range(4):
            _picture(place / folder / f"{number}.jpg")
    data = open_dataset(tmp_path)
    assert data.classes == ("Acura", "Volvo")
    assert data.test.labels.tolist() == [1, 0, 1, 0]
    assert sorted(data.train.labels.tolist() + data.validation.labels.tolist()) == [0, 0, 1, 1]
