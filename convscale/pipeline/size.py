"""The side in pixels that networks are built for where nobody says one, and whether that makes images small."""

from __future__ import annotations

from convscale.choice.candidates import SMALL_IMAGE
from convscale.images.extent import small_side
from convscale.images.splits import DataSplits


def default_size(splits: DataSplits) -> int:
    """The side in pixels that candidates are built for: small images' own, else 224."""
    return small_side(splits.train, SMALL_IMAGE) or 224


def is_small(splits: DataSplits, image_size: int | None) -> bool:
    """Whether images are small, and trained at a side (None: their own) that is: enlarged, they are as others."""
    return max(default_size(splits), image_size or 0) <= SMALL_IMAGE
