"""What a training step keeps for its backward pass, of anything that is a network."""

from __future__ import annotations

import torch

from convscale.conditions import Conditions, Size, sides, size_text
from convscale.cost.memory import free_bytes
from convscale.cost.memory import saved_bytes as bytes_kept
from convscale.errors import DoesNotFit, check_whole
from convscale.networks.resolve import Network, as_module, find
from convscale.speed.subjects import GUARDED_BATCH, needed_bytes

_GUARDED_PIXELS = GUARDED_BATCH * 224 * 224


@torch.inference_mode(False)  # whoever calls this may be in inference mode
def saved_bytes(net: Network, image_size: Size = 224, batch_size: int = 4) -> float:
    """Bytes kept for backward, per image: the distinct storages that autograd saves in one training step's forward
    pass.

    Parameters are left out; the input and buffers count where an operation keeps them. The pass runs on a copy of the
    network where its parameters are, in their precision, so that the network stays as it is.

    Args:
        net: any module that takes (N, C, H, W), a spec or a model's name, which are built untrained.
        image_size: side of the square images in pixels, or (height, width).
        batch_size: N; what doesn't grow with it (statistics) is shared among the images.

    Raises:
        UserError: not a network, a size below 1, no parameter to train, a network that can not be copied or run, or
            images that do not fit in memory.
    """
    (height, width), batch_size = sides(image_size), check_whole("batch_size", batch_size)
    # a name with a tag of weights is built untrained: the bytes do not depend on them, and nothing is downloaded
    module, name = as_module(find(net) if isinstance(net, str) else net)
    too_large = DoesNotFit(
        f"{name} does not fit in memory at {size_text(image_size)} px and batch {batch_size}; take a smaller batch or "
        "smaller images"
    )
    weight = next(module.parameters(), None)
    try:
        if weight is not None and weight.device.type == "cpu" and batch_size * height * width >= _GUARDED_PIXELS:
            free, need = free_bytes(), needed_bytes(module, Conditions(mode="train", image_size=image_size))(batch_size)
            if free is not None and need > free:
                raise too_large
        return bytes_kept(module, image_size, batch_size)
    except (RuntimeError, MemoryError) as error:  # what a network's own code raises is told by then: it is the images
        raise too_large from error
