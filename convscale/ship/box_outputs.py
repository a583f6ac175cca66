"""What a detector said of files, in other forms: COCO's results, and the pictures with boxes drawn."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convscale.errors import UserError, check_number
from convscale.files import atomic_path, write_json
from convscale.images.decode import ImageError, read_image
from convscale.images.drawing import COLOURS, draw_boxes
from convscale.read import Limits, json_of

_LINE = Limits(size=4 * 2**20, surrogates=True)


def said_rows(output: Path) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Path and boxes of each row of a finished ``.jsonl`` file; pictures that could not be read have none.

    Raises:
        UserError: it is no file of boxes.
    """
    try:
        with open(output, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                row = json_of(line, f"{output}, line {number}", _LINE)
                if not isinstance(row, dict) or not isinstance(row.get("path"), str):
                    raise UserError(f"{output}, line {number} is no row of boxes")
                boxes = row.get("boxes", [])
                if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
                    raise UserError(f"{output}, line {number} has a box without class, score and four numbers")
                yield row["path"], boxes
    except OSError as error:
        raise UserError(f"{output} can not be read: {error.strerror}") from error


def _is_box(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("class"), str) or not _is_number(value.get("score")):
        return False
    box = value.get("box")
    return isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def write_coco_results(output: Path, target: Path, classes: Sequence[str], ids: Sequence[int] = ()) -> int:
    """Write the boxes of a ``.jsonl`` file as COCO's results: a list of image_id, category_id (of ``ids``, in the order
    of the classes; from 1 where there are none), bbox (x, y, width, height) and score.

    A picture's id is the number that its name is (``000000000139.jpg``) where every name is one, else its place in the
    list, from 1. Returns how many boxes there are.
    """
    rows = list(said_rows(output))
    stems = [Path(path).stem for path, _ in rows]
    numbered = all(stem.isdecimal() for stem in stems) and len(set(map(int, stems))) == len(stems)
    unknown = next((each["class"] for _, boxes in rows for each in boxes if each["class"] not in classes), None)
    if unknown is not None:
        raise UserError(f"{output} has the class {unknown[:60]!r}, which the artefact does not know")
    id_of = dict(zip(classes, ids or range(1, len(classes) + 1), strict=True))
    results = [
        {
            "image_id": int(stems[at]) if numbered else at + 1,
            "file_name": path.encode(errors="surrogateescape").decode(errors="replace"),
            "category_id": id_of[each["class"]],
            "bbox": [
                each["box"][0],
                each["box"][1],
                round(each["box"][2] - each["box"][0], 2),
                round(each["box"][3] - each["box"][1], 2),
            ],
            "score": each["score"],
        }
        for at, (path, boxes) in enumerate(rows)
        for each in boxes
    ]
    write_json(target, results)
    return len(results)


def draw_results(
    output: Path, folder: Path, classes: Sequence[str], *, min_score: float = 0.3, since_ns: int = 0
) -> int:
    """Draw the boxes of a ``.jsonl`` file into copies of its pictures; copies that are there are left, so that a run
    that was stopped goes on.

    Args:
        output: the finished file.
        folder: for the copies: ``NAME.png``, with a number before it where two pictures have one name.
        classes: their order gives the colours.
        min_score: boxes of lower scores are not drawn.
        since_ns: copies older than this, in nanoseconds since 1970, are of other boxes and made again.

    Returns:
        How many pictures were drawn.

    Raises:
        UserError: a copy would take the place of one of the pictures; before any is drawn.
    """
    from PIL import Image

    check_number("min_score", min_score, "a score from 0 to 1", 0, 1)
    folder.mkdir(parents=True, exist_ok=True)
    colour_of = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(classes)}
    targets = _copies([path for path, _ in said_rows(output)], folder)
    drawn = 0
    for target, (path, boxes) in zip(targets, said_rows(output), strict=True):
        if target.exists():
            if target.stat().st_mtime_ns >= since_ns:
                continue
            target.unlink()  # or it would stay where the picture can not be read any more
        shown = [each for each in boxes if each["score"] >= min_score]
        try:
            pixels = read_image(os.fspath(path))
        except ImageError:
            continue
        table = np.array([each["box"] for each in shown], np.float64).reshape(-1, 4)
        texts = [f"{each['class']} {each['score']:.2f}" for each in shown]
        colours = [colour_of.get(each["class"], COLOURS[0]) for each in shown]
        with atomic_path(target) as place:
            Image.fromarray(draw_boxes(pixels, table, texts, colours=colours, most=1280)).save(place, format="PNG")
        drawn += 1
    return drawn


def _copies(paths: Sequence[str], folder: Path) -> list[Path]:
    """Where the copy of each picture goes."""
    pictures = {os.path.realpath(path) for path in paths}
    used: set[str] = set()
    found: list[Path] = []
    for number, path in enumerate(paths, 1):
        name = f"{Path(path).stem}.png"
        name = f"{number}-{name}" if name in used else name
        used.add(name)
        found.append(folder / name)
        if os.path.realpath(found[-1]) in pictures:
            raise UserError(f"{found[-1]} is one of the pictures; draw into another folder than theirs")
    return found
