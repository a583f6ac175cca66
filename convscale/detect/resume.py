"""A detector whose training goes on: built as it was, and refused where something else is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.nn.detectors import DetectorSpec

_ASKED_ALWAYS = ("backbone", "head", "num_classes", "image_size")
"""What a detector is built from whether it is new or not; the size is looked at with the pictures'."""


def written_side(about: Mapping[str, Any]) -> int:
    """Side of the squares that a checkpoint was trained on."""
    return Preprocessing.from_dict(about["preprocessing"]).width


def written_options(about: Mapping[str, Any]) -> dict[str, object]:
    """What a checkpoint's detector was built with, as options of ``create_detector``; nothing for one of others."""
    if "detector" not in about:
        return {}
    spec = DetectorSpec.from_dict(about["detector"])
    return {
        field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.name not in _ASKED_ALWAYS
    }


def check_as_written(about: Mapping[str, Any], output: Path | None, net: nn.Module, side: int) -> None:
    """
    Raises:
        UserError: the detector, or the size of its pictures, is another than the checkpoint's.
    """
    spec = getattr(net, "detector_spec", None)
    written = {"image_size": written_side(about)}
    now: dict[str, object] = {"image_size": side}
    if spec is not None and "detector" in about:  # another backbone or number of classes is found by the weights
        names = ("head", *written_options(about))
        written |= {name: getattr(DetectorSpec.from_dict(about["detector"]), name) for name in names}
        now |= {name: getattr(spec, name) for name in names}
    for name, value in written.items():
        if value != now[name]:
            raise UserError(f"{output} was trained with {name} {value}, not {now[name]}; a resumed run keeps it")
