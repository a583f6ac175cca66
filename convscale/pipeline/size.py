"""The side in pixels that networks are built for where nobody says one."""

from __future__ import annotations

from convscale.choice.candidates import SMALL_IMAGE
from convscale.images.extent import largest_side
from convscale.images.splits import DataSplits

LEAST_SIDE = 28
"""Files of smaller pictures are enlarged to this side."""


def default_size(splits: DataSplits) -> int:
    """The side in pixels that candidates are built for: small images' own, else 224. Files are resized anyway, so
    theirs is a multiple of 4, which every family takes.
    """
    side = largest_side(splits.train)
    if side is None or side > SMALL_IMAGE:
        return 224
    return side if splits.train.images is not None else max(LEAST_SIDE, -(-side // 4) * 4)
