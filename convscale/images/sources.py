"""Where labelled images come from: folders, idx files, a manifest, torchvision's data sets.

``open_dataset`` looks at what it is given and decides. Class names belong to the train set; no other split ever
re-makes the indices.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from convscale.errors import UserError
from convscale.images.decode import EXTENSIONS, MAX_PIXELS, ImageError, check_image, preload
from convscale.images.idx import find_idx, open_idx
from convscale.images.manifest import open_manifest
from convscale.images.splits import DataSplits, FileSplit, Split, complete
from convscale.images.torchvision_sets import find_torchvision, open_torchvision
from convscale.images.walk import LOOSE, Folder, Tally, identity, list_folder, pictures_below

_VALIDATION_FOLDERS = ("validation", "val", "valid")


def open_dataset(
    data_dir: str | os.PathLike[str],
    *,
    dataset: str | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    max_bad_rate: float = 0.01,
    max_pixels: int = MAX_PIXELS,
) -> DataSplits:
    """Labelled images as train, validation and test set.

    Args:
        data_dir: a folder with ``train/`` and, beside it, ``val|validation/`` and ``test/``, each with one folder per
            class; a folder of class folders; a folder with idx files; a manifest (``.csv``, ``.jsonl``, ``.json``); or
            the root of one of torchvision's data sets.
        dataset: torchvision's name of the set in ``data_dir`` (``cifar10``); None: recognised by its files.
        channels: 1 (gray) or 3 (RGB); None: 1 for idx files, else 3.
        classes: a manifest's class list; None: what its train set has.
        seed: of what is carved from train.
        validation_fraction: share of train that is carved when there is no validation set.
        test_fraction: share of train that is carved when there is no test set.
        max_bad_rate: share of a split's files (but at least one file) that may have an unreadable header; these are
            left out and counted in the notes.
        max_pixels: larger pictures count as unreadable.

    Raises:
        UserError: one line: a missing or empty folder, one class, class folders that differ between splits, too many
            unreadable images ...
    """
    place = Path(data_dir)
    if channels not in (None, 1, 3):
        raise UserError(f"channels must be 1 (gray) or 3 (RGB), got {channels!r}")
    if not place.exists():
        raise UserError(f"data folder {place} does not exist")
    notes, tally = list[str](), Tally()
    name = dataset or (find_torchvision(place) if place.is_dir() else None)
    if place.is_file():
        if place.suffix.lower() not in (".csv", ".jsonl", ".json"):
            raise UserError(f"{place} is a file; name a folder, or a manifest ending in .csv, .jsonl or .json")
        train, validation, test = open_manifest(place, channels=channels or 3, max_pixels=max_pixels, classes=classes)
    elif name is not None:
        train, validation, test = open_torchvision(name, place, channels=channels or 3, max_pixels=max_pixels)
    elif (idx_folder := find_idx(place)) is not None:
        (train, test), validation = open_idx(idx_folder, channels=channels), None
    else:
        train, validation, test = _open_folders(place, channels or 3, max_pixels, tally)
    if classes is not None and not place.is_file():
        raise UserError(
            f"classes are for a manifest; {place} has its own: "
            f"{', '.join(train.classes[:5])}{' ...' if len(train.classes) > 5 else ''}"
        )
    if len(train.classes) < 2:
        only = f" ({train.classes[0]!r})" if train.classes else ""
        raise UserError(
            f"{place}: only {len(train.classes)} class{only}; a classifier needs at least 2, one folder each"
        )
    preflight = tally.report()
    notes += preflight.notes()
    checked = [_drop_unreadable(split, max_bad_rate, notes) for split in (train, validation, test)]
    assert checked[0] is not None
    return complete(
        checked[0],
        checked[1],
        checked[2],
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        notes=notes,
        preflight=preflight,
    )


def _open_folders(
    place: Path, channels: int, max_pixels: int, tally: Tally
) -> tuple[Split, Split | None, Split | None]:
    """An ImageFolder tree, with or without ``train/`` on top."""
    if not (place / "train").is_dir():
        stray = [name for name in (*_VALIDATION_FOLDERS, "test") if (place / name).is_dir()]
        if stray:
            raise UserError(f"{place}: there is {stray[0]}/ but no train/ beside it")
        found = _scan(place, tally)
        return _file_split("train", found, tuple(sorted(found)), channels, max_pixels, place), None, None
    validation_folders = [name for name in _VALIDATION_FOLDERS if (place / name).is_dir()]
    if len(validation_folders) > 1:
        raise UserError(f"{place}: both {validation_folders[0]}/ and {validation_folders[1]}/ are there; keep one")
    apart = (place, *(place / name for name in ("train", "test", *_VALIDATION_FOLDERS)))
    train = _scan(place / "train", tally, apart)
    classes = tuple(sorted(train))
    splits: list[Split | None] = [_file_split("train", train, classes, channels, max_pixels, place / "train")]
    for split, folder in (("validation", validation_folders[0] if validation_folders else None), ("test", "test")):
        if folder is None or not (place / folder).is_dir():
            splits.append(None)
            continue
        found = _scan(place / folder, tally, apart)
        only_train, only_here = sorted(set(train) - set(found)), sorted(set(found) - set(train))
        if only_train or only_here:
            sides = [
                f"only in {side}/: {_some(names)}"
                for side, names in (("train", only_train), (folder, only_here))
                if names
            ]
            raise UserError(
                f"{place}: class folders differ between train/ and {folder}/; {'; '.join(sides)}; make them the same"
            )
        splits.append(_file_split(split, found, classes, channels, max_pixels, place / folder))
    return splits[0], splits[1], splits[2]  # pyright: ignore[reportReturnType]


def _scan(folder: Path, tally: Tally, apart: Iterable[Path] = ()) -> dict[str, list[str]]:
    """Class name -> image files below its folder, at any depth; what is left out is counted.

    Args:
        folder: holds one folder per class.
        tally: counts what is left out.
        apart: folders that links below a class must not lead into, beside ``folder`` and the other classes'.

    Raises:
        UserError: there is no image, or two classes are one folder.
    """
    before = tally.report()
    listed = list_folder(str(folder), tally)
    for name in listed.pictures:
        tally.add(LOOSE, str(folder / name))
    known: dict[Folder, str] = {}
    for name in listed.folders:
        which = identity(str(folder / name))
        if which is not None and (other := known.setdefault(which, name)) != name:
            raise UserError(f"{folder}: the class folders {other} and {name} are one folder, by a link; remove one")
    seen = {*known, *(which for place in (folder, *apart) if (which := identity(str(place))) is not None)}
    found = {
        name: list(pictures_below(str(folder / name), tally, seen=seen, files_first=True)) for name in listed.folders
    }
    if not any(found.values()):
        known_endings = ", ".join(EXTENSIONS)
        others = "".join(f"; {each.describe()}" for each in tally.report().since(before).left_out)
        raise UserError(
            f"{folder}: no images found{others}; one folder per class with files ending in {known_endings} would be "
            "right"
        )
    return found


def _file_split(
    split: str, found: dict[str, list[str]], classes: tuple[str, ...], channels: int, max_pixels: int, place: Path
) -> FileSplit:
    empty = [name for name in classes if not found[name]]
    if empty and split == "train":
        raise UserError(f"{place}: class folder(s) without an image: {_some(empty)}")
    paths = [path for name in classes for path in found[name]]
    labels = [label for label, name in enumerate(classes) for _ in found[name]]
    return FileSplit(
        split=split,
        classes=classes,
        labels=torch.tensor(labels, dtype=torch.long),
        channels=channels,
        paths=tuple(paths),
        max_pixels=max_pixels,
    )


def _drop_unreadable(split: Split | None, max_bad_rate: float, notes: list[str]) -> Split | None:
    """Leave out files whose header is unreadable, as long as they are few."""
    if not isinstance(split, FileSplit):
        return split

    def problem(path: str) -> str | None:
        try:
            check_image(path, max_pixels=split.max_pixels)
        except ImageError as error:
            return str(error)
        return None

    preload()
    with ThreadPoolExecutor(8) as pool:
        problems = list(pool.map(problem, split.paths, chunksize=64))
    bad = [text for text in problems if text is not None]
    if not bad:
        return split
    if len(bad) > max(1, max_bad_rate * len(split)):
        share = f"{len(bad)} of {len(split)} {split.split} images ({len(bad) / len(split):.1%})"
        raise UserError(f"{share} are unreadable, at most {max_bad_rate:.1%} (or one) are skipped; first: {bad[0]}")
    notes.append(f"{len(bad)} of {len(split)} {split.split} images are unreadable and left out; first: {bad[0]}")
    kept = split.subset([index for index, text in enumerate(problems) if text is None])
    gone = [
        name
        for name, before, after in zip(split.classes, split.class_counts(), kept.class_counts(), strict=True)
        if before > 0 and after == 0
    ]
    if gone and split.split == "train":
        raise UserError(f"no readable image is left of class(es) {_some(gone)}; first problem: {bad[0]}")
    return kept


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
