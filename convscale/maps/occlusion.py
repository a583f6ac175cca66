"""Occlusion: what a class's output loses when a part of the image is covered (Zeiler and Fergus 2014, arXiv 1311.2901,
section 4.2). It asks nothing of a network but its outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Outputs = Callable[[np.ndarray], np.ndarray]
"""Images (n, ...) -> (n, classes)."""
GRID = 14
"""Places along one side where the cover is put."""


def places(side: int, grid: int) -> list[tuple[int, int]]:
    """First and last pixel (exclusive) of the cover at each place of a side: two steps wide, cut at the edges."""
    grid = min(grid, side)
    step = side / grid
    centres = [(at + 0.5) * step for at in range(grid)]
    return [
        (max(0, min(side - 1, round(centre - step))), min(side, max(1, round(centre + step)))) for centre in centres
    ]


def occlusion(
    outputs: Outputs,
    images: np.ndarray,
    targets: np.ndarray,
    *,
    cover: np.ndarray | float,
    rows_first: bool,
    batch_size: int,
    grid: int = GRID,
) -> np.ndarray:
    """What each place is worth to the target.

    Args:
        outputs: the network.
        images: (N, C, H, W), or (N, H, W, C) with ``rows_first``.
        targets: (N,).
        cover: what stands in the place of pixels: one value, or one per channel.
        rows_first: whether images are (N, H, W, C).
        batch_size: covered images per call.
        grid: places along one side.

    Returns:
        float64 (N, grid, grid): the target's output without a cover minus that with it.
    """
    height, width = images.shape[1:3] if rows_first else images.shape[2:4]
    down, across = places(height, grid), places(width, grid)
    fill = np.asarray(cover, images.dtype)
    fill = fill.reshape(1, 1, -1) if rows_first else fill.reshape(-1, 1, 1)
    raw = np.zeros((len(images), len(down), len(across)))
    for row, image in enumerate(images):
        whole = float(outputs(image[None])[0, targets[row]])
        boxes = [(y, x) for y in range(len(down)) for x in range(len(across))]
        for start in range(0, len(boxes), batch_size):
            some = boxes[start : start + batch_size]
            covered = np.repeat(image[None], len(some), 0)
            for one, (y, x) in zip(covered, some, strict=True):
                rows, columns = slice(*down[y]), slice(*across[x])
                part = one[rows, columns] if rows_first else one[:, rows, columns]
                part[...] = fill
            found = outputs(covered)[:, targets[row]]
            for (y, x), value in zip(some, found, strict=True):
                raw[row, y, x] = whole - float(value)
    return raw
