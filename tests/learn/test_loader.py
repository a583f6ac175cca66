"""Batches: the same whatever the workers or the place of a restart; bad images left out; pixels as Pillow has them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convscale.conditions import Size, sides
from convscale.errors import SystemTrouble, UserError, stop_if_system
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.images.splits import ArraySplit, FileSplit, Split
from convscale.learn.augment import crop_box, mix_seed
from convscale.learn.loader import Batch, EvalImages, TrainLoader, eval_batches, into_memory, measure_mean_std, readable
from convscale.learn.recipe import Recipe
from convscale.learn.train import train
from convscale.learn.validate import Validation
from tests.learn.nets import halves, halves_data, small_net

FILES = Recipe(name="files", batch_size=4, augment="resized-crop")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, base in (("a", 40), ("b", 160)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(9):
            pixels = random.integers(base, base + 80, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((60, 48), Image.Resampling.BICUBIC).save(
                tmp_path / "data" / name / f"{number}.jpg", quality=95
            )
    return tmp_path / "data"


def _train_split(folder: Path) -> FileSplit:
    data = open_dataset(folder)
    assert isinstance(data.train, FileSplit)
    return data.train


def _equal(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.indices, b.indices) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("augment", ["resized-crop", "shift-crop"])
def test_workers_and_restarts_change_nothing(folder: Path, augment: str) -> None:
    split = _train_split(folder)
    recipe = FILES.override({"augment": augment, "policy": "randaugment" if augment == "resized-crop" else "none"})
    alone, pair = (TrainLoader(split, recipe, image_size=16, seed=1, workers=workers) for workers in (0, 2))
    whole = list(alone.batches(3))
    assert len(whole) == len(split) // 4
    assert _equal(whole, list(pair.batches(3)))
    assert _equal(whole[2:], list(pair.batches(3, start=2)))
    assert not _equal(whole, list(alone.batches(4)))
    assert sorted(torch.cat([batch.indices for batch in whole]).tolist()) == sorted(
        set(torch.cat([batch.indices for batch in whole]).tolist())
    )
    assert torch.equal(whole[0].labels, split.labels[whole[0].indices])


def test_a_samples_augmentation_does_not_depend_on_its_batch() -> None:
    split, recipe = halves(32), Recipe(name="x", augment="shift-crop", cutout=0.3, shift=0.2)
    by_size = []
    for size in (4, 8):
        loader = TrainLoader(split, recipe.override({"batch_size": size}), image_size=12, seed=9)
        batches = list(loader.batches(0))
        images = torch.empty(32, 12, 12, 1, dtype=torch.uint8)
        images[torch.cat([batch.indices for batch in batches])] = torch.cat([batch.images for batch in batches])
        by_size.append(images)
    assert torch.equal(*by_size)
    assert not torch.equal(by_size[0], split.images)


def test_two_processes_share_the_global_batch() -> None:
    split, recipe = halves(32), Recipe(name="x", augment="shift-crop", batch_size=8)
    whole = list(TrainLoader(split, recipe, image_size=12).batches(0))
    half = recipe.override({"batch_size": 4})
    parts = [list(TrainLoader(split, half, image_size=12, rank=rank, world=2).batches(0)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.images, torch.cat([parts[0][step].images, parts[1][step].images]))


@pytest.mark.parametrize("size", [16, (20, 12), (8, 24)])
def test_pixels_are_those_of_pillow(folder: Path, size: Size) -> None:
    """A rectangle is written (height, width); its crops have its shape, give or take a third."""
    split, (rows, columns) = _train_split(folder), sides(size)
    loader = TrainLoader(split, FILES, image_size=size, seed=5, workers=0)
    for batch in loader.batches(0):
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            random = np.random.Generator(np.random.Philox(key=mix_seed(5, 3, 0, index)))
            top, left, height, width = crop_box(48, 60, random, min_scale=0.08, aspect=columns / rows)
            picture = (
                Image.open(split.name(index))
                .crop((left, top, left + width, top + height))
                .resize((columns, rows), Image.Resampling.BILINEAR)
            )
            golden = np.asarray(
                picture if random.random() >= 0.5 else picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            ).astype(int)
            assert np.abs(image.numpy().astype(int) - golden).max() <= 1


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_rectangle_stretches_no_more_than_a_square(tmp_path: Path, orientation: int, scaled: bool) -> None:
    """Red counts columns and green rows of the upright picture: their slopes say how far a crop was stretched."""
    y, x = np.mgrid[0:300, 0:500]
    upright = np.stack([x * 255 / 500, y * 255 / 500, 0 * x], axis=2).round().astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else np.rot90(upright)  # EXIF 6: to be turned by 90 degrees clockwise
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "0.jpg", quality=95, exif=exif)
    split = FileSplit(
        split="train",
        classes=("a",),
        labels=torch.zeros(1, dtype=torch.long),
        channels=3,
        paths=(str(tmp_path / "0.jpg"),),
    )
    recipe = FILES.override({"batch_size": 1, "scaled_decode": scaled, "flip": 0, "crop_scale": 0.2})
    loader = TrainLoader(split, recipe, image_size=(24, 72), workers=0)
    for epoch in range(6):
        image = next(loader.batches(epoch)).images[0].numpy().astype(float)
        assert image.shape == (24, 72, 3)
        columns_per_pixel = (image[:, -4, 0] - image[:, 3, 0]).mean() / 65
        rows_per_pixel = (image[-4, :, 1] - image[3, :, 1]).mean() / 17
        assert 0.7 < columns_per_pixel / rows_per_pixel < 1.43


def test_evaluation_crops_a_rectangle(tmp_path: Path) -> None:
    """A picture of 48 x 64 (height x width) just covers 24 x 16 at half its size; its middle 16 columns are seen."""
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "0.png")
    golden = np.asarray(picture.resize((32, 24), Image.Resampling.BILINEAR)).astype(int)[:, 8:24]
    labels = torch.zeros(1, dtype=torch.long)
    files = FileSplit(split="test", classes=("a",), labels=labels, channels=3, paths=(str(tmp_path / "0.png"),))
    plain = Preprocessing(image_size=(24, 16), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0)
    memory, _ = into_memory(files, plain)
    pixels = torch.from_numpy(np.array(picture))[None]
    array = ArraySplit(split="test", classes=("a",), labels=labels, channels=3, pixels=pixels)
    for split in (files, memory, array):
        (batch,) = eval_batches(split, plain)
        assert np.abs(batch.images[0].numpy().astype(int) - golden).max() <= 1
        (images,) = EvalImages(split, plain)
        assert np.array_equal(images, batch.images.numpy())
    for augment in ("none", "shift-crop"):
        recipe = Recipe(name="x", batch_size=1, augment=augment, shift=0, flip=0)
        (batch,) = TrainLoader(files, recipe, image_size=(24, 16), workers=0).batches(0)
        assert np.abs(batch.images[0].numpy().astype(int) - golden).max() <= 1


def test_scaled_decoding_shows_the_same_place(tmp_path: Path) -> None:
    y, x = np.mgrid[0:400, 0:640]
    smooth = np.stack([x * 255 // 640, y * 255 // 400, (x + y) * 255 // 1040], axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth).save(tmp_path / "0.jpg", quality=95)
    Image.fromarray(smooth).save(tmp_path / "1.jpg", quality=95, exif=exif)
    paths = tuple(str(tmp_path / f"{number}.jpg") for number in (0, 1))
    split = FileSplit(split="train", classes=("a", "b"), labels=torch.tensor([0, 1]), channels=3, paths=paths)
    recipe = FILES.override({"batch_size": 2})
    for epoch in range(3):
        full, scaled = (
            next(TrainLoader(split, recipe.override({"scaled_decode": value}), image_size=32, workers=0).batches(epoch))
            for value in (False, True)
        )
        assert torch.equal(full.indices, scaled.indices)
        upright = int((full.indices == 0).nonzero())
        difference = (full.images[upright].int() - scaled.images[upright].int()).abs()
        assert 0 < int(difference.max()) <= 8


def test_unreadable_images_are_left_out_and_reported(folder: Path) -> None:
    data = open_dataset(folder)
    broken = Path(data.train.name(3))
    broken.write_bytes(broken.read_bytes()[:500])  # its header is still right
    loader = TrainLoader(data.train, FILES, image_size=16, workers=2)
    batches = list(loader.batches(0)) + list(loader.batches(1))
    assert 3 not in torch.cat([batch.indices for batch in batches]).tolist()
    problems = {problem for batch in batches for problem in batch.bad}
    assert problems == {f"{broken}: JPEG image is truncated"}
    plain = Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    held, bad = into_memory(data.train, plain)
    assert bad == (f"{broken}: JPEG image is truncated",)
    assert len(held) == len(data.train) - 1
    assert torch.equal(held.images[3], plain.resize(data.train.read(4)))
    for number in (5, 6):
        Path(data.train.name(number)).write_bytes(b"\xff\xd8\xff")
    with pytest.raises(
        UserError, match=r"3 of 14 train images \(21.4%\) can not be decoded, at most 1.0% may be; first: "
    ):
        into_memory(data.train, plain)


def test_a_set_without_an_image_left_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, plain = (
        _train_split(folder).subset([0], "validation"),
        Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1)),
    )
    path = Path(one.name(0))
    path.write_bytes(path.read_bytes()[:500])
    for held in (10**9, 1):
        monkeypatch.setattr("convscale.learn.loader.MEMORY_BYTES", held)
        for read in (into_memory, readable) if held > 1 else (readable,):
            with pytest.raises(
                UserError,
                match=rf"^no readable image is left of the validation set; first: {path}: JPEG image is trunc",
            ):
                read(one, plain)
    with pytest.raises(UserError, match=r"^the validation set has no image$"):
        into_memory(one.subset([]), plain)


@pytest.mark.parametrize("memory", [1, 10**9])
def test_as_many_may_be_unreadable_as_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """In memory, and read in batches."""
    split, plain = open_dataset(folder).train, Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    for number in (3, 5, 6):
        broken = Path(split.name(number))
        broken.write_bytes(broken.read_bytes()[:500])
    monkeypatch.setattr("convscale.learn.loader.MEMORY_BYTES", memory)
    held, bad = readable(split, plain, max_bad_rate=0.25)
    assert [problem.split(": ")[0] for problem in bad] == [split.name(number) for number in (3, 5, 6)]
    assert held.labels.tolist() == [int(label) for at, label in enumerate(split.labels) if at not in (3, 5, 6)]
    with pytest.raises(UserError, match=r"3 of 14 train images \(21.4%\) can not be decoded, at most 20.0% may be"):
        readable(split, plain, max_bad_rate=0.2)


@pytest.mark.parametrize("workers", [None, 0, 3])
def test_a_set_is_held_by_as_many_processes_as_are_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    split, seen = _train_split(folder), []
    many, plain = split.subset([0, 1] * 128), Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1))

    def batches(samples: object, chunks: list[torch.Tensor], workers: int) -> Iterator[Batch]:
        seen.append(workers)
        some = torch.zeros(256, 16, 16, 3, dtype=torch.uint8)
        yield Batch(images=some, labels=many.labels, indices=torch.arange(256))

    monkeypatch.setattr("convscale.learn.loader._file_batches", batches)
    monkeypatch.setattr("convscale.learn.loader.available_cores", lambda: 7)
    into_memory(many, plain, workers=workers)
    monkeypatch.setattr("convscale.learn.loader.MEMORY_BYTES", 1)
    readable(many, plain, workers=workers)
    assert seen == [7 if workers is None else workers] * 2


@pytest.mark.parametrize("workers", [None, 0, 3])
def test_validation_is_decoded_by_as_many_processes_as_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    seen = list[tuple[str, int | None]]()

    def validate(*_: object, **options: Any) -> Validation:
        seen.append(("validate", options["workers"]))
        return Validation(loss=1.0, top1=0.5)

    def hold(split: Split, preprocessing: Preprocessing, **options: Any) -> tuple[Split, tuple[str, ...]]:
        seen.append((split.split, options["workers"]))
        return into_memory(split, preprocessing, **options)

    monkeypatch.setattr("convscale.learn.loop.validate", validate)
    monkeypatch.setattr("convscale.learn.prepare.into_memory", hold)
    recipe = Recipe(name="x", epochs=1, batch_size=48, augment="shift-crop", precision="fp32", layout="nchw")
    train(small_net(), halves_data(), recipe=recipe, workers=workers)
    assert seen == [(name, workers) for name in ("train", "validation", "validate")]


def test_a_worker_that_dies_ends_the_epoch_with_advice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = _train_split(folder)
    monkeypatch.setattr("convscale.learn.loader.read_bytes", lambda _: os._exit(9))  # in the worker, which inherits it
    with pytest.raises(UserError, match=r"a data loader process ended .* use fewer workers \(now 2\)"):
        list(TrainLoader(split, FILES, image_size=16, workers=2).batches(0))


def test_full_shared_memory_ends_the_epoch_with_advice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)"
        )

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the worker, which inherits it
    with pytest.raises(
        UserError,
        match=r"No space left on device \(28\)\); memory or /dev/shm may be full: use fewer workers \(now 2\)",
    ):
        list(TrainLoader(_train_split(folder), FILES, image_size=16, workers=2).batches(0))


def test_another_error_of_a_worker_is_not_taken_for_full_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("sizes differ")

    monkeypatch.setattr("convscale.learn.loader.read_bytes", broken)
    with pytest.raises(RuntimeError, match="sizes differ"):
        list(TrainLoader(_train_split(folder), FILES, image_size=16, workers=2).batches(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_trouble_of_the_system_in_a_worker_is_told_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fail(path: str) -> bytearray:
        stop_if_system(OSError(errno.ESTALE, "stale"), path)
        raise AssertionError

    split = _train_split(folder)
    monkeypatch.setattr("convscale.learn.loader.read_bytes", fail)
    with pytest.raises(SystemTrouble) as caught:
        list(TrainLoader(split, FILES, image_size=16, workers=workers).batches(0))
    path, _, said = str(caught.value).partition(": ")
    assert path in split.paths
    assert said == "the network folder it is in went away: mount it again"


def test_evaluation_reads_every_image_once_in_order(folder: Path) -> None:
    split = _train_split(folder)
    plain = Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    batches = list(eval_batches(split, plain, batch_size=5))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(len(split)))
    assert torch.equal(batches[1].images[2], plain.resize(split.read(7)))
    array = halves(10)
    resized = next(eval_batches(array, Preprocessing(image_size=8, channels=1, mean=(0,), std=(1,), crop_pct=1.0)))
    assert resized.images.shape == (10, 8, 8, 1)


def test_balanced_sampling_evens_the_classes() -> None:
    split = halves(300).subset([*range(0, 300, 3), *range(1, 30, 3)])  # 100 dark, 10 left, no top
    loader = TrainLoader(split, Recipe(name="x", balanced=True, batch_size=10, augment="none"), image_size=12)
    drawn = torch.bincount(split.labels[torch.cat([loader.order(epoch) for epoch in range(10)])], minlength=3)
    assert 450 < drawn[0] < 650
    assert 450 < drawn[1] < 650
    assert drawn[2] == 0


def test_mean_and_std_by_numpy() -> None:
    split = halves(40)
    values = split.images.numpy() / 255
    mean, std = measure_mean_std(split)
    assert mean == (pytest.approx(values.mean(), abs=1e-4),)
    assert std == (pytest.approx(values.std(), abs=1e-4),)


@pytest.mark.parametrize(("images", "measured"), [(19, 19), (20, 10), (29, 15), (30, 10), (100, 10)])
def test_mean_and_std_look_at_as_many_images_as_they_say(images: int, measured: int) -> None:
    """Of 29 images and a sample of 10 every second one, 15: its docstring said "at most" 10."""
    pixels = torch.zeros(images, 1, 1, 1, dtype=torch.uint8)
    pixels[0] = 255
    split = ArraySplit(split="train", classes=("a",), labels=torch.zeros(images).long(), channels=1, pixels=pixels)
    assert measure_mean_std(split, sample=10)[0] == (round(1 / measured, 4),)


def test_a_batch_that_two_processes_can_not_fill_is_refused_with_the_right_advice() -> None:
    recipe = Recipe(name="x", batch_size=60)
    with pytest.raises(UserError, match=r"60 x 2 processes is larger than the train set \(96 images\); use at most 48"):
        TrainLoader(halves(96), recipe, image_size=12, world=2)
    TrainLoader(halves(96), recipe.override({"batch_size": 48}), image_size=12, world=2)


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size 64 is larger than the train set \(32 images\); use at most 32"):
        TrainLoader(halves(32), Recipe(name="x", batch_size=64), image_size=12)


def test_a_set_too_large_for_memory_is_read_in_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, plain = _train_split(folder), Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1))
    golden = np.stack([plain.resize(split.read(index)).numpy() for index in range(len(split)) if index != 3])
    labels = [int(label) for index, label in enumerate(split.labels) if index != 3]
    broken = Path(split.name(3))
    broken.write_bytes(broken.read_bytes()[:500])
    monkeypatch.setattr("convscale.learn.loader.MEMORY_BYTES", 1)
    held, bad = readable(split, plain)
    assert held.images is None
    assert bad == (f"{broken}: JPEG image is truncated",)
    assert held.labels.tolist() == labels
    done: list[int] = []
    images = EvalImages(held, plain, batch_size=4, on_images=done.append)
    for _ in range(2):  # more than once
        assert np.array_equal(np.concatenate(list(images)), golden)
    assert done == 2 * [*range(0, len(golden), 4), len(golden)]
    assert np.array_equal(images[1], golden[4:8])
    assert np.array_equal(images[-1], golden[4 * (len(images) - 1) :])
    monkeypatch.setattr("convscale.learn.loader.MEMORY_BYTES", 10**9)
    held, _ = readable(split, plain)
    assert held.images is not None
    assert np.array_equal(np.concatenate(list(EvalImages(held, plain))), golden)


def test_a_set_held_in_memory_is_cropped_once(folder: Path) -> None:
    split, cropped = _train_split(folder), Preprocessing(image_size=16, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=0.8)
    held, _ = into_memory(split, cropped)
    golden = torch.stack([cropped.resize(split.read(index)) for index in range(len(split))])
    assert held.images is not None
    assert torch.equal(held.images, golden)
    assert torch.equal(next(eval_batches(held.subset(range(5)), cropped)).images, golden[:5])
    again, _ = into_memory(held, cropped)
    assert again.images is not None
    assert torch.equal(again.images, golden)
    raw = ArraySplit(
        split="test", classes=("a", "b"), labels=held.labels, channels=3, pixels=golden
    )  # a user's own, of the same size
    assert torch.equal(
        next(eval_batches(raw, cropped)).images, torch.stack([cropped.resize(image) for image in golden])
    )


@pytest.mark.parametrize("scaled", [False, True])
def test_a_picture_without_area_is_left_out(folder: Path, scaled: bool) -> None:
    split = _train_split(folder)
    path = Path(split.name(2))
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 2] = b"\0\0"  # a height of 0, as files have whose height comes later
    path.write_bytes(data)
    loader = TrainLoader(split, FILES.override({"scaled_decode": scaled}), image_size=16, workers=0)
    batches = [batch for epoch in range(4) for batch in loader.batches(epoch)]
    assert {problem for batch in batches for problem in batch.bad} == {
        f"{path}: JPEG image of 60 x 0 pixels has no area"
    }
    assert 2 not in torch.cat([batch.indices for batch in batches]).tolist()
