"""COCO's annotations: one JSON file with images, annotations and categories (cocodataset.org, "Data format")."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convscale.detect.boxes import Annotated
from convscale.detect.faults import Faults
from convscale.errors import UserError, short
from convscale.images.splits import split_of
from convscale.read import Limits, object_of, read_json

LIMITS = Limits(size=2 * 2**30, nodes=400_000_000, surrogates=True)
"""Of an annotation file: COCO's own for training has 450 MB."""
_PARTS = ("images", "annotations", "categories")


def find_coco(folder: Path, faults: Faults) -> dict[str, Path]:
    """Annotation files of a folder by the split that their name, or else their folder's, says; where none is ``train``,
    the first that says none is. Files that are passed over are told.
    """
    places = [folder, folder / "annotations", *(each for each in _folders(folder) if split_of(each.name))]
    files = [path for place in places for path in sorted(place.glob("*.json")) if _looks_like_coco(path)]
    found: dict[str, Path] = {}
    for path in sorted(files, key=lambda path: _said_split(path) is None):  # "annotations" stands before "train"
        said = _said_split(path)
        split = said or "train"
        if split in found:
            why = f"there is {found[split].relative_to(folder)} for {split}"
            faults.tell(
                f"{path.relative_to(folder)} is passed over: {why if said else 'it names no split, and ' + why}"
            )
            continue
        if said is None and found:
            faults.tell(f"{path.relative_to(folder)} names no split; it is the train set")
        found[split] = path
    return found


def _said_split(path: Path) -> str | None:
    """The split that a word of a file's name, or else its folder, says: a data folder may be called ``test`` too."""
    words = path.stem.lower().replace("-", "_").replace("2017", "").replace("2014", "").split("_")
    return next((split for word in words if (split := split_of(word))), None) or split_of(path.parent.name)


def _folders(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir()) if folder.is_dir() else []


def _looks_like_coco(path: Path) -> bool:
    """Whether a JSON file speaks of annotations; its other kinds of file (captions, keypoints) are passed over."""
    if any(word in path.stem.lower() for word in ("caption", "keypoint", "panoptic", "image_info", "stuff")):
        return False
    try:
        with open(path, "rb") as file:
            head, size = file.read(65536), os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 65536))
            text = head + file.read()
    except OSError:
        return False
    return b'"annotations"' in text or b'"images"' in text or b'"categories"' in text


def read_coco(path: Path, faults: Faults) -> tuple[list[Annotated], dict[int, str]]:
    """Pictures of an annotation file, and class names by their ids, in the order of these, which may have gaps.

    Raises:
        UserError: it is no such file, has no images or no categories.
    """
    where = f"annotation file {path}"
    told = object_of(read_json(path, "annotation file", LIMITS), where)
    for part in _PARTS:
        if not isinstance(told.get(part, []), list):
            raise UserError(f"{where}: {part} is {short(told[part], 40)}; it must be a list")
    images, annotations, categories = (told.get(part, []) for part in _PARTS)
    if not images:
        raise UserError(f"{where} has 0 images; it must have at least one")
    names = _categories(categories, where)
    by_image: dict[Any, list[Any]] = {}
    known = set[object]()
    for one in annotations:
        if not isinstance(one, dict):
            faults.add("no number", short(one, 60))
            continue
        if one.get("id") is not None:
            key = _key(one["id"])
            if key in known:
                faults.add("id twice", f"id {short(key, 40)}")
                continue
            known.add(key)
        by_image.setdefault(_key(one.get("image_id")), []).append(one)
    pictures, seen = [], set()
    base = _base(path, images, where)
    for image in images:
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
            raise UserError(f"{where}: an image is {short(image, 60)}; it must have id and file_name")
        key = _key(image["id"])
        if key in seen:
            faults.add("twice", f"id {short(key, 40)}")
            continue
        seen.add(key)
        pictures.append(_picture(base, image, by_image.pop(key, []), names))
    for key, rest in by_image.items():
        for _ in rest:
            faults.add("no picture", f"image_id {short(key, 40)}")
    return pictures, names


def _key(value: object) -> object:
    return value if isinstance(value, int | str) else repr(value)


def _categories(categories: list[Any], where: str) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    found: dict[int, str] = {}
    for one in categories:
        number, name = (one.get("id"), one.get("name")) if isinstance(one, dict) else (None, None)
        if not isinstance(number, int) or isinstance(number, bool) or not isinstance(name, str):
            raise UserError(f"{where}: a category is {short(one, 60)}; it must have id, a whole number, and name")
        if number in found or name in found.values():
            raise UserError(f"{where}: category {number} {name!r} stands there twice")
        found[number] = name
    if not found:
        raise UserError(f"{where} has no categories; it must name its classes")
    return dict(sorted(found.items()))


def _picture(base: Path, image: dict[str, Any], annotations: list[dict[str, Any]], names: dict[int, str]) -> Annotated:
    boxes = [_box(one.get("bbox")) for one in annotations]
    height, width = image.get("height"), image.get("width")
    said = isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0
    number = image["id"]
    return Annotated(
        path=os.path.join(base, image["file_name"]),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        classes=tuple(_name(one.get("category_id"), names) for one in annotations),
        crowd=np.array([bool(one.get("iscrowd", 0)) for one in annotations], bool),
        areas=np.array([_area(one.get("area")) for one in annotations], np.float64),
        size=(height, width) if said else None,  # pyright: ignore[reportArgumentType]
        number=number if isinstance(number, int) and not isinstance(number, bool) else None,
    )


def _name(number: object, names: dict[int, str]) -> str:
    """Of a category; empty for none that is listed."""
    return names.get(number, "") if isinstance(number, int) and not isinstance(number, bool) else ""


def _area(value: object) -> float:
    """Pixels that an annotation says it covers; NaN where it does not."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e15
    return float(value) if good else math.nan  # pyright: ignore[reportArgumentType]


def _box(value: object) -> list[float]:
    """COCO's x, y, width, height as corners; NaN where it is none."""
    numbers = value if isinstance(value, list) else []
    good = len(numbers) == 4 and all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
    if not good:
        return [math.nan] * 4
    x, y, width, height = map(float, numbers)
    return [x, y, x + width, y + height]


def _base(path: Path, images: list[Any], where: str) -> Path:
    """The folder that the names of the images start from: the first in which one of the first few stands."""
    firsts = [each["file_name"] for each in images[:20] if isinstance(each, dict) and _is_name(each.get("file_name"))]
    for place in _places(path):
        if any((place / name).is_file() for name in firsts):
            return place
    raise UserError(f"{where}: its images are not found, {short(firsts[0] if firsts else '', 80)} neither beside it "
                    "nor in images/ or a folder of its split's name")  # fmt: skip


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name) and "\0" not in name


def _places(path: Path) -> Iterator[Path]:
    split = path.stem.removeprefix("instances_")
    for above in (path.parent, path.parent.parent):
        yield above
        yield from (above / "images", above / split, above / "images" / split)
        kind = split_of(split.rstrip("0123456789"))
        yield from (each for each in _folders(above) if kind and split_of(each.name) == kind)
