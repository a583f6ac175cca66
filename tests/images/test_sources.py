"""Data sources: what is found, carved, and refused."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convscale.errors import UserError
from convscale.images.idx import FASHION_CLASSES, read_idx
from convscale.images.sources import open_dataset


def test_tree_with_all_splits(make_tree) -> None:
    root = make_tree({"train": {"b": 3, "a": 2}, "val": {"a": 1, "b": 1}, "test": {"a": 1, "b": 2}})
    data = open_dataset(root)
    assert data.classes == ("a", "b")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [5, 2, 3]
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.test.name(2).endswith("test/b/001.jpg")
    assert data.notes == ()
    image = data.test.read(2)
    assert image.shape == (10, 12, 3)
    golden = np.asarray(Image.open(data.test.name(2))).astype(int)
    assert np.abs(image.numpy().astype(int) - golden).max() <= 1


def test_missing_splits_are_carved_stratified_and_seeded(make_tree) -> None:
    root = make_tree({"cat": 40, "dog": 20})
    data = open_dataset(root, seed=3)
    assert data.train.class_counts().tolist() == [32, 16]
    assert data.validation.class_counts().tolist() == [4, 2]
    assert data.test.class_counts().tolist() == [4, 2]
    names = [split.paths for split in (data.train, data.validation, data.test)]
    assert len(set().union(*names)) == 60
    assert "no validation and no test set found" in data.notes[0]
    again, other = open_dataset(root, seed=3), open_dataset(root, seed=4)
    assert again.validation.paths == data.validation.paths
    assert other.validation.paths != data.validation.paths


def test_class_folders_that_differ_are_named(make_tree) -> None:
    root = make_tree({"train": {"a": 2, "b": 2, "c": 2}, "val": {"a": 1, "b": 1, "d": 1}})
    with pytest.raises(UserError, match="differ between train/ and val/; only in train/: c; only in val/: d"):
        open_dataset(root)


def test_unreadable_images_are_counted_and_skipped_up_to_a_rate(make_tree) -> None:
    root = make_tree({"a": 30, "b": 30})
    (root / "a" / "000.jpg").write_bytes(b"")
    data = open_dataset(root)
    assert "1 of 60 train images are unreadable and left out; first: " in data.notes[0]
    assert "a/000.jpg" in data.notes[0]
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 59
    for number in range(1, 4):
        (root / "a" / f"{number:03d}.jpg").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"4 of 60 train images \(6.7%\) are unreadable, at most 1.0% .* first: .*000.jpg"
    ):
        open_dataset(root)
    assert "4 of 60" in open_dataset(root, max_bad_rate=0.1).notes[0]


def test_a_set_that_loses_all_of_its_images_is_told(make_tree) -> None:
    root = make_tree({"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 0}, "test": {"a": 1, "b": 1}})
    (root / "val" / "a" / "000.jpg").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"^no readable image is left of the validation set; first: .*val/a/000.jpg: the file is empty$"
    ):
        open_dataset(root)
    splits = open_dataset(root, listing=True)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (6, 0, 2)
    assert len(splits.unreadable) == 1


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"only": 5}, r"only 1 class \('only'\)"),
        ({"a": 1, "b": 1}, r"class 'a' has 1 image\(s\), too few"),
        ({"train": {"a": 2, "b": 0}}, "without an image: b"),
        ({"val": {"a": 2, "b": 2}}, "there is val/ but no train/"),
        ({"train": {"a": 2}, "val": {"a": 2}, "validation": {"a": 2}}, "both val/ and validation/"),
    ],
)
def test_bad_trees(make_tree, layout: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(make_tree(layout))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images found"):
        open_dataset(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.xyz").touch()
    with pytest.raises(
        UserError, match=r"no images found; left out: files without an image's extension: 1 \(1 .xyz; first: .*x.xyz\)"
    ):
        open_dataset(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match=r"x.txt is a file; name a folder, or a manifest"):
        open_dataset(tmp_path / "x.txt")
    with pytest.raises(UserError, match="channels must be 1"):
        open_dataset(tmp_path, channels=2)


def _write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, packed: bool = True) -> None:
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        data = (
            bytes([0, 0, 8, values.ndim])
            + struct.pack(f">{values.ndim}I", *values.shape)
            + values.astype(np.uint8).tobytes()
        )
        path = folder / f"{part}-{kind}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)


@pytest.mark.parametrize("packed", [True, False])
def test_idx(tmp_path: Path, packed: bool) -> None:
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    images = np.arange(100 * 6).reshape(100, 2, 3) % 251
    _write_idx(folder, "train", images, np.arange(100) % 10, packed)
    _write_idx(folder, "t10k", images[:20], np.arange(20) % 10, packed)
    data = open_dataset(folder)
    assert data.classes == FASHION_CLASSES
    assert data.channels == 1
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 20)
    assert data.test.images.shape == (20, 2, 3, 1)
    assert data.test.read(7)[..., 0].tolist() == images[7].tolist()
    number = int(data.validation.name(4).removeprefix("train#"))
    assert torch.equal(data.validation.read(4)[..., 0], torch.from_numpy(images[number].astype(np.uint8)))
    assert int(data.validation.labels[4]) == number % 10
    colour = open_dataset(folder, channels=3)
    assert colour.train.images.shape == (90, 2, 3, 3)
    assert torch.equal(colour.train.images[..., 2], data.train.images[..., 0])


def test_idx_without_the_name_has_numbers_for_classes(tmp_path: Path) -> None:
    _write_idx(tmp_path, "train", np.zeros((60, 2, 2)), np.arange(60) % 3 + 1)
    data = open_dataset(tmp_path)
    assert data.classes == ("1", "2", "3")
    assert data.train.class_counts().tolist() == [16, 16, 16]


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"\0\0\x08\x04" + b"\0\1\0\0" * 4, "promises 65536 x 65536 x 65536 x 65536"),  # none, in 64 bits
        (b"\0\0\x08\xff" + b"\0" * 1020, "says 255 dimensions"),
        (b"\0\0\x08\x03" + b"\0" * 4 + b"\xff" * 8, "promises 0 x 4294967295 x 4294967295"),  # found by fuzzing
    ],
)
def test_an_idx_file_of_impossible_size(tmp_path: Path, head: bytes, said: str) -> None:
    (tmp_path / "x").write_bytes(head)
    with pytest.raises(UserError, match=said):
        read_idx(tmp_path / "x")


def test_damaged_idx(tmp_path: Path) -> None:
    _write_idx(tmp_path, "train", np.zeros((6, 2, 2)), np.arange(5) % 3)
    with pytest.raises(UserError, match="6 images but 5 labels"):
        open_dataset(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: can not be read"):
        open_dataset(tmp_path)
    (tmp_path / "short").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, 1, 2]))
    with pytest.raises(UserError, match="promises 9 values, it holds 2"):
        read_idx(tmp_path / "short")
    (tmp_path / "floats").write_bytes(bytes([0, 0, 13, 1, 0, 0, 0, 2, 1, 2]))
    with pytest.raises(UserError, match=r"type code 0x0d is not supported; 0x08 \(unsigned byte\) is"):
        read_idx(tmp_path / "floats")


@pytest.fixture
def pictures(make_tree) -> Path:
    return make_tree({"x": 6}, root="pictures")


def test_csv_manifest(pictures: Path) -> None:
    rows = [
        f"x/{number:03d}.jpg,{'cat' if number % 2 else 'dog'},"
        + ("test" if number > 3 else "train" if number > 1 else "val")
        for number in range(6)
    ]
    (pictures / "m.csv").write_text("\n".join(["path,label,split", *rows]))
    data = open_dataset(pictures / "m.csv")
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [1, 0]
    assert data.test.labels.tolist() == [1, 0]
    assert data.validation.read(0).shape == (10, 12, 3)
    (pictures / "m.csv").write_text("\n".join(["path,label,split", *rows, "x/000.jpg,bird,test"]))
    with pytest.raises(UserError, match=r"m.csv: label\(s\) 'bird' are not in the class list"):
        open_dataset(pictures / "m.csv")
    (pictures / "m.csv").write_text("\n".join(["path,label", "x/000.jpg,a", "x/nope.jpg,b"]))
    with pytest.raises(UserError, match=r"1 of 2 files do not exist \(first: .*nope.jpg\)"):
        open_dataset(pictures / "m.csv")
    (pictures / "m.csv").write_text("path,lable\nx/000.jpg,a")
    with pytest.raises(UserError, match=r"unknown column 'lable' \(nearest: label"):
        open_dataset(pictures / "m.csv")


def test_multilabel_manifest(pictures: Path) -> None:
    labels = [["sea", "sky"], ["sky"], [], ["sea"], ["sky", "tree"], ["tree"]]
    splits = ["train", "train", "train", "val", "train", "test"]
    lines = [
        json.dumps({"path": f"x/{n:03d}.jpg", "labels": value, "split": split})
        for n, (value, split) in enumerate(zip(labels, splits, strict=True))
    ]
    (pictures / "m.jsonl").write_text("\n".join(lines))
    data = open_dataset(pictures / "m.jsonl")
    assert data.multilabel
    assert data.classes == ("sea", "sky", "tree")
    assert data.train.labels.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1]]
    assert data.validation.labels.tolist() == [[1, 0, 0]]
    assert data.train.class_counts().tolist() == [1, 3, 1]


def test_torchvision_cifar10_from_local_files(tmp_path: Path, monkeypatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (30, 32, 32, 3), dtype=np.uint8)
    planar = pixels.transpose(0, 3, 1, 2).reshape(30, 3072)
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        (folder / name).write_bytes(pickle.dumps({"data": planar, "labels": [n % 10 for n in range(30)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(
        UserError, match="CIFAR10 can not be opened from local files"
    ):  # its checksums are torchvision's business
        open_dataset(tmp_path)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = open_dataset(tmp_path)
    assert data.classes == tuple("abcdefghij")
    assert (len(data.train), len(data.validation), len(data.test)) == (130, 20, 30)
    assert np.array_equal(data.test.images.numpy(), pixels)
    with pytest.raises(UserError, match=r"'cifra10' is unknown \(nearest: cifar10"):
        open_dataset(tmp_path, dataset="cifra10")


def test_fashion_mnist_is_known_by_its_labels() -> None:
    place = Path("/usr/share/datasets/fashion-mnist")
    if not place.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = open_dataset(place)
    assert (len(data.train), len(data.validation), len(data.test)) == (54_000, 6_000, 10_000)
    assert data.train.class_counts().tolist() == [5_400] * 10
    assert data.test.labels[:5].tolist() == [9, 2, 1, 1, 6]  # as in the data set's own documentation
