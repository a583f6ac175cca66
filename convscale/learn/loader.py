"""Batches of images: in-memory ones augmented a batch at a time, files decoded by worker processes.

The order of an epoch and every random choice depend on (seed, epoch, sample) alone, so neither the number of workers
nor a restart in the middle of an epoch changes a batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F

from convscale.conditions import Size, sides
from convscale.errors import UserError
from convscale.images.decode import ImageError, decode_image, parse_header, read_bytes
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import ArraySplit, FileSplit, Split
from convscale.learn.augment import crop_box, generator_for, mix_seed, resize_box, resized_crop, shift_crop
from convscale.learn.recipe import Recipe
from convscale.learn.workers import by_processes
from convscale.machine import available_cores

MEMORY_BYTES = 1_000_000_000
"""Sets that fit into this many bytes at the network's size are decoded once and kept, where the recipe's augmentation
allows it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Some images of a split."""

    images: torch.Tensor
    """uint8 (N, H, W, C)."""
    labels: torch.Tensor
    """As in the split, for these images."""
    indices: torch.Tensor
    """int64 (N,): which images of the split."""
    bad: tuple[str, ...] = ()
    """What was wrong with images that were left out."""


AnyBatch = TypeVar("AnyBatch", bound=Batch)


class TrainLoader:
    """Source of an epoch's training batches, from any step on.

    Args:
        split: the train set.
        recipe: batch size, augmentation, balanced sampling.
        image_size: of the batches in pixels: the side of squares, or (height, width).
        seed: fixes order and augmentation.
        workers: processes that decode files; None: one per core, none for sets in memory.
        rank: this process among ``world``.
        world: processes that share every epoch; each takes its part of a global batch of ``batch_size * world``.
    """

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        *,
        image_size: Size,
        seed: int = 0,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if recipe.augment == "scale-jitter":
            raise UserError(
                f"recipe {recipe.name}: augment scale-jitter is for pictures with boxes (--task detection); use "
                "resized-crop or none"
            )
        global_batch = recipe.batch_size * world
        if global_batch > len(split):
            processes = f" x {world} processes" if world > 1 else ""
            raise UserError(
                f"batch_size {recipe.batch_size}{processes} is larger than the train set ({len(split)} images); use at "
                f"most {len(split) // world}"
            )
        self.split, self.recipe, self.seed, self.rank, self.world = split, recipe, seed, rank, world
        self.image_size, self.asked_workers = image_size, workers
        self.steps_per_epoch = len(split) // global_batch
        self.in_memory = split.images is not None and recipe.policy == "none" and recipe.augment != "resized-crop"
        if recipe.policy != "none":  # here, not again in each loader process
            import torchvision.transforms.v2  # noqa: F401
        self.workers = 0 if self.in_memory else (available_cores() if workers is None else workers)

    def order(self, epoch: int) -> torch.Tensor:
        """int64: the split's indices in the order of ``epoch``, over all processes."""
        generator = generator_for(self.seed, 1, epoch)
        if not self.recipe.balanced:
            return torch.randperm(len(self.split), generator=generator)
        counts = self.split.class_counts().double().clamp(min=1)
        labels = self.split.labels
        weights = (
            (labels.nan_to_num().double() @ (1 / counts)).clamp(min=1e-9)
            if self.split.multilabel
            else (1 / counts)[labels]
        )
        return torch.multinomial(weights, len(self.split), replacement=True, generator=generator)

    def batches(self, epoch: int, start: int = 0, image_size: Size | None = None) -> Iterator[Batch]:
        """This process's batches of ``epoch`` from step ``start`` on.

        Args:
            epoch: counted from 0.
            start: steps to leave out, as a resumed run does.
            image_size: another size than the loader's (progressive resizing).
        """
        size = sides(image_size or self.image_size)
        order, width = self.order(epoch), self.recipe.batch_size
        chunks = []
        for step in range(start, self.steps_per_epoch):
            at = (step * self.world + self.rank) * width
            chunks.append(order[at : at + width])
        if self.in_memory:
            yield from self._memory_batches(epoch, chunks, size)
        else:
            yield from _file_batches(
                _TrainSamples(self.split, self.recipe, size, self.seed, epoch), chunks, self.workers
            )

    def _memory_batches(self, epoch: int, chunks: list[torch.Tensor], size: tuple[int, int]) -> Iterator[Batch]:
        images, recipe = self.split.images, self.recipe
        assert images is not None
        table = torch.rand(
            len(self.split), 5, generator=generator_for(self.seed, 2, epoch)
        )  # one row per sample, whatever its batch
        for indices in chunks:
            batch = images[indices]
            if recipe.augment == "shift-crop":
                side = min(batch.shape[1:3])
                batch = shift_crop(
                    batch,
                    table[indices],
                    pad=round(recipe.shift * side),
                    flip=recipe.flip,
                    cutout=round(recipe.cutout * side),
                )
            if batch.shape[1:3] != size:
                channels_first = batch.permute(0, 3, 1, 2)
                batch = F.interpolate(channels_first, size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
            yield Batch(images=batch, labels=self.split.labels[indices], indices=indices)


def eval_batches(
    split: Split, preprocessing: Preprocessing, *, batch_size: int = 256, workers: int | None = None
) -> Iterator[Batch]:
    """A split in order, every image once, resized and cropped as ``preprocessing`` says."""
    chunks = list(torch.arange(len(split)).split(batch_size))
    if split.images is not None:
        if isinstance(split, ArraySplit) and split.prepared:
            preprocessing = dataclasses.replace(preprocessing, crop_pct=1.0)  # a second crop would show them larger
        for indices in chunks:
            yield Batch(
                images=resize_batch(split.images[indices], preprocessing), labels=split.labels[indices], indices=indices
            )
        return
    count = available_cores() if workers is None else workers
    yield from _file_batches(_EvalSamples(split, preprocessing), chunks, count if len(split) >= 256 else 0)


def counted(batches: Iterable[AnyBatch], on_images: Callable[[int], object] | None) -> Iterator[AnyBatch]:
    """The batches, while someone is told how many of their images are done, those that can not be read too."""
    if on_images is None:
        yield from batches
        return
    done = 0
    on_images(done)
    for batch in batches:
        yield batch
        done += len(batch.indices) + len(batch.bad)
        on_images(done)


def resize_batch(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """``preprocessing.resize`` on a batch, uint8 (N, H, W, C) -> (N, H', W', channels)."""
    size, (height, width, channels) = (preprocessing.height, preprocessing.width), images.shape[1:]
    if size == (height, width) == preprocessing.resized(*size) and channels == preprocessing.channels:
        return images
    return torch.stack([preprocessing.resize(image) for image in images])


def into_memory(
    split: Split, preprocessing: Preprocessing, *, max_bad_rate: float = 0.01, workers: int | None = None
) -> tuple[Split, tuple[str, ...]]:
    """The split decoded at the network's size and held in memory, and what was wrong with images that were left out.

    A set in memory is resized only; one that would take more than ``MEMORY_BYTES`` comes back as it was. ``workers``
    are processes that decode; None: one per core.

    Raises:
        UserError: more than ``max_bad_rate`` of the images (and more than one), or all, can not be decoded; or there is
            none.
    """
    if not len(split):
        raise UserError(f"the {split.split} set has no image")
    image_bytes = preprocessing.height * preprocessing.width * preprocessing.channels
    if split.images is None and len(split) * image_bytes > MEMORY_BYTES:
        return split, ()
    pixels, kept, bad = [], [], []
    for batch in eval_batches(split, preprocessing, batch_size=1024, workers=workers):
        pixels.append(batch.images)
        kept.append(batch.indices)
        bad += batch.bad
    check_bad_rate(bad, len(split), max_bad_rate, split.split)
    indices = torch.cat(kept)
    return ArraySplit(
        split=split.split,
        classes=split.classes,
        labels=split.labels[indices],
        channels=preprocessing.channels,
        pixels=pixels[0] if len(pixels) == 1 else torch.cat(pixels),
        prepared=True,
        origin=split.split if not isinstance(split, ArraySplit) else split.origin,
        numbers=indices if not isinstance(split, ArraySplit) or split.numbers is None else split.numbers[indices],
    ), tuple(bad)


def readable(
    split: Split, preprocessing: Preprocessing, *, max_bad_rate: float = 0.01, workers: int | None = None
) -> tuple[Split, tuple[str, ...]]:
    """The images that can be decoded, in memory at the network's size where they fit, else as files; and what was wrong
    with the others.

    Raises:
        UserError: as for ``into_memory``.
    """
    held, bad = into_memory(split, preprocessing, max_bad_rate=max_bad_rate, workers=workers)
    if held.images is not None:
        return held, bad
    kept, problems = [], []
    for batch in eval_batches(split, preprocessing, workers=workers):
        kept.append(batch.indices)
        problems += batch.bad
    check_bad_rate(problems, len(split), max_bad_rate, split.split)
    return (split.subset(torch.cat(kept)) if problems else split), tuple(problems)


class EvalImages(Sequence[np.ndarray]):
    """A split's images as uint8 (N, H, W, C) arrays of at most ``batch_size`` each, made anew whenever they are
    asked for.

    Args:
        split: images that can all be decoded, as ``readable`` gives them.
        preprocessing: how they are resized.
        batch_size: images in an array.
        on_images: told how many are done, each time that all of them are gone through.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        batch_size: int = 256,
        *,
        on_images: Callable[[int], object] | None = None,
    ) -> None:
        self.split, self.preprocessing, self.batch_size = split, preprocessing, batch_size
        self.on_images = on_images

    def __len__(self) -> int:
        return math.ceil(len(self.split) / self.batch_size)

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, at: slice) -> list[np.ndarray]: ...

    def __getitem__(self, at: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(at, slice):
            return [self[index] for index in range(*at.indices(len(self)))]
        first = range(len(self))[at] * self.batch_size
        some = self.split.subset(range(first, min(first + self.batch_size, len(self.split))))
        return next(eval_batches(some, self.preprocessing, batch_size=self.batch_size, workers=0)).images.numpy()

    def __iter__(self) -> Iterator[np.ndarray]:
        every = eval_batches(self.split, self.preprocessing, batch_size=self.batch_size)
        for batch in counted(every, self.on_images):
            yield batch.images.numpy()


def check_bad_rate(bad: list[str] | tuple[str, ...], total: int, max_bad_rate: float, split: str) -> None:
    """Raise UserError when more than ``max_bad_rate`` of ``total`` images (and more than one) were unreadable, or
    all.
    """
    if len(bad) > max(1, max_bad_rate * total):
        raise UserError(
            f"{len(bad)} of {total} {split} images ({len(bad) / total:.1%}) can not be decoded, at most "
            f"{max_bad_rate:.1%} may be; first: {bad[0]}"
        )
    if bad and len(bad) >= total:
        raise UserError(f"no readable image is left of the {split} set; first: {bad[0]}")


_Item = tuple[torch.Tensor, list[int], list[str]]
"""A batch from a worker: images, which of the split they are, what was wrong with others."""


class _TrainSamples:
    """Augmented images, uint8 (*size, C), by index."""

    def __init__(self, split: Split, recipe: Recipe, size: tuple[int, int], seed: int, epoch: int) -> None:
        self.split, self.recipe, self.size, self.seed, self.epoch = split, recipe, size, seed, epoch
        self.channels = split.channels

    def __call__(self, index: int, out: torch.Tensor) -> str | None:
        """Fill ``out``, or say what is wrong with the image."""
        random = np.random.Generator(np.random.Philox(key=mix_seed(self.seed, 3, self.epoch, index)))
        try:
            if self.recipe.augment == "resized-crop":
                if isinstance(self.split, FileSplit):
                    self._crop_file(self.split, index, random, out)
                else:
                    resized_crop(self.split.read(index), self.size, random, self.recipe, out)
                return None
            image = self.split.read(index)
        except ImageError as error:
            return str(error)
        whole = Preprocessing(
            image_size=self.size,
            channels=self.split.channels,
            mean=(0,) * self.split.channels,
            std=(1,) * self.split.channels,
            crop_pct=1.0,
        )
        image = whole.resize(image)
        if self.recipe.augment == "none":
            out.copy_(image)
            return None
        table = torch.from_numpy(random.random((1, 5)))
        side = min(self.size)
        pad, cutout = round(self.recipe.shift * side), round(self.recipe.cutout * side)
        out.copy_(shift_crop(image[None], table, pad=pad, flip=self.recipe.flip, cutout=cutout)[0])
        return None

    def _crop_file(self, split: FileSplit, index: int, random: np.random.Generator, out: torch.Tensor) -> None:
        """A random crop of a file; of a JPEG, what lies below it is not decoded, and with ``scaled_decode`` the rest is
        as small as allowed.
        """
        recipe, path = self.recipe, split.paths[index]
        data = read_bytes(path)
        header = parse_header(data)
        empty = header is None or not header.width * header.height  # decode_image says what is wrong
        if header is None or empty or header.format != "JPEG" or (header.orientation != 1 and not recipe.scaled_decode):
            image = decode_image(data, name=path, channels=split.channels, max_pixels=split.max_pixels)
            resized_crop(torch.from_numpy(image), self.size, random, recipe, out)
            return
        turned = header.orientation >= 5 and header.height != header.width  # EXIF: rows are shown as columns
        rows, columns = self.size[::-1] if turned else self.size
        box = crop_box(header.height, header.width, random, min_scale=recipe.crop_scale, aspect=columns / rows)
        top, left, height, width = box
        allowed = None
        if recipe.scaled_decode:
            shorter = min(header.height, header.width)
            allowed = math.ceil(
                max(
                    recipe.scaled_share * rows * shorter / height,
                    recipe.scaled_share * columns * shorter / width,
                )
            )
        image = decode_image(
            data, name=path, channels=split.channels, max_pixels=split.max_pixels, min_side=allowed, rows=top + height
        )
        whole_width = header.width
        if turned:
            top, left, height, width, whole_width = left, top, width, height, header.height
        divisor = round(whole_width / image.shape[1])
        box = (top // divisor, left // divisor, max(1, height // divisor), max(1, width // divisor))
        resize_box(torch.from_numpy(image), box, self.size, random, recipe, out)


class _EvalSamples:
    """Images as the preprocessing says, uint8 (*size, C), by index."""

    def __init__(self, split: Split, preprocessing: Preprocessing) -> None:
        self.split, self.preprocessing = split, preprocessing
        self.size, self.channels = (preprocessing.height, preprocessing.width), preprocessing.channels

    def __call__(self, index: int, out: torch.Tensor) -> str | None:
        """Fill ``out``, or say what is wrong with the image."""
        try:
            out.copy_(self.preprocessing.resize(self.split.read(index)))
        except ImageError as error:
            return str(error)
        return None


_Samples = _TrainSamples | _EvalSamples


class _Chunks(torch.utils.data.Dataset):
    """A map-style data set whose items are whole batches, so that collation happens in the worker."""

    def __init__(self, samples: _Samples, chunks: list[torch.Tensor]) -> None:
        self.samples, self.chunks = samples, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, at: int) -> _Item:
        indices, kept, bad = self.chunks[at].tolist(), [], []
        images = torch.empty(len(indices), *self.samples.size, self.samples.channels, dtype=torch.uint8)
        if torch.utils.data.get_worker_info() is not None:
            # Here a full /dev/shm is an error of this batch. Left to the queue, it would be one of its thread, and the
            # batch awaited for ever.
            images.share_memory_()
        for index in indices:
            problem = self.samples(index, images[len(kept)])
            if problem is None:
                kept.append(index)
            else:
                bad.append(problem)
        return images[: len(kept)], kept, bad


def _file_batches(samples: _Samples, chunks: list[torch.Tensor], workers: int) -> Iterator[Batch]:
    data = _Chunks(samples, chunks)
    workers = min(workers, len(chunks))
    if not workers:
        for at in range(len(data)):
            yield from _as_batch(samples, *data[at])
        return
    for images, kept, bad in by_processes(data, workers, ahead=3):
        yield from _as_batch(samples, images, kept, bad)


def _as_batch(samples: _Samples, images: torch.Tensor, kept: list[int], bad: list[str]) -> Iterator[Batch]:
    if kept or bad:
        indices = torch.tensor(kept, dtype=torch.long)
        yield Batch(images=images, labels=samples.split.labels[indices], indices=indices, bad=tuple(bad))


def measure_mean_std(split: Split, sample: int = 20_000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1] of a set in memory.

    A set of fewer than ``2 * sample`` images is measured whole; of a larger one every k-th image is taken, k as large
    as leaves ``sample`` of them, and at most half as many again.
    """
    assert split.images is not None, "only for sets in memory"
    step = max(1, len(split) // sample)
    pixels = split.images[::step]
    total = pixels.numel() / pixels.shape[-1]
    mean = [pixels[..., channel].sum(dtype=torch.int64).item() / total / 255 for channel in range(pixels.shape[-1])]
    square = [
        pixels[..., channel].double().square_().sum().item() / total / 255**2 for channel in range(pixels.shape[-1])
    ]
    std = [max(np.sqrt(second - first**2), 1e-3) for first, second in zip(mean, square, strict=True)]
    return tuple(round(float(value), 4) for value in mean), tuple(round(float(value), 4) for value in std)
