"""A split: labelled images, in memory or as files, and how missing splits are carved from train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from convscale.errors import UserError
from convscale.files import places_of
from convscale.images.decode import MAX_PIXELS, read_image
from convscale.images.digest import data_digest
from convscale.images.walk import NOTHING, Preflight

SPLITS = ("train", "validation", "test")
_SYNONYMS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


def split_of(name: str) -> str | None:
    """Which split a folder or a value of a manifest names, in any case: ``Valid`` -> ``validation``; None: none."""
    return _SYNONYMS.get(name.strip().lower())


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Labelled images; subclasses say where the pixels are."""

    split: str
    """``train``, ``validation`` or ``test``."""
    classes: tuple[str, ...]
    """Class names; an index into them is a label."""
    labels: torch.Tensor
    """int64 (N,), or float32 (N, classes) of zeros and ones when an image can have several labels; NaN: not known."""
    channels: int
    """3 for RGB, 1 for gray."""

    @property
    def multilabel(self) -> bool:
        """Whether an image can have several labels."""
        return self.labels.ndim == 2

    @property
    def images(self) -> torch.Tensor | None:
        """uint8 (N, H, W, channels) when all images are in memory at one size, else None."""
        return None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What to call the image in messages and reports: its path, or its number."""
        raise NotImplementedError

    def label_bytes(self) -> bytes:
        """All labels, for a digest."""
        return self.labels.contiguous().numpy().tobytes()

    def read(self, index: int) -> torch.Tensor:
        """The image, uint8 (H, W, channels).

        Raises:
            ImageError: it can not be decoded.
        """
        raise NotImplementedError

    def subset(self, indices: Sequence[int] | torch.Tensor, split: str | None = None) -> Split:
        """The images at ``indices``, in that order, as a split of their own."""
        raise NotImplementedError

    def class_counts(self) -> torch.Tensor:
        """int64 (classes,): images per class."""
        if self.multilabel:
            return self.labels.nan_to_num().sum(0).long()
        return torch.bincount(self.labels, minlength=len(self.classes))


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySplit(Split):
    """Images of one size, held in memory."""

    pixels: torch.Tensor
    """uint8 (N, H, W, channels); never written to."""
    origin: str = ""
    """Where they came from, for names."""
    numbers: torch.Tensor | None = None
    """int64 (N,): each image's number in its origin; None: its position."""
    prepared: bool = False
    """Whether the images were resized and cropped for evaluation already."""

    @property
    def images(self) -> torch.Tensor:
        return self.pixels

    def name(self, index: int) -> str:
        number = index if self.numbers is None else int(self.numbers[index])
        return f"{self.origin or self.split}#{number}"

    def read(self, index: int) -> torch.Tensor:
        return self.pixels[index]

    def subset(self, indices: Sequence[int] | torch.Tensor, split: str | None = None) -> ArraySplit:
        chosen = torch.as_tensor(indices, dtype=torch.long)
        numbers = chosen if self.numbers is None else self.numbers[chosen]
        name = split or self.split
        return dataclasses.replace(
            self, split=name, labels=self.labels[chosen], pixels=self.pixels[chosen], numbers=numbers
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSplit(Split):
    """Images as files, decoded when read."""

    paths: tuple[str, ...]
    """One per image."""
    max_pixels: int = MAX_PIXELS
    """Larger pictures are refused."""

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int, min_side: int | None = None) -> torch.Tensor:
        """The image, uint8 (H, W, channels); ``min_side`` allows a JPEG to be decoded smaller (see ``read_image``)."""
        path = self.paths[index]
        pixels = read_image(path, channels=self.channels, max_pixels=self.max_pixels, min_side=min_side)
        return torch.from_numpy(pixels)

    def subset(self, indices: Sequence[int] | torch.Tensor, split: str | None = None) -> FileSplit:
        chosen = torch.as_tensor(indices, dtype=torch.long)
        paths = tuple(self.paths[index] for index in chosen.tolist())
        return dataclasses.replace(self, split=split or self.split, labels=self.labels[chosen], paths=paths)


@dataclass(frozen=True, kw_only=True)
class DataSplits:
    """What a data set is made of."""

    train: Split
    """Seen by the optimiser."""
    validation: Split
    """For choices, early stopping and thresholds."""
    test: Split
    """Read once, at the end."""
    classes: tuple[str, ...]
    """Class names, the same for every split."""
    notes: tuple[str, ...] = ()
    """What a user should know: what was carved, which files were skipped and why."""
    preflight: Preflight = NOTHING
    """What was found and not used, by reason; the notes say it in words."""
    unreadable: tuple[str, ...] = ()
    """What is wrong with each file whose header can not be read; they are in no split."""
    max_bad_rate: float = 0.01
    """Share of the train images that may turn out to be unreadable while they are decoded."""
    carved: tuple[str, ...] = ()
    """``validation`` and ``test`` where they were carved from the train set: one image more or less in that makes
    others of them."""
    origin: Path | None = None
    """The folder or manifest that they were read from; None: made of images in memory."""

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for gray."""
        return self.train.channels

    @property
    def multilabel(self) -> bool:
        """Whether an image can have several labels."""
        return self.train.multilabel

    def places(self) -> Iterator[tuple[str, object]]:
        """Where all of it lies, as ``check_outside`` takes it."""
        parts = (self.train, self.validation, self.test)
        files = [path for part in parts if isinstance(part, FileSplit) for path in part.paths]
        yield from (("data", place) for place in (self.origin, *places_of(files)))

    def whole(self) -> Split:
        """Every image of the three splits as one."""
        return joined((self.train, self.validation, self.test), "all")

    def digests(self, *, older: bool = False) -> dict[str, object]:
        """Of each split, what its images and labels are known by (``data_digest``), and which were ``carved``; plain
        JSON values.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        digests = {name: data_digest((part,), older=older) for name, part in parts.items()}
        return {**digests, "carved": list(self.carved)}

    def describe(self) -> str:
        """One line: sizes and classes."""
        sizes = ", ".join(f"{len(split):,} {split.split}" for split in (self.train, self.validation, self.test))
        return f"{sizes} images, {len(self.classes)} classes"


def joined(parts: Sequence[Split], split: str) -> Split:
    """Splits of one kind and with the same classes as one, in that order.

    Raises:
        UserError: some are in memory and some are files, or images in memory differ in size.
    """
    labels = torch.cat([part.labels for part in parts])
    files = [part for part in parts if isinstance(part, FileSplit)]
    arrays = [part for part in parts if isinstance(part, ArraySplit)]
    if len(files) == len(parts):
        return dataclasses.replace(
            files[0], split=split, labels=labels, paths=tuple(path for part in files for path in part.paths)
        )
    if len(arrays) == len(parts) and len({part.pixels.shape[1:] for part in arrays}) == 1:
        return dataclasses.replace(
            arrays[0],
            split=split,
            labels=labels,
            pixels=torch.cat([part.pixels for part in arrays]),
            origin=split,
            numbers=None,
        )
    raise UserError("the splits differ in kind or image size and can not be joined; evaluate them one by one")


def split_indices(
    labels: torch.Tensor, fraction: float, *, seed: int, classes: Sequence[str], keep: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two disjoint, sorted sets of indices: what stays, and a stratified ``fraction`` that is carved off.

    Every class gives ``round(fraction * n)`` of its images, at least one; one that has too few gives none. Sets with
    several labels per image are carved without strata.

    Args:
        labels: int64 (N,) or float32 (N, classes).
        fraction: in (0, 1).
        seed: the same seed carves the same images.
        classes: names for messages.
        keep: images of a class that must stay.

    Raises:
        UserError: every class has too few images; the first is named.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the fraction to carve must lie between 0 and 1, got {fraction!r}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    carved = torch.zeros(len(labels), dtype=torch.bool)
    if labels.ndim == 2:
        if len(labels) < keep + 1:
            raise UserError(f"{len(labels)} image(s) are too few to carve a split from")
        carved[order[: max(1, round(fraction * len(labels)))]] = True
    else:
        shuffled, few = labels[order], list[str]()
        for label, name in enumerate(classes):
            members = order[shuffled == label]
            if len(members) < keep + 1:
                few.append(f"class {name!r} has {len(members)} image(s)")
                continue
            carved[members[: max(1, min(round(fraction * len(members)), len(members) - keep))]] = True
        if not carved.any():
            raise UserError(
                f"{few[0] if few else 'there is no image'}, too few to carve a split from train, and no class has more "
                "than enough: add images (at least 3 per class), or provide val/ and test/ beside train/"
            )
    return torch.nonzero(~carved).flatten(), torch.nonzero(carved).flatten()


def complete(
    train: Split,
    validation: Split | None,
    test: Split | None,
    *,
    seed: int,
    validation_fraction: float,
    test_fraction: float,
    notes: Sequence[str] = (),
    preflight: Preflight = NOTHING,
) -> DataSplits:
    """Carve from ``train`` what is missing (stratified, seeded) and say so in the notes; fractions are of the train set
    as it was given.
    """
    notes = list(notes)
    missing = [name for name, split in (("validation", validation), ("test", test)) if split is None]
    given, whole = train, len(train)
    if test is None:
        rest, carved = split_indices(train.labels, test_fraction, seed=seed, classes=train.classes, keep=len(missing))
        train, test = train.subset(rest), train.subset(carved, "test")
    if validation is None:
        fraction = validation_fraction * whole / len(train)
        rest, carved = split_indices(train.labels, fraction, seed=seed + 1, classes=train.classes)
        train, validation = train.subset(rest), train.subset(carved, "validation")
    if missing:
        notes += _kept_whole(
            given, [split for name, split in (("validation", validation), ("test", test)) if name in missing]
        )
        sizes = {"validation": len(validation), "test": len(test)}
        carved_sizes = " and ".join(f"{sizes[name]:,} images for {name}" for name in missing)
        notes.append(
            f"no {' and no '.join(missing)} set found: {carved_sizes} carved from train (stratified, seed {seed})"
        )
    return DataSplits(
        train=train,
        validation=validation,
        test=test,
        classes=train.classes,
        notes=tuple(notes),
        preflight=preflight,
        carved=tuple(missing),
    )


def _kept_whole(given: Split, carved: Sequence[Split]) -> list[str]:
    """A note on classes that have too few images to be in every split that was carved."""
    if given.multilabel:
        return []
    counts = given.class_counts().tolist()
    short = [
        f"{name} ({count:,})"
        for label, (name, count) in enumerate(zip(given.classes, counts, strict=True))
        if count and any(not (split.labels == label).any() for split in carved)
    ]
    if not short:
        return []
    named = ", ".join(short[:5]) + (f" and {len(short) - 5} more" if len(short) > 5 else "")
    return [f"too few images to be in every split, so they stay in train first: {named}; nothing tests these classes"]


def labels_from_names(names: Sequence[str], classes: Sequence[str], where: Path | str) -> torch.Tensor:
    """Class names as int64 labels.

    Raises:
        UserError: a name is not in ``classes``.
    """
    index = {name: label for label, name in enumerate(classes)}
    if unknown := sorted(set(names) - set(index)):
        shown = ", ".join(map(repr, unknown[:5])) + (" ..." if len(unknown) > 5 else "")
        raise UserError(f"{where}: label(s) {shown} are not in the class list ({len(classes)} classes from train)")
    return torch.tensor([index[name] for name in names], dtype=torch.long)
