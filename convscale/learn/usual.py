"""Which recipe a network is trained by where none is named: by what it starts from, and by the images."""

from __future__ import annotations

from torch import nn

from convscale.arch.spec import NetSpec
from convscale.choice.candidates import SMALL_IMAGE
from convscale.conditions import Size, sides
from convscale.errors import UserError
from convscale.images.extent import small_side
from convscale.images.splits import DataSplits
from convscale.learn.probe import headed_parts
from convscale.networks.foreign import Foreign

WHY = {
    "finetune": "for a start from weights",
    "small": "for small images from scratch",
    "pictures": "for pictures from scratch",
}
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


def can_finetune(net: nn.Module | NetSpec | Foreign | str) -> bool:
    """Whether a network is known to have the parts that ``finetune`` needs: of a user's own that is told by the module
    alone, not by the function that builds it.
    """
    if isinstance(net, str):
        return ":" not in net
    module = net.module if isinstance(net, Foreign) else net
    if not isinstance(module, nn.Module):
        return not (isinstance(net, Foreign) and net.origin == "factory")
    try:
        headed_parts(module)
    except UserError:
        return False
    return True
