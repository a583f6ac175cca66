"""Pictures for an export: fitted into squares, with their boxes; answers as COCO's results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from convscale.detect.boxes import BoxSplit
from convscale.detect.loader import eval_box_batches
from convscale.errors import UserError
from convscale.ship.box_metrics import Truth
from convscale.ship.quantize import spread

MOST_CHECKED = 500
"""Pictures that an artefact is checked on at most: they are held in memory."""


def squares(
    split: BoxSplit, side: int, fill: Sequence[int], *, most: int = MOST_CHECKED
) -> tuple[np.ndarray, list[Truth]]:
    """Pictures of a split as a detector takes them, and their boxes in the squares' pixels; of more than ``most``,
    ``most`` that are spread evenly over them; those that can not be read are left out.

    Returns:
        uint8 (N, side, side, 3), and N boxes' truths.

    Raises:
        UserError: none can be read.
    """
    some = split.subset(spread(len(split), most))
    images, truths = [], []
    for batch in eval_box_batches(some, side, tuple(fill), batch_size=16, workers=0):
        images.append(batch.images.numpy())
        for index, target in zip(batch.indices.tolist(), batch.targets, strict=True):
            truths.append(
                Truth(
                    size=(side, side),
                    boxes=target["boxes"].numpy(),
                    labels=target["labels"].numpy(),
                    crowd=some.crowd[index],
                )
            )
    if not truths:
        raise UserError(f"no picture of the {split.split} set can be read")
    return np.concatenate(images), truths
