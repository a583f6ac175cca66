"""Which backbone: the best published features among those whose detector keeps a speed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convscale.arch.spec import NetSpec
from convscale.choice.basis import Asked, Basis, basis_of
from convscale.choice.detector_speed import DetectorPrediction, DetectorSpeed, measure_detector, predict_detector
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError, check_text
from convscale.networks.detectors import create_detector
from convscale.networks.names import is_spec_of
from convscale.networks.offered import weights_in
from convscale.networks.resolve import Network
from convscale.nn.detectors import HEADS
from convscale.predictor.calibration import Calibration
from convscale.predictor.devices import at_hand
from convscale.predictor.predict import Prediction
from convscale.stats import chance_above
from convscale.words import odds

USUAL = (
    *("tresnet_m", "resnet50d", "resnet50", "resnet34", "resnet18", "efficientnet_b1", "efficientnet_b0"),
    *("tf_efficientnet_lite2", "tf_efficientnet_lite1", "tf_efficientnet_lite0", "mobilenetv2_120d", "mobilenetv2_100"),
)
"""Backbones that are tried where none is named."""


@dataclass(frozen=True, kw_only=True)
class DetectorOption:
    """A backbone that was tried."""

    backbone: str
    """Its name."""
    top1: float | None
    """The best published ImageNet-1k top-1 of its weights that saw nothing more, in percent; None: none is known."""
    speed: DetectorSpeed | DetectorPrediction | None
    """None where it could not be had."""
    reason: str = ""
    """Why it is not chosen; empty where it keeps the speed."""

    @property
    def name(self) -> str:
        """The backbone's, as of a classifier's option."""
        return self.backbone

    @property
    def images_per_s(self) -> float:
        """Measured or predicted."""
        return 0.0 if self.speed is None else self.speed.whole.images_per_s

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "backbone": self.backbone,
            "top1": self.top1,
            "images_per_s": self.images_per_s,
            "reason": self.reason,
            "parts_s": {} if self.speed is None else dict(self.speed.parts_s),
        }


@dataclass(frozen=True, kw_only=True)
class DetectorChoice:
    """What was chosen, and from what."""

    best: DetectorOption
    """The one with the best published features that keeps the speed."""
    options: tuple[DetectorOption, ...]
    """All that were tried, the best features first."""
    head: str
    """Of each detector."""
    num_classes: int
    """Of each detector."""
    conditions: Conditions
    """What their speeds hold under; the image size is the detectors'."""

    @property
    def rejected(self) -> tuple[DetectorOption, ...]:
        """Those that can not be chosen, each with its reason."""
        return tuple(each for each in self.options if each.reason)

    @property
    def predicted(self) -> bool:
        """Whether speeds are predicted, without non-maximum suppression; else they are measured as shipped."""
        return isinstance(self.best.speed, DetectorPrediction)

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "best": self.best.to_dict(),
            "options": [each.to_dict() for each in self.options],
            "head": self.head,
            "num_classes": self.num_classes,
            "conditions": self.conditions.to_dict(),
        }


def basis_as_shipped(asked: Asked, calibration: str | os.PathLike[str] | None = None) -> Basis:
    """On what basis detectors are compared: as classifiers, but here in ONNX Runtime and float where nothing is asked
    for.

    Raises:
        UserError: as for ``basis_of``.
    """
    if at_hand(asked.device) and calibration is None:
        asked = replace(asked, precision=asked.precision or "fp32", runtime=asked.runtime or "onnxruntime")
    return basis_of(asked, calibration)


def backbones_of(candidates: Sequence[Network] | Network | None) -> list[str | NetSpec] | None:
    """The backbones named; None: nobody named any.

    Raises:
        UserError: a pattern, or what is neither a name nor a spec.
    """
    if candidates is None:
        return None
    given = candidates if isinstance(candidates, Sequence) and not isinstance(candidates, str) else [candidates]
    named: list[str | NetSpec] = []
    for each in given:
        if not isinstance(each, str | NetSpec):
            raise UserError(f"candidates hold a {type(each).__name__}; of detectors they must be names or specs")
        if isinstance(each, str) and any(sign in each for sign in "*?["):
            raise UserError(
                f"{each!r} is a pattern; task detection takes names and specs (`convscale list {each!r}` gives the "
                "names)"
            )
        named.append(each)
    return named


def one_size(image_sizes: Sequence[int] | None) -> int | None:
    """The side asked for; None: none is.

    Raises:
        UserError: several.
    """
    sizes = [] if image_sizes is None else list(image_sizes)
    if len(sizes) > 1:
        raise UserError(f"image_sizes are {sizes}; task detection chooses at one size")
    return sizes[0] if sizes else None


def choose_backbone(
    min_throughput: float | None,
    cond: Conditions,
    *,
    predicted: bool,
    backbones: Sequence[str | NetSpec] | None = None,
    head: str = "fcos",
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
    num_classes: int = 20,
    seconds: float = 0.5,
    compiled: bool = False,
    calibration: Calibration | None = None,
    confidence: float = 0.8,
    say: Callable[[str], object] = lambda text: None,
) -> DetectorChoice:
    """The backbone with the best published ImageNet accuracy whose detector keeps ``min_throughput``.

    ImageNet accuracy says how good features are; the mAP that a detector reaches on other data is not known before it
    is trained, and none is claimed.

    Args:
        min_throughput: images/s: measured as shipped, or predicted without non-maximum suppression.
        cond: device, batch size, runtime.
        predicted: whether the device is a named one that is not here.
        backbones: names or specs; None: a dozen usual ones.
        head, options, num_classes: of the detector.
        image_size: its side in pixels; None: what ``create_detector`` takes (512, for SSDLite 320).
        seconds: timed seconds of each part.
        compiled, calibration: of predictions.
        confidence: probability with which a predicted speed must keep ``min_throughput``, 0.5 to 0.99.
        say: told about each.

    Raises:
        UserError: another mode than ``infer``, no detector could be built or timed (the first's reason is told), or
            none keeps the speed: the fastest is named.
    """
    if cond.mode != "infer":
        raise UserError(f"a detector's backbone is chosen in mode infer, got {cond.mode}")
    if min_throughput is None:
        raise UserError("min_throughput is missing; a detector's backbone is chosen by the images/s that it must keep")
    if clash := sorted({"head", "backbone"} & set(options or {})):
        raise UserError(f"detector holds {clash[0]!r}, which is an argument of its own; leave it out there")
    check_text("head", head, HEADS)  # else each backbone would be refused for it
    floor = Constraint(min_throughput=min_throughput, confidence=confidence)
    tried = list[DetectorOption]()
    wanted: dict[str, Any] = {"num_classes": num_classes, "image_size": image_size, **(options or {})}
    for backbone in backbones or USUAL:
        name = backbone if isinstance(backbone, str) else backbone.name
        top1 = published_top1(name) if isinstance(backbone, str) or is_spec_of(name, backbone) else None
        try:
            detector = create_detector(backbone, head, **wanted).eval()
            speed: DetectorSpeed | DetectorPrediction
            if predicted:
                speed = predict_detector(detector, cond, compiled=compiled, calibration=calibration)
            else:
                speed = measure_detector(detector, cond, min_seconds=seconds, max_seconds=10 * seconds)
        except UserError as error:
            tried.append(DetectorOption(backbone=name, top1=top1, speed=None, reason=str(error)))
            continue
        say(f"{name}: {speed.whole.images_per_s:,.1f} images/s")
        tried.append(DetectorOption(backbone=name, top1=top1, speed=speed, reason=_too_slow(speed, floor)))
    if all(each.speed is None for each in tried):
        raise UserError(f"no detector could be timed; the first, {tried[0].backbone}: {tried[0].reason}")
    tried.sort(key=lambda each: (-(each.top1 or 0.0), -each.images_per_s))
    best = next((each for each in tried if not each.reason), None)
    fastest = max(tried, key=lambda each: each.images_per_s)
    assert fastest.speed is not None, "one was timed"
    held = fastest.speed.whole.conditions
    if best is None:
        raise UserError(
            f"no backbone keeps {min_throughput:g} images/s with head {head} at {held.image_size} px; the fastest, "
            f"{fastest.backbone}, reaches {fastest.reason}; a smaller image size or another head may"
        )
    classes = int(wanted["num_classes"])
    return DetectorChoice(best=best, options=tuple(tried), head=head, num_classes=classes, conditions=held)


def _too_slow(speed: DetectorSpeed | DetectorPrediction, floor: Constraint) -> str:
    """Why a detector does not keep the speed: a measured one by its median, a predicted one by how likely it does, as a
    classifier; empty where it does.
    """
    whole, wanted = speed.whole, floor.min_throughput or 0.0
    if isinstance(whole, Prediction):
        chance = chance_above(wanted, whole.images_per_s, whole.low, whole.high)
        if chance >= floor.confidence:
            return ""
        likely = f" with {odds(floor.confidence)} (it is {odds(chance)} likely)"
    elif whole.images_per_s >= wanted:
        return ""
    else:
        likely = ""
    return f"{whole.images_per_s:,.1f} images/s, {wanted:g} are wanted{likely}"


def published_top1(name: str) -> float | None:
    """The best published figure of a network's weights that saw ImageNet-1k alone, in percent."""
    arch = name.removeprefix("timm/").partition(".")[0]
    offered = [each for each in weights_in("all", f"{arch}.*") if not each.extra_data]
    return max((result.top1 for each in offered for result in each.results), default=None)
