"""The training pipeline against timm's create_loader, on one core: decode, random crop to 224 px, flip, normalise.

    python -m benchmarks.loader [--images 192] [--rounds 9] [--width 500] [--json] [--output results/loader.jsonl]

JPEGs of 500 x 375 pixels are cut from scikit-image's photographs, at a quality that makes them about 85 kB on average.
All loaders run in this process (no workers) on one thread, alternating within each round; figures are images per second
of this process's CPU time, which other load on the machine disturbs least, median over the rounds with the
interquartile range. Both get their best form: timm's with PIL decoding, its own transform, uint8 collation and batched
normalisation (use_prefetcher=True). Of ours there are four: the same pixels as timm's, JPEGs decoded at a half or less
where the crop keeps three quarters or a half of the pixels per side that it is resized to (``scaled_decode``,
``scaled_share``), and smaller copies that were made before (``shrink``, 1.15 times the training size; not timed).
``--width`` makes larger photographs, of about the same bits per pixel.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.records import machine, replace_record
from convscale.images.decode import read_image
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import FileSplit
from convscale.learn.augment import crop_box, mix_seed
from convscale.learn.loader import TrainLoader
from convscale.learn.recipe import Recipe
from convscale.learn.shrink import shrink_split

SIZE, BATCH, SHRINK = 224, 32, 1.15
SHARES = (0.75, 0.5)
IMAGENET = Preprocessing(image_size=SIZE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def write_photographs(folder: Path, count: int, width: int = 500) -> list[str]:
    """``count`` JPEGs of ``width`` x 3/4 ``width`` pixels in one class folder; their paths."""
    from PIL import Image
    from skimage import data

    sources = [data.chelsea(), data.coffee(), data.astronaut(), data.rocket(), data.hubble_deep_field(), data.retina()]
    random, paths = np.random.default_rng(0), []
    (folder / "photograph").mkdir(parents=True)
    height = width * 3 // 4
    for number in range(count):
        picture = Image.fromarray(sources[number % len(sources)])
        scale = max(width / picture.width, height / picture.height) * random.uniform(1.0, 1.3)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
        left, top = int(random.integers(picture.width - width + 1)), int(random.integers(picture.height - height + 1))
        picture = picture.crop((left, top, left + width, top + height))
        paths.append(str(folder / "photograph" / f"{number:04d}.jpg"))
        picture.save(paths[-1], quality=_quality(picture, 85_000 * (width * height) // (500 * 375)))
    return paths


def _quality(picture: Any, target: int) -> int:
    """The lowest JPEG quality that gives ``target`` bytes, at most 98."""
    for quality in range(80, 98, 2):
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality)
        if out.tell() >= target:
            return quality
    return 98


def split_of(paths: list[str]) -> FileSplit:
    """The files with labels that nobody looks at."""
    return FileSplit(
        split="train",
        classes=("photograph", "other"),
        labels=torch.zeros(len(paths), dtype=torch.long),
        channels=3,
        paths=tuple(paths),
    )


def ours(paths: list[str], *, share: float | None = None, copies: Path | None = None) -> Callable[[], int]:
    """One epoch of our loader, with scaled decoding where a share is given, from smaller copies where a folder for them
    is named.
    """
    split = split_of(paths)
    if copies is not None:
        split, _ = shrink_split(split, round(SHRINK * SIZE), folder=copies)
    loader, epoch = _loader(split, share), iter(range(10_000))

    def run() -> int:
        return sum(len(IMAGENET.normalize(batch.images)) for batch in loader.batches(next(epoch)))

    return run


def _loader(split: FileSplit, share: float | None) -> TrainLoader:
    recipe = Recipe(
        name="bench",
        batch_size=BATCH,
        augment="resized-crop",
        scaled_decode=share is not None,
        scaled_share=share or 1.0,
    )
    return TrainLoader(split, recipe, image_size=SIZE, workers=0)


def timms(folder: Path) -> Callable[[], int]:
    """One epoch of timm's loader."""
    from timm.data import create_dataset, create_loader

    data: Any = create_dataset("", root=str(folder))
    loader = create_loader(
        data,
        input_size=(3, SIZE, SIZE),
        batch_size=BATCH,
        is_training=True,
        use_prefetcher=True,
        scale=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        hflip=0.5,
        color_jitter=0.0,
        auto_augment=None,
        interpolation="bilinear",
        num_workers=0,
        device=torch.device("cpu"),
        persistent_workers=False,
        pin_memory=False,
    )
    return lambda: sum(len(images) for images, _ in loader)


def decoding(paths: list[str]) -> Callable[[], int]:
    """Bare decoding."""
    return lambda: sum(1 for path in paths if read_image(path).shape[2] == 3)


def pixel_difference(paths: list[str]) -> int:
    """Largest difference of our crops from Pillow's decode, crop and resize with the same boxes, in 1/255."""
    from PIL import Image

    batch, worst = next(_loader(split_of(paths), None).batches(0)), 0
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        random = np.random.Generator(np.random.Philox(key=mix_seed(0, 3, 0, index)))
        with Image.open(paths[index]) as picture:
            top, left, height, width = crop_box(picture.height, picture.width, random, min_scale=0.08)
            golden = picture.crop((left, top, left + width, top + height)).resize(
                (SIZE, SIZE), Image.Resampling.BILINEAR
            )
        pixels = np.asarray(
            golden if random.random() >= 0.5 else golden.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        ).astype(int)
        worst = max(worst, int(np.abs(image.numpy().astype(int) - pixels).max()))
    return worst


def scaled_difference(paths: list[str], share: float) -> float:
    """Mean difference of crops by scaled decoding from those by whole decoding, in 1/255."""
    off = []
    for left, right in zip(*(_loader(split_of(paths), value).batches(0) for value in (None, share)), strict=True):
        off.append((left.images.int() - right.images.int()).abs().float().mean())
    return round(float(torch.stack(off).mean()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--width", type=int, default=500, help="of the photographs, in pixels; their height is three quarters of it"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("results/loader.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        paths = write_photographs(folder, arguments.images // BATCH * BATCH, arguments.width)
        subjects = {"timm": timms(folder), "ours": ours(paths)}
        subjects |= {f"ours, scaled decoding to {share}": ours(paths, share=share) for share in SHARES}
        subjects |= {
            "ours, smaller copies": ours(paths, copies=Path(name) / "copies"),
            "bare decoding": decoding(paths),
        }
        rates: dict[str, list[float]] = {subject: [] for subject in subjects}
        for turn in range(arguments.rounds + 1):
            for subject, run in subjects.items():
                started = time.process_time()
                count = run()
                if turn:  # the first warms caches
                    rates[subject].append(count / (time.process_time() - started))
        record = {
            "benchmark": "loader",
            "images_per_s": {subject: round(statistics.median(values), 1) for subject, values in rates.items()},
            "iqr_rel": {
                subject: round(float(np.subtract(*np.percentile(values, [75, 25])) / np.median(values)), 3)
                for subject, values in rates.items()
            },
            "speedup": {
                subject: round(statistics.median(a / b for a, b in zip(values, rates["timm"], strict=True)), 3)
                for subject, values in rates.items()
                if subject.startswith("ours")
            },
            "share_of_decoding": round(
                statistics.median(a / b for a, b in zip(rates["ours"], rates["bare decoding"], strict=True)), 3
            ),
            "largest_pixel_difference": pixel_difference(paths),
            "mean_scaled_difference": {str(share): scaled_difference(paths, share) for share in SHARES},
            "mean_kilobytes": round(sum(os.path.getsize(path) for path in paths) / len(paths) / 1000, 1),
            "conditions": {
                "threads": 1,
                "batch_size": BATCH,
                "images": len(paths),
                "rounds": arguments.rounds,
                "width": arguments.width,
                "machine": machine(),
            },
            "versions": _versions(),
        }
    if arguments.output:
        replace_record(arguments.output, record, ("benchmark", "conditions"))
    print(json.dumps(record) if arguments.json else _table(record))


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "timm", "pillow", "simplejpeg", "numpy")}


def _table(record: dict[str, Any]) -> str:
    lines = [
        f"{subject:30} {rate:8.1f} images/s (IQR {record['iqr_rel'][subject]:.1%})"
        for subject, rate in record["images_per_s"].items()
    ]
    lines += [f"{subject} / timm: {ratio:.2f}x" for subject, ratio in record["speedup"].items()]
    lines.append("ours: at most")
    lines[-1] += (
        f" {record['largest_pixel_difference']}/255 from Pillow's pixels; {record['share_of_decoding']:.0%} of bare "
        "decoding;"
    )
    lines[-1] += f" files of {record['mean_kilobytes']} kB"
    lines += [
        f"scaled decoding to {share}: {off}/255 from whole decoding in the mean"
        for share, off in record["mean_scaled_difference"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
