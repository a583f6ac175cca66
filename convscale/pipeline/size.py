"""The side in pixels that networks are built for where nobody says one."""

from __future__ import annotations

from convscale.choice.candidates import SMALL_IMAGE
from convscale.images.extent import small_side
from convscale.images.splits import DataSplits


def default_size(splits: DataSplits) -> int:
    """The side in pixels that candidates are built for: small images' own, else 224."""
    return small_side(splits.train, SMALL_IMAGE) or 224
