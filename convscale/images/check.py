"""What is odd about a data set, said before anything is trained on it."""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from convscale import words
from convscale.conditions import Size, as_size, sides, size_text
from convscale.images.decode import ImageError, preload
from convscale.images.duplicates import IN_TWO_SPLITS, WITH_TWO_LABELS, Duplicates, evenly, find_duplicates
from convscale.images.extent import upright_size
from convscale.images.sources import open_dataset
from convscale.images.splits import ArraySplit, DataSplits, FileSplit, Split
from convscale.images.threads import in_threads
from convscale.images.walk import Preflight
from convscale.machine import available_cores

MOST_DECODED = 5_000
"""Pictures that are decoded at most; evenly taken."""
MOST_SIZES = 500
"""Train images whose size is looked at."""
FEW_IMAGES = 10
"""A class with fewer train images is tiny."""
DOMINANT = 0.9
"""Share of the train images above which a class outweighs all others."""
MANY_SMALL = 0.1
"""Share of images smaller than the input that is worth a word."""
_NAMED = 5


class ClassCount(NamedTuple):
    """A class and its images."""

    name: str
    images: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large train images are, against the network's input."""

    input: Size
    """Side in pixels, or (height, width)."""
    checked: int
    """Images that were looked at, evenly taken."""
    smaller: int
    """Of them, those that are lower or narrower than the input."""

    @property
    def share(self) -> float:
        """Of the images that were looked at."""
        return self.smaller / self.checked if self.checked else 0.0

    @property
    def warning(self) -> str:
        """A line, where many are smaller than the input; else empty."""
        if self.share <= MANY_SMALL:
            return ""
        return (
            f"{words.percent(self.share, 0)} of {self.checked:,} train images looked at are smaller than the input of "
            f"{size_text(self.input)} px: enlarging them adds time, no detail; try a smaller input"
        )


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """What ``check_data`` found. ``warnings`` says it in words."""

    train: int
    """Images."""
    validation: int
    """Images."""
    test: int
    """Images."""
    multilabel: bool
    """Whether an image can have several labels."""
    tiny_classes: tuple[ClassCount, ...]
    """Classes with fewer than 10 train images, the smallest first."""
    largest_class: ClassCount
    """The class with most train images."""
    without_validation: tuple[str, ...]
    """Classes that have train images but none for validation."""
    without_test: tuple[str, ...]
    """Classes that have train images but none in the test set."""
    sizes: Sizes | None
    """None where no input size was given."""
    duplicates: Duplicates
    """The same picture in two splits, or with two labels."""
    notes: tuple[str, ...]
    """What opening the data had to say."""
    left_out: Preflight
    """What was found and not used, by reason."""
    bad: tuple[str, ...]
    """What is wrong with each file that can not be read or decoded: of all files where ``every`` was asked for, else of
    those that were looked at."""
    seconds: float
    """That the check took."""

    @property
    def largest_share(self) -> float:
        """Share of the train images that are of the largest class."""
        return self.largest_class.images / self.train if self.train else 0.0

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each thing that is odd."""
        lines = (
            self._tiny(),
            self._dominant(),
            _missing(self.without_validation, "for validation: nothing is chosen by them"),
            _missing(self.without_test, "in the test set: the test says nothing about them"),
            self.duplicates.across_splits.describe(IN_TWO_SPLITS),
            self.duplicates.two_labels.describe(WITH_TWO_LABELS, labels=True),
            self._small(),
            self._undecodable(),
        )
        return tuple(line for line in lines if line)

    def describe_cost(self) -> str:
        """One line: what was looked at, and how long that took."""
        looked, total = self.duplicates, self.train + self.validation + self.test
        return (
            f"compared: the contents of {looked.contents_compared:,} and the looks of "
            f"{looked.fingerprints_compared:,} of {total:,} images (evenly taken), in {words.seconds(self.seconds)}"
        )

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values; pairs and counts are objects."""
        out: dict[str, object] = {"warnings": list(self.warnings)}
        for field in dataclasses.fields(self):
            out[field.name] = _plain(getattr(self, field.name))
        return out | {"largest_share": self.largest_share}

    def _tiny(self) -> str:
        if not self.tiny_classes:
            return ""
        named = ", ".join(f"{each.name} ({each.images:,})" for each in self.tiny_classes[:_NAMED])
        what = words.plural(len(self.tiny_classes), "class has", "classes have")
        return f"{what} fewer than {FEW_IMAGES} train images: {named}{_more(len(self.tiny_classes))}"

    def _dominant(self) -> str:
        if self.largest_share <= DOMINANT:
            return ""
        advice = (
            "its average precision is high whatever is learnt"
            if self.multilabel
            else "always saying it is right that often; look at each class, not at the accuracy"
        )
        return f"{words.percent(self.largest_share)} of the train images are {self.largest_class.name}: {advice}"

    def _small(self) -> str:
        return "" if self.sizes is None else self.sizes.warning

    def _undecodable(self) -> str:
        bad = self.duplicates.undecodable
        if not bad:
            return ""
        seen = len(bad) + self.duplicates.fingerprints_compared
        return f"{len(bad):,} of {seen:,} images looked at can not be decoded; first: {bad[0]}"


def check_data(
    data: DataSplits | str | os.PathLike[str], image_size: Size | None = None, *, every: bool = False
) -> DataCheck:
    """Look for what spoils training or its result: tiny classes, one that outweighs all others, classes that are not
    tested, the same picture in two splits or with two labels, images smaller than the network's input, and images that
    can not be decoded.

    At most 5,000 images are decoded, so the time is bounded, unless ``every`` one is asked for; the result says how
    many were looked at.

    Args:
        data: a folder or a manifest as ``convscale train --data-dir`` takes it, of which any number of files may be
            unreadable; or splits that are open.
        image_size: of the network's input in pixels, or (height, width); None: sizes are not looked at.
        every: decode every file once, to find all that can not be, as ``convscale check`` does without ``--quick``.

    Raises:
        UserError: the data can not be opened, or ``image_size`` is none.
    """
    size = None if image_size is None else as_size(*sides(image_size))
    started = time.perf_counter()
    splits = data if isinstance(data, DataSplits) else open_dataset(data, compare=False, listing=True)
    counts = np.asarray(splits.train.class_counts())
    smallest_first = np.argsort(counts, kind="stable")
    largest = int(np.argmax(counts))

    def counted(label: int) -> ClassCount:
        return ClassCount(splits.classes[label], int(counts[label]))

    parts = (splits.train, splits.validation, splits.test)
    found = find_duplicates(parts, MOST_DECODED)
    undecodable = [problem for part in parts for problem in _undecodable(part)] if every else found.undecodable
    return DataCheck(
        train=len(splits.train),
        validation=len(splits.validation),
        test=len(splits.test),
        multilabel=splits.multilabel,
        tiny_classes=tuple(counted(label) for label in smallest_first.tolist() if counts[label] < FEW_IMAGES),
        largest_class=counted(largest),
        without_validation=_untested(splits.train, splits.validation),
        without_test=_untested(splits.train, splits.test),
        sizes=None if size is None else sizes_of(splits.train, size),
        duplicates=found,
        notes=splits.notes,
        left_out=splits.preflight,
        bad=(*splits.unreadable, *undecodable),
        seconds=time.perf_counter() - started,
    )


def _undecodable(split: Split) -> list[str]:
    """What is wrong with each file that can not be decoded, in their order."""
    if not isinstance(split, FileSplit):
        return []

    def problem(index: int) -> str | None:
        try:
            split.read(index)
        except ImageError as error:
            return str(error)
        return None

    preload()
    said = in_threads(problem, range(len(split)), workers=available_cores(), chunk=16)
    return [text for text in said if text is not None]


def majority_share(labels: ArrayLike, train_labels: ArrayLike | None = None) -> float:
    """How good an answer is that does not look at the image: what an accuracy has to be compared with.

    Args:
        labels: those that are predicted: whole numbers (N,), or zeros and ones (N, classes).
        train_labels: the same of the train set, which says what class is most frequent; None: ``labels`` do.

    Returns:
        The share of ``labels`` that are the most frequent class; where an image can have several labels, the mean
        average precision of giving every image the same probabilities, which is the mean of the shares of images that
        have a class, over the classes that any has. NaN without labels.
    """
    truth = np.asarray(labels)
    if not len(truth):
        return float("nan")
    if truth.ndim == 2:
        known = np.maximum((~np.isnan(truth.astype(np.float64))).sum(0), 1)
        shares = (truth > 0).sum(0) / known
        return float(shares[shares > 0].mean()) if (shares > 0).any() else float("nan")
    most_frequent = np.bincount(truth if train_labels is None else np.asarray(train_labels)).argmax()
    return float(np.mean(truth == most_frequent))


def _untested(train: Split, other: Split) -> tuple[str, ...]:
    """Classes with images in ``train`` and none in ``other``."""
    missing = (np.asarray(train.class_counts()) > 0) & (np.asarray(other.class_counts()) == 0)
    return tuple(train.classes[label] for label in np.flatnonzero(missing))


def sizes_of(split: Split, size: Size) -> Sizes:
    """How large a split's images are against an input, by the files' headers, without decoding."""
    height, width = sides(size)
    chosen = evenly(len(split), MOST_SIZES).tolist()
    if isinstance(split, ArraySplit):
        found = [tuple(split.pixels.shape[1:3])] * len(chosen)
    elif isinstance(split, FileSplit):
        seen = in_threads(lambda index: upright_size(split.paths[index], split.max_pixels), chosen, chunk=64)
        found = [each for each in seen if each is not None]
    else:
        raise TypeError(f"{type(split).__name__} is neither in memory nor in files")
    return Sizes(input=size, checked=len(found), smaller=sum(h < height or w < width for h, w in found))


def _missing(names: tuple[str, ...], what: str) -> str:
    if not names:
        return ""
    having = words.plural(len(names), "class has", "classes have")
    kind, _, consequence = what.partition(": ")
    return f"{having} no image {kind} ({', '.join(names[:_NAMED])}{_more(len(names))}): {consequence}"


def _more(count: int) -> str:
    return f" and {count - _NAMED:,} more" if count > _NAMED else ""


def _plain(value: object) -> object:
    """Named tuples and dataclasses as objects, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return plain | ({"share": value.share} if isinstance(value, Sizes) else {})
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
