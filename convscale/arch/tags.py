"""Released weights (tags) with their preprocessing and published figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, kw_only=True)
class PublishedAccuracy:
    """An ImageNet-1k validation result that somebody published, in percent."""

    image_size: int
    """Side of the images, pixels."""
    crop_pct: float
    """Share of the resized shorter side that the centre crop kept."""
    interpolation: str
    """``bilinear`` or ``bicubic``."""
    top1: float
    """Images whose most probable class is right, %."""
    top5: float
    """Images whose class is among the five most probable, %."""
    source: str
    """Where it was published."""


@dataclass(frozen=True, kw_only=True)
class WeightsTag:
    """Released weights of an architecture."""

    name: str
    """``arch.tag``; the tag names the training recipe."""
    arch: str
    """The architecture's name."""
    is_default: bool
    """Whether ``pretrained=True`` without a tag means this one."""
    hf_hub_id: str
    """Repository on the Hugging Face hub."""
    image_size: int
    """Side of the images that they were last trained at or are meant for, pixels."""
    mean: tuple[float, ...]
    """Per channel, subtracted from pixels in [0, 1]."""
    std: tuple[float, ...]
    """Per channel, divided by after the mean."""
    interpolation: str
    """``bilinear`` or ``bicubic``."""
    crop_pct: float
    """Share of the resized shorter side that the centre crop keeps."""
    crop_mode: str
    """``center``, or ``squash``: resized to a square whatever their shape."""
    num_classes: int
    """Outputs of the classifier; 0: none."""
    license: str
    """As the repository states it; ``unknown`` where it does not."""
    results: tuple[PublishedAccuracy, ...]
    """Published results. Empty: nobody's figure is known to us, so none is claimed."""

    @property
    def recipe(self) -> str:
        """The part of the name after the dot."""
        return self.name.partition(".")[2]


@cache
def all_tags() -> dict[str, WeightsTag]:
    """Every released weights by its name."""
    table = json.loads(files("convscale.arch").joinpath("tags.json").read_text(encoding="utf-8"))
    out = {}
    for name, row in table["tags"].items():
        results = tuple(PublishedAccuracy(source=table["source"], **result) for result in row["results"])
        out[name] = WeightsTag(
            name=name,
            arch=name.partition(".")[0],
            is_default=row["default"],
            hf_hub_id=row["hf_hub_id"],
            image_size=row["image_size"],
            mean=tuple(row["mean"]),
            std=tuple(row["std"]),
            interpolation=row["interpolation"],
            crop_pct=row["crop_pct"],
            crop_mode=row.get("crop_mode", "center"),
            num_classes=row["num_classes"],
            license=row["license"] or "unknown",
            results=results,
        )
    return out


def find_tag(name: str) -> WeightsTag | None:
    """The released weights called ``arch.tag``, or None."""
    return all_tags().get(name)
