"""Which parts of a backbone do not learn where its first stages are frozen."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from convscale.errors import UserError


def first_parts(body: nn.Module, stages: int) -> list[nn.Module]:
    """The stem and the first ``stages - 1`` stages; of a network of others, all up to the ``stages``-th of the maps
    that it tells of, the stem's among them.

    Raises:
        UserError: it has not so many, or does not tell where they end.
    """
    own = getattr(body, "stages", None)
    if isinstance(own, nn.Sequential | nn.ModuleList) and isinstance(getattr(body, "stem", None), nn.Module):
        parts = [cast(nn.Module, body.stem), *own]
        if stages >= len(parts):
            raise UserError(f"frozen_stages is {stages}; the backbone has {len(parts)} parts, and the last must learn")
        return parts[:stages]
    maps = _map_names(body)
    if stages >= len(maps):
        raise UserError(f"frozen_stages is {stages}; the backbone has {len(maps)} maps, and the last must learn")
    wanted = maps[stages - 1].replace(".", "_")  # timm writes both: layers.0 in one module is layers_0 in another
    found = next((name for name, _ in body.named_modules() if _flat(name) == wanted), None)
    if found is None:
        raise UserError(
            f"frozen_stages is {stages}; the backbone's map {stages} is of {maps[stages - 1]}, which is no module of it"
        )
    parts, at = list[nn.Module](), body
    for step in found.split("."):
        for name, child in at.named_children():
            if name == step:
                at = child
                break
            parts.append(child)
    return [*parts, at]


def _flat(name: str) -> str:
    return name.removeprefix("model.").replace(".", "_")


def _map_names(body: nn.Module) -> list[str]:
    """Of which module each map is, also of those that no head stands on where that is told (timm)."""
    info = cast(Any, body.feature_info)
    if isinstance(every := getattr(info, "info", None), list):
        return [each["module"] for each in every]
    if not callable(getattr(info, "module_name", None)):
        raise UserError(
            "frozen_stages needs to know where the backbone's stages end: feature_info.module_name() that gives the "
            "module of each map would be right"
        )
    return list(info.module_name())
