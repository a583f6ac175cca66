"""What a run of ``fit`` writes down of its data and of what its network gets wrong."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

import torch

from convscale.images.splits import ArraySplit, DataSplits, Split
from convscale.learn.evaluate import Evaluation
from convscale.show.fit_record import Data, Mistake
from convscale.show.fit_record import Evaluation as EvaluationRecord

SHOWN_MISTAKES = 24
"""Wrong examples that the report shows as pictures."""


def describe(splits: DataSplits, path: str, size: int) -> Data:
    """A data set as a run writes it down, and the side in pixels that candidates are built for."""
    return Data(
        name=Path(path).name,
        path=path,
        classes=tuple(splits.classes),
        channels=splits.channels,
        image_size=size,
        train=len(splits.train),
        validation=len(splits.validation),
        test=len(splits.test),
        notes=tuple(splits.notes),
    )


def evaluation_record(ev: Evaluation) -> EvaluationRecord:
    """An evaluation as a run writes it down."""
    return EvaluationRecord(
        n=ev.n,
        top1=ev.top1,
        top1_interval=(ev.top1_low, ev.top1_high),
        top5=ev.top5,
        confusion=tuple(tuple(row) for row in ev.confusion.tolist()),
        per_class=tuple(None if math.isnan(share) else share for share in ev.per_class),  # no test image of the class
        calibration_error=ev.calibration_error,
    )


def mistakes(ev: Evaluation, read: Split, test: Split) -> tuple[Mistake, ...]:
    """The most confident mistakes, with their pictures as PNG data: as in the test set, of which ``read`` is what could
    be decoded.
    """
    worst = sorted(ev.wrong, key=lambda wrong: -wrong.confidence)[:SHOWN_MISTAKES]
    shown = []
    for wrong in worst:
        name, pixels = _original(read, test, wrong.index)
        shown.append(
            Mistake(
                name=name,
                true=read.classes[wrong.true],
                predicted=read.classes[wrong.predicted],
                confidence=wrong.confidence,
                image=_picture(pixels),
            )
        )
    return tuple(shown)


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
