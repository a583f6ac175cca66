"""Boxes drawn on a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#e377c2", "#bcbd22")


def draw_boxes(
    pixels: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str],
    *,
    colours: Sequence[str] | str = COLOURS[0],
    most: int = 640,
) -> np.ndarray:
    """A picture with boxes and a text at each, made smaller where its longer side is above ``most`` pixels.

    Args:
        pixels: uint8 (H, W, 3).
        boxes: (n, 4) x1, y1, x2, y2 in its pixels.
        texts: one for each box; empty: none.
        colours: of each box, or one for all.
        most: of the longer side of the result.

    Returns:
        uint8 (h, w, 3).
    """
    from PIL import Image, ImageDraw

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    scale = min(1.0, most / max(picture.size))
    if scale < 1:
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    drawing = ImageDraw.Draw(picture)
    each = [colours] * len(boxes) if isinstance(colours, str) else list(colours)
    width = max(1, round(max(picture.size) / 250))
    for box, text, colour in zip((boxes * scale).tolist(), texts, each, strict=True):
        x1, y1, x2, y2 = box
        drawing.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
        if text:
            left, top, right, bottom = drawing.textbbox((x1, y1), text)
            drawing.rectangle((left, top, right + 2, bottom + 1), fill=colour)
            drawing.text((x1 + 1, y1), text, fill="white")
    return np.asarray(picture)
