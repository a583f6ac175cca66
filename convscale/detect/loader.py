"""Batches of pictures with boxes, each fitted into a square; every random choice depends on (seed, epoch, picture)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from convscale.conditions import Size, sides
from convscale.detect.boxes import BoxSplit
from convscale.errors import UserError
from convscale.images.decode import ImageError, preload
from convscale.images.letterbox import into_square, letterbox
from convscale.learn.augment import generator_for, mix_seed
from convscale.learn.loader import Batch
from convscale.learn.recipe import Recipe
from convscale.learn.workers import by_processes
from convscale.machine import available_cores

LEAST_SIDE = 1.0
"""Pixels of a box's sides after augmentation; smaller ones are dropped."""
_Target = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxBatch(Batch):
    """Some pictures of a split, with their boxes; ``labels`` is empty."""

    targets: tuple[dict[str, torch.Tensor], ...]
    """Of each picture ``boxes`` float32 (n, 4) in the square's pixels and ``labels`` int64 (n,)."""


class BoxLoader:
    """Source of an epoch's training batches, from any step on.

    Args:
        split: the train set.
        recipe: batch size and augmentation: ``scale-jitter`` or ``none``.
        image_size: side of the squares, in pixels.
        fill: colour around a picture.
        seed: fixes order and augmentation.
        workers: processes that decode; None: one per core.
        rank: this process among ``world``.
        world: processes that share every epoch.
    """

    in_memory = False
    """Pictures are read from files."""

    def __init__(
        self,
        split: BoxSplit,
        recipe: Recipe,
        *,
        image_size: int,
        fill: tuple[int, ...],
        seed: int = 0,
        workers: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if recipe.augment not in ("scale-jitter", "none"):
            raise UserError(
                f"recipe {recipe.name}: augment {recipe.augment} knows no boxes; for detection use scale-jitter or none"
            )
        if recipe.batch_size * world > len(split):
            raise UserError(
                f"batch_size {recipe.batch_size} is larger than the train set ({len(split)} images); use at most "
                f"{len(split) // world}"
            )
        self.split, self.recipe, self.image_size, self.fill, self.seed = split, recipe, image_size, fill, seed
        self.rank, self.world = rank, world
        self.workers = available_cores() if workers is None else workers
        self.steps_per_epoch = len(split) // (recipe.batch_size * world)
        preload()

    def order(self, epoch: int) -> torch.Tensor:
        """int64: the split's indices in the order of ``epoch``, over all processes."""
        return torch.randperm(len(self.split), generator=generator_for(self.seed, 1, epoch))

    def batches(self, epoch: int, start: int = 0, image_size: Size | None = None) -> Iterator[BoxBatch]:
        """This process's batches of ``epoch`` from step ``start`` on."""
        side = sides(image_size or self.image_size)[0]
        order, width, chunks = self.order(epoch), self.recipe.batch_size, []
        for step in range(start, self.steps_per_epoch):
            at = (step * self.world + self.rank) * width
            chunks.append(order[at : at + width].tolist())
        samples = _Samples(self.split, self.recipe, side, self.fill, self.seed, epoch)
        yield from _run(samples, chunks, self.workers)


def eval_box_batches(
    split: BoxSplit, side: int, fill: tuple[int, ...], *, batch_size: int, workers: int | None
) -> Iterator[BoxBatch]:
    """Pictures in order, each fitted into its square without augmentation."""
    preload()
    chunks = [list(range(at, min(at + batch_size, len(split)))) for at in range(0, len(split), batch_size)]
    samples = _Samples(split, None, side, fill, 0, 0)
    yield from _run(samples, chunks, available_cores() if workers is None else workers)


class _Samples(torch.utils.data.Dataset):
    """Whole batches by their number."""

    def __init__(
        self, split: BoxSplit, recipe: Recipe | None, side: int, fill: tuple[int, ...], seed: int, epoch: int
    ) -> None:
        self.split, self.recipe, self.side, self.fill, self.seed, self.epoch = split, recipe, side, fill, seed, epoch
        self.chunks: list[list[int]] = []
        self.transform: Any = None
        if recipe is not None and recipe.augment == "scale-jitter":
            self.transform = _scale_jitter(recipe, side, fill)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, at: int) -> BoxBatch:
        images, targets, kept, bad = [], [], [], []
        for index in self.chunks[at]:
            try:
                image, boxes, labels = self._one(index)
            except ImageError as error:
                bad.append(str(error))
                continue
            images.append(image)
            targets.append({"boxes": boxes, "labels": labels})
            kept.append(index)
        side = self.side
        stacked = torch.stack(images) if images else torch.zeros(0, side, side, 3, dtype=torch.uint8)
        return BoxBatch(
            images=stacked,
            labels=torch.zeros(0, dtype=torch.long),
            indices=torch.tensor(kept, dtype=torch.long),
            bad=tuple(bad),
            targets=tuple(targets),
        )

    def _one(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = self.split.read(index)
        learnt = ~self.split.crowd[index] if self.recipe is not None else slice(None)
        boxes, labels = self.split.boxes[index][learnt], torch.from_numpy(self.split.labels[index][learnt])
        if self.transform is None:
            square = torch.from_numpy(letterbox(pixels, self.side, self.fill))
            there = torch.from_numpy(into_square(boxes, pixels.shape[0], pixels.shape[1], self.side).astype(np.float32))
            random = np.random.Generator(np.random.Philox(key=mix_seed(self.seed, 3, self.epoch, index)))
            if self.recipe is not None and random.random() < self.recipe.flip:
                square = square.flip(1)
                there = torch.stack([self.side - there[:, 2], there[:, 1], self.side - there[:, 0], there[:, 3]], 1)
            return square, there, labels
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(mix_seed(self.seed, 3, self.epoch, index))
            canvas = (pixels.shape[0], pixels.shape[1])
            image = tv_tensors.Image(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
            about: dict[str, Any] = {"format": "XYXY", "canvas_size": canvas}
            make: Any = tv_tensors.BoundingBoxes
            where = make(torch.from_numpy(boxes), **about)
            image, where, labels = self.transform(image, where, labels)
        return image.permute(1, 2, 0).contiguous(), where.as_subclass(torch.Tensor).float(), labels


def _scale_jitter(recipe: Recipe, side: int, fill: tuple[int, ...]) -> Any:
    """The whole picture at a random scale, a crop of the square's size from it, a flip (Ghiasi et al. 2021, arXiv
    2012.07177); boxes whose sides are below a pixel then are dropped.
    """
    return v2.Compose(
        [
            _Jitter((side, side), (recipe.scale_low, recipe.scale_high), antialias=True),
            v2.RandomCrop((side, side), pad_if_needed=True, fill=fill),  # pyright: ignore[reportArgumentType]
            v2.RandomHorizontalFlip(recipe.flip),
            v2.SanitizeBoundingBoxes(min_size=LEAST_SIDE, labels_getter=_labels),
        ]
    )


class _Jitter(v2.ScaleJitter):
    """A picture as long as this that is made small keeps a pixel of its shorter side, as in ``letterbox.fitted``."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"size": tuple(max(1, each) for each in super().make_params(flat_inputs)["size"])}


def _labels(inputs: Any) -> Any:
    """The third of what the transform is given; a function that processes can be sent."""
    return inputs[2]


def _run(samples: _Samples, chunks: list[list[int]], workers: int) -> Iterator[BoxBatch]:
    """The batches, made here or by processes."""
    samples.chunks = chunks
    workers = min(workers, len(chunks))
    if not workers:
        for at in range(len(samples)):
            yield samples[at]
        return
    yield from by_processes(samples, workers, ahead=2)
