"""What shipping must know about a network given as a module, a spec or a name: its module, its name, the input it
takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing


def input_shape(net: nn.Module, image_size: int | None = None) -> tuple[int, int, int]:
    """Channels (``speed.trace.image_channels``), height and width a network takes, the last two from its
    ``pretrained_cfg``.

    Raises:
        UserError: the size is neither given nor known.
    """
    cfg = getattr(net, "pretrained_cfg", None) or {}
    channels = image_channels(net)
    _, height, width = cfg.get("input_size", (None, None, None))
    if image_size is not None:
        height = width = image_size
    if not height or not width:
        raise UserError(f"the input size of {type(net).__name__} is not known; give image_size")
    return int(channels), int(height), int(width)


def example_input(net: nn.Module, image_size: int | None = None, *, batch_size: int = 2) -> torch.Tensor:
    """Seeded noise in the network's input shape and dtype, like normalised pixels."""
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, *input_shape(net, image_size), generator=generator).to(dtype)


def preprocessing_of(net: nn.Module, image_size: int | None = None) -> Preprocessing:
    """The preprocessing a network names in its ``pretrained_cfg``, at another size where one is given.

    Raises:
        UserError: it names none.
    """
    cfg = getattr(net, "pretrained_cfg", None) or {}
    if "mean" not in cfg or "std" not in cfg:
        raise UserError(
            f"the preprocessing of {type(net).__name__} is not known; give preprocessing=Preprocessing(...)"
        )
    channels, height, width = input_shape(net, image_size)
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    if len(mean) != channels:
        raise UserError(
            f"the network takes {channels} channel(s), its pretrained_cfg has the mean of {len(mean)}; give "
            "preprocessing=Preprocessing(...)"
        )
    interpolation = cfg.get("interpolation", "bilinear")
    return Preprocessing(
        image_size=(height, width),
        channels=channels,
        mean=mean,
        std=std,
        crop_pct=cfg.get("crop_pct", 0.875),
        interpolation=interpolation,
    )


def own_size(net: nn.Module | None, spec: Any = None) -> tuple[int, int]:
    """The image size a network was made for, as (height, width) in pixels.

    Raises:
        UserError: neither ``spec.input.size`` nor ``pretrained_cfg["input_size"]`` says it.
    """
    spec = spec if spec is not None else getattr(net, "spec", None)
    size: Any = getattr(getattr(spec, "input", None), "size", None)
    if size is None:
        config = getattr(net, "pretrained_cfg", None)
        size = config.get("input_size") if isinstance(config, dict) else getattr(config, "input_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) >= 2:
        return int(size[-2]), int(size[-1])
    raise UserError(f"{type(net or spec).__name__} does not say its image size; give image_size in pixels")


def checked_size(image_size: int | tuple[int, int] | None, net: nn.Module | None, spec: Any) -> tuple[int, int]:
    """``image_size`` as (height, width), or the network's own for None.

    Raises:
        UserError: not a whole number of at least 1.
    """
    if image_size is None:
        return own_size(net, spec)
    sides = (image_size, image_size) if not isinstance(image_size, list | tuple) else tuple(image_size)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise UserError(f"image_size must be a whole number of pixels of at least 1, got {image_size!r}")
    return sides[0], sides[1]


def image_channels(net: nn.Module) -> int:
    """Channels of the images a network takes: its own ``in_chans``; else its first convolution's, which behind a
    space-to-depth of 2 or 4 has 4 or 16 for each."""
    own = getattr(net, "in_chans", None)
    if isinstance(own, int):
        return own
    cfg = getattr(net, "pretrained_cfg", None)
    declared = cfg["input_size"][0] if isinstance(cfg, dict) and cfg.get("input_size") else None
    first = next((module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d)), declared or 3)
    if declared is not None and first in (declared, 4 * declared, 16 * declared):
        return declared
    return first // 16 if first % 16 == 0 else first
