"""A network given as a module, a spec or a name: resolved once, for every command.

Names are looked up here alone: own names first, then timm's, and ``package.module:function`` for a user's own.
Importing this loads no torch, and neither does resolving a spec or an own name.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, cast

from convscale.arch.spec import NetSpec
from convscale.arch.tags import find_tag
from convscale.arch.zoo import ARCHITECTURES, get_spec, list_models
from convscale.errors import UserError, check_text, nearest
from convscale.networks.foreign import Foreign, build_foreign, timm_has, timm_is_installed, timm_name
from convscale.networks.released import architectures, released

if TYPE_CHECKING:
    from torch import nn

Network: TypeAlias = "nn.Module | NetSpec | Foreign | str"
"""What a command takes where a network goes: a module (timm's too), a ``NetSpec``, a ``Foreign``, or a name."""
Named: TypeAlias = NetSpec | Foreign
"""What a name stands for."""


def is_module(value: object) -> TypeGuard[nn.Module]:
    """Whether ``value`` is a ``torch.nn.Module``; where torch is not loaded nothing is, and it stays so."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def find(name: str) -> Named:
    """What a name stands for: an own architecture or its weights, one of timm's, or ``package.module:function``.

    Own names win; ``timm/NAME`` is always timm's. Nothing is built, and timm is imported only for names of its that the
    table of released networks does not know.

    Raises:
        UserError: an unknown name; the nearest are named.
    """
    check_text("model name", name, what="tresnet_m")
    forced = timm_name(name)
    if forced is None and ":" in name:
        return Foreign(name, "factory")
    arch = (forced or name).partition(".")[0]
    if forced is None and (name in ARCHITECTURES or find_tag(name) or arch in ARCHITECTURES):
        return get_spec(name)
    wanted = forced or name
    if wanted in released() or wanted in architectures() or timm_has(wanted):
        return Foreign(wanted, "timm")
    known = [*architectures(), *released()]
    if forced is None:
        known += [*ARCHITECTURES, *list_models(pretrained=True)]
    known = list(dict.fromkeys(known))  # an architecture that both have is named once
    without = "" if timm_is_installed() else "; timm, which has more, is not installed: pip install 'convscale[timm]'"
    raise UserError(f"unknown model {name!r}{nearest(wanted, known)}{without}")


def resolve(net: Network) -> tuple[nn.Module | None, NetSpec | None]:
    """Tell a module from a spec or a name: (module, None) or (None, spec); timm's and a factory's are built, timm's on
    the meta device.

    Raises:
        UserError: it is none of these, the name is unknown, or its network can not be built.
    """
    if isinstance(net, str):
        net = find(net)
    if isinstance(net, NetSpec):
        return None, net
    if isinstance(net, Foreign):
        return build_foreign(net, meta=True), None
    if is_module(net):
        return net, None
    if dataclasses.is_dataclass(net) and not isinstance(net, type):
        return None, cast(NetSpec, net)  # a stand-in for a spec, as tests use
    raise UserError(f"expected a network, a NetSpec or a model's name, got {type(net).__name__}")


def as_module(net: Network, *, fused: bool = False) -> tuple[nn.Module, str]:
    """A module with values and its name, from anything that is a network (untrained unless a name with a tag asks for
    weights).

    Args:
        net: a module, a spec, a ``Foreign`` or a name.
        fused: timm's network by its name: in the re-parameterised form for inference.

    Raises:
        UserError: it is none of these, the name is unknown, or its network or weights can not be had.
    """
    from convscale.nn.net import create_model

    if isinstance(net, str):
        found = find(net)
        if isinstance(found, Foreign):
            tagged = found.origin == "timm" and "." in found.name
            return build_foreign(found, pretrained=tagged, fused=fused), found.name
        return create_model(net, pretrained="." in net), net
    if isinstance(net, Foreign):
        return build_foreign(net, fused=fused), net.name
    module, spec = resolve(net)
    if module is None:
        assert spec is not None
        return create_model(spec), spec.name
    return module, name_of(module)


def shapes_of(net: Network, *, fused: bool = False) -> nn.Module:
    """A module whose shapes are right, its values not: what counting and tracing need.

    Args:
        net: anything that is a network.
        fused: timm's network by its name: in the re-parameterised form for inference.
    """
    if isinstance(net, str):
        net = find(net)
    if isinstance(net, Foreign):
        return build_foreign(net, meta=True, fused=fused)
    module, spec = resolve(net)
    if module is not None:
        return module
    assert spec is not None
    return build_meta(spec)


def name_of(net: nn.Module) -> str:
    """A module's name: its spec's, without a tag; its ``pretrained_cfg``'s architecture; else its class's."""
    spec = getattr(net, "spec", None)
    if isinstance(spec, NetSpec):  # a scaled one's multipliers have points, which are no tag's
        return spec.name if find_tag(spec.name) is None else spec.name.partition(".")[0]
    config = getattr(net, "pretrained_cfg", None) or {}
    architecture = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return str(architecture or getattr(spec, "name", None) or type(net).__name__)


def build_meta(spec: NetSpec | str) -> nn.Module:
    """The spec's network on the meta device: shapes, no values."""
    import torch

    from convscale.nn.net import create_model

    with torch.device("meta"):
        return create_model(spec)
