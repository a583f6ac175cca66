"""A picture fitted into a square: resized by its longer side, in the upper left corner, the rest one colour.

What a detector takes. Boxes stay where they are up to one factor for each side. Resizing is Pillow's arithmetic, for
training and for what was shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def fitted(height: int, width: int, side: int) -> tuple[int, int]:
    """The (height, width) of a picture whose longer side is ``side``; at least one pixel each."""
    longer = max(height, width)
    return max(1, round(height * side / longer)), max(1, round(width * side / longer))


def fill_of(mean: Sequence[float]) -> tuple[int, ...]:
    """The colour around a picture: what normalises to about 0."""
    return tuple(round(255 * value) for value in mean)


def letterbox(pixels: np.ndarray, side: int, fill: Sequence[int]) -> np.ndarray:
    """A picture in a square.

    Args:
        pixels: uint8 (H, W, 3).
        side: of the square, in pixels.
        fill: the colour of the rest.

    Returns:
        uint8 (side, side, 3).
    """
    from PIL import Image

    size = fitted(pixels.shape[0], pixels.shape[1], side)
    if size != pixels.shape[:2]:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        pixels = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    out = np.empty((side, side, 3), np.uint8)
    out[:] = np.array(fill, np.uint8)
    out[: size[0], : size[1]] = pixels
    return out


@dataclass(frozen=True, kw_only=True, eq=False)
class Square:
    """A picture as a detector takes it."""

    pixels: np.ndarray
    """uint8 (side, side, 3)."""
    size: tuple[int, int]
    """The picture's own (height, width)."""


def square_of(pixels: np.ndarray, side: int, mean: Sequence[float]) -> Square:
    """A picture, uint8 (H, W, 3), in its square."""
    return Square(pixels=letterbox(pixels, side, fill_of(mean)), size=(pixels.shape[0], pixels.shape[1]))


def into_square(boxes: np.ndarray, height: int, width: int, side: int) -> np.ndarray:
    """Boxes (n, 4) of a picture as they stand in its square."""
    new_height, new_width = fitted(height, width, side)
    return boxes * np.array([new_width / width, new_height / height] * 2, boxes.dtype)


def out_of_square(boxes: np.ndarray, height: int, width: int, side: int) -> np.ndarray:
    """Boxes (n, 4) in a square as they stand in its picture, cut at its sides."""
    new_height, new_width = fitted(height, width, side)
    back = boxes * np.array([width / new_width, height / new_height] * 2, boxes.dtype)
    return np.clip(back, 0, np.array([width, height] * 2, boxes.dtype))
