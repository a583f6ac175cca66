"""Public sets with several labels per image, from local files as their makers pack them: COCO, Pascal VOC, NUS-WIDE,
Open Images.

What a set does not say of an image is not known (NaN), not absent: VOC's difficult objects, and all of Open Images that
nobody verified.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from convscale import words
from convscale.errors import UserError, short
from convscale.images.splits import FileSplit
from convscale.read import Limits, read_json, read_text

PRESENT, ABSENT, UNKNOWN = 1.0, 0.0, float("nan")
MOST_LABELS = 2**31
"""Images times classes of a split that are held in memory."""
_JSON = Limits(size=2**30, nodes=400_000_000)
_TABLE = Limits(size=4 * 2**30)

Opened = tuple[FileSplit, FileSplit | None, FileSplit | None]
"""Train, validation and test set; None where there is none."""


@dataclass(kw_only=True)
class _Rows:
    """One split as it is read."""

    where: Path
    """The file it comes from, for messages."""
    paths: list[Path] = field(default_factory=list)
    """Of the images."""
    labels: list[dict[int, float]] = field(default_factory=list)
    """Of each image its classes that are not as ``other`` says."""
    other: float = ABSENT
    """What is not said."""

    def split(self, name: str, classes: tuple[str, ...], options: _Options) -> FileSplit:
        """As a split, without the images that are not there."""
        there = [at for at, path in enumerate(self.paths) if os.path.isfile(path)]
        if not self.paths:
            raise UserError(f"{self.where} lists 0 images; it must list at least one")
        if not there:
            raise UserError(
                f"none of the {len(self.paths):,} images that {self.where} lists is there (first: "
                f"{words.safe(str(self.paths[0]))})"
            )
        if missing := len(self.paths) - len(there):
            first = next(path for path in self.paths if not os.path.isfile(path))
            options.notes.append(
                f"{missing:,} of {len(self.paths):,} images that {self.where} lists are not there and left out (first: "
                f"{words.safe(str(first))})"
            )
        if len(there) * len(classes) > MOST_LABELS:
            raise UserError(
                f"{self.where}: {len(there):,} images x {len(classes):,} classes are more labels than fit into memory; "
                "leave out images or classes"
            )
        labels = torch.full((len(there), len(classes)), self.other)
        for row, at in enumerate(there):
            for label, value in self.labels[at].items():
                labels[row, label] = value
        return FileSplit(
            split=name,
            classes=classes,
            labels=labels,
            channels=options.channels,
            paths=tuple(str(self.paths[at]) for at in there),
            max_pixels=options.max_pixels,
        )


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How pictures are read, and who is told."""

    channels: int
    max_pixels: int
    notes: list[str]


# ---------------------------------------------------------------- COCO


def _coco(place: Path, options: _Options) -> Opened:
    """``annotations/instances_train2017.json`` and ``train2017/`` beside each other (``images/train2017/`` too)."""
    folder = place / "annotations"
    train, validation = (_only(folder, rf"instances_{name}.*\.json") for name in ("train", "val"))
    if train is None:
        raise UserError(f"{folder} has no instances_train*.json")
    classes, rows = _coco_file(place, train)
    made = rows.split("train", classes, options)
    if validation is None:
        return made, None, None
    others, rows = _coco_file(place, validation)
    if others != classes:
        raise UserError(f"{validation} has other categories than {train.name}")
    return made, rows.split("validation", classes, options), None


def _coco_file(place: Path, path: Path) -> tuple[tuple[str, ...], _Rows]:
    about = read_json(path, "annotations", _JSON)
    parts = {
        key: about.get(key) if isinstance(about, dict) else None for key in ("images", "annotations", "categories")
    }
    for key, value in parts.items():
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise UserError(f"{path}: {key} must be a list of objects")
    categories = {_id(each, "id", path): str(each.get("name", "")) for each in parts["categories"] or []}
    names = tuple(categories[number] for number in sorted(categories))  # ids may have gaps
    if not names or len(set(names)) < len(names) or "" in names:
        raise UserError(f"{path}: categories must have names, each once, and at least one")
    label = {number: at for at, number in enumerate(sorted(categories))}
    rows, row_of = _Rows(where=path), dict[int, int]()
    year = path.stem.removeprefix("instances_")
    roots = [root for root in (place / year, place / "images" / year, place / "images") if root.is_dir()]
    for image in parts["images"] or []:
        number = _id(image, "id", path)
        if number in row_of:
            raise UserError(f"{path}: image id {number} is there twice")
        row_of[number] = len(rows.paths)
        rows.paths.append((roots[0] if roots else place / year) / _inside(image.get("file_name"), path))
        rows.labels.append({})
    for one in parts["annotations"] or []:
        image, category = _id(one, "image_id", path), _id(one, "category_id", path)
        if image not in row_of or category not in label:
            what = f"image {image}" if image not in row_of else f"category {category}"
            raise UserError(f"{path}: an annotation is of {what}, which is not in its list")
        rows.labels[row_of[image]][label[category]] = PRESENT
    return names, rows


def _id(value: dict[str, Any], key: str, path: Path) -> int:
    number = value.get(key)
    if not isinstance(number, int) or isinstance(number, bool):
        raise UserError(f"{path}: {key} is {short(number, 60)}; it must be a whole number")
    return number


# ---------------------------------------------------------------- Pascal VOC


def _voc(place: Path, options: _Options) -> Opened:
    """``ImageSets/Main/CLASS_SPLIT.txt`` with -1, 0 (difficult: not known) or 1 an image, and ``JPEGImages/``."""
    root = _voc_root(place)
    main = root / "ImageSets" / "Main"
    names = sorted({match[1] for path in main.iterdir() if (match := re.fullmatch(r"(.+)_train\.txt", path.name))})
    if not names:
        raise UserError(f"{main} has no CLASS_train.txt")
    made: dict[str, FileSplit] = {}
    for split, ending in (("train", "train"), ("validation", "val"), ("test", "test")):
        if not (main / f"{names[0]}_{ending}.txt").is_file():
            continue
        rows = _Rows(where=main / f"{names[0]}_{ending}.txt")
        known: list[str] = []
        for label, name in enumerate(names):
            path = main / f"{name}_{ending}.txt"
            said = list(_voc_lines(path))
            if label == 0:
                known = [image for image, _ in said]
                rows.paths = [root / "JPEGImages" / _inside(f"{image}.jpg", path) for image in known]
                rows.labels = [{} for _ in known]
            elif [image for image, _ in said] != known:
                raise UserError(f"{path} lists other images than {rows.where.name}")
            for at, (_, value) in enumerate(said):
                rows.labels[at][label] = {1: PRESENT, 0: UNKNOWN, -1: ABSENT}[value]
        made[split] = rows.split(split, tuple(names), options)
    return made["train"], made.get("validation"), made.get("test")


def _voc_root(place: Path) -> Path:
    """The folder that holds ``ImageSets``."""
    found = [place, *sorted(place.glob("VOC2*")), *sorted(place.glob("VOCdevkit/VOC2*"))]
    found = [each for each in found if (each / "ImageSets" / "Main").is_dir()]
    if len(found) > 1:
        raise UserError(f"{place} holds several sets ({', '.join(each.name for each in found)}); name one's folder")
    if not found:
        raise UserError(f"{place} has no ImageSets/Main")
    return found[0]


def _voc_lines(path: Path) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(read_text(path, "label file").splitlines(), 1):
        parts = line.split()
        if parts and (len(parts) != 2 or parts[1] not in ("-1", "0", "1")):
            raise UserError(f"{path}, line {number}: {short(line, 60)}; it must be an image and -1, 0 or 1")
        if parts:
            yield parts[0], int(parts[1])


# ---------------------------------------------------------------- NUS-WIDE


def _nus_wide(place: Path, options: _Options) -> Opened:
    """``ImageList/TrainImagelist.txt``, ``TrainTestLabels/Labels_CLASS_Train.txt`` (in ``Groundtruth/`` too) and the
    images in ``Flickr/`` or ``images/``.
    """
    lists, truth = place / "ImageList", place / "TrainTestLabels"
    truth = truth if truth.is_dir() else place / "Groundtruth" / "TrainTestLabels"
    if not truth.is_dir():
        raise UserError(f"{place} has no TrainTestLabels, nor has its Groundtruth")
    names = sorted({m[1] for path in truth.iterdir() if (m := re.fullmatch(r"Labels_(.+)_Train\.txt", path.name))})
    if not names:
        raise UserError(f"{truth} has no Labels_CLASS_Train.txt")
    root = next((place / name for name in ("Flickr", "images") if (place / name).is_dir()), place)
    made = []
    for split, ending in (("train", "Train"), ("test", "Test")):
        listed = lists / f"{ending}Imagelist.txt"
        rows = _Rows(where=listed)
        images = [line.strip() for line in read_text(listed, "image list").splitlines() if line.strip()]
        rows.paths = [root / _inside(image.replace("\\", "/"), listed) for image in images]
        rows.labels = [{} for _ in images]
        for label, name in enumerate(names):
            path = truth / f"Labels_{name}_{ending}.txt"
            said = read_text(path, "label file").split()
            if len(said) != len(images) or not set(said) <= {"0", "1"}:
                raise UserError(f"{path} must have 0 or 1 for each of the {len(images):,} images of {listed.name}")
            for at, value in enumerate(said):
                if value == "1":
                    rows.labels[at][label] = PRESENT
        made.append(rows.split(split, tuple(names), options))
    return made[0], None, made[1]


# ---------------------------------------------------------------- Open Images


def _open_images(place: Path, options: _Options) -> Opened:
    """``train-annotations-human-imagelabels*.csv`` and ``train/ID.jpg``, the same of ``validation`` and ``test``; names
    from ``class-descriptions*.csv`` or ``oidv*-class-descriptions*.csv``.
    """
    tables = {split: _open_images_table(place, split) for split in ("train", "validation", "test")}
    if tables["train"] is None:
        raise UserError(f"{place} has no train-annotations*imagelabels*.csv")
    _, train = tables["train"]
    keys = sorted({name for said in train.values() for name, value in said.items() if value == PRESENT})
    if not keys:
        raise UserError(f"{tables['train'][0]} has no label that any image has")
    index, made = {key: at for at, key in enumerate(keys)}, dict[str, FileSplit]()
    names = _open_images_names(place, keys)
    for split, table in tables.items():
        if table is None:
            continue
        rows = _Rows(where=table[0], other=UNKNOWN)
        for image, said in table[1].items():
            rows.paths.append(place / split / _inside(f"{image}.jpg", table[0]))
            rows.labels.append({index[key]: value for key, value in said.items() if key in index})
        made[split] = rows.split(split, names, options)
    return made["train"], made.get("validation"), made.get("test")


def _open_images_table(place: Path, split: str) -> tuple[Path, dict[str, dict[str, float]]] | None:
    """A split's file, and of each image what is said of its labels."""
    path = _only(place, rf"(oidv\d+-)?{split}-annotations-(human-|machine-)?imagelabels.*\.csv")
    if path is None:
        return None
    found: dict[str, dict[str, float]] = {}
    rows = _csv_rows(path)
    columns = {name: at for at, name in enumerate(next(rows, []))}
    needed = ("Confidence", "ImageID", "LabelName")
    if not set(needed) <= set(columns):
        raise UserError(f"{path} must have the columns {', '.join(needed)}")
    at = [columns[name] for name in needed]
    for number, row in enumerate(rows, 2):
        value, image, name = [row[column] for column in at] if len(row) > max(at) else ("", "", "")
        if value not in ("0", "1", "0.0", "1.0") or not image or not name:
            raise UserError(f"{path}, line {number}: Confidence is {short(value, 40)}; it must be 0 or 1, of an image")
        found.setdefault(image, {})[name] = float(value)
    return path, found


def _csv_rows(path: Path) -> Iterator[list[str]]:
    """Its rows that are not empty."""
    try:
        for row in csv.reader(io.StringIO(read_text(path, "label file", _TABLE), newline="")):
            if row:
                yield row
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error})") from error


def _open_images_names(place: Path, keys: Sequence[str]) -> tuple[str, ...]:
    """What classes are called; two of one name, or one without, keep their key."""
    path = _only(place, r"(oidv\d+-)?class-descriptions.*\.csv")
    if path is None:
        return tuple(keys)
    called = {row[0]: row[1].strip() for row in _csv_rows(path) if len(row) >= 2}
    names = [called.get(key) or key for key in keys]
    return tuple(name if names.count(name) == 1 else f"{name} ({key})" for name, key in zip(names, keys, strict=True))


# ---------------------------------------------------------------- what they share


LABELLED: dict[str, tuple[Callable[[Path, _Options], Opened], Callable[[Path], bool]]] = {
    "coco": (_coco, lambda place: _only(place / "annotations", r"instances_train.*\.json") is not None),
    "voc": (_voc, lambda place: any((place / at / "ImageSets/Main").is_dir() for at in _voc_places(place))),
    "nus-wide": (_nus_wide, lambda place: (place / "ImageList" / "TrainImagelist.txt").is_file()),
    "open-images": (
        _open_images,
        lambda place: _only(place, r"(oidv\d+-)?train-annotations-(human-|machine-)?imagelabels.*\.csv") is not None,
    ),
}
"""How each is opened, and what gives it away."""


def _voc_places(place: Path) -> list[str]:
    below = [*place.glob("VOC2*"), *place.glob("VOCdevkit/VOC2*")]
    return [".", *(str(each.relative_to(place)) for each in below)]


def find_labelled(place: Path) -> str | None:
    """The set whose files lie in ``place``; None: none of these."""
    return next((name for name, (_, known) in LABELLED.items() if known(place)), None)


def open_labelled(name: str, place: Path, *, channels: int, max_pixels: int, notes: list[str]) -> Opened:
    """A set's splits.

    Args:
        name: a key of ``LABELLED``.
        place: its folder.
        channels: 3 or 1.
        max_pixels: cap on a picture's size.
        notes: gets a line on images that are not there.

    Raises:
        UserError: a file that is missing, damaged, or lists no image; the message names it.
    """
    options = _Options(channels=channels, max_pixels=max_pixels, notes=notes)
    return LABELLED[name][0](place, options)


def _only(folder: Path, pattern: str) -> Path | None:
    """The one file of a folder whose name fits; None: none does."""
    try:
        found = sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
    except OSError:  # it is not there, or not to be read: who opens it says so
        return None
    if len(found) > 1:
        raise UserError(f"{folder} has both {found[0].name} and {found[1].name}; leave one")
    return found[0] if found else None


def _inside(name: object, where: Path) -> PurePosixPath:
    """A file's name that does not lead out of its folder."""
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(path):
        raise UserError(f"{where}: the file name {short(name, 80)} leads out of the set's folder, or is none")
    return path
