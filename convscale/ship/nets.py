"""What shipping must know about a network given as a module, a spec or a name: its module, its name, the input it takes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing
from convscale.speed.trace import image_channels


def as_module(net: Any) -> tuple[nn.Module, str]:
    """A module and its name, from a module, a ``NetSpec`` or a model's name (untrained unless the name has a tag)."""
    if isinstance(net, nn.Module):
        cfg = getattr(net, "pretrained_cfg", None) or {}
        return net, str(cfg.get("architecture") or getattr(getattr(net, "spec", None), "name", None) or type(net).__name__)
    from convscale.nn.net import create_model

    if isinstance(net, str):
        return create_model(net, pretrained="." in net), net
    return create_model(net), str(getattr(net, "name", "network"))


def input_shape(net: nn.Module, image_size: int | None = None) -> tuple[int, int, int]:
    """Channels (``speed.trace.image_channels``), height and width a network takes, the last two from its ``pretrained_cfg``.

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
        raise UserError(f"the preprocessing of {type(net).__name__} is not known; give preprocessing=Preprocessing(...)")
    channels, height, _ = input_shape(net, image_size)
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    if len(mean) != channels:
        raise UserError(
            f"the network takes {channels} channel(s), its pretrained_cfg has the mean of {len(mean)}; give preprocessing=Preprocessing(...)"
        )
    interpolation = cfg.get("interpolation", "bilinear")
    return Preprocessing(image_size=height, channels=channels, mean=mean, std=std, crop_pct=cfg.get("crop_pct", 0.875), interpolation=interpolation)


class Baked(nn.Module):
    """Pixels to probabilities: cast, permute, normalise, the network, softmax (``several`` labels per image: sigmoid).

    Takes uint8 (N, H, W, C) and gives probabilities and logits, (N, classes) each.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: nn.Module, preprocessing: Preprocessing, *, several: bool = False) -> None:
        super().__init__()
        self.net, self.several = net, several
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))
        self.dtype = next((p.dtype for p in net.parameters()), torch.float32)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        logits = self.net(((pixels - self.mean) / self.std).to(self.dtype)).float()
        return (torch.sigmoid(logits) if self.several else torch.softmax(logits, dim=1)), logits


def forward_logits(net: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Float32 logits (N, classes) of a module on its own device, in eval mode; its mode is put back."""
    training = net.training
    parameter = next(net.parameters(), torch.empty(0))
    net.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return net(batch.to(device=parameter.device, dtype=parameter.dtype)).float().cpu()
    finally:
        net.train(training)
