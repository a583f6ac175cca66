"""The same picture twice: byte for byte, or re-encoded, resized, in gray.

Two pictures are near-duplicates when their fingerprints are: decoded, squeezed to 16 x 16 pixels, compared in
brightness and in colour. A mirrored, rotated or cropped copy is another picture here.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convscale import words
from convscale.errors import stop_if_system
from convscale.images.decode import ImageError, preload
from convscale.images.splits import ArraySplit, FileSplit, Split
from convscale.images.threads import in_threads
from convscale.machine import available_cores

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

IN_TWO_SPLITS = "in two splits, where results are too good for it"
WITH_TWO_LABELS = "with different labels"
"""What is wrong with pairs."""
SHOWN = 3
"""Pairs that are named."""

_SIDE = 16
"""Pixels a fingerprint is wide and high."""
_DECODED_SIDE = 128
"""JPEGs are decoded no smaller: the rounded edge of a scaled one would move the fingerprint."""
_TAIL_BYTES = 16_384
_MOST_READ = 20_000
"""Files whose ends are read at most; the others' contents are not compared."""
_BLOCK = 512
"""Rows of the table of distances that are computed at once."""

# Set on real photographs: copies of 13 pictures at JPEG quality 30 to 95 and a half or a quarter of the size differ by
# at most 0.06 of their contrast (0.25 levels where there is little of it), while the closest of 5,000 pieces of
# clothing in Fashion-MNIST, which look much alike, differ by 0.09.
_RELATIVE = 0.06
_ABSOLUTE = 0.25
_FLAT = 1.0
"""Contrast in levels below which a picture has nothing to be known by."""
_CHROMA = 8.0
"""Difference in colour, in levels, of what is another picture of the same shape."""
_GRAY = 2.0
"""Colour in levels below which a picture is gray, and matches a coloured one by brightness alone."""
_LUMINANCE = np.array((0.299, 0.587, 0.114), dtype=np.float32)


class PictureLabel(NamedTuple):
    """One picture of a data set."""

    split: str
    """``train``, ``validation`` or ``test``."""
    name: str
    """Its path, or its number."""
    label: str
    """Its class; several are joined by ``|``."""


class SamePicture(NamedTuple):
    """Two that show the same."""

    first: PictureLabel
    second: PictureLabel
    exact: bool
    """Whether their contents are equal; else they look alike."""


class Pairs(NamedTuple):
    """How often the same picture occurs twice in a way that matters."""

    exact: int
    """Pairs with equal contents."""
    near: int
    """Further pairs, among the pictures whose fingerprints were compared."""
    examples: tuple[SamePicture, ...]
    """The first three."""

    @property
    def total(self) -> int:
        """All pairs."""
        return self.exact + self.near

    def describe(self, what: str, *, labels: bool = False) -> str:
        """One line; ``what`` says where they are, ``labels`` shows these in the place of splits. Empty without
        pairs.
        """
        if not self.total:
            return ""

        def shown(picture: PictureLabel) -> str:
            return f"{picture.name} ({(picture.label or 'no label') if labels else picture.split})"

        named = "; ".join(f"{shown(pair.first)} and {shown(pair.second)}" for pair in self.examples)
        kinds = f"{self.exact:,} equal, {self.near:,} alike"
        more = " ..." if self.total > len(self.examples) else ""
        return f"{words.plural(self.total, 'pair')} of the same picture {what} ({kinds}): {named}{more}"


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """The same picture in two splits, or with two labels."""

    across_splits: Pairs
    """One of the two is in another split than the other."""
    two_labels: Pairs
    """The two have different labels, in whatever splits."""
    contents_compared: int
    """Pictures whose contents were compared with all others."""
    fingerprints_compared: int
    """Pictures, evenly taken, whose fingerprints were compared with each other."""
    undecodable: tuple[str, ...]
    """What was wrong with pictures that could not be decoded."""


def find_duplicates(splits: Sequence[Split], most: int) -> Duplicates:
    """Look for the same picture in two splits, or with two labels.

    Args:
        splits: with the same classes; the first is the train set.
        most: pictures that are decoded for their fingerprints: half of them from the train set, half from the others
            (or all there are), evenly taken.
    """
    pictures = _Pictures(splits)
    contents, compared = _contents(splits)
    chosen = _sample([len(split) for split in splits], most)
    found = _fingerprints(pictures, chosen)
    across, labels = _Tally(pictures, pictures.split), _Tally(pictures, pictures.label)
    for tally in (across, labels):
        tally.count_exact(contents)
    for first, second in _near_pairs(found):
        fresh = contents[first] != contents[second]
        for tally in (across, labels):
            tally.count_near(first[fresh], second[fresh])
    return Duplicates(
        across_splits=across.result(),
        two_labels=labels.result(),
        contents_compared=compared,
        fingerprints_compared=len(found.indices),
        undecodable=found.bad,
    )


def equal_files(splits: Sequence[Split]) -> tuple[Pairs, Pairs]:
    """Pairs of pictures with equal contents in two splits, and with two labels; nothing is decoded."""
    pictures = _Pictures(splits)
    contents, _ = _contents(splits)
    across, labels = _Tally(pictures, pictures.split), _Tally(pictures, pictures.label)
    for tally in (across, labels):
        tally.count_exact(contents)
    return across.result(), labels.result()


def evenly(total: int, most: int) -> Ints:
    """At most ``most`` different numbers below ``total``, evenly spaced, in order."""
    count = min(total, most)
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


class _Pictures:
    """The pictures of all splits under one numbering."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.splits = splits
        self.starts = np.cumsum([0, *(len(split) for split in splits)])
        self.split = np.repeat(np.arange(len(splits)), [len(split) for split in splits])
        self.label = _label_groups(splits)

    def at(self, index: int) -> tuple[Split, int]:
        """A picture's split, and its number there."""
        split = int(self.split[index])
        return self.splits[split], index - int(self.starts[split])

    def describe(self, index: int) -> PictureLabel:
        split, number = self.at(index)
        labels = np.asarray(split.labels[number])
        present = np.flatnonzero(labels == 1) if split.multilabel else [int(labels)]
        return PictureLabel(split.split, split.name(number), "|".join(split.classes[label] for label in present))


def _label_groups(splits: Sequence[Split]) -> Ints:
    """int64 (pictures,): equal where the labels are; of several, those that are present: what is not known is no
    difference. A few rows are looked at at a time, as the table may be large.
    """
    known: dict[object, int] = {}
    groups = list[int]()
    for split in splits:
        labels = np.asarray(split.labels)
        for start in range(0, len(labels), _BLOCK):
            rows = labels[start : start + _BLOCK]
            keys = map(bytes, np.packbits(rows == 1, axis=1)) if split.multilabel else rows.tolist()
            groups += [known.setdefault(key, len(known)) for key in keys]
    return np.array(groups, dtype=np.int64)


class _Tally:
    """Counts the pairs whose two pictures are in different groups."""

    def __init__(self, pictures: _Pictures, group: Ints) -> None:
        self.pictures, self.group = pictures, group
        self.exact = self.near = 0
        self.shown: list[tuple[int, int, bool]] = []

    def count_exact(self, contents: Ints) -> None:
        """Pairs of equal ``contents``: all pairs less those within a group, never listed one by one."""
        order = np.argsort(contents, kind="stable")
        _, starts, counts = np.unique(contents[order], return_index=True, return_counts=True)
        alike = [order[start : start + count] for start, count in zip(starts, counts, strict=True) if count > 1]
        for members in sorted(alike, key=lambda members: int(members[0])):
            groups = self.group[members]
            total = _pairs_of(len(members)) - sum(_pairs_of(count) for count in Counter(groups.tolist()).values())
            self.exact += total
            if total and len(self.shown) < SHOWN:
                other = int(np.argmax(groups != groups[0]))
                self.shown.append((int(members[0]), int(members[other]), True))

    def count_near(self, first: Ints, second: Ints) -> None:
        """Those of these pairs."""
        apart = np.flatnonzero(self.group[first] != self.group[second])
        self.near += len(apart)
        for at in apart[: SHOWN - len(self.shown)] if len(self.shown) < SHOWN else ():
            self.shown.append((int(first[at]), int(second[at]), False))

    def result(self) -> Pairs:
        describe = self.pictures.describe
        examples = tuple(SamePicture(describe(first), describe(second), exact) for first, second, exact in self.shown)
        return Pairs(self.exact, self.near, examples)


def _pairs_of(count: int) -> int:
    return count * (count - 1) // 2


def _sample(sizes: Sequence[int], most: int) -> Ints:
    """Half of ``most`` from the first split, half from the others: so most pairs across splits are seen."""
    train, others = sizes[0], sum(sizes[1:])
    from_others = min(others, max(most // 2, most - train))
    return np.concatenate([evenly(train, most - from_others), train + evenly(others, from_others)])


# ------------------------------------------------------------------ equal contents


def _contents(splits: Sequence[Split]) -> tuple[Ints, int]:
    """int64 (pictures,): equal where contents are; and of how many pictures that is known."""
    total = sum(len(split) for split in splits)
    numbers: dict[object, int] = {}
    contents = -1 - np.arange(total)  # what is not looked at is like nothing else
    compared, start, files = 0, 0, list[tuple[int, str]]()
    for split in splits:
        if isinstance(split, ArraySplit):
            pixels = np.asarray(split.pixels)
            for index in range(len(split)):
                key = (pixels.shape[1:], hashlib.blake2b(pixels[index].tobytes(), digest_size=16).digest())
                contents[start + index] = numbers.setdefault(key, len(numbers))
            compared += len(split)
        elif isinstance(split, FileSplit):
            files += [(start + index, path) for index, path in enumerate(split.paths)]
        start += len(split)
    keys, unread = _file_contents([path for _, path in files])
    for (index, _), key in zip(files, keys, strict=True):
        if key is not None:
            contents[index] = numbers.setdefault(key, len(numbers))
    return contents, compared + len(files) - unread


def _file_contents(paths: Sequence[str]) -> tuple[list[object], int]:
    """For each file what is equal for equal contents (None: like no other's), and how many are not known.

    First sizes are compared, then the ends of files of equal size, then files whose ends are equal as well: so little
    is read of files that differ.
    """
    keys: list[object] = [None] * len(paths)
    by_size: dict[int, list[int]] = defaultdict(list)
    unread = 0
    for index, size in enumerate(in_threads(_size, paths)):
        if size is None:
            unread += 1
        else:
            by_size[size].append(index)
    # files of the same size by chance are small ones, of which there are many: the large ones come first
    groups = [by_size[size] for size in sorted(by_size, reverse=True) if len(by_size[size]) > 1]
    alike = [index for group in groups for index in group]
    unread += len(alike[_MOST_READ:])
    ends: dict[object, list[int]] = defaultdict(list)
    read = alike[:_MOST_READ]
    tails = in_threads(partial(_digest, last=_TAIL_BYTES), [paths[index] for index in read], chunk=64)
    for index, tail in zip(read, tails, strict=True):
        ends[tail].append(index)
    wanted = [index for key, group in ends.items() if key is not None and len(group) > 1 for index in group]
    for index, key in zip(wanted, in_threads(_digest, [paths[index] for index in wanted], chunk=8), strict=True):
        keys[index] = key
    return keys, unread


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError as error:
        stop_if_system(error, path)
        return None


def _digest(path: str, last: int | None = None) -> tuple[int, bytes] | None:
    """A file's size and the digest of its ``last`` bytes, or of all; None where it can not be read."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if last is not None:
                file.seek(max(0, size - last))
            return size, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as error:
        stop_if_system(error, path)
        return None


# ------------------------------------------------------------------ equal looks


class _Fingerprints(NamedTuple):
    """What pictures are known by."""

    indices: Ints
    """(N,): which pictures; flat and undecodable ones are left out of the table, not of the count."""
    luminance: Floats
    """(N, 256)."""
    chroma: Floats
    """(N, 768): colour without its luminance."""
    bad: tuple[str, ...]
    """What was wrong with others."""


def _fingerprints(pictures: _Pictures, chosen: Ints) -> _Fingerprints:
    """Decode the ``chosen`` pictures, JPEGs at a part of their size, in threads."""
    if any(isinstance(split, FileSplit) for split in pictures.splits):
        preload()

    def look(index: int) -> Floats | str:
        split, number = pictures.at(index)
        try:
            return _thumbnail(split, number)
        except ImageError as error:
            return str(error)

    looks = list(in_threads(look, chosen.tolist(), workers=available_cores(), chunk=16))
    kept = [(index, seen) for index, seen in zip(chosen.tolist(), looks, strict=True) if not isinstance(seen, str)]
    colours = np.array([seen for _, seen in kept], dtype=np.float32).reshape(len(kept), _SIDE * _SIDE, 3)
    luminance = colours @ _LUMINANCE
    return _Fingerprints(
        indices=np.array([index for index, _ in kept], dtype=np.int64),
        luminance=luminance,
        chroma=(colours - luminance[:, :, None]).reshape(len(kept), 3 * _SIDE * _SIDE).astype(np.float32, copy=False),
        bad=tuple(seen for seen in looks if isinstance(seen, str)),
    )


def _thumbnail(split: Split, number: int) -> Floats:
    """(16, 16, 3), whatever the picture's shape."""
    read = split.read(number, _DECODED_SIDE) if isinstance(split, FileSplit) else split.read(number)
    pixels = np.asarray(read)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    # a triangle filter: a box's weights are whole pixels, and a copy of another size would look shifted
    small = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    return np.broadcast_to(small.reshape(_SIDE, _SIDE, -1), (_SIDE, _SIDE, 3))


def _near_pairs(found: _Fingerprints) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of pictures that look the same, as two arrays of their numbers, some at a time."""
    contrast = found.luminance.std(1) if len(found.indices) else np.zeros(0, np.float32)
    shaped = contrast >= _FLAT
    indices, light, chroma = found.indices[shaped], found.luminance[shaped], found.chroma[shaped]
    allowed = np.square(_RELATIVE * contrast[shaped] + _ABSOLUTE)
    gray = np.mean(chroma**2, 1) < _GRAY**2
    light = light - 128  # smaller numbers, whose squares lose fewer digits
    for start in range(0, len(indices), _BLOCK):
        rows, rest = slice(start, start + _BLOCK), slice(start, None)
        near = _distances(light[rows], light[rest]) <= np.minimum.outer(allowed[rows], allowed[rest])
        near &= np.arange(near.shape[0])[:, None] < np.arange(near.shape[1])  # each pair once
        if near.any():
            coloured = ~np.logical_or.outer(gray[rows], gray[rest])
            near &= ~(coloured & (_distances(chroma[rows], chroma[rest]) > _CHROMA**2))
            first, second = np.nonzero(near)
            yield indices[start + first], indices[start + second]


def _distances(rows: Floats, columns: Floats) -> Floats:
    """Mean squared difference of each row with each column's."""
    squares = np.add.outer(np.square(rows).sum(1), np.square(columns).sum(1))
    return (squares - 2 * (rows @ columns.T)) / rows.shape[1]
