"""A set of pictures with boxes, composed from real cut-outs on real photographs, as COCO's annotations.

    python -m benchmarks.boxes DIR [--train 2000] [--side 192] [--seed 0]

Cut-outs: Debian's package tuxpaint-stamps-default (PNGs with transparency), ten classes of its folders. Photographs:
scikit-image's data. Train, validation and test have different cut-outs and photographs. A picture is a crop of
a photograph, mirrored or not, with one to five cut-outs, each an eighth to half of the side long, mirrored or not, and
none more than a quarter covered. A box is what of a cut-out is not transparent. Seeded: the same DIR each time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

STAMPS = Path("/usr/share/tuxpaint/stamps")
CLASSES = {
    "mammal": "animals/mammals", "bird": "animals/birds", "insect": "animals/insects", "fruit": "food/fruit",
    "vegetable": "food/vegetables", "flower": "plants/flowers", "house": "town/houses", "roadsign": "town/roadsigns",
    "money": "symbols/money", "vehicle": "vehicles",
}  # fmt: skip
PHOTOGRAPHS = {
    "train": ("astronaut", "chelsea", "coffee", "stereo_motorcycle", "brick", "moon"),
    "val": ("rocket", "grass"),
    "test": ("hubble_deep_field", "retina", "gravel", "immunohistochemistry"),
}
SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}
"""Of each class's cut-outs."""


def photographs(names: tuple[str, ...]) -> list[np.ndarray]:
    """uint8 (H, W, 3)."""
    from skimage import data

    found = []
    for name in names:
        pixels = getattr(data, name)()
        pixels = np.asarray(pixels[0] if isinstance(pixels, tuple) else pixels)
        pixels = np.stack([pixels] * 3, 2) if pixels.ndim == 2 else pixels[..., :3]
        found.append(pixels.astype(np.uint8))
    return found


def cut_outs(split: str, seed: int) -> list[list[Image.Image]]:
    """Of each class its cut-outs of a split, without empty margins."""
    low, high = SHARES[split]
    found = []
    for folder in CLASSES.values():
        files = sorted((STAMPS / folder).rglob("*.png"))
        order = np.random.default_rng([seed, 99]).permutation(len(files))
        own = order[round(low * len(files)) : round(high * len(files))]
        pictures = []
        for at in own:
            picture = Image.open(files[at]).convert("RGBA")
            opaque = [255 * (value > 127) for value in range(256)]
            box = picture.getchannel("A").point(opaque).getbbox()
            if box is not None:
                pictures.append(picture.crop(box))
        found.append(pictures)
    return found


def compose(split: str, count: int, side: int, seed: int, folder: Path) -> dict[str, object]:
    """Write the pictures of a split; gives its annotations."""
    random = np.random.default_rng([seed, list(SHARES).index(split)])
    backgrounds, stamps = photographs(PHOTOGRAPHS[split]), cut_outs(split, seed)
    images, annotations = [], []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        picture = _background(backgrounds[random.integers(len(backgrounds))], side, random)
        taken: list[tuple[int, int, int, int]] = []
        for _ in range(int(random.integers(1, 6))):
            kind = int(random.integers(len(stamps)))
            stamp = stamps[kind][random.integers(len(stamps[kind]))]
            scale = side * random.uniform(0.12, 0.5) / max(stamp.size)
            stamp = stamp.resize((max(4, round(stamp.width * scale)), max(4, round(stamp.height * scale))))
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else stamp
            x, y = int(random.integers(side - stamp.width + 1)), int(random.integers(side - stamp.height + 1))
            box = (x, y, x + stamp.width, y + stamp.height)
            if any(_covered(old, box) > 0.25 for old in taken):
                continue
            picture.paste(stamp, (x, y), stamp)
            taken.append(box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": kind + 1,
                    "iscrowd": 0,
                    "bbox": [x, y, stamp.width, stamp.height],
                    "area": stamp.width * stamp.height,
                }
            )
        name = f"{number:05d}.jpg"
        picture.save(folder / split / name, quality=92)
        images.append({"id": number, "file_name": f"{split}/{name}", "width": side, "height": side})
    categories = [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _background(pixels: np.ndarray, side: int, random: np.random.Generator) -> Image.Image:
    """A crop of one to two thirds of a photograph's shorter side, resized."""
    whole = min(pixels.shape[:2])
    size = int(whole * random.uniform(0.33, 0.66))
    top, left = int(random.integers(pixels.shape[0] - size)), int(random.integers(pixels.shape[1] - size))
    crop = Image.fromarray(pixels[top : top + size, left : left + size]).resize((side, side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop


def _covered(old: tuple[int, int, int, int], new: tuple[int, int, int, int]) -> float:
    """Share of the smaller box that both have."""
    width, height = min(old[2], new[2]) - max(old[0], new[0]), min(old[3], new[3]) - max(old[1], new[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (old, new)]
    return max(0, width) * max(0, height) / min(areas)


def make(folder: Path, train: int, side: int, seed: int) -> Path:
    """The set, made once: ``train``, a tenth as many for validation, a fifth for test."""
    done = folder / "made.json"
    about = {"train": train, "side": side, "seed": seed}
    if done.is_file() and json.loads(done.read_text()) == about:
        return folder
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", max(20, train // 10)), ("test", max(40, train // 5))):
        told = compose(split, count, side, seed, folder)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(told))
    done.write_text(json.dumps(about))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(make(options.folder, options.train, options.side, options.seed))


if __name__ == "__main__":
    main()
