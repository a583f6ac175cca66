"""Detectors over any backbone: torchvision's heads, necks and losses on feature maps of ours or timm's.

A detector is a value too: a ``DetectorSpec`` says all of it, and is kept as JSON. What torchvision has is not written
again: this file chooses taps, strides and sizes, and puts its parts together.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import Conv2dNormActivation

from convscale.arch.spec import NetSpec
from convscale.errors import UserError, check_number, check_text, check_whole, short
from convscale.nn.frozen_parts import first_parts

HEADS = ("fcos", "retinanet", "faster_rcnn", "ssdlite")
NORMS = (None, "inplace", "batchnorm", "frozen")
STRIDE = 32
"""What sides of the input must be multiples of: the reduction of the deepest map."""
LEAST_SIDE, MOST_SIDE = 64, 2048
_WANTED = {"fcos": (8, 16, 32), "retinanet": (8, 16, 32), "faster_rcnn": (4, 8, 16, 32), "ssdlite": (16, 32)}
"""Reductions of the maps that a head stands on: C3 to C5, C2 to C5, and of SSDLite the last two."""
_LEAST_TAPS = {"fcos": 3, "retinanet": 3, "faster_rcnn": 2, "ssdlite": 2}
_ANSWERS: dict[str, tuple[float, float, int, int]] = {
    "fcos": (0.05, 0.6, 100, 1000),
    "retinanet": (0.05, 0.5, 100, 1000),
    "faster_rcnn": (0.05, 0.5, 100, 1000),
    "ssdlite": (0.001, 0.55, 300, 300),
}
"""Score threshold, IoU of non-maximum suppression, boxes of a picture, candidates (of a level; of SSDLite of a class);
torchvision's own but for FCOS's score threshold, which is the paper's (arXiv 1904.01355), not 0.2."""
_SSD_EXTRAS = (512, 256, 256, 128)
"""Channels of the maps below the backbone's (MobileNetV2, arXiv 1801.04381, section 6.2)."""


class Features(Protocol):
    """What a backbone tells of its maps."""

    def channels(self) -> list[int]:
        """Channels of each map."""
        ...

    def reduction(self) -> list[int]:
        """Pixels of the image per pixel of each map, along one side."""
        ...


@dataclass(frozen=True, kw_only=True)
class DetectorSpec:
    """A detector as a value: its backbone, its head, its size, how its answers are cut.

    Raises:
        UserError: a field has an impossible value; the message names the field, the value and what would be right.
    """

    backbone: str | NetSpec | None
    """A network's name, or its spec; None: a module of the caller's own."""
    head: str = "fcos"
    """``fcos``, ``retinanet``, ``faster_rcnn`` or ``ssdlite``."""
    num_classes: int
    """Without background; labels are 1 to ``num_classes``."""
    image_size: int = 512
    """Side of the square that pictures are fitted into, in pixels; a multiple of 32."""
    norm: str | None = None
    """Of the backbone: None (its own), ``inplace``, ``batchnorm``, or ``frozen``: its norms do not learn."""
    neck_width: int = 256
    """Channels of the pyramid (not of SSDLite)."""
    head_depth: int = 4
    """Convolutions of each branch of the heads of FCOS and RetinaNet."""
    anchor_scale: float = 4.0
    """Side of the smallest anchor over its map's stride; twice as many for Faster R-CNN, none for the others."""
    frozen_stages: int = 0
    """The backbone's stem and so many stages less one do not learn (of a network of others: all up to so many of its
    maps, the stem's among them); 0: everything does."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from pixels in [0, 1]."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides what the mean was subtracted from."""
    score_threshold: float | None = None
    """Boxes of lower scores are dropped; None: the head's own."""
    nms_threshold: float | None = None
    """Of two boxes of a class with a larger IoU the weaker one is dropped; None: the head's own."""
    max_detections: int | None = None
    """Boxes of a picture; None: the head's own."""

    def __post_init__(self) -> None:
        if isinstance(self.backbone, Mapping):
            object.__setattr__(self, "backbone", NetSpec.from_dict(cast(dict[str, object], dict(self.backbone))))
        if self.backbone is not None and not isinstance(self.backbone, str | NetSpec):
            raise UserError(f"backbone is {short(self.backbone)}; it must be a network's name or a NetSpec")
        check_text("head", self.head, HEADS)
        check_whole("num_classes", self.num_classes)
        for name, least, most in (("neck_width", 8, 2048), ("head_depth", 1, 16), ("frozen_stages", 0, 64)):
            if check_whole(name, getattr(self, name), least) > most:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at most {most}")
        if self.head == "fcos" and (self.neck_width % 32 or self.neck_width < 64):
            raise UserError(
                f"neck_width is {self.neck_width}; with head fcos it must be a multiple of 32 from 64 on: its group "
                "norms have 32 groups"
            )
        _check_side(self.image_size)
        if self.norm not in NORMS:
            raise UserError(f"norm is {self.norm!r}; it must be None, 'inplace', 'batchnorm' or 'frozen'")
        check_number("anchor_scale", self.anchor_scale, "from 0.5 to 32", 0.5, 32)
        score, iou, most, _ = _ANSWERS[self.head]
        for name, usual in (("score_threshold", score), ("nms_threshold", iou)):
            value = usual if getattr(self, name) is None else getattr(self, name)
            object.__setattr__(self, name, check_number(name, value, "from 0 to 1", 0, 1))
        found = most if self.max_detections is None else self.max_detections
        object.__setattr__(self, "max_detections", check_whole("max_detections", found))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or len(values) != 3:
                raise UserError(f"{name} is {short(values)}; it must be three numbers")
            object.__setattr__(self, name, tuple(check_number(name, value, "three numbers") for value in values))
        if min(self.std) <= 0:
            raise UserError(f"std is {self.std}; it must be above 0")

    @property
    def candidates(self) -> int:
        """Candidates of a level (of SSDLite of a class) that go into non-maximum suppression."""
        return _ANSWERS[self.head][3]

    @property
    def backbone_name(self) -> str:
        """The backbone's name."""
        return self.backbone.name if isinstance(self.backbone, NetSpec) else self.backbone or "a module"

    @property
    def name(self) -> str:
        """What to call it: ``fcos-tresnet_m``."""
        return f"{self.head}-{self.backbone_name}"

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.backbone, NetSpec):
            values["backbone"] = self.backbone.to_dict()
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DetectorSpec:
        """From what :meth:`to_dict` gave.

        Raises:
            UserError: an unknown or missing key, or an impossible value.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"a detector's spec is {short(values)}; it must be a table of keys and values")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(map(str, values)) - known):
            raise UserError(f"a detector's spec has no key {unknown[0]!r} (known: {', '.join(sorted(known))})")
        if missing := sorted({"backbone", "num_classes"} - set(values)):
            raise UserError(f"a detector's spec lacks {', '.join(missing)}")
        return cls(**values)


def _check_side(size: object) -> None:
    side = check_whole("image_size", size)
    if side % STRIDE or not LEAST_SIDE <= side <= MOST_SIDE:
        raise UserError(
            f"image_size is {side}; a detector's must be a multiple of {STRIDE} from {LEAST_SIDE} to {MOST_SIDE}"
        )


def choose_taps(head: str, reductions: Sequence[int], name: str) -> list[int]:
    """Which of a backbone's maps a head stands on: positions in ``reductions``.

    Raises:
        UserError: it has not enough maps; the message says which it has.
    """
    places = [list(reductions).index(each) for each in _WANTED[head] if each in reductions]
    if len(places) < _LEAST_TAPS[head] or STRIDE not in reductions:
        wanted = ", ".join(map(str, _WANTED[head]))
        raise UserError(
            f"backbone {name} has maps at strides {', '.join(map(str, reductions)) or 'none'}; head {head} stands on "
            f"those at {wanted}"
        )
    return places


class Trunk(nn.Module):
    """A backbone and its neck: pixels to an ordered dictionary of maps, as torchvision's detectors want them."""

    def __init__(self, body: nn.Module, spec: DetectorSpec, *, all_maps: bool) -> None:
        super().__init__()
        info = cast(Features, body.feature_info)
        places = choose_taps(spec.head, info.reduction(), spec.backbone_name)
        self.body, self.places = body, places if all_maps else list(range(len(places)))
        channels = [info.channels()[place] for place in places]
        self.strides = [info.reduction()[place] for place in places]
        self.norm_is_frozen, self.frozen_stages = spec.norm == "frozen", spec.frozen_stages
        self.out_channels: int | list[int]
        if spec.head == "ssdlite":
            self.neck: nn.Module = Extras(channels[-1], spec.image_size)
            self.out_channels = [*channels, *self.neck.channels]
        else:
            top = LastLevelMaxPool() if spec.head == "faster_rcnn" else LastLevelP6P7(spec.neck_width, spec.neck_width)
            self.neck = FeaturePyramidNetwork(channels, spec.neck_width, extra_blocks=top)
            self.out_channels = spec.neck_width
        for module in self._frozen():
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(x)
        chosen = OrderedDict((str(number), maps[place]) for number, place in enumerate(self.places))
        return self.neck(chosen)

    def train(self, mode: bool = True) -> Trunk:
        """Frozen parts stay in evaluation mode: their running statistics do not move."""
        super().train(mode)
        for module in self._frozen():
            module.train(False)
        return self

    def _frozen(self) -> list[nn.Module]:
        """What does not learn, as it stands now: a norm may have been replaced by another that took its parameters."""
        frozen: list[nn.Module] = []
        if self.frozen_stages:
            frozen += first_parts(self.body, self.frozen_stages)
        if self.norm_is_frozen:
            frozen += [module for module in self.body.modules() if hasattr(module, "running_mean")]
        return frozen


class Extras(nn.Module):
    """The maps below a backbone's last one, each half as wide and high: SSDLite's, as many as fit."""

    def __init__(self, channels: int, image_size: int) -> None:
        super().__init__()
        side, self.channels, self.blocks = image_size // STRIDE, [], nn.ModuleList()
        for width in _SSD_EXTRAS:
            if side <= 1:
                break
            side = (side + 1) // 2
            self.blocks.append(_extra(channels, width))
            self.channels.append(width)
            channels = width

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        out, x = OrderedDict(maps), list(maps.values())[-1]
        for block in self.blocks:
            x = block(x)
            out[str(len(out))] = x
        return out


def _extra(channels: int, width: int) -> nn.Sequential:
    unit = partial(Conv2dNormActivation, activation_layer=nn.ReLU6, norm_layer=_SSD_NORM)
    half = width // 2
    return nn.Sequential(
        unit(channels, half, kernel_size=1),
        unit(half, half, kernel_size=3, stride=2, groups=half),
        unit(half, width, kernel_size=1),
    )


_SSD_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


# ---------------------------------------------------------------- the detectors

Target = dict[str, Tensor]
"""``boxes`` float (n, 4) as x1, y1, x2, y2 in pixels, ``labels`` int64 (n,)."""


class Detector(nn.Module):
    """What all detectors have; the rest is torchvision's."""

    detector_spec: DetectorSpec
    """What it is built from."""
    counts_background = True
    """Whether the head's first class is the background."""

    def dress(self, spec: DetectorSpec) -> None:
        """Keep what it was built from, and how pictures become its input."""
        self.detector_spec = spec
        self.num_classes = spec.num_classes
        size = spec.image_size
        self.pretrained_cfg = {
            "architecture": spec.name,
            "input_size": (3, size, size),
            "mean": spec.mean,
            "std": spec.std,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "num_classes": spec.num_classes,
        }
        self.transform = GeneralizedRCNNTransform(size, size, list(spec.mean), list(spec.std), size_divisible=size)

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """As torchvision's: in training the losses by name, else for each picture its boxes, labels and scores.

        Args:
            images: float (3, H, W) each, in [0, 1], of any size.
            targets: in training, the boxes and labels (from 1) of each.

        Raises:
            UserError: in training no targets, a box without area, or a label outside.
        """
        shift = 0 if self.counts_background else 1
        if self.training:
            if targets is None:
                raise UserError("a detector in training needs targets: boxes and labels of each image")
            check_targets(targets, self.num_classes)
        if targets is not None:
            targets = [{**each, "labels": each["labels"] - shift} for each in targets]
        out = super().forward(list(images), targets)  # pyright: ignore[reportAttributeAccessIssue]
        if not self.training and shift:
            for each in out:
                each["labels"] = each["labels"] + shift
        return out


class FcosDetector(Detector, FCOS):
    """FCOS (arXiv 1904.01355)."""

    counts_background = False


class RetinaDetector(Detector, RetinaNet):
    """RetinaNet (arXiv 1708.02002)."""

    counts_background = False


class FasterDetector(Detector, FasterRCNN):
    """Faster R-CNN (arXiv 1506.01497) with a pyramid (arXiv 1612.03144)."""


class SsdDetector(Detector, SSD):
    """SSDLite (arXiv 1801.04381, section 6.2)."""

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """As the other detectors'.

        Raises:
            UserError: besides, in training one image alone where the last map is a single pixel.
        """
        try:
            return super().forward(images, targets)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "an ssdlite detector's last map is one pixel, whose norm has no statistics of one image: train with "
                "batches of at least 2"
            ) from error


def check_targets(targets: Sequence[Target], num_classes: int) -> None:
    """
    Raises:
        UserError: a box is not x1 < x2, y1 < y2, boxes have another shape, or a label is outside 1 to ``num_classes``.
    """
    for number, target in enumerate(targets):
        boxes, labels = target.get("boxes"), target.get("labels")
        if not isinstance(boxes, Tensor) or boxes.ndim != 2 or boxes.shape[1] != 4:
            raise UserError(f"targets[{number}]['boxes'] must be a tensor (n, 4) of x1, y1, x2, y2")
        if not isinstance(labels, Tensor) or labels.shape != boxes.shape[:1]:
            raise UserError(f"targets[{number}]['labels'] must be a tensor of {len(boxes)} labels, one for each box")
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(1) | ~torch.isfinite(boxes).all(1)
        if len(boxes) and bool(flat.any()):
            box = [round(value, 2) for value in boxes[flat][0].tolist()]
            raise UserError(f"targets[{number}] has the box {box}; it must have x1 < x2 and y1 < y2")
        if len(labels) and not (int(labels.min()) >= 1 and int(labels.max()) <= num_classes):
            raise UserError(
                f"targets[{number}] has labels {int(labels.min())} to {int(labels.max())}; they must be 1 to "
                f"{num_classes}"
            )


def build_detector(body: nn.Module, spec: DetectorSpec, *, all_maps: bool = True) -> Detector:
    """A detector over a backbone that is there.

    Args:
        body: gives a list of maps and has ``feature_info`` (``create_model(..., features_only=True)``, ours or timm's).
        spec: what to build.
        all_maps: whether it gives all maps of its ``feature_info``, or only those that the head stands on.

    Returns:
        In training mode; the head's weights are fresh, from torch's global generator.

    Raises:
        UserError: it is no such backbone, or has not enough maps.
    """
    if not hasattr(body, "feature_info") or not callable(getattr(body.feature_info, "reduction", None)):
        raise UserError(
            f"{type(body).__name__} is no backbone: it has no feature_info; create_model(..., features_only=True) gives"
            " one"
        )
    trunk = Trunk(body, spec, all_maps=all_maps)
    detector = _BUILDERS[spec.head](trunk, spec)
    detector.dress(spec)
    return detector


def _cut(spec: DetectorSpec) -> dict[str, Any]:
    """How the answers are cut, as torchvision names it."""
    return {
        "score_thresh": spec.score_threshold,
        "nms_thresh": spec.nms_threshold,
        "detections_per_img": spec.max_detections,
        "topk_candidates": spec.candidates,
    }


def _strides(trunk: Trunk, more: int) -> list[int]:
    return [*trunk.strides, *(trunk.strides[-1] * 2**power for power in range(1, more + 1))]


def _fcos(trunk: Trunk, spec: DetectorSpec) -> Detector:
    anchors = AnchorGenerator(tuple((stride,) for stride in _strides(trunk, 2)), ((1.0,),) * 5)
    head = FCOSHead(spec.neck_width, 1, spec.num_classes, num_convs=spec.head_depth)
    return FcosDetector(trunk, spec.num_classes, anchor_generator=anchors, head=head, **_cut(spec))


def _retinanet(trunk: Trunk, spec: DetectorSpec) -> Detector:
    sides = tuple(
        tuple(spec.anchor_scale * stride * 2 ** (third / 3) for third in range(3)) for stride in _strides(trunk, 2)
    )
    anchors = AnchorGenerator(cast(Any, sides), ((0.5, 1.0, 2.0),) * len(sides))
    head = RetinaNetHead(spec.neck_width, anchors.num_anchors_per_location()[0], spec.num_classes)
    for part in (head.classification_head, head.regression_head):  # torchvision's have four convolutions always
        part.conv = part.conv[: spec.head_depth]
    return RetinaDetector(trunk, spec.num_classes, anchor_generator=anchors, head=head, **_cut(spec))


def _faster_rcnn(trunk: Trunk, spec: DetectorSpec) -> Detector:
    sides = tuple((2 * spec.anchor_scale * stride,) for stride in _strides(trunk, 1))
    anchors = AnchorGenerator(cast(Any, sides), ((0.5, 1.0, 2.0),) * len(sides))
    names = [str(number) for number in range(len(trunk.strides))]
    return FasterDetector(
        trunk,
        spec.num_classes + 1,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        **{f"box_{name}": value for name, value in _cut(spec).items() if name != "topk_candidates"},
    )


def _ssdlite(trunk: Trunk, spec: DetectorSpec) -> Detector:
    channels = cast(list[int], trunk.out_channels)
    anchors = DefaultBoxGenerator([[2, 3] for _ in channels], min_ratio=0.2, max_ratio=0.95)
    classes = spec.num_classes + 1
    head = SSDLiteHead(channels, anchors.num_anchors_per_location(), classes, _SSD_NORM)
    return SsdDetector(trunk, anchors, (spec.image_size, spec.image_size), classes, head=head, **_cut(spec))


_BUILDERS = {"fcos": _fcos, "retinanet": _retinanet, "faster_rcnn": _faster_rcnn, "ssdlite": _ssdlite}


def is_detector(net: object) -> bool:
    """Whether it is a detector of ours."""
    return isinstance(net, Detector)
