"""Names: architectures, released weights (tags) with their preprocessing and published figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files

from convscale.arch import mobile, resnet, tresnet
from convscale.arch.spec import NetSpec
from convscale.errors import UserError, nearest

ARCHITECTURES: dict[str, NetSpec] = {**tresnet.SPECS, **mobile.SPECS, **resnet.SPECS}


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
    num_classes: int
    """Outputs of the classifier; 0: none."""
    license: str
    """As the repository states it; empty where it does not."""
    results: tuple[PublishedAccuracy, ...]
    """Published results. Empty: nobody's figure is known to us, so none is claimed."""

    @property
    def recipe(self) -> str:
        """The part of the name after the dot."""
        return self.name.partition(".")[2]


@cache
def _tags() -> dict[str, WeightsTag]:
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
            num_classes=row["num_classes"],
            license=row["license"] or "unknown",
            results=results,
        )
    return out


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Names that match a shell pattern, sorted: architectures, or with ``pretrained`` their weights as ``arch.tag``."""
    if not pretrained:
        return sorted(name for name in ARCHITECTURES if fnmatchcase(name, pattern))
    return sorted(name for name, tag in _tags().items() if fnmatchcase(name, pattern) or fnmatchcase(tag.arch, pattern))


def find_tag(name: str) -> WeightsTag | None:
    """The released weights called ``arch.tag``, or None."""
    return _tags().get(name)


def get_tag(name: str) -> WeightsTag:
    """The released weights called ``arch.tag``, or an architecture's default ones.

    Raises:
        UserError: an unknown name (the nearest are named), or an architecture without released weights.
    """
    tags = _tags()
    if name in tags:
        return tags[name]
    if name in ARCHITECTURES:
        known = [tag for tag in tags.values() if tag.arch == name]
        if not known:
            raise UserError(f"no released weights are known for {name}; list_models(pretrained=True) names those that have some")
        return next((tag for tag in known if tag.is_default), known[0])
    arch = name.partition(".")[0]
    if arch in ARCHITECTURES:
        own = [n for n in tags if n.startswith(f"{arch}.")]
        raise UserError(f"unknown weights {name!r} (known for {arch}: {', '.join(own) or 'none'})")
    raise UserError(f"unknown model {name!r}{nearest(name, [*ARCHITECTURES, *tags])}")


def get_spec(name: str) -> NetSpec:
    """The spec of a named architecture; with a tag (``arch.tag``), its input is what those weights were trained on.

    Raises:
        UserError: an unknown name; the nearest are named.
    """
    if not isinstance(name, str):
        raise UserError(f"model name is {name!r}; it must be text such as 'tresnet_m'")
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    tag = get_tag(name)
    spec = ARCHITECTURES[tag.arch]
    pixels = replace(
        spec.input,
        size=tag.image_size,
        mean=tag.mean,
        std=tag.std,
        crop_pct=tag.crop_pct,
        interpolation=tag.interpolation,  # pyright: ignore[reportArgumentType]
    )
    return replace(spec, name=name, input=pixels)


def as_spec(spec: NetSpec | str) -> NetSpec:
    """A spec from itself or from a name."""
    if isinstance(spec, NetSpec):
        return spec
    return get_spec(spec)
