"""Names: architectures, released weights (tags) with their preprocessing and published figures."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from convscale.arch import families
from convscale.arch.spec import NetSpec
from convscale.arch.tags import WeightsTag, all_tags
from convscale.errors import UserError, check_flag, check_text, nearest

ARCHITECTURES: dict[str, NetSpec] = families.load()
"""Every named architecture, family by family."""


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Names that match a shell pattern, sorted: architectures, or with ``pretrained`` their weights as ``arch.tag``.

    Raises:
        UserError: the pattern is no text.
    """
    check_text("pattern", pattern, what="tresnet*")
    if not check_flag("pretrained", pretrained):
        return sorted(name for name in ARCHITECTURES if fnmatchcase(name, pattern))
    tags = all_tags()
    return sorted(name for name in tags if fnmatchcase(name, pattern) or fnmatchcase(tags[name].arch, pattern))


def get_tag(name: str) -> WeightsTag:
    """The released weights called ``arch.tag``, or an architecture's default ones.

    Raises:
        UserError: an unknown name (the nearest are named), or an architecture without released weights.
    """
    tags = all_tags()
    if name in tags:
        return tags[name]
    if name in ARCHITECTURES:
        known = [tag for tag in tags.values() if tag.arch == name]
        if not known:
            raise UserError(
                f"no released weights are known for {name}; list_models(pretrained=True) names those that have some"
            )
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
    check_text("model name", name, what="tresnet_m")
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
