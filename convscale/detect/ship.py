"""Pictures for an export: fitted into squares, with their boxes; answers as COCO's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from convscale.detect.boxes import BoxSplit, BoxSplits
from convscale.detect.loader import eval_box_batches
from convscale.errors import UserError
from convscale.learn.loader import check_bad_rate
from convscale.ship.box_metrics import Truth
from convscale.ship.quantize import CALIBRATION, MIN_CALIBRATION, spread

MOST_CHECKED = 500
"""Pictures that an artefact is checked on at most: they are held in memory."""


def for_int8(splits: BoxSplits) -> tuple[BoxSplit, BoxSplit, tuple[str, ...]]:
    """The pictures that calibrate 8 bits, others that judge them, and what a user should know of these.

    A train set that is borrowed may be the pictures that judge: then half of them calibrate at most, or as many as are
    needed, and judge no more.

    Raises:
        UserError: pictures that are borrowed so are too few for both.
    """
    known, judging = splits.train, splits.validation
    if splits.borrowed is None:
        return known, judging, ()
    if not {*known.paths}.isdisjoint(judging.paths):
        if len(known) <= MIN_CALIBRATION:
            raise UserError(
                f"INT8 needs {MIN_CALIBRATION} pictures that calibrate it and others that judge it; there is no train "
                f"set, and the {splits.borrowed} set has {len(known)} for both; give a train set"
            )
        known = known.subset(spread(len(known), min(CALIBRATION, max(MIN_CALIBRATION, len(known) // 2))))
        taken = {*known.paths}
        judging = judging.subset([at for at, path in enumerate(judging.paths) if path not in taken])
    note = f"there is no train set: pictures of the {splits.borrowed} set calibrate the 8 bits, others judge them"
    return known, judging, (note,)


def squares(
    split: BoxSplit,
    side: int,
    fill: Sequence[int],
    *,
    most: int = MOST_CHECKED,
    max_bad_rate: float = 0.01,
    tell: Callable[[str], object] | None = None,
) -> tuple[np.ndarray, list[Truth]]:
    """Pictures of a split as a detector takes them, and their boxes in the squares' pixels; of more than ``most``,
    ``most`` that are spread evenly over them; those that can not be read are left out.

    Args:
        split, side, fill: what of, and the squares' side in pixels and colour around a picture.
        most: pictures at most.
        max_bad_rate: share of them that may be unreadable.
        tell: called with what is wrong with each that is left out.

    Returns:
        uint8 (N, side, side, 3), and N pictures' truths.

    Raises:
        UserError: more of them can not be read, or none can.
    """
    some = split.subset(spread(len(split), most))
    images, truths, bad = [], [], list[str]()
    for batch in eval_box_batches(some, side, tuple(fill), batch_size=16, workers=0):
        bad += batch.bad
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
    check_bad_rate(bad, len(some), max_bad_rate, split.split)
    if tell is not None:
        for problem in bad:
            tell(problem)
    if not truths:
        raise UserError(f"the {split.split} set has 0 images; it must have at least one")
    return np.concatenate(images), truths
