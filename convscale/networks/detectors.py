"""A detector from a backbone's name: ours, timm's, a spec, or a module."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, cast

from convscale.arch.spec import NetSpec
from convscale.errors import UserError, check_flag
from convscale.networks.foreign import Foreign, build_foreign
from convscale.networks.inputs import input_facts
from convscale.networks.resolve import find, is_module

if TYPE_CHECKING:
    from torch import nn

    from convscale.nn.detectors import Detector, DetectorSpec
    from convscale.nn.net import NormKind

_OWN_SIZE = {"ssdlite": 320}
"""Side of the input where none is given; 512 for all other heads."""


def create_detector(
    backbone: str | NetSpec | nn.Module | DetectorSpec,
    head: str = "fcos",
    *,
    num_classes: int | None = None,
    pretrained_backbone: bool | str | os.PathLike[str] = False,
    image_size: int | None = None,
    norm: str | None = None,
    **options: object,
) -> Detector:
    """Build a detector over any backbone.

    It is called as torchvision's detectors are: ``detector(images, targets)`` gives the losses in training mode, and
    ``detector(images)`` in evaluation mode boxes, labels and scores of each image.

    Args:
        backbone: a name of ours or timm's, a ``NetSpec``, a module with ``feature_info`` that gives a list of maps, or
            a ``DetectorSpec``, which says everything else too.
        head: ``fcos``, ``retinanet``, ``faster_rcnn`` or ``ssdlite``.
        num_classes: without background; labels are 1 to ``num_classes``.
        pretrained_backbone: load the backbone's released weights: those of its tag, or its usual ones; or a file of
            weights, in any known layout of keys.
        image_size: side in pixels of the square that pictures are fitted into, a multiple of 32; None: 512, for SSDLite
            320.
        norm: of the backbone: None (its own), ``inplace``, ``batchnorm``, or ``frozen`` (norms do not learn, for small
            batches).
        options: more of :class:`DetectorSpec`'s fields: ``neck_width``, ``head_depth``, ``anchor_scale``,
            ``frozen_stages``, ``score_threshold``, ``nms_threshold``, ``max_detections``.

    Returns:
        A module in training mode, with ``detector_spec``; same torch seed, same weights.

    Raises:
        UserError: an unknown name, head or option, no ``num_classes``, a size that does not go, or a backbone without
            the maps that the head stands on.
    """
    from convscale.nn.detectors import DetectorSpec, build_detector

    if not isinstance(pretrained_backbone, str | os.PathLike):
        check_flag("pretrained_backbone", pretrained_backbone)
    if isinstance(backbone, DetectorSpec):
        return _from_spec(backbone, None, pretrained_backbone)
    if num_classes is None:
        raise UserError("num_classes is missing; give the number of classes without background, such as num_classes=5")
    known = {field.name for field in dataclasses.fields(DetectorSpec)}
    if unknown := sorted(set(options) - known):
        raise UserError(f"create_detector has no option {unknown[0]!r} (known: {', '.join(sorted(known))})")
    size = _OWN_SIZE.get(head, 512) if image_size is None else image_size
    given: dict[str, object] = {"head": head, "num_classes": num_classes, "image_size": size, "norm": norm, **options}
    if is_module(backbone):
        if pretrained_backbone:
            raise UserError("pretrained_backbone needs a name; a module that is given brings its own weights")
        if norm in ("inplace", "batchnorm"):
            raise UserError(f"norm is {norm!r}; a module that is given keeps its own, or norm='frozen'")
        spec = DetectorSpec(backbone=None, **given)  # pyright: ignore[reportArgumentType]
        return build_detector(backbone, spec)
    if not isinstance(backbone, str | NetSpec):
        raise UserError(f"backbone is a {type(backbone).__name__}; it must be a name, a NetSpec or a module")
    named = find(backbone) if isinstance(backbone, str) else backbone
    facts = input_facts(named)
    if facts.mean is not None and facts.std is not None and len(facts.mean) == 3:
        given = {"mean": facts.mean, "std": facts.std, **given}
    spec = DetectorSpec(backbone=backbone, **given)  # pyright: ignore[reportArgumentType]
    return _from_spec(spec, named, pretrained_backbone)


def _from_spec(
    spec: DetectorSpec, named: NetSpec | Foreign | None, pretrained: bool | str | os.PathLike[str]
) -> Detector:
    """The spec's detector over the backbone that it names."""
    from convscale.nn.detectors import build_detector, choose_taps
    from convscale.nn.features import FeatureInfo
    from convscale.nn.net import create_model

    if spec.backbone is None:
        raise UserError("this detector's spec names no backbone; give create_detector the module instead")
    named = named or (find(spec.backbone) if isinstance(spec.backbone, str) else spec.backbone)
    norm = None if spec.norm == "frozen" else spec.norm
    if isinstance(named, NetSpec):
        places = choose_taps(spec.head, FeatureInfo.of(named).reduction(), named.name)
        source = spec.backbone if isinstance(spec.backbone, str) and "." in spec.backbone else named
        kind = cast("NormKind | None", norm)
        file = None if isinstance(pretrained, bool) else pretrained
        body = create_model(
            source,
            pretrained=pretrained is True,
            checkpoint_path=file,
            features_only=True,
            out_indices=places,
            norm=kind,
        )
        return build_detector(body, spec)
    if not isinstance(pretrained, bool):
        raise UserError(f"{named.name} is not ours; its own loader takes its weights: pretrained_backbone=True")
    if norm is not None:
        raise UserError(f"norm is {norm!r}; {named.name} is not ours and keeps its own, or norm='frozen'")
    if named.origin == "factory":
        if pretrained:
            raise UserError(
                f"pretrained_backbone is True; {named.name} is a function of your own: let it load its weights itself"
            )
        body = build_foreign(named, features_only=True)
        return build_detector(body, spec)
    there = build_foreign(named, meta=True, features_only=True)
    places = choose_taps(spec.head, list(there.feature_info.reduction()), named.name)  # pyright: ignore
    body = build_foreign(named, pretrained=pretrained, features_only=True, out_indices=places)
    return build_detector(body, spec)
