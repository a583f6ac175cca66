"""A detector as one function of a batch, for export and for tracing: pixels to candidate boxes, without data-dependent
shapes.

torchvision's own forward walks over the images of a list, so it can not be written for a free batch. Here the same is
done for the whole batch: the same maps, the same anchors, the same candidates per level (per class for SSDLite), boxes
decoded by torchvision's coders. What is left is non-maximum suppression.

Faster R-CNN has two stages with a suppression between them. To be counted and traced the second one gets the best
proposals, as many as there can be: its work does not depend on which they are. ``formats.two_stage`` writes the file
with the suppression.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from convscale.nn.detectors import Detector

OUTPUTS = ("boxes", "scores", "labels")
"""Names of what it gives: float (N, K, 4) as x1, y1, x2, y2 in the square's pixels, float (N, K), and int64 (N, K) from
1. Scores at or below the detector's threshold do not count."""
TWO_STAGES = "faster_rcnn"
"""The head whose second stage looks at what the first one finds."""
_CANONICAL_SIDE, _CANONICAL_LEVEL, _EPSILON = 224, 4, 1e-6
"""Which map a box is read from (Lin et al. 2017, arXiv 1612.03144, equation 1), as torchvision computes it."""
_LEAST_BOX = 1e-2
"""Pixels: torchvision drops boxes with a shorter side."""


class DetectorGraph(nn.Module):
    """Candidates of a batch.

    Args:
        detector: with any head; its parts are shared, not copied.
    """

    anchors: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        spec = detector.detector_spec
        self.kind, self.side, self.most, self.classes = spec.head, spec.image_size, spec.candidates, spec.num_classes
        parts = cast(Any, detector)
        self.trunk, self.pretrained_cfg = parts.backbone, detector.pretrained_cfg
        self.first = self.second = None
        if spec.head == TWO_STAGES:
            self.first, self.second = FirstStage(detector), SecondStage(detector)
            return
        self.head, self.coder = parts.head, parts.box_coder
        anchors, self.levels = _anchors(detector)
        self.register_buffer("anchors", anchors, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates of normalised images, float (N, 3, side, side)."""
        if self.first is not None and self.second is not None:
            boxes, scores, _, *maps = self.first(images)
            return self.second(_best(boxes, scores, self.second.most), maps)
        told = self.head(list(self.trunk(images).values()))
        boxes = self._decoded(told["bbox_regression"])
        if self.kind == "ssdlite":
            return self._by_class(boxes, torch.softmax(told["cls_logits"], -1)[..., 1:])
        scores = torch.sigmoid(told["cls_logits"])
        if self.kind == "fcos":
            scores = torch.sqrt(scores * torch.sigmoid(told["bbox_ctrness"]))
        return self._by_level(boxes, scores)

    def stages(self) -> dict[str, nn.Module]:
        """Modules that end after the backbone, the neck and the heads (candidates included), each from the pixels on:
        what the parts cost is the difference between them.
        """
        return {
            "backbone": _Until(self.trunk.body, self.pretrained_cfg),
            "neck": _Until(self.trunk, self.pretrained_cfg),
            "heads": self,
        }

    def _decoded(self, regression: Tensor) -> Tensor:
        """(N, anchors, 4) in pixels, cut at the square's sides."""
        anchors = self.anchors.unsqueeze(0).expand_as(regression)
        if self.kind == "fcos":
            boxes = self.coder.decode(regression, anchors)
        else:
            flat = self.coder.decode_single(regression.reshape(-1, 4), anchors.reshape(-1, 4))
            boxes = flat.reshape(-1, self.anchors.shape[0], 4)
        return boxes.clamp(0, self.side)

    def _by_level(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best pairs of anchor and class of each level."""
        parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        for level_boxes, level_scores in zip(boxes.split(self.levels, 1), scores.split(self.levels, 1), strict=True):
            pairs = level_scores.flatten(1)
            best, at = pairs.topk(min(self.most, pairs.shape[1]), 1)
            where = torch.div(at, self.classes, rounding_mode="floor")
            parts[0].append(level_boxes.gather(1, where.unsqueeze(2).expand(-1, -1, 4)))
            parts[1].append(best)
            parts[2].append(at - where * self.classes + 1)
        return torch.cat(parts[0], 1), torch.cat(parts[1], 1), torch.cat(parts[2], 1)

    def _by_class(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best anchors of each class."""
        most = min(self.most, boxes.shape[1])
        best, at = scores.transpose(1, 2).topk(most, 2)  # (N, classes, most)
        chosen = boxes.gather(1, at.flatten(1).unsqueeze(2).expand(-1, -1, 4))
        label = torch.arange(1, self.classes + 1, device=boxes.device).repeat_interleave(most)
        return chosen, best.flatten(1), label.unsqueeze(0).expand_as(best.flatten(1))


class _Until(nn.Module):
    """A part that gives maps, as a tuple."""

    def __init__(self, part: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.part, self.pretrained_cfg = part, config

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.part(images)
        return tuple(maps.values() if isinstance(maps, dict) else maps)


def _best(boxes: Tensor, scores: Tensor, most: int) -> Tensor:
    """The boxes (N, most, 4) with the highest scores; boxes without area where there are fewer."""
    count = min(most, scores.shape[1])
    at = scores.topk(count, 1).indices
    return nn.functional.pad(boxes.gather(1, at.unsqueeze(2).expand(-1, -1, 4)), (0, 0, 0, most - count))


class FirstStage(nn.Module):
    """Normalised images, float (N, 3, side, side), to proposals before suppression: boxes (N, K, 4) in pixels, scores
    (N, K), levels (N, K), and the maps that the second stage reads.
    """

    anchors: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        parts, self.side = cast(Any, detector), detector.detector_spec.image_size
        self.trunk, self.head, self.coder = parts.backbone, parts.rpn.head, parts.rpn.box_coder
        self.most, self.least = parts.rpn._pre_nms_top_n["testing"], parts.rpn.min_size
        self.nms_threshold = float(parts.rpn.nms_thresh)
        self.names = tuple(parts.roi_heads.box_roi_pool.featmap_names)
        anchors, self.levels = _anchors(detector)
        self.register_buffer("anchors", anchors, persistent=False)
        self.pretrained_cfg = detector.pretrained_cfg

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.trunk(images)
        objectness, deltas = self.head(list(maps.values()))
        parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        start = 0
        for level, (count, logits, regression) in enumerate(zip(self.levels, objectness, deltas, strict=True)):
            pairs = logits.permute(0, 2, 3, 1).flatten(1)
            best, at = pairs.topk(min(self.most, count), 1)
            apart = regression.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            chosen = apart.gather(1, at.unsqueeze(2).expand(-1, -1, 4))
            anchors = self.anchors[start : start + count][at]
            boxes = self.coder.decode_single(chosen.reshape(-1, 4), anchors.reshape(-1, 4)).reshape(anchors.shape)
            boxes = boxes.clamp(0, self.side)
            parts[0].append(boxes)
            parts[1].append(torch.where(_is_box(boxes, self.least), torch.sigmoid(best), torch.zeros_like(best)))
            parts[2].append(torch.full_like(at, level))
            start += count
        found = tuple(torch.cat(each, 1) for each in parts)
        return *found, *(maps[name] for name in self.names)


class SecondStage(nn.Module):
    """Proposals (N, P, 4 or more), each with its box first, as ``formats.suppression`` writes them, and maps, to
    candidates: boxes (N, K, 4) in pixels, scores (N, K), labels int64 (N, K) from 1, K being P times the classes.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        parts = cast(Any, detector)
        heads, self.side = parts.roi_heads, detector.detector_spec.image_size
        self.head, self.predictor, self.coder = heads.box_head, heads.box_predictor, heads.box_coder
        self.size, self.sampling = heads.box_roi_pool.output_size, heads.box_roi_pool.sampling_ratio
        self.strides = [int(stride) for stride in parts.backbone.strides]
        self.most, self.classes = parts.rpn._post_nms_top_n["testing"], detector.detector_spec.num_classes
        self.numbers = self.most * len(self.strides) * math.prod(self.size) * detector.detector_spec.neck_width
        """That one picture's boxes are read as, from all maps."""

    def forward(self, proposals: Tensor, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        count = proposals.shape[0]
        boxes = proposals[:, :, :4].reshape(-1, 4)
        picture = torch.arange(count, device=boxes.device).to(boxes.dtype).reshape(-1, 1, 1)
        rois = torch.cat([picture.expand(-1, self.most, 1).reshape(-1, 1), boxes], 1)
        logits, regression = self.predictor(self.head(self._pooled(rois, maps)))
        scores = torch.softmax(logits, -1)[:, 1:]
        found = self.coder.decode_single(regression, boxes).unflatten(1, (-1, 4))[:, 1:].clamp(0, self.side)
        scores = torch.where(_is_box(found, _LEAST_BOX), scores, torch.zeros_like(scores))
        wide = self.most * self.classes
        labels = torch.arange(1, self.classes + 1, device=boxes.device).repeat(self.most)
        return (
            found.reshape(-1, wide, 4),
            scores.reshape(-1, wide),
            labels.unsqueeze(0).expand(count, -1),
        )

    def _pooled(self, rois: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Each box read from the map of its size, (R, C, h, w): it is read from all, so that shapes stay."""
        area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
        level = torch.floor(_CANONICAL_LEVEL + torch.log2(area.sqrt() / _CANONICAL_SIDE) + _EPSILON)
        low, high = (int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        level = level.clamp(low, high).reshape(-1, 1, 1, 1)
        out = None
        for stride, each in zip(self.strides, maps, strict=True):
            read = _read(each, rois, self.size, 1 / stride, self.sampling)
            out = read if out is None else torch.where(level == math.log2(stride), read, out)
        assert out is not None, "a detector has maps"
        return out


def _read(maps: Tensor, rois: Tensor, size: Any, scale: float, sampling: int) -> Tensor:
    """torchvision's ``roi_align``, maps of another type cast for it as its autocast does."""
    if maps.dtype == rois.dtype:
        return roi_align(maps, rois, size, scale, sampling)
    return roi_align(maps.to(rois.dtype), rois, size, scale, sampling).to(maps.dtype)


def _is_box(boxes: Tensor, least: float) -> Tensor:
    """Whether both sides are at least so long."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)


@torch.no_grad()
def _anchors(detector: Detector) -> tuple[Tensor, list[int]]:
    """The anchors of a square (anchors, 4), of two stages the first one's, and how many there are of each level."""
    parts, side = cast(Any, detector), detector.detector_spec.image_size
    generator = parts.rpn.anchor_generator if hasattr(parts, "rpn") else parts.anchor_generator
    parameter = next(detector.parameters())
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    try:
        if parameter.is_meta:
            shapes = list(parts.backbone(torch.empty(1, 3, side, side, device="meta")).values())
            maps = [torch.zeros(each.shape) for each in shapes]
        else:
            maps = list(parts.backbone(torch.zeros(1, 3, side, side, device=parameter.device)).values())
    finally:
        for module, flag in modes:
            module.training = flag
    image = ImageList(maps[0].new_zeros(1, 3, side, side), [(side, side)])
    anchors = generator(image, maps)[0].detach().clone()
    each = generator.num_anchors_per_location()
    levels = [maps[at].shape[2] * maps[at].shape[3] * each[at] for at in range(len(maps))]
    return anchors.to(parameter.dtype) if not parameter.is_meta else anchors, levels
