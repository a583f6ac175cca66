"""What a run of ``fit`` writes down of its data and of what its network gets wrong."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import torch

from convscale.images.splits import ArraySplit, DataSplits, Split
from convscale.learn.evaluate import Evaluation

SHOWN_MISTAKES = 24
"""Wrong examples that the report shows as pictures."""


def describe(splits: DataSplits, path: str, size: int) -> dict[str, Any]:
    """A data set as JSON values: its sizes and classes, and the side in pixels that candidates are built for."""
    return {
        "name": Path(path).name,
        "path": path,
        "classes": list(splits.classes),
        "channels": splits.channels,
        "image_size": size,
        "train": len(splits.train),
        "validation": len(splits.validation),
        "test": len(splits.test),
        "notes": list(splits.notes),
    }


def evaluation_record(ev: Evaluation) -> dict[str, Any]:
    """An evaluation as JSON values."""
    return {
        "n": ev.n,
        "top1": ev.top1,
        "top1_interval": [ev.top1_low, ev.top1_high],
        "top5": ev.top5,
        "confusion": ev.confusion.tolist(),
        "per_class": [None if math.isnan(share) else share for share in ev.per_class],  # no test image of the class
        "calibration_error": ev.calibration_error,
    }


def mistakes(ev: Evaluation, held: Split, test: Split) -> list[dict[str, Any]]:
    """The most confident mistakes, with their pictures as PNG data: as in the test set, of which ``held`` is what could
    be decoded.
    """
    worst = sorted(ev.wrong, key=lambda wrong: -wrong.confidence)[:SHOWN_MISTAKES]
    return [
        {
            "name": picture[0],
            "true": held.classes[wrong.true],
            "predicted": held.classes[wrong.predicted],
            "confidence": wrong.confidence,
            "image": _picture(picture[1]),
        }
        for wrong in worst
        for picture in (_original(held, test, wrong.index),)
    ]


def _original(held: Split, test: Split, index: int) -> tuple[str, torch.Tensor]:
    """Name and pixels of an image of ``held`` as it stands in the test set that was read."""
    source, number = held, index
    if isinstance(held, ArraySplit) and not isinstance(test, ArraySplit) and held.numbers is not None:
        source, number = (
            test,
            int(held.numbers[index]),
        )  # held at the network's size, and without what could not be decoded
    return Path(source.name(number)).name, source.read(number)


def _picture(image: torch.Tensor, side: int = 160) -> str:
    """A uint8 (H, W, C) image as a PNG data URI, at most ``side`` px."""
    from PIL import Image

    pixels = image.numpy()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
