"""How pictures become a network's input, its crop mode too."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from convscale.arch.spec import NetSpec
from convscale.arch.tags import find_tag
from convscale.conditions import Size
from convscale.images.preprocess import Preprocessing
from convscale.networks.inputs import input_facts

if TYPE_CHECKING:
    from torch import nn


def preprocessing_of(net: nn.Module, image_size: Size | None = None) -> Preprocessing:
    """The preprocessing that a module names, at another size where one is given.

    Raises:
        UserError: it names no mean and std, or of another number of channels than it takes, or an unknown crop mode.
    """
    return dataclasses.replace(input_facts(net).preprocessing(image_size), crop_mode=crop_mode_of(net))


def crop_mode_of(net: nn.Module) -> str:
    """How pictures of another shape are made to fit, as the module's ``pretrained_cfg`` says it (timm's form), else as
    the released weights that its spec is named after were evaluated; ``center`` where nothing is said.
    """
    config = getattr(net, "pretrained_cfg", None)
    values = vars(config) if dataclasses.is_dataclass(config) else config if isinstance(config, dict) else {}
    if mode := values.get("crop_mode"):
        return str(mode)
    spec = getattr(net, "spec", None)
    tag = find_tag(spec.name) if isinstance(spec, NetSpec) else None
    return "center" if tag is None else tag.crop_mode
