"""Maps as a value, and how raw ones become pictures' size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from convscale.errors import UserError, short

NOTHING = -1
"""The target of an image in which a detector finds nothing: its map is 0 everywhere."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Maps:
    """Where images speak for a class."""

    values: np.ndarray
    """float32 (N, H, W) in [0, 1]: ``raw`` at the images' size, bilinear, of each image from its least (0) to its
    largest (1); 0 everywhere where ``raw`` is the same everywhere."""
    targets: np.ndarray
    """int64 (N,): the class that each map is of; -1 where a detector finds nothing."""
    raw: np.ndarray
    """(N, h, w) at the map's own size, in the method's own unit: shares of the logit (``cam``), a weighted activation
    of at least 0 (``gradcam``), what the class's output loses when the place is covered (``occlusion``)."""
    method: str
    """``cam``, ``gradcam`` or ``occlusion``."""

    def __len__(self) -> int:
        return len(self.targets)


def made(method: str, raw: np.ndarray, targets: np.ndarray, size: tuple[int, int]) -> Maps:
    """Maps from raw ones.

    Args:
        method: what made them.
        raw: (N, h, w).
        targets: (N,).
        size: height and width of the images.

    Raises:
        UserError: they are not finite.
    """
    if not np.isfinite(raw).all():
        bad = int((~np.isfinite(raw).all(axis=(1, 2))).sum())
        raise UserError(f"the maps of {bad} of {len(raw)} images are not finite numbers; the network's outputs are not")
    values = np.stack([spread(resized(one, size)) for one in raw]) if len(raw) else np.zeros((0, *size), np.float32)
    return Maps(values=values, targets=targets.astype(np.int64), raw=raw, method=method)


def spread(plane: np.ndarray) -> np.ndarray:
    """A map from its least value (0) to its largest (1), float32; 0 where all are the same, but for rounding."""
    low, high = float(plane.min()), float(plane.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return np.zeros(plane.shape, np.float32)
    return np.clip((plane - low) / (high - low), 0, 1).astype(np.float32)


def resized(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) at another size (height, width), bilinear between the middles of places: float64."""
    for axis, side in enumerate(size):
        count = plane.shape[axis]
        at = np.clip((np.arange(side) + 0.5) * count / side - 0.5, 0, count - 1)
        low = np.minimum(at.astype(np.int64), max(0, count - 2))
        share = at - low
        share = share[:, None] if axis == 0 else share[None]
        high = np.minimum(low + 1, count - 1)
        plane = np.take(plane, low, axis) * (1 - share) + np.take(plane, high, axis) * share
    return plane


def targets_of(target: object, outputs: np.ndarray, *, first: int = 0) -> np.ndarray:
    """The class of each image's map.

    Args:
        target: None: the likeliest; a class's number for all; or one for each image.
        outputs: (N, classes).
        first: the lowest number that may be asked for.

    Returns:
        int64 (N,).

    Raises:
        UserError: no number of a class, or not one for each image.
    """
    count, classes = outputs.shape
    if target is None:
        return outputs.argmax(1).astype(np.int64)
    given = target.tolist() if hasattr(target, "tolist") else target  # pyright: ignore[reportAttributeAccessIssue]
    right = f"a class's number from {first} to {classes - 1}, or a list of {count}, one for each image"
    if isinstance(given, str | bytes) or not isinstance(given, Integral | Sequence):
        raise UserError(f"target is {short(target)}; it must be {right}")
    rows = list(given) if isinstance(given, Sequence) else [given] * count
    whole = all(isinstance(one, Integral) and not isinstance(one, bool) for one in rows)
    if len(rows) != count or not whole or not all(first <= one < classes for one in rows):
        raise UserError(f"target is {short(target)}; it must be {right}")
    return np.array(rows, np.int64)
