"""How pictures become a network's input, its crop mode too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convscale.arch.spec import NetSpec
from convscale.arch.tags import find_tag
from convscale.conditions import Size
from convscale.images.preprocess import Preprocessing
from convscale.networks.inputs import input_facts

if TYPE_CHECKING:
    from torch import nn

_TAUGHT = "convscale_taught"
"""Attribute of a module that was trained or read from a checkpoint: its ``Taught``."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a module was trained with, which no architecture knows: small images have statistics of their own."""

    preprocessing: Preprocessing
    """How images became inputs."""
    classes: tuple[str, ...]
    """Class names in the order of its outputs."""
    splits: Mapping[str, object] | None = None
    """What its data are known by (``DataSplits.digests``); None: not known."""
    category_ids: tuple[int, ...] = ()
    """Of a detector: the annotations' own numbers of the classes; empty: they had none."""
    data_digest: str | None = None
    """What those of training and validation are known by together; None: not known."""


def keep_taught(net: nn.Module, taught: Taught) -> None:
    """Let a module know what it was trained with."""
    setattr(net, _TAUGHT, taught)


def taught_of(net: nn.Module) -> Taught | None:
    """What a module was trained with; None: that was not here."""
    return getattr(net, _TAUGHT, None)


def preprocessing_of(net: nn.Module, image_size: Size | None = None) -> Preprocessing:
    """The preprocessing that a module was trained with or names, at another size where one is given.

    Raises:
        UserError: it names no mean and std, or of another number of channels than it takes, or an unknown crop mode.
    """
    if (taught := taught_of(net)) is not None:
        own = taught.preprocessing
        return own if image_size is None else dataclasses.replace(own, image_size=image_size)
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
