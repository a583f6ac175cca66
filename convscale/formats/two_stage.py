"""Faster R-CNN as one ONNX file with a free batch: the first stage, its suppression, the second stage.

What the second stage looks at depends on what the first one finds, so the two are captured apart. Between them stands
the suppression of ``formats.suppression``, whose table has as many rows for each picture as the first stage may
propose; rows without a proposal are boxes without area, and so is what the second stage makes of them. So no shape
depends on the picture.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from convscale.errors import UserError
from convscale.formats.baked import BakedBoxes
from convscale.formats.fold import fold
from convscale.formats.onnx import write_onnx
from convscale.formats.suppression import OUTPUT, add_suppression
from convscale.images.preprocess import Preprocessing
from convscale.nn.detector_graph import OUTPUTS
from convscale.nn.detectors import Detector
from convscale.nn.modes import evaluating

HEAD = "faster_rcnn"
_CANONICAL_SIDE, _CANONICAL_LEVEL, _EPSILON = 224, 4, 1e-6
"""Which map a box is read from (Lin et al. 2017, arXiv 1612.03144, equation 1), as torchvision computes it."""
_LEAST_BOX = 1e-2
"""Pixels: torchvision drops boxes with a shorter side."""
_FIRST, _PROPOSALS = "first_", "proposals"


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
    """Proposals (N, P, 6) as ``formats.suppression`` writes them, and maps, to candidates: boxes (N, K, 4) in pixels,
    scores (N, K), labels int64 (N, K) from 1, K being P times the classes.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        parts = cast(Any, detector)
        heads, self.side = parts.roi_heads, detector.detector_spec.image_size
        self.head, self.predictor, self.coder = heads.box_head, heads.box_predictor, heads.box_coder
        self.size, self.sampling = heads.box_roi_pool.output_size, heads.box_roi_pool.sampling_ratio
        self.strides = [int(stride) for stride in parts.backbone.strides]
        self.most, self.classes = parts.rpn._post_nms_top_n["testing"], detector.detector_spec.num_classes

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
            read = roi_align(each, rois, self.size, 1 / stride, self.sampling)
            out = read if out is None else torch.where(level == math.log2(stride), read, out)
        assert out is not None, "a detector has maps"
        return out


def _is_box(boxes: Tensor, least: float) -> Tensor:
    """Whether both sides are at least so long."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)


@torch.no_grad()
def _anchors(detector: Detector) -> tuple[Tensor, list[int]]:
    """The first stage's anchors of a square (anchors, 4), and how many there are of each map."""
    parts, side = cast(Any, detector), detector.detector_spec.image_size
    with evaluating(detector):
        maps = list(parts.backbone(torch.zeros(1, 3, side, side)).values())
    generator = parts.rpn.anchor_generator
    anchors = generator(ImageList(torch.zeros(1, 3, side, side), [(side, side)]), maps)[0].clone()
    each = generator.num_anchors_per_location()
    return anchors, [one.shape[2] * one.shape[3] * count for one, count in zip(maps, each, strict=True)]


def check_two_stages(form: str, *, int8: bool) -> None:
    """
    Raises:
        UserError: Faster R-CNN has no such form.
    """
    if form == "torch" or int8:
        raise UserError(
            f"head {HEAD} ships as onnx or openvino, in float: its second stage depends on what the first finds; got "
            + ("int8" if int8 else f"format {form}")
        )


def write_two_stages(detector: Detector, path: str | os.PathLike[str], bake: Preprocessing | None = None) -> None:
    """Write a Faster R-CNN on the CPU as one ONNX file with a free batch: images to candidates (``OUTPUTS``).

    Args:
        detector: in any mode; it is left as it is.
        path: the file.
        bake: normalising becomes a part of it; None: it takes normalised images.
    """
    import onnx

    side, rpn = detector.detector_spec.image_size, cast(Any, detector).rpn
    first, second = FirstStage(detector).eval(), SecondStage(detector).eval()
    example = torch.zeros(2, 3, side, side)
    with torch.no_grad(), evaluating(detector):
        maps = tuple(first(example)[3:])
    names = tuple(f"map{number}" for number in range(len(maps)))
    folded: nn.Module = fold(first, example)
    if bake is not None:
        folded, example = BakedBoxes(folded, bake), torch.zeros(2, side, side, 3, dtype=torch.uint8)
    write_onnx(folded, example, path, outputs=(*OUTPUTS, *names))
    proposed = rpn._post_nms_top_n["testing"]
    add_suppression(path, side=side, score_threshold=0.0, nms_threshold=rpn.nms_thresh, most=proposed)
    behind = Path(f"{path}.second")
    table = torch.zeros(2, proposed, 6)
    write_onnx(second, (table, maps), behind, outputs=OUTPUTS, inputs=(_PROPOSALS, *names))
    joined = _joined(onnx.load(os.fspath(path)), onnx.load(behind), names)
    behind.unlink()
    onnx.checker.check_model(joined)
    onnx.save(joined, os.fspath(path))


def _joined(first: Any, second: Any, shared: Sequence[str]) -> Any:
    """One model: ``first``, whose own names get a prefix, then ``second``, which takes its table and ``shared``."""
    known = {name: name for name in ("", *shared, *(each.name for each in first.graph.input))} | {OUTPUT: _PROPOSALS}
    _rename(first.graph, lambda name: known.get(name, _FIRST + name))
    if first.functions or second.functions:
        raise UserError("the exporter left functions in a detector's file; it can not be joined")
    first.graph.node.extend(second.graph.node)
    first.graph.initializer.extend(second.graph.initializer)
    first.graph.value_info.extend(second.graph.value_info)
    del first.graph.output[:]
    first.graph.output.extend(second.graph.output)
    domains = {each.domain for each in first.opset_import}
    first.opset_import.extend(each for each in second.opset_import if each.domain not in domains)
    return first


def _rename(graph: Any, name_of: Callable[[str], str]) -> None:
    """Give every value and node of a graph another name."""
    for each in (*graph.initializer, *graph.value_info, *graph.input, *graph.output):
        each.name = name_of(each.name)
    for node in graph.node:
        node.name = _FIRST + node.name
        for names in (node.input, node.output):
            names[:] = [name_of(name) for name in names]
