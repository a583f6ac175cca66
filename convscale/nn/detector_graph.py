"""A detector as one function of a batch, for export and for tracing: pixels to candidate boxes, without data-dependent
shapes.

torchvision's own forward walks over the images of a list, so it can not be written for a free batch. Here the same is
done for the whole batch: the same maps, the same anchors, the same candidates per level (per class for SSDLite), boxes
decoded by torchvision's coders. What is left is non-maximum suppression.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from convscale.errors import UserError
from convscale.nn.detectors import Detector

OUTPUTS = ("boxes", "scores", "labels")
"""Names of what it gives: float (N, K, 4) as x1, y1, x2, y2 in the square's pixels, float (N, K), and int64 (N, K) from
1. Scores at or below the detector's threshold do not count."""


class DetectorGraph(nn.Module):
    """Candidates of a batch.

    Args:
        detector: FCOS, RetinaNet or SSDLite; its parts are shared, not copied.

    Raises:
        UserError: Faster R-CNN, whose second stage depends on what the first one finds.
    """

    anchors: Tensor

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        spec = detector.detector_spec
        if spec.head == "faster_rcnn":
            raise UserError(
                "head faster_rcnn is not counted, measured or predicted: its work depends on what it finds; "
                "fcos, retinanet and ssdlite are"
            )
        self.kind, self.side, self.most, self.classes = spec.head, spec.image_size, spec.candidates, spec.num_classes
        parts = cast(Any, detector)
        self.trunk, self.head, self.coder = parts.backbone, parts.head, parts.box_coder
        anchors, self.levels = _anchors(detector)
        self.register_buffer("anchors", anchors, persistent=False)
        self.pretrained_cfg = detector.pretrained_cfg

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates of normalised images, float (N, 3, side, side)."""
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


@torch.no_grad()
def _anchors(detector: Detector) -> tuple[Tensor, list[int]]:
    """The anchors of a square (anchors, 4), and how many there are of each level."""
    parts, side = cast(Any, detector), detector.detector_spec.image_size
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
    anchors = parts.anchor_generator(image, maps)[0].detach().clone()
    each = parts.anchor_generator.num_anchors_per_location()
    levels = [maps[at].shape[2] * maps[at].shape[3] * each[at] for at in range(len(maps))]
    return anchors.to(parameter.dtype) if not parameter.is_meta else anchors, levels
