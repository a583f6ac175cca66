"""YOLO's annotations: a text file for each picture, a line for each box: class, centre and sides as shares."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from convscale.detect.boxes import Annotated
from convscale.errors import UserError, short
from convscale.images.splits import split_of
from convscale.images.walk import Tally, pictures_below
from convscale.read import Limits, read_text, read_yaml

_LABELS = Limits(size=8 * 2**20)
"""Of a picture's file."""
MOST_CLASS = 100_000
"""Largest number of a class: there is a name for every smaller one."""
_NAMES = ("classes.txt", "obj.names", "names.txt")


def find_yaml(folder: Path) -> Path | None:
    """The file that names splits and classes, where there is one."""
    usual = [folder / name for name in ("data.yaml", "data.yml", "dataset.yaml")]
    others = sorted(folder.glob("*.y*ml")) if folder.is_dir() else []
    return next((path for path in [*usual, *others] if path.is_file()), None)


def is_yolo(folder: Path) -> bool:
    """Whether a folder holds labels as YOLO has them."""
    return (folder / "labels").is_dir() or any((each / "labels").is_dir() for each in folder.iterdir() if each.is_dir())


def open_yolo(path: Path) -> tuple[dict[str, list[Annotated]], tuple[str, ...]]:
    """Pictures by split, and class names.

    Args:
        path: the YAML file, or a folder with ``images`` and ``labels``.

    Raises:
        UserError: no pictures, no names, or a line that is no box.
    """
    told: dict[str, Any] = {}
    folder = path
    if (file := path if path.is_file() else find_yaml(path)) is not None:
        read = read_yaml(file, "file")
        if not isinstance(read, dict):
            raise UserError(f"file {file} must be a table of train, val and names")
        told, folder = read, file.parent
    places = _split_places(told, folder)
    names = _class_names(told, folder)
    splits = {split: [each for place in found for each in _pictures(place)] for split, found in places.items()}
    if not any(splits.values()):
        raise UserError(f"{path} has 0 images; YOLO's pictures stand in images/, their labels in labels/")
    if not names:
        most = max((int(name) for each in splits.values() for one in each for name in one.classes), default=-1)
        if most > MOST_CLASS:
            raise UserError(
                f"{path} names no classes and has a box of class {short(most, 20)}; without names it is at most "
                f"{MOST_CLASS:,}"
            )
        names = tuple(str(number) for number in range(most + 1))
    if not names:
        raise UserError(f"{path} names no classes and has no box; list them in data.yaml (names) or classes.txt")
    known = {str(number): name for number, name in enumerate(names)}
    return {split: [_renamed(one, known) for one in each] for split, each in splits.items()}, names


def _renamed(one: Annotated, known: dict[str, str]) -> Annotated:
    from dataclasses import replace

    return replace(one, classes=tuple(known.get(number, "") for number in one.classes))


def _split_places(told: dict[str, Any], folder: Path) -> dict[str, list[Path]]:
    """The folders (or lists) of pictures of each split."""
    root = folder / str(told["path"]) if isinstance(told.get("path"), str) else folder
    root = root if root.is_dir() else folder
    found: dict[str, list[Path]] = {}
    for key, value in told.items():
        split = split_of(key)
        if split is None or value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str) for each in values):
            raise UserError(f"{folder}: {key} is {short(value, 60)}; it must be a folder, or a list of them")
        found[split] = [_place(root, each) for each in values]
    if found:
        return found
    for images in (folder / "images", folder):
        for each in sorted(images.iterdir()) if images.is_dir() else ():
            split = split_of(each.name)
            if split and each.is_dir():
                found.setdefault(split, []).append(each / "images" if (each / "images").is_dir() else each)
        if found:
            return found
    return {"train": [folder / "images"]}


def _place(root: Path, name: str) -> Path:
    for place in (root / name, root / name.removeprefix("../"), root / "images" / name):
        if place.exists():
            return place
    raise UserError(f"{root}: there is no {name}; name the folders of the pictures from there")


def _class_names(told: dict[str, Any], folder: Path) -> tuple[str, ...]:
    names = told.get("names")
    if isinstance(names, dict):
        try:
            table = {int(key): str(value) for key, value in names.items()}
        except ValueError:
            raise UserError(f"{folder}: names must be a list, or a table of numbers, got {short(names, 60)}") from None
        if not table or min(table) < 0 or max(table) > MOST_CLASS:
            raise UserError(f"{folder}: names has numbers from {min(table, default=0)} to {max(table, default=0)}")
        names = [table.get(number, f"class {number}") for number in range(max(table) + 1)]  # a gap keeps its number
    if names is None:
        file = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
        names = [] if file is None else [line.strip() for line in read_text(file, "file").split("\n") if line.strip()]
    if not isinstance(names, list) or len(set(map(str, names))) < len(names):
        raise UserError(f"{folder}: names must be class names, each once, got {short(names, 60)}")
    return tuple(map(str, names))


def _pictures(place: Path) -> list[Annotated]:
    if place.is_file():
        lines = [line.strip() for line in read_text(place, "list").split("\n") if line.strip()]
        paths = [line if os.path.isabs(line) else os.path.join(place.parent, line) for line in lines]
    else:
        paths = list(pictures_below(os.fspath(place), Tally()))
    return [_picture(path) for path in paths]


def _picture(path: str) -> Annotated:
    labels = _labels_of(path)
    boxes, classes = [], []
    for number, line in enumerate(read_text(labels, "labels", _LABELS).split("\n") if labels else (), 1):
        if not line.strip():
            continue
        words = line.split()
        try:
            kind, values = int(words[0]), [float(word) for word in words[1:]]
        except (ValueError, IndexError):
            raise UserError(
                f"labels {labels}, line {number}: {short(line, 60)} is no box; write class x y w h"
            ) from None
        if len(values) >= 6 and len(values) % 2 == 0:  # an outline: its extent is its box
            xs, ys = values[0::2], values[1::2]
            boxes.append([min(xs), min(ys), max(xs), max(ys)])
        elif len(values) in (4, 5):  # a fifth is a score
            x, y, w, h = values[:4]
            boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
        else:
            boxes.append([math.nan] * 4)
        classes.append(str(kind))
    crowd = np.zeros(len(boxes), bool)
    return Annotated(
        path=path, boxes=np.array(boxes, np.float64).reshape(-1, 4), classes=tuple(classes), crowd=crowd, relative=True
    )


def _labels_of(path: str) -> Path | None:
    """A picture's file of labels: ``images`` in its path becomes ``labels``; none: background alone."""
    parts = Path(path).with_suffix(".txt").parts
    places = [Path(*parts)]
    for at in range(len(parts) - 1, -1, -1):
        if parts[at] == "images":
            places.insert(0, Path(*parts[:at], "labels", *parts[at + 1 :]))
            break
    return next((each for each in places if each.is_file()), None)
