"""A set of pictures with boxes, opened and checked, whatever form its annotations have."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from convscale.detect.boxes import Annotated, BoxSplit, BoxSplits
from convscale.detect.coco import find_coco, read_coco
from convscale.detect.faults import Faults
from convscale.detect.voc import is_voc, open_voc
from convscale.detect.yolo import find_yaml, is_yolo, open_yolo
from convscale.errors import UserError, check_number, check_path
from convscale.images.decode import ImageError, check_image, preload
from convscale.machine import available_cores

FORMS = ("coco", "yolo", "voc")
CARVED = 0.1
"""Share of the train set that becomes a missing validation or test set."""
LEAST_SIDE = 1e-3
"""Pixels: a side that is shorter is none."""


def open_boxes(
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    max_bad_rate: float = 0.01,
    seed: int = 0,
) -> BoxSplits:
    """Open a set of pictures with boxes, and check all of it.

    What is wrong is counted and named in ``notes``: boxes without area, outside, of unknown classes, pictures that are
    missing, unreadable or of another size, ids that stand there twice. Such boxes and pictures are left out, up to
    ``max_bad_rate`` of the pictures and 5 % of the boxes. Boxes that reach out are cut. A picture without boxes is kept
    as background. Splits that are missing are carved from train, by picture; where there is no train set it is another
    one (``borrowed``), which can be evaluated on and not trained on.

    Args:
        path: COCO: an annotation file, or a folder with one for each split (``annotations/instances_train2017.json``,
            ``train/_annotations.coco.json``); YOLO: ``data.yaml``, or a folder with ``images`` and ``labels``; VOC: a
            folder with ``Annotations`` and ``JPEGImages``.
        classes: those that a network knows, in its order; None: those of the data.
        max_bad_rate: share of pictures that may be left out.
        seed: of what is carved.

    Raises:
        UserError: no such data, 0 images, or too much of it is wrong.
    """
    place = check_path("data", path)
    check_number("max_bad_rate", max_bad_rate, "a share from 0 to 1", 0, 1)
    if not place.exists():
        raise UserError(f"data {place} does not exist")
    faults = Faults()
    form, found, names, ids = _read(place, faults)
    if classes is not None:
        if missing := [name for name in names if name not in classes]:
            raise UserError(f"{place} has the class {missing[0]!r}, which the detector does not know")
        id_of = dict(zip(names, ids, strict=False))
        names = tuple(classes)
        ids = tuple(id_of[name] for name in names) if id_of.keys() == set(names) else ()
    splits = {split: _checked(split, each, names, ids, faults) for split, each in found.items() if each}
    pictures = sum(len(each) for each in found.values())
    boxes = sum(len(one.boxes) for each in found.values() for one in each)
    boxes += faults.counts["id twice"] + faults.counts["no picture"]  # these are in no picture
    faults.check(str(place), pictures, boxes, max_bad_rate)
    made, carved, borrowed, notes = _complete(splits, place, seed)
    return BoxSplits(
        train=made["train"],
        validation=made["validation"],
        test=made["test"],
        form=form,
        notes=(*faults.notes(), *notes),
        max_bad_rate=max_bad_rate,
        origin=place,
        carved=carved,
        borrowed=borrowed,
    )


def _read(place: Path, faults: Faults) -> tuple[str, dict[str, list[Annotated]], tuple[str, ...], tuple[int, ...]]:
    """The form of the annotations, the pictures by split, the class names, and COCO's ids of these."""
    if place.is_file():
        if place.suffix.lower() in (".yaml", ".yml"):
            return "yolo", *open_yolo(place), ()
        if place.suffix.lower() == ".json":
            pictures, named = read_coco(place, faults)
            return "coco", {"train": pictures}, tuple(named.values()), tuple(named)
        raise UserError(f"{place} is no set of boxes; COCO's .json, YOLO's .yaml or a folder would be right")
    if files := find_coco(place, faults):
        read = {split: read_coco(file, faults) for split, file in files.items()}
        first, named = next(iter(files.values())), next(iter(read.values()))[1]
        names, ids = tuple(named.values()), tuple(named)
        for split, (_, others) in read.items():
            if tuple(others.values()) != names:
                raise UserError(f"{files[split]} has other categories than {first}")
            if ids and tuple(others) != ids:
                faults.tell(f"{files[split]} has other ids of the categories than {first}: results count them from 1")
                ids = ()
        return "coco", {split: pictures for split, (pictures, _) in read.items()}, names, ids
    for folder in (place, *(each for each in sorted(place.glob("VOC*")) if each.is_dir())):
        if is_voc(folder):
            return "voc", *open_voc(folder), ()
    if is_yolo(place) or find_yaml(place) is not None:
        return "yolo", *open_yolo(place), ()
    raise UserError(
        f"{place} holds no boxes that are known: neither COCO's JSON, nor YOLO's images/ and labels/, nor VOC's "
        "Annotations/"
    )


def _checked(
    split: str, pictures: Sequence[Annotated], names: tuple[str, ...], ids: tuple[int, ...], faults: Faults
) -> BoxSplit:
    """The pictures that can be used, with the boxes that can."""
    preload()
    with ThreadPoolExecutor(min(8, 2 * available_cores())) as pool:
        headers = list(pool.map(_header, [one.path for one in pictures]))
    label_of = {name: number for number, name in enumerate(names, 1)}
    rows: list[tuple[str, tuple[int, int], np.ndarray, np.ndarray, np.ndarray, int, np.ndarray]] = []
    seen: set[str] = set()
    for number, (one, header) in enumerate(zip(pictures, headers, strict=True), 1):
        if isinstance(header, str):
            faults.add(
                "missing" if header == "missing" else "unreadable", f"{one.path}" if header == "missing" else header
            )
            continue
        if one.path in seen:
            faults.add("twice", one.path)
            continue
        seen.add(one.path)
        (height, width), orientation = header
        raw = (width, height) if orientation >= 5 else (height, width)
        turned = one.size is not None and one.size != (height, width) and one.size == raw
        if one.size is not None and one.size not in ((height, width), raw):
            faults.add("other size", f"{one.path}: {one.size[1]} x {one.size[0]}, it is {width} x {height}")
            continue
        boxes = one.boxes * np.array([width, height, width, height]) if one.relative else one.boxes
        if turned:
            faults.add("turned", one.path)
            boxes = turn_boxes(boxes, orientation, raw)
        elif orientation > 1 and len(boxes) and (one.size is None or orientation < 5 or height == width):
            faults.add("unsaid turn", one.path)
        kept, labels = _usable(one, boxes, (height, width), label_of, faults)
        low, high = np.zeros(4), np.array([width, height, width, height], np.float64)
        cut = np.clip(boxes[kept], low, high)
        areas = (cut[:, 2] - cut[:, 0]) * (cut[:, 3] - cut[:, 1])
        if one.areas is not None:
            areas = np.where(np.isnan(one.areas[kept]), areas, one.areas[kept])
        at = one.number or number
        rows.append((one.path, (height, width), cut.astype(np.float32), labels, one.crowd[kept], at, areas))
    parts: list[tuple[object, ...]] = list(zip(*rows, strict=True)) if rows else [()] * 7
    keys = ("paths", "sizes", "boxes", "labels", "crowd", "numbers", "areas")
    values: dict[str, Any] = dict(zip(keys, parts, strict=True))
    return BoxSplit(split=split, classes=names, category_ids=ids, **values)


def _usable(
    one: Annotated, boxes: np.ndarray, size: tuple[int, int], label_of: Mapping[str, int], faults: Faults
) -> tuple[list[int], np.ndarray]:
    """Positions of the boxes that can be used, and their labels."""
    kept: list[int] = []
    labels: list[int] = []
    height, width = size
    for at, (box, name) in enumerate(zip(boxes, one.classes, strict=True)):
        x1, y1, x2, y2 = box
        where = f"{one.path}: {np.round(box, 1).tolist()}"
        if not np.isfinite(box).all():
            faults.add("no number", where)
        elif x2 - x1 < LEAST_SIDE or y2 - y1 < LEAST_SIDE:
            faults.add("no area", where)
        elif min(x2, width) - max(x1, 0) < LEAST_SIDE or min(y2, height) - max(y1, 0) < LEAST_SIDE:
            faults.add("outside", where)
        elif name not in label_of:
            faults.add("unknown class", f"{one.path}: {name!r}" if name else one.path)
        else:
            if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:
                faults.add("cut", where)
            if one.crowd[at]:
                faults.add("crowd", where)
            kept.append(at)
            labels.append(label_of[name])
    return kept, np.array(labels, np.int64)


def turn_boxes(boxes: np.ndarray, orientation: int, raw: tuple[int, int]) -> np.ndarray:
    """Boxes on a picture as it is stored, on the upright one.

    Args:
        boxes: (n, 4) x1, y1, x2, y2.
        orientation: EXIF's, 1 to 8.
        raw: (height, width) of the stored picture.
    """
    height, width = raw
    x = boxes[:, [0, 2]]
    y = boxes[:, [1, 3]]
    turned = {
        2: (width - x, y),
        3: (width - x, height - y),
        4: (x, height - y),
        5: (y, x),
        6: (height - y, x),
        7: (height - y, width - x),
        8: (y, width - x),
    }
    new_x, new_y = turned.get(orientation, (x, y))
    return np.stack([new_x.min(1), new_y.min(1), new_x.max(1), new_y.max(1)], 1) if len(boxes) else boxes


def _header(path: str) -> tuple[tuple[int, int], int] | str:
    """Upright (height, width) and EXIF's orientation; a text says why there is none."""
    if not os.path.isfile(path):
        return "missing"
    try:
        header = check_image(path)
    except ImageError as error:
        return str(error)
    turned = header.orientation >= 5
    size = (header.width, header.height) if turned else (header.height, header.width)
    return size, header.orientation


def _complete(
    splits: dict[str, BoxSplit], place: Path, seed: int
) -> tuple[dict[str, BoxSplit], tuple[str, ...], str | None, list[str]]:
    """All three splits, which of them are carved, the one that train is borrowed from, and notes; what is missing is
    carved from train, the same each time.
    """
    notes: list[str] = []
    borrowed: str | None = None
    if "train" not in splits or not len(splits["train"]):
        known = [name for name, each in splits.items() if len(each)]
        if not known:
            raise UserError(f"{place} has 0 images that can be used")
        borrowed = known[0]
        splits = {**splits, "train": splits[borrowed].subset(range(len(splits[borrowed])), "train")}
        notes.append(f"there is no train set; it is the {borrowed} set")
    train = splits["train"]
    missing = [name for name in ("validation", "test") if name not in splits or not len(splits[name])]
    order = np.random.default_rng([seed, 17]).permutation(len(train))
    for name in missing:
        count = max(1, round(CARVED * len(train)))
        if len(order) <= count:
            splits[name] = train.subset(order, name)
            notes.append(f"there are too few images to carve a {name} set; it is the train set")
            continue
        part, order = np.sort(order[:count]), order[count:]
        splits[name] = train.subset(part, name)
        notes.append(f"carved {count:,} images from train as {name} set")
    if missing:
        splits["train"] = train.subset(np.sort(order))
    return splits, tuple(missing), borrowed, notes
