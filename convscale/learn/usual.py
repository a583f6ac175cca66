"""Which recipe a network is trained by where none is named: by what it starts from, and by the images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from convscale.arch.spec import NetSpec
from convscale.choice.candidates import SMALL_IMAGE
from convscale.conditions import Size, sides
from convscale.errors import UserError
from convscale.images.extent import small_side
from convscale.images.splits import DataSplits
from convscale.learn.probe import headed_parts
from convscale.learn.recipe import Recipe
from convscale.networks.foreign import Foreign, build_foreign
from convscale.networks.resolve import find

WHY = {"finetune": "for a start from weights", "small": "for small images", "pictures": "for pictures"}
"""What each usual recipe is for."""


def is_small(splits: DataSplits, image_size: Size | None) -> bool:
    """Whether images are small, and trained at a size (None: their own) that is: enlarged, they are as others."""
    asked = 0 if image_size is None else max(sides(image_size))
    return small_side(splits.train, SMALL_IMAGE) is not None and asked <= SMALL_IMAGE


def usual_recipe(splits: DataSplits, image_size: Size | None = None, *, weights: bool) -> str:
    """The name of the recipe for a network that starts from weights, or from scratch at a size (None: the images'
    own).
    """
    if weights:
        return "finetune"
    return "small" if is_small(splits, image_size) else "pictures"


def can_finetune(
    net: nn.Module | NetSpec | Foreign | str, splits: DataSplits, keys: Mapping[str, object] | None = None
) -> bool:
    """Whether ``finetune`` suits a network: a head can be solved, or the recipe's ``keys`` ask for none to be.

    It is built for the data's classes, without values where it is no code of the user's; what can not be built is told
    by the training.
    """
    asked = Recipe(name="given").override(dict(keys or {}))
    if keys and "solve_head" in keys and not asked.solve_head:
        return True
    try:
        with torch.random.fork_rng(devices=[]):  # a user's function may draw
            headed_parts(_shapes(net, splits, asked.head))
    except UserError:
        return False
    return True


def _shapes(net: nn.Module | NetSpec | Foreign | str, splits: DataSplits, head: str) -> nn.Module:
    """The network with the parts that training gives it: of timm's some classify by a convolution."""
    if isinstance(net, nn.Module):
        return net
    named = find(net) if isinstance(net, str) else net
    classes, channels = len(splits.classes), splits.channels
    if isinstance(named, Foreign):
        return build_foreign(named, meta=True, num_classes=classes, in_chans=channels)
    from convscale.nn.net import create_model

    own = None if head == "own" else head
    with torch.device("meta"):
        return create_model(named, num_classes=classes, in_chans=channels, head=own)  # pyright: ignore[reportArgumentType]


def why(name: str, net: object, *, init: bool) -> str:
    """What a usual recipe is taken for, for people; ``init``: first weights are asked for."""
    if name == "finetune":
        return WHY[name]
    if init:
        return f"{WHY[name]}: no head to solve is known of this network, as finetune needs one"
    if isinstance(net, nn.Module):
        return f"{WHY[name]} from scratch; finetune is for a network that brings weights"
    return f"{WHY[name]} from scratch"
