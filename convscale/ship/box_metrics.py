"""How good boxes are: COCO's mean average precision, by faster-coco-eval; whether two sets of boxes are the same."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscale.errors import naming_extras

RECALLS = 101
"""Recall levels of a curve: 0, 0.01 ... 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """The boxes of a picture."""

    size: tuple[int, int]
    """(height, width) in pixels."""
    boxes: np.ndarray
    """(n, 4) x1, y1, x2, y2."""
    labels: np.ndarray
    """(n,), from 1."""
    crowd: np.ndarray
    """bool (n,): neither found nor missed."""
    areas: np.ndarray | None = None
    """(n,): pixels by which each is small, medium or large, as COCO's annotations say them; None: the boxes'."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What a detector says of a picture, the surest first."""

    boxes: np.ndarray
    """float32 (n, 4) x1, y1, x2, y2 in the picture's pixels."""
    scores: np.ndarray
    """float32 (n,)."""
    labels: np.ndarray
    """int64 (n,), from 1."""

    def above(self, score: float) -> Found:
        """Those with at least this score."""
        keep = self.scores >= score
        return Found(boxes=self.boxes[keep], scores=self.scores[keep], labels=self.labels[keep])


NOTHING = Found(boxes=np.zeros((0, 4), np.float32), scores=np.zeros(0, np.float32), labels=np.zeros(0, np.int64))
"""No box at all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BoxMetrics:
    """COCO's summary, every value in [0, 1]; NaN where there is nothing to judge by."""

    map: float
    """Mean average precision over IoU 0.5 to 0.95 and classes."""
    ap50: float
    """At IoU 0.5."""
    ap75: float
    """At IoU 0.75."""
    small: float
    """``map`` of what covers less than 32 x 32 pixels."""
    medium: float
    """Of those up to 96 x 96."""
    large: float
    """Of larger ones."""
    recall: float
    """Average recall with 100 boxes a picture."""
    per_class: tuple[float, ...]
    """``map`` of each class."""
    per_class_50: tuple[float, ...]
    """At IoU 0.5."""
    curves: np.ndarray
    """float (classes, 101): precision at IoU 0.5 at recalls 0, 0.01 ... 1; NaN for a class without boxes."""


def need_coco(what: str = "mean average precision of boxes") -> None:
    """To be called before minutes of detecting or training.

    Raises:
        MissingExtra: faster-coco-eval, which judges what comes of them, is not installed.
    """
    with naming_extras(what):
        import faster_coco_eval  # noqa: F401


def coco_metrics(truths: Sequence[Truth], found: Sequence[Found], classes: int) -> BoxMetrics:
    """COCO's mean average precision of answers.

    Args:
        truths: of each picture what is there.
        found: of each what was said.
        classes: how many there are; labels are 1 to that.

    Raises:
        MissingExtra: faster-coco-eval is not installed.
    """
    rows = [row for number, each in enumerate(found, 1) for row in _results(number, each)]
    if not any((~each.crowd).any() for each in truths):
        nothing = (float("nan"),) * classes
        return _metrics([float("nan")] * 7, nothing, nothing, np.full((classes, RECALLS), np.nan))
    if not rows:
        seen = {int(label) for each in truths for label in each.labels[~each.crowd]}
        per_class = tuple(0.0 if label in seen else float("nan") for label in range(1, classes + 1))
        curves = np.tile(np.array(per_class)[:, None], (1, RECALLS))
        return _metrics([0.0] * 7, per_class, per_class, curves)
    with naming_extras("mean average precision of boxes"):
        from faster_coco_eval import COCO, COCOeval_faster
    with redirect_stdout(io.StringIO()):
        truth: Any = COCO(_dataset(truths, classes))
        judged: Any = COCOeval_faster(truth, truth.loadRes(rows), iouType="bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    stats = [_known(value) for value in judged.stats]
    precision = np.asarray(judged.eval["precision"])  # (IoU, recall, class, area, most)
    precision = np.where(precision < 0, np.nan, precision)[:, :, :, 0, -1]
    per_class = tuple(_mean(precision[:, :, at]) for at in range(classes))
    per_class_50 = tuple(_mean(precision[0, :, at]) for at in range(classes))
    return _metrics([*stats[:6], stats[8]], per_class, per_class_50, precision[0].T.astype(np.float64))


def _metrics(
    stats: Sequence[float], per_class: tuple[float, ...], per_class_50: tuple[float, ...], curves: np.ndarray
) -> BoxMetrics:
    names = ("map", "ap50", "ap75", "small", "medium", "large", "recall")
    values = dict(zip(names, stats, strict=True))
    return BoxMetrics(**values, per_class=per_class, per_class_50=per_class_50, curves=curves)


def _known(value: float) -> float:
    """COCO says -1 where there is nothing to judge by."""
    return float("nan") if value < 0 else float(value)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _dataset(truths: Sequence[Truth], classes: int) -> dict[str, Any]:
    """The pictures and their boxes as COCO's annotations."""
    annotations = []
    for number, each in enumerate(truths, 1):
        areas = (each.boxes[:, 2:] - each.boxes[:, :2]).prod(1) if each.areas is None else each.areas
        rows = (each.boxes, each.labels, each.crowd, areas)
        for box, label, crowd, area in zip(*(values.tolist() for values in rows), strict=True):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    return {
        "info": {},
        "images": [{"id": n, "height": t.size[0], "width": t.size[1]} for n, t in enumerate(truths, 1)],
        "annotations": annotations,
        "categories": [{"id": label, "name": str(label)} for label in range(1, classes + 1)],
    }


def _results(number: int, found: Found) -> list[dict[str, Any]]:
    """What was said of a picture as COCO's results."""
    return [
        {"image_id": number, "category_id": label, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for (x1, y1, x2, y2), label, score in zip(
            found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
        )
    ]


# ---------------------------------------------------------------- boxes against boxes


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every box of ``a`` (n, 4) with every one of ``b`` (m, 4): (n, m)."""
    top = np.maximum(a[:, None, :2], b[None, :, :2])
    bottom = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inner = np.clip(bottom - top, 0, None).prod(2)
    areas = [(each[:, 2:] - each[:, :2]).prod(1) for each in (a, b)]
    union = areas[0][:, None] + areas[1][None] - inner
    return np.where(union > 0, inner / np.where(union > 0, union, 1), 0.0)


def matched(a: Found, b: Found, least: float) -> int:
    """How many boxes of ``a`` have one of ``b`` of their own, of the same label, with an IoU of at least ``least``."""
    if not len(a.boxes) or not len(b.boxes):
        return 0
    table = iou(a.boxes.astype(np.float64), b.boxes.astype(np.float64))
    table[a.labels[:, None] != b.labels[None]] = 0
    count = 0
    for row in np.argsort(-a.scores, kind="stable"):
        best = int(table[row].argmax())
        if table[row, best] >= least:
            count += 1
            table[:, best] = 0  # taken
    return count


def quality(truth: Truth, found: Found, least: float = 0.5, score: float = 0.3) -> float:
    """How well a picture was answered: F1 of its boxes above ``score`` at an IoU of ``least``; 1 where there is nothing
    and nothing was said.
    """
    real = Found(
        boxes=truth.boxes[~truth.crowd], scores=np.ones((~truth.crowd).sum()), labels=truth.labels[~truth.crowd]
    )
    said = found.above(score)
    total = len(real.boxes) + len(said.boxes)
    return 1.0 if total == 0 else 2 * matched(said, real, least) / total
