"""A network given as a module, a spec or a name: resolved once, for every command."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.errors import UserError


def as_module(net: Any) -> tuple[nn.Module, str]:
    """A module and its name, from a module, a ``NetSpec`` or a model's name (untrained unless the name has a tag)."""
    if isinstance(net, nn.Module):
        cfg = getattr(net, "pretrained_cfg", None) or {}
        return net, str(
            cfg.get("architecture") or getattr(getattr(net, "spec", None), "name", None) or type(net).__name__
        )
    from convscale.nn.net import create_model

    if isinstance(net, str):
        return create_model(net, pretrained="." in net), net
    return create_model(net), str(getattr(net, "name", "network"))


def resolve(net_or_spec: nn.Module | NetSpec | str) -> tuple[nn.Module | None, Any]:
    """Tell a module from a spec or a model's name: (module, None) or (None, spec).

    Raises:
        UserError: it is none of these, or the name is unknown.
    """
    if isinstance(net_or_spec, nn.Module):
        return net_or_spec, None
    if isinstance(net_or_spec, str):
        from convscale.arch.zoo import get_spec

        return None, get_spec(net_or_spec)
    if dataclasses.is_dataclass(net_or_spec) and not isinstance(net_or_spec, type):
        return None, net_or_spec
    raise UserError(f"expected a network, a NetSpec or a model's name, got {type(net_or_spec).__name__}")


def build_meta(spec: Any) -> nn.Module:
    """The spec's network on the meta device: shapes, no values."""
    from convscale.nn.net import create_model

    with torch.device("meta"):
        return create_model(spec)
