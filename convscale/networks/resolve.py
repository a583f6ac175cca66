"""A network given as a module, a spec or a name: resolved once, for every command.

Importing this loads no torch, and neither does resolving a spec or a name.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, cast

from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_spec
from convscale.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Network: TypeAlias = "nn.Module | NetSpec | str"
"""What a command takes where a network goes: a module (timm's too), a ``NetSpec`` or a model's name."""


def is_module(value: object) -> TypeGuard[nn.Module]:
    """Whether ``value`` is a ``torch.nn.Module``; where torch is not loaded nothing is, and it stays so."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def resolve(net: Network) -> tuple[nn.Module | None, NetSpec | None]:
    """Tell a module from a spec or a model's name: (module, None) or (None, spec).

    Raises:
        UserError: it is none of these, or the name is unknown.
    """
    if isinstance(net, NetSpec):
        return None, net
    if isinstance(net, str):
        return None, get_spec(net)
    if is_module(net):
        return net, None
    if dataclasses.is_dataclass(net) and not isinstance(net, type):
        return None, cast(NetSpec, net)  # a stand-in for a spec, as tests use
    raise UserError(f"expected a network, a NetSpec or a model's name, got {type(net).__name__}")


def as_module(net: Network) -> tuple[nn.Module, str]:
    """A module and its name, from a module, a ``NetSpec`` or a model's name (untrained unless the name has a tag).

    Raises:
        UserError: it is none of these, or the name is unknown.
    """
    from convscale.nn.net import create_model

    if isinstance(net, str):
        return create_model(net, pretrained="." in net), net
    module, spec = resolve(net)
    if module is None:
        assert spec is not None
        return create_model(spec), spec.name
    return module, name_of(module)


def name_of(net: nn.Module) -> str:
    """A module's name: its ``pretrained_cfg``'s architecture, its spec's name, else its class's."""
    config = getattr(net, "pretrained_cfg", None) or {}
    architecture = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return str(architecture or getattr(getattr(net, "spec", None), "name", None) or type(net).__name__)


def build_meta(spec: NetSpec | str) -> nn.Module:
    """The spec's network on the meta device: shapes, no values."""
    import torch

    from convscale.nn.net import create_model

    with torch.device("meta"):
        return create_model(spec)
