"""How good a detector is on a split: COCO's mean average precision, per class and by size, best and worst pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.detect.boxes import BoxSplit, BoxSplits
from convscale.detect.data import open_boxes
from convscale.detect.loader import eval_box_batches
from convscale.errors import UserError, check_text, check_whole
from convscale.images.letterbox import fill_of, out_of_square
from convscale.learn.loader import check_bad_rate, counted
from convscale.learn.settings import autocast_type, usable_device
from convscale.nn.modes import evaluating
from convscale.ship.box_metrics import NOTHING, BoxMetrics, Found, Truth, coco_metrics, need_coco, quality

SPLITS = ("train", "validation", "test")
BATCH = 16
"""Pictures a call, where nothing else is asked for: a detector's maps are large."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectorEvaluation:
    """What a detector does on a split."""

    split: str
    """Which."""
    n: int
    """Pictures that were evaluated: those that could be read."""
    boxes: int
    """Boxes in them, crowds left out."""
    map: float
    """COCO's mean average precision, IoU 0.5 to 0.95, in [0, 1]."""
    ap50: float
    """At IoU 0.5."""
    ap75: float
    """At IoU 0.75."""
    map_small: float
    """Of what covers less than 32 x 32 pixels, by the annotations' own areas where they have some; NaN where there is
    none."""
    map_medium: float
    """Of those up to 96 x 96."""
    map_large: float
    """Of larger ones."""
    recall: float
    """Average recall with 100 boxes a picture."""
    per_class: tuple[float, ...]
    """``map`` of each class; NaN for a class without boxes."""
    per_class_50: tuple[float, ...]
    """At IoU 0.5."""
    curves: np.ndarray
    """(classes, 101): precision at IoU 0.5 at recalls 0, 0.01 ... 1."""
    quality: np.ndarray
    """Of each picture of the split the F1 of its boxes above 0.3 at IoU 0.5; NaN for one that could not be read."""
    found: tuple[Found, ...]
    """What was said of each picture of the split, in its pixels; nothing of one that could not be read."""
    images_per_s: float
    """Of the whole evaluation, decoding included."""
    bad: tuple[str, ...]
    """What was wrong with pictures that could not be read; they and their boxes are left out."""
    classes: tuple[str, ...]
    """Class names."""

    def worst(self, count: int = 6) -> list[int]:
        """Positions of the pictures answered worst."""
        return [int(at) for at in np.argsort(self.quality, kind="stable")[: min(count, self.n)]]  # NaN comes last

    def best(self, count: int = 6) -> list[int]:
        """Positions of the pictures answered best, those with the most boxes first."""
        boxes = np.array([len(each.above(0.3).boxes) for each in self.found])
        return [int(at) for at in np.lexsort((-boxes, -self.quality))[: min(count, self.n)]]

    def describe(self) -> str:
        """One line."""
        if math.isnan(self.map):
            return f"no box to judge by on {self.n:,} pictures"
        return (
            f"mAP {self.map:.2%} (AP50 {self.ap50:.2%}, AP75 {self.ap75:.2%}, average recall {self.recall:.2%}) on "
            f"{self.n:,} pictures with {self.boxes:,} boxes"
        )

    def to_dict(self) -> dict[str, object]:
        """The figures as plain JSON values, without what was said of each picture."""
        names = ("split", "n", "boxes", "map", "ap50", "ap75", "map_small", "map_medium", "map_large", "recall")
        values: dict[str, object] = {name: getattr(self, name) for name in (*names, "images_per_s")}
        return values | {
            "classes": list(self.classes),
            "per_class": list(self.per_class),
            "per_class_50": list(self.per_class_50),
            "curves": self.curves.round(5).tolist(),
            "bad": list(self.bad),
        }


def evaluate_detector(
    net: nn.Module | Artifact,
    data: BoxSplits | BoxSplit | str | Path,
    *,
    split: str = "test",
    image_size: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    workers: int | None = None,
    on_images: Callable[[int], object] | None = None,
) -> DetectorEvaluation:
    """Run a detector over every picture of a split, and judge it as COCO does (faster-coco-eval).

    Args:
        net: a detector of ours, any module that is called as torchvision's detectors are (with ``image_size``), or a
            detector's artefact; it is left in the mode that it was in.
        data: an opened set, one split of it, or a path for ``open_boxes``.
        split: ``train``, ``validation`` or ``test``.
        image_size: side of the square that pictures are fitted into; None: the detector's own.
        batch_size: pictures a call; None: 16, of an artefact its own.
        device: where to run; of an artefact its own.
        precision: ``fp32``, or with autocast ``bf16``, ``fp16``, ``amp``.
        workers: decoding processes; None: one per core.
        on_images: called with the number of pictures so far, after each batch; not of an artefact.

    Raises:
        UserError: no such data, another number of classes, no size, more pictures that can not be read than the opened
            set allows (of one split: all), or faster-coco-eval is not installed.
    """
    need_coco()
    chosen, max_bad_rate = _split_of(data, split)
    if not len(chosen):
        raise UserError(f"the {chosen.split} set has 0 images; it must have at least one")
    began = time.perf_counter()
    if isinstance(net, Artifact):
        if net.classes != chosen.classes:
            raise UserError(f"the artefact's classes are {list(net.classes)}, the data's {list(chosen.classes)}")
        found, bad = artifact_answers(net, chosen, batch_size=batch_size)
    else:
        found, bad = answers(
            net,
            chosen,
            image_size=image_size,
            batch_size=BATCH if batch_size is None else batch_size,
            device=usable_device(device),
            precision=precision,
            workers=workers,
            on_images=on_images,
        )
    check_bad_rate(bad, len(chosen), max_bad_rate, chosen.split)
    return judge(chosen, found, bad, seconds=time.perf_counter() - began)


def _split_of(data: BoxSplits | BoxSplit | str | Path, split: str) -> tuple[BoxSplit, float]:
    """The split, and the share of it that may be unreadable."""
    check_text("split", split, SPLITS)
    if isinstance(data, BoxSplit):
        return data, 1.0
    opened = data if isinstance(data, BoxSplits) else open_boxes(data)
    return getattr(opened, split), opened.max_bad_rate


def judge(
    split: BoxSplit, found: Sequence[Found | None], bad: Sequence[str] = (), *, seconds: float
) -> DetectorEvaluation:
    """Answers against the truth of a split; pictures without one, which could not be read, are left out."""
    metrics, truths = judged_by_coco(split, found), truths_of(split)
    read = [each is not None for each in found]
    return DetectorEvaluation(
        split=split.split,
        n=sum(read),
        boxes=split.subset(np.flatnonzero(read)).box_count,
        map=metrics.map,
        ap50=metrics.ap50,
        ap75=metrics.ap75,
        map_small=metrics.small,
        map_medium=metrics.medium,
        map_large=metrics.large,
        recall=metrics.recall,
        per_class=metrics.per_class,
        per_class_50=metrics.per_class_50,
        curves=metrics.curves,
        quality=np.array(
            [math.nan if each is None else quality(truth, each) for truth, each in zip(truths, found, strict=True)]
        ),
        found=tuple(NOTHING if each is None else each for each in found),
        images_per_s=len(split) / max(seconds, 1e-9),
        bad=tuple(bad),
        classes=split.classes,
    )


def judged_by_coco(split: BoxSplit, found: Sequence[Found | None]) -> BoxMetrics:
    """COCO's figures of the pictures that there is an answer of."""
    known = [(truth, each) for truth, each in zip(truths_of(split), found, strict=True) if each is not None]
    return coco_metrics([truth for truth, _ in known], [each for _, each in known], len(split.classes))


def truths_of(split: BoxSplit) -> list[Truth]:
    """The boxes of each picture."""
    areas = split.areas or (None,) * len(split)
    parts = zip(split.sizes, split.boxes, split.labels, split.crowd, areas, strict=True)
    return [
        Truth(size=size, boxes=boxes, labels=labels, crowd=crowd, areas=area)
        for size, boxes, labels, crowd, area in parts
    ]


def own_size(net: nn.Module, image_size: int | None) -> tuple[int, tuple[int, ...]]:
    """Side of the square that a detector takes, and the colour around a picture.

    Raises:
        UserError: it is not of ours, and no size is given.
    """
    spec = getattr(net, "detector_spec", None)
    if spec is not None:
        return spec.image_size if image_size is None else check_whole("image_size", image_size), fill_of(spec.mean)
    if image_size is None:
        raise UserError(f"{type(net).__name__} does not say its image size; give image_size in pixels")
    transform = getattr(net, "transform", None)
    mean = getattr(transform, "image_mean", None) or (0.485, 0.456, 0.406)
    return check_whole("image_size", image_size), fill_of(mean)


def answers(
    net: nn.Module,
    split: BoxSplit,
    *,
    image_size: int | None,
    batch_size: int,
    device: torch.device,
    precision: str,
    workers: int | None,
    on_images: Callable[[int], object] | None = None,
) -> tuple[list[Found | None], list[str]]:
    """What a detector says of each picture, in its pixels (None: it can not be read), and what was wrong with
    pictures.
    """
    side, fill = own_size(net, image_size)
    check_whole("batch_size", batch_size)
    spec = getattr(net, "detector_spec", None)
    if spec is not None and spec.num_classes != len(split.classes):
        raise UserError(f"the detector has {spec.num_classes} classes, the data {len(split.classes)}")
    parameter = next(net.parameters(), torch.empty(0))
    kind, back = autocast_type(precision, device), parameter.device
    found, bad = list[Found | None]([None] * len(split)), list[str]()
    net.to(device)
    try:
        with evaluating(net), torch.no_grad():
            every = eval_box_batches(split, side, fill, batch_size=batch_size, workers=workers)
            for batch in counted(every, on_images):
                bad += batch.bad
                if not len(batch.indices):
                    continue
                inputs = batch.images.to(device).permute(0, 3, 1, 2).float() / 255
                with torch.autocast(device.type, kind or torch.bfloat16, enabled=kind is not None):
                    outputs = net(list(inputs))
                for index, output in zip(batch.indices.tolist(), outputs, strict=True):
                    found[index] = as_found(output, split.sizes[index], side)
    finally:
        net.to(back)
    return found, bad


def as_found(output: dict[str, torch.Tensor], size: tuple[int, int], side: int) -> Found:
    """torchvision's answer about a square as an answer about its picture; boxes without area there are dropped."""
    boxes = out_of_square(output["boxes"].float().cpu().numpy(), *size, side)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    scores, labels = output["scores"].float().cpu().numpy(), output["labels"].cpu().numpy()
    return Found(boxes=boxes[keep], scores=scores[keep], labels=labels[keep])


def artifact_answers(
    artifact: Artifact, split: BoxSplit, *, batch_size: int | None = None
) -> tuple[list[Found | None], list[str]]:
    """What a detector's artefact says of each picture (None: it can not be read), and what was wrong with pictures."""
    found, bad = list[Found | None](), list[str]()
    for answer in artifact.classify(list(split.paths), top=None, batch_size=batch_size):
        if answer.error:
            bad.append(f"{answer.name}: {answer.error}")
            found.append(None)
            continue
        labels = np.array([artifact.classes.index(name) + 1 for name in answer.labels], np.int64)
        found.append(
            Found(
                boxes=np.array(answer.boxes, np.float32).reshape(-1, 4),
                scores=np.array(answer.probabilities, np.float32),
                labels=labels,
            )
        )
    return found, bad
