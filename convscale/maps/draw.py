"""Maps over the pictures that they are of."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from convscale.files import atomic_path

_STOPS = ((0.0, (0, 0, 128)), (0.25, (0, 128, 255)), (0.5, (64, 224, 128)), (0.75, (255, 208, 0)), (1.0, (192, 0, 0)))
"""Colours of the scale, from least to most."""


def heat(values: np.ndarray) -> np.ndarray:
    """Colours of a map (H, W) in [0, 1]: uint8 (H, W, 3), blue to red."""
    at = [stop for stop, _ in _STOPS]
    channels = [np.interp(values, at, [colour[channel] for _, colour in _STOPS]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def overlaid(pixels: np.ndarray, values: np.ndarray, *, strength: float = 0.55) -> np.ndarray:
    """A picture under its map.

    Args:
        pixels: uint8 (H, W, C), C 1 or 3.
        values: (H, W) in [0, 1].
        strength: share of the map's colour where the map is 1; where it is 0 the picture is gray and as it was.

    Returns:
        uint8 (H, W, 3).
    """
    gray = np.repeat(pixels.astype(np.float64).mean(2, keepdims=True), 3, 2)
    share = strength * values[..., None]
    return ((1 - share) * gray + share * heat(values)).round().clip(0, 255).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a PNG in a data URI."""
    import base64
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def save_png(pixels: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write uint8 (H, W, 3) as a PNG, whole or not at all."""
    from PIL import Image

    with atomic_path(path) as place:
        Image.fromarray(pixels).save(place, format="PNG")
    return Path(path)
