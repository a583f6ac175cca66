"""What a detector's artefact says: candidates or finished boxes of a batch become boxes of pictures. NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from convscale.errors import UserError, check_number, check_text, check_whole, short
from convscale.images.letterbox import out_of_square

INSIDE, OUTSIDE = "inside", "outside"
_MOST = 100_000


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How a detector's answers are cut, and where that is done."""

    nms: str
    """``inside``: the network gives finished boxes; ``outside``: it gives candidates, and the caller does it."""
    score_threshold: float
    """Boxes at or below it are dropped."""
    nms_threshold: float
    """Of two boxes of a class with a larger IoU the weaker one is dropped."""
    max_detections: int
    """Boxes of a picture."""
    head: str = ""
    """``fcos``, ``retinanet`` or ``ssdlite``."""
    backbone: str = ""
    """Its name."""

    @classmethod
    def from_dict(cls, values: object) -> Cut:
        """From an artefact's record.

        Raises:
            UserError: a value is missing or impossible.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"detection is {short(values, 40)}; it must be an object")
        named = ("nms", "score_threshold", "nms_threshold", "max_detections")
        if missing := [name for name in named if name not in values]:
            raise UserError(f"detection lacks {', '.join(missing)}")
        most = check_whole("detection.max_detections", values["max_detections"])
        if most > _MOST:
            raise UserError(f"detection.max_detections is {most}; it must be at most {_MOST}")
        return cls(
            nms=check_text("detection.nms", values["nms"], (INSIDE, OUTSIDE)),
            score_threshold=check_number("detection.score_threshold", values["score_threshold"], "a share", 0, 1),
            nms_threshold=check_number("detection.nms_threshold", values["nms_threshold"], "a share", 0, 1),
            max_detections=most,
            head=str(values.get("head", "")),
            backbone=str(values.get("backbone", "")),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Boxes:
    """What is said of a picture, the surest first."""

    boxes: np.ndarray
    """float32 (n, 4): x1, y1, x2, y2 in pixels."""
    scores: np.ndarray
    """float32 (n,)."""
    labels: np.ndarray
    """int64 (n,), from 1."""

    def to_dict(self) -> dict[str, np.ndarray]:
        """As torchvision's detectors give it."""
        return {"boxes": self.boxes, "scores": self.scores, "labels": self.labels}


def boxes_of(outputs: Sequence[np.ndarray], cut: Cut, classes: int) -> list[Boxes]:
    """A network's outputs for a batch as boxes of each picture.

    Args:
        outputs: inside: (N, most, 6); outside: boxes (N, K, 4), scores (N, K) and labels (N, K).
        cut: how they are cut.
        classes: labels outside 1 to that, and boxes that are not finite or have no area, are dropped.
    """
    found = []
    for at in range(len(outputs[0])):
        if cut.nms == INSIDE:
            table = np.asarray(outputs[0][at], np.float32)
            boxes, scores, labels = table[:, :4], table[:, 4], np.nan_to_num(table[:, 5]).round().astype(np.int64)
        else:
            boxes, scores, labels = (np.asarray(each[at]) for each in outputs[:3])
            boxes, scores = boxes.astype(np.float32), scores.astype(np.float32)
            labels = labels.astype(np.int64)
        good = (
            np.isfinite(boxes).all(1)
            & (boxes[:, 2:] > boxes[:, :2]).all(1)
            & (scores > cut.score_threshold)
            & (labels >= 1)
            & (labels <= classes)
        )
        boxes, scores, labels = boxes[good], scores[good], labels[good]
        if cut.nms == OUTSIDE:
            kept = suppress(boxes, scores, labels, cut.nms_threshold, cut.max_detections)
        else:
            kept = np.argsort(-scores, kind="stable")
        found.append(Boxes(boxes=boxes[kept], scores=scores[kept], labels=labels[kept]))
    return found


def suppress(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, threshold: float, most: int) -> np.ndarray:
    """Greedy non-maximum suppression, each class by itself.

    Args:
        boxes: float32 (n, 4).
        scores: (n,).
        labels: (n,).
        threshold: of two boxes of a class with a larger IoU the weaker one is dropped.
        most: boxes at most.

    Returns:
        int64: positions of what is kept, the surest first.
    """
    order = np.argsort(-scores, kind="stable")
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[int] = []
    while len(order) and len(kept) < most:
        first, rest = int(order[0]), order[1:]
        kept.append(first)
        sides = np.minimum(boxes[rest, 2:], boxes[first, 2:]) - np.maximum(boxes[rest, :2], boxes[first, :2])
        inner = np.clip(sides, 0, None).prod(1)
        union = areas[rest] + areas[first] - inner
        overlap = np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)
        order = rest[(overlap <= threshold) | (labels[rest] != labels[first])]
    return np.array(kept, np.int64)


def in_picture(found: Boxes, size: tuple[int, int], side: int) -> Boxes:
    """Boxes in a square as they stand in its picture; those without area there are dropped."""
    boxes = out_of_square(found.boxes, *size, side)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Boxes(boxes=boxes[keep], scores=found.scores[keep], labels=found.labels[keep])
