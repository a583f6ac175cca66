"""Small sets of pictures with boxes, and a small detector."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

import convscale as cs
from convscale.nn.detectors import Detector

CLASSES = ("red", "green")
_COLOURS = {1: (230, 20, 20), 7: (20, 230, 20)}


def coco_set(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Coloured squares on gray noise, as COCO's annotations with gaps in the ids; gives the file."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for number in range(count):
        height, width = int(random.integers(48, 80)), int(random.integers(48, 80))
        pixels = random.integers(90, 140, (height, width, 3)).astype(np.uint8)
        for _ in range(int(random.integers(0 if number else 1, 3))):
            kind, side = int(random.choice([1, 7])), int(random.integers(14, 30))
            x, y = int(random.integers(0, width - side)), int(random.integers(0, height - side))
            pixels[y : y + side, x : x + side] = _COLOURS[kind]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": kind, "bbox": [x, y, side, side]}
            )
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
    categories = [{"id": 7, "name": "green"}, {"id": 1, "name": "red"}]
    file = folder / "all.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def cut_off(*paths: str | Path) -> None:
    """Pictures whose header is sound and whose pixels end in the middle."""
    for path in map(Path, paths):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def small_spec() -> cs.NetSpec:
    """ResNet-18's shape at an eighth of its width, one block a stage."""
    return cs.scale("resnet18", width=0.125, depth=0.5)


def small_detector(head: str = "fcos", **options: object) -> Detector:
    """A detector of two classes at 64 px."""
    given: dict[str, object] = {"num_classes": 2, "image_size": 64, "neck_width": 64, "head_depth": 1, **options}
    return cs.create_detector(small_spec(), head=head, **given)  # pyright: ignore[reportArgumentType]
