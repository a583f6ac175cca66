"""What is said of a data set before training: by hand-made sets and real photographs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from convscale.errors import UserError
from convscale.images import check, duplicates
from convscale.images.check import check_data, majority_share
from convscale.images.duplicates import evenly
from convscale.images.sources import open_dataset
from convscale.images.splits import ArraySplit, DataSplits

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "page", "clock", "moon", "text", "grass")


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(photographs, name)())


def save(path: Path, picture: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def noise(seed: int, size: tuple[int, int] = (20, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of 10, 2 and 2 different pictures."""
    for number in range(28):
        split = "train" if number < 20 else "val" if number < 24 else "test"
        save(tmp_path / split / "ab"[number % 2] / f"{number}.png", noise(number))
    return tmp_path


def arrays(labels: dict[str, list[int]], pixels: dict[str, np.ndarray], classes: tuple[str, ...]) -> DataSplits:
    made = {
        name: ArraySplit(
            split=name,
            classes=classes,
            labels=torch.tensor(labels[name]),
            channels=3,
            pixels=torch.from_numpy(pixels[name]),
        )
        for name in ("train", "validation", "test")
    }
    return DataSplits(**made, classes=classes)


def test_nothing_is_said_of_a_sound_set(tree: Path) -> None:
    found = check_data(tree, 20)
    assert found.warnings == ()
    assert (found.train, found.validation, found.test) == (20, 4, 4)
    assert (found.duplicates.contents_compared, found.duplicates.fingerprints_compared) == (28, 28)
    assert found.seconds > 0
    assert json.loads(json.dumps(found.to_dict()))["duplicates"]["across_splits"] == {
        "exact": 0,
        "near": 0,
        "examples": [],
    }


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize(("quality", "scale"), [(95, 1), (60, 1), (30, 1), (75, 0.5)])
def test_a_re_encoded_photograph_is_found_across_splits(tree: Path, name: str, quality: int, scale: float) -> None:
    original = photo(name).convert("RGB")
    first = save(tree / "train" / "a" / "original.png", original)
    smaller = original.resize((round(original.width * scale), round(original.height * scale)))
    second = save(tree / "test" / "a" / "copy.jpg", smaller, quality=quality)
    pairs = check_data(tree).duplicates.across_splits
    assert (pairs.exact, pairs.near) == (0, 1)
    assert [(each.split, each.name, each.label) for each in pairs.examples[0][:2]] == [
        ("train", str(first), "a"),
        ("test", str(second), "a"),
    ]


def test_different_photographs_are_told_apart(tree: Path) -> None:
    """Also two cuts of one scene, a mirrored one, and neighbouring tiles of one texture."""
    astronaut, grass = photo("astronaut"), photo("grass").convert("RGB")
    for number, name in enumerate(PHOTOS):
        save(tree / ("train", "test")[number % 2] / "a" / f"{name}.jpg", photo(name).convert("RGB"))
    save(tree / "test" / "b" / "mirrored.jpg", astronaut.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    save(tree / "test" / "b" / "cut.jpg", astronaut.crop((40, 40, 470, 470)))
    for number in range(16):
        left, top = 128 * (number % 4), 128 * (number // 4)
        save(
            tree / ("train", "test")[number % 2] / "b" / f"tile{number}.jpg",
            grass.crop((left, top, left + 128, top + 128)),
        )
    found = check_data(tree).duplicates
    assert (found.across_splits.total, found.two_labels.total) == (0, 0)


def test_gray_and_transparent_copies_are_found(tree: Path) -> None:
    coffee = photo("coffee")
    save(tree / "train" / "a" / "coffee.jpg", coffee)
    save(tree / "test" / "a" / "gray.png", coffee.convert("L"))
    shape = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    shape.paste(photo("rocket").resize((150, 120)), (30, 40))
    white = Image.new("RGBA", shape.size, (255, 255, 255, 255))
    save(tree / "train" / "b" / "clear.png", shape)
    save(tree / "val" / "b" / "white.jpg", Image.alpha_composite(white, shape).convert("RGB"))
    pairs = check_data(tree).duplicates.across_splits
    assert pairs.near == 2
    assert {tuple(Path(each.name).name for each in pair[:2]) for pair in pairs.examples} == {
        ("coffee.jpg", "gray.png"),
        ("clear.png", "white.jpg"),
    }


def test_the_same_shape_in_another_colour_is_another_picture(tree: Path) -> None:
    """Red (130, 0, 0) is as bright as green (0, 66, 0): 0.299 * 130 = 0.587 * 66.2."""
    mask = np.zeros((64, 64, 1), dtype=bool)
    mask[16:48, 8:40] = True
    for split, name, colour in (("train", "red", (130, 0, 0)), ("test", "green", (0, 66, 0))):
        picture = np.where(mask, np.array(colour, dtype=np.uint8), np.uint8(0))
        save(tree / split / "a" / f"{name}.png", Image.fromarray(picture))
    assert check_data(tree).duplicates.across_splits.total == 0


def test_flat_pictures_are_no_copies_unless_equal(tree: Path) -> None:
    save(tree / "train" / "a" / "flat.png", Image.new("RGB", (30, 30), (99, 99, 99)))
    save(tree / "test" / "a" / "flat.png", Image.new("RGB", (30, 30), (100, 99, 99)))
    assert check_data(tree).duplicates.across_splits.total == 0
    save(tree / "val" / "a" / "flat.png", Image.new("RGB", (30, 30), (99, 99, 99)))
    assert check_data(tree).duplicates.across_splits[:2] == (1, 0)


def test_pairs_of_equal_files_are_counted(tree: Path) -> None:
    """Three copies in train (a, a, b) and two in test (a, a): 10 pairs, 3 x 2 of them across, 1 x 4 with two labels."""
    same = noise(0)
    for split, name, number in (("train", "a", 1), ("train", "b", 2), ("test", "a", 3), ("test", "a", 4)):
        save(tree / split / name / f"copy{number}.png", same)
    save(tree / "train" / "a" / "other-of-equal-size.bmp", noise(50))
    save(tree / "test" / "a" / "other-of-equal-size.bmp", noise(51))
    found = check_data(tree)
    assert found.duplicates.across_splits[:2] == (6, 0)
    assert found.duplicates.two_labels[:2] == (4, 0)
    across, labels = found.warnings
    assert across.startswith(
        "6 pairs of the same picture in two splits, where results are too good for it (6 equal, 0 alike): "
    )
    assert labels.startswith("4 pairs of the same picture with different labels (4 equal, 0 alike): ")
    assert f"{tree / 'train' / 'a' / '0.png'} (a) and {tree / 'train' / 'b' / 'copy2.png'} (b)" in labels


def test_large_files_with_equal_ends_are_read_whole(tree: Path) -> None:
    """Uncompressed, more than 16 KiB, and different at the far end alone: a bitmap's last rows are its upper ones."""
    pixels = np.asarray(noise(60, (100, 100))).copy()
    save(tree / "train" / "a" / "one.bmp", Image.fromarray(pixels))
    pixels[-1, -1] ^= 255
    save(tree / "test" / "a" / "two.bmp", Image.fromarray(pixels))
    assert check_data(tree).duplicates.across_splits[:2] == (0, 1)


def test_arrays_by_hand() -> None:
    """Image 1 of train is in test with another label, and, a level brighter, in validation."""
    rng = np.random.default_rng(0)
    pixels = {
        name: rng.integers(0, 200, (count, 16, 16, 3), dtype=np.uint8)
        for name, count in (("train", 24), ("validation", 2), ("test", 2))
    }
    pixels["test"][0] = pixels["train"][1]
    pixels["validation"][1] = pixels["train"][1] + 1
    labels = {"train": [0] * 23 + [1], "validation": [0, 0], "test": [1, 0]}
    found = check_data(arrays(labels, pixels, ("x", "y")), (16, 17))
    assert found.duplicates.across_splits[:2] == (1, 2)  # train and test; either and validation
    assert found.duplicates.two_labels[:2] == (1, 1)
    assert [tuple(pair[:2]) for pair in found.duplicates.two_labels.examples] == [
        (("train", "train#1", "x"), ("test", "test#0", "y")),
        (("validation", "validation#1", "x"), ("test", "test#0", "y")),
    ]
    assert found.tiny_classes == (("y", 1),)
    assert found.without_validation == ("y",)
    assert found.without_test == ()
    assert found.sizes is not None
    assert found.sizes.share == 1
    lines = "\n".join(found.warnings)
    assert "1 class has fewer than 10 train images: y (1)" in lines
    assert "95.8 % of the train images are x" in lines  # 23 of 24
    assert "1 class has no image for validation (y)" in lines
    assert "100 % of 24 train images looked at are smaller than the input of 16x17 px" in lines


def test_five_tiny_classes_are_named() -> None:
    classes = tuple("abcdefg")
    pixels = {
        name: np.random.default_rng(seed).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
        for seed, (name, count) in enumerate((("train", 37), ("validation", 7), ("test", 7)))
    }
    counts = [9, 8, 7, 6, 5, 1, 1]
    labels = {
        "train": [label for label, count in enumerate(counts) for _ in range(count)],
        "validation": list(range(7)),
        "test": list(range(7)),
    }
    (line,) = check_data(arrays(labels, pixels, classes)).warnings
    assert line == "7 classes have fewer than 10 train images: f (1), g (1), e (5), d (6), c (7) and 2 more"


def test_several_labels(tree: Path) -> None:
    rows = [
        {"path": str(path.relative_to(tree)), "labels": ["all"] + ["b"] * (path.parent.name == "b"), "split": split}
        for split in ("train", "val", "test")
        for path in sorted((tree / split).rglob("*.png"))
    ]
    save(tree / "copy.png", noise(1))  # train/b/1.png
    rows.append({"path": "copy.png", "labels": ["all"], "split": "test"})
    manifest = tree / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = check_data(manifest)
    assert found.multilabel
    assert found.largest_class == ("all", 20)
    lines = "\n".join(found.warnings)
    assert "100 % of the train images are all: its average precision is high" in lines
    assert "b/1.png (all|b) and " in lines


def test_labels_that_are_not_known_are_no_difference() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    nan = float("nan")
    rows = {
        "train": [[1, nan, 0], [1, 0, 0], [nan, nan, nan]],
        "validation": [[1, nan, 0], [1, nan, nan], [nan, nan, nan]],
        "test": [[1, nan, nan], [0, 1, nan], [nan, nan, 1]],
    }
    made = {
        name: ArraySplit(
            split=name, classes=("x", "y", "z"), labels=torch.tensor(each), channels=3, pixels=torch.from_numpy(pixels)
        )
        for name, each in rows.items()
    }
    found = check_data(DataSplits(**made, classes=("x", "y", "z"))).duplicates
    assert (found.across_splits.exact, found.two_labels.exact) == (9, 4)  # two pairs each of the second and the third
    assert found.two_labels.describe("twice", labels=True).endswith(
        ": train#1 (x) and test#1 (y); train#2 (no label) and test#2 (z) ..."
    )


def test_a_folder_is_looked_at_however_many_files_are_bad(tree: Path) -> None:
    """From Python too many ended it, where the command lists them."""
    for number in range(5):
        (tree / "train" / "a" / f"empty{number}.png").write_bytes(b"")
    cut = save(tree / "train" / "b" / "cut.jpg", photo("astronaut"))
    cut.write_bytes(cut.read_bytes()[:20_000])
    found = check_data(tree, every=True)
    names = [*(f"empty{number}.png" for number in range(5)), "cut.jpg"]
    assert [name in problem for name, problem in zip(names, found.bad, strict=True)] == [True] * 6


def test_undecodable_pictures_are_counted(tree: Path) -> None:
    whole = save(tree / "train" / "a" / "cut.jpg", photo("astronaut")).read_bytes()
    (tree / "train" / "a" / "cut.jpg").write_bytes(whole[:20_000])
    splits = open_dataset(tree)
    Path(splits.train.name(0)).unlink()  # gone after the set was opened
    found = check_data(splits, 224)
    assert len(found.duplicates.undecodable) == 2
    assert found.sizes is not None
    assert found.sizes.checked == 20
    assert any(line.startswith("2 of 29 images looked at can not be decoded; first: ") for line in found.warnings)


def test_a_turned_picture_has_the_size_it_is_shown_at(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter: 40 x 80 is shown 80 high and 40 wide
    for split in ("train", "val", "test"):
        for number, name in enumerate("ab"):
            save(tmp_path / split / name / "x.jpg", noise(number, (40, 80)), exif=exif)
    for size, smaller in (((80, 40), 0), ((40, 80), 2), (41, 2), (40, 0)):
        sizes = check_data(tmp_path, size).sizes
        assert sizes is not None
        assert sizes.smaller == smaller


def test_few_are_decoded_half_of_them_from_train(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MOST_DECODED", 12)
    seen: list[str] = []
    real = duplicates._thumbnail
    monkeypatch.setattr(duplicates, "_thumbnail", lambda split, number: seen.append(split.split) or real(split, number))
    found = check_data(tree).duplicates
    assert (found.fingerprints_compared, found.contents_compared) == (12, 28)
    assert sorted(seen) == ["test"] * 3 + ["train"] * 6 + ["validation"] * 3


def test_few_files_are_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files of one size those above the cap are left out, and that is said."""
    monkeypatch.setattr(duplicates, "_MOST_READ", 4)
    for number in range(6):
        save(tree / "train" / "a" / f"{number}.bmp", noise(100 + number))
    assert check_data(tree).duplicates.contents_compared <= 34 - 2


def test_evenly() -> None:
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly(3, 4).tolist() == [0, 1, 2]
    assert evenly(0, 4).tolist() == []


def test_bad_input(tree: Path) -> None:
    with pytest.raises(UserError, match="image_size must be a whole number"):
        check_data(tree, 0)
    with pytest.raises(UserError, match="does not exist"):
        check_data(tree / "none")


def test_majority_share_by_hand() -> None:
    assert majority_share([0, 1, 1, 2]) == 0.5
    assert majority_share([0, 1, 1, 2], [2, 2, 1]) == 0.25  # the train set's most frequent class is 2
    assert majority_share(torch.tensor([0, 1, 1, 1])) == 0.75
    assert np.isnan(majority_share([]))
    # 2 of 4 images have the first class, 1 the second, none the third
    assert majority_share([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]) == pytest.approx((0.5 + 0.25) / 2)


def test_majority_share_is_the_average_precision_of_constant_answers() -> None:
    from torchmetrics.functional.classification import multilabel_average_precision

    truth = (torch.rand(50, 4) < torch.tensor([0.1, 0.3, 0.6, 0.9])).long()
    golden = multilabel_average_precision(truth.float().mean(0).expand(50, 4), truth, num_labels=4)
    assert majority_share(truth) == pytest.approx(golden.item())


def test_fashion_mnist_is_sound(fashion_mnist_dir: Path) -> None:
    """Its clothes look much alike at 28 px, and none is called a copy of another."""
    found = check_data(open_dataset(fashion_mnist_dir), 28)
    assert found.warnings == ()
    assert (found.duplicates.contents_compared, found.duplicates.fingerprints_compared) == (70_000, 5_000)
