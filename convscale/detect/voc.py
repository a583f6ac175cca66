"""Pascal VOC's annotations: an XML file for each picture (Everingham et al. 2010, development kit)."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from convscale.detect.boxes import Annotated
from convscale.errors import UserError, first_line
from convscale.images.decode import EXTENSIONS
from convscale.images.splits import split_of
from convscale.read import Limits, read_text

_XML = Limits(size=8 * 2**20)
_MOST = 100_000
"""Objects of a picture."""


def is_voc(folder: Path) -> bool:
    """Whether a folder holds annotations as VOC has them."""
    return (folder / "Annotations").is_dir()


def open_voc(folder: Path) -> tuple[dict[str, list[Annotated]], tuple[str, ...]]:
    """Pictures by split, and class names in order of the alphabet. Splits are the lists of ``ImageSets/Main``; without
    those all pictures are ``train``. Where no list is, ``trainval`` is it, without what other lists name.

    Raises:
        UserError: no annotations, or one that is no such XML.
    """
    listed: dict[str, list[str]] = {}
    sets = folder / "ImageSets" / "Main"
    for file in sorted(sets.glob("*.txt")) if sets.is_dir() else ():
        if split := split_of(file.stem):
            listed[split] = _listed(file)
    if "train" not in listed and (sets / "trainval.txt").is_file():
        held = {name for names in listed.values() for name in names}
        listed["train"] = [name for name in _listed(sets / "trainval.txt") if name not in held]
    if not listed:
        listed = {"train": sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))}
    splits = {split: [_picture(folder, name) for name in names] for split, names in listed.items()}
    if not any(splits.values()):
        raise UserError(f"{folder / 'Annotations'} has 0 images; VOC has one XML file for each")
    names = sorted({name for each in splits.values() for one in each for name in one.classes if name})
    if not names:
        raise UserError(f"{folder / 'Annotations'} has no object in any file; there is no class to learn")
    return splits, tuple(names)


def _listed(file: Path) -> list[str]:
    """Names of pictures, the first word of each line."""
    return [line.split()[0] for line in read_text(file, "list").split("\n") if line.strip()]


def _picture(folder: Path, stem: str) -> Annotated:
    file = folder / "Annotations" / f"{stem}.xml"
    root = _xml(file)
    boxes, classes, crowd = [], [], []
    for one in root.findall("object")[:_MOST]:
        box = one.find("bndbox")
        corners = [_number(box, name) for name in ("xmin", "ymin", "xmax", "ymax")]
        # pixels count from 1, and the last one is inside
        boxes.append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
        classes.append((one.findtext("name") or "").strip())
        crowd.append((one.findtext("difficult") or "0").strip() == "1")
    size = root.find("size")
    height, width = _number(size, "height"), _number(size, "width")
    known = math.isfinite(height) and math.isfinite(width) and height > 0 and width > 0
    return Annotated(
        path=_path(folder, stem, root.findtext("filename")),
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        classes=tuple(classes),
        crowd=np.array(crowd, bool),
        size=(int(height), int(width)) if known else None,
    )


def _xml(file: Path) -> ElementTree.Element:
    """The outermost element; one that declares entities, which can make a small file endless, is refused."""
    text = read_text(file, "annotation file", _XML)
    if re.search(r"<!\s*(DOCTYPE|ENTITY)", text, re.IGNORECASE):
        raise UserError(f"annotation file {file} declares a document type; annotations have none")
    try:
        root = ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise UserError(f"annotation file {file} is no valid XML: {first_line(error)}") from error
    if root.tag != "annotation":
        raise UserError(f"annotation file {file} is a {root.tag[:40]!r}; it must be an 'annotation'")
    return root


def _number(element: ElementTree.Element | None, name: str) -> float:
    text = None if element is None else element.findtext(name)
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan


def _path(folder: Path, stem: str, said: str | None) -> str:
    """Of the picture: what the file says, else the annotation's name with a known ending."""
    for place in (folder / "JPEGImages", folder / "images", folder):
        if said and os.path.basename(said) == said and (place / said).is_file():
            return os.path.join(place, said)
        for ending in EXTENSIONS:
            if (place / f"{stem}{ending}").is_file():
                return os.path.join(place, f"{stem}{ending}")
    return os.path.join(folder, "JPEGImages", said or f"{stem}.jpg")
