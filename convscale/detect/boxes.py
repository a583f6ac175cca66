"""Pictures with boxes as a value: what every reader of annotations gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convscale.files import places_of
from convscale.images.decode import read_image
from convscale.images.digest import data_digest


@dataclass(frozen=True, kw_only=True, eq=False)
class Annotated:
    """One picture as its annotations tell of it, before anything is checked."""

    path: str
    """Of its file."""
    boxes: np.ndarray
    """float64 (n, 4): x1, y1, x2, y2, in pixels, or as shares of the sides (``relative``)."""
    classes: tuple[str, ...]
    """One name for each box; None stands for a class that is not known."""
    crowd: np.ndarray
    """bool (n,): groups and hard ones, which count neither as found nor as missed."""
    areas: np.ndarray | None = None
    """float64 (n,): pixels that the annotations say each covers, which COCO judges its size by; NaN, and None for all:
    not said."""
    size: tuple[int, int] | None = None
    """(height, width) that the annotations were made at; None: not said."""
    relative: bool = False
    """Boxes are shares of the picture's sides."""
    number: int | None = None
    """Its id among the annotations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxSplit:
    """Pictures with boxes, checked: every box lies inside its picture and has an area."""

    split: str
    """``train``, ``validation`` or ``test``."""
    classes: tuple[str, ...]
    """Class names; a label, counted from 1, less one is an index into them."""
    paths: tuple[str, ...]
    """Of the pictures."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of each, upright, in pixels."""
    boxes: tuple[np.ndarray, ...]
    """Of each float32 (n, 4): x1, y1, x2, y2 in pixels of the upright picture; n may be 0: background alone."""
    labels: tuple[np.ndarray, ...]
    """Of each int64 (n,), from 1."""
    crowd: tuple[np.ndarray, ...]
    """Of each bool (n,): left out of training, neither found nor missed in evaluation."""
    numbers: tuple[int, ...]
    """Ids among the annotations; running numbers from 1 where those have none."""
    areas: tuple[np.ndarray, ...] = ()
    """Of each float64 (n,): pixels that each covers as the annotations say, else its box's; empty: the boxes'."""
    category_ids: tuple[int, ...] = ()
    """The annotations' own numbers of the classes; empty: they have none, COCO's results count from 1."""

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def images(self) -> int:
        """How many pictures there are."""
        return len(self.paths)

    @property
    def box_count(self) -> int:
        """How many boxes there are, crowds left out."""
        return int(sum((~each).sum() for each in self.crowd))

    def label_bytes(self) -> bytes:
        """All boxes with their classes, for a digest."""
        parts: list[bytes] = []
        for boxes, labels, crowd in zip(self.boxes, self.labels, self.crowd, strict=True):
            parts += [b"%d " % len(labels), boxes.tobytes(), labels.tobytes(), crowd.tobytes()]
        return b"".join(parts)

    def name(self, index: int) -> str:
        """What to call a picture in messages."""
        return self.paths[index]

    def read(self, index: int) -> np.ndarray:
        """A picture, upright: uint8 (H, W, 3).

        Raises:
            ImageError: it can not be decoded.
        """
        return read_image(self.paths[index], channels=3)

    def subset(self, indices: Sequence[int] | np.ndarray, split: str | None = None) -> BoxSplit:
        """The pictures at ``indices``, in that order."""
        chosen = [int(each) for each in indices]
        names = ("paths", "sizes", "boxes", "labels", "crowd", "numbers", *(("areas",) if self.areas else ()))
        parts = {name: tuple(getattr(self, name)[index] for index in chosen) for name in names}
        return dataclasses.replace(self, split=split or self.split, **parts)

    def class_counts(self) -> np.ndarray:
        """int64 (classes,): boxes of each class."""
        every = np.concatenate([np.zeros(0, np.int64), *self.labels])
        return np.bincount(every - 1, minlength=len(self.classes)) if len(every) else np.zeros(len(self.classes), int)


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxSplits:
    """A data set of pictures with boxes."""

    train: BoxSplit
    """To learn from."""
    validation: BoxSplit
    """Watched while training."""
    test: BoxSplit
    """Read once, at the end."""
    form: str
    """``coco``, ``yolo`` or ``voc``."""
    notes: tuple[str, ...] = ()
    """What was found wrong and left out or put right, and what was carved."""
    max_bad_rate: float = 0.01
    """Share of pictures that may be unreadable."""
    origin: Path | None = None
    """Where it was read from; None: nowhere."""
    carved: tuple[str, ...] = ()
    """``validation`` and ``test`` where they were carved from the train set: one picture more or less in that makes
    others of them."""
    borrowed: str | None = None
    """The split whose pictures ``train`` has too, where there is no train set: nothing may be learnt from them."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.train.classes

    def places(self) -> Iterator[tuple[str, object]]:
        """Where all of it lies, as ``check_outside`` takes it."""
        files = [path for part in (self.train, self.validation, self.test) for path in part.paths]
        yield from (("data", place) for place in (self.origin, *places_of(files)))

    def digests(self, *, older: bool = False) -> dict[str, object]:
        """Of each split, what its pictures and boxes are known by (``data_digest``), and which were ``carved``; plain
        JSON values.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        digests = {name: data_digest((part,), older=older) for name, part in parts.items()}
        return {**digests, "carved": list(self.carved)}

    def describe(self) -> str:
        """How many pictures, boxes and classes there are, in words."""
        parts = [f"{len(each):,} {each.split}" for each in (self.train, self.validation, self.test)]
        total = sum(each.box_count for each in (self.train, self.validation, self.test))
        return f"{self.form}: {', '.join(parts)} pictures, {total:,} boxes of {len(self.classes)} classes"
