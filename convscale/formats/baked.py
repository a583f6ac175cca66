"""Preprocessing as a part of the network: pixels in, probabilities out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from convscale.images.preprocess import Preprocessing


class Baked(nn.Module):
    """Pixels to probabilities: cast, permute, normalise, the network, softmax (``several`` labels per image: sigmoid).

    Takes uint8 (N, H, W, C) and gives probabilities and logits, (N, classes) each; what else the network puts out comes
    after them. With ``temperatures`` each class's probability is the sigmoid of its logit over its temperature; the
    logits are the network's own.
    """

    mean: torch.Tensor
    std: torch.Tensor
    temperatures: torch.Tensor | None

    def __init__(
        self,
        net: nn.Module,
        preprocessing: Preprocessing,
        *,
        several: bool = False,
        temperatures: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.several = net, several
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))
        self.register_buffer("temperatures", None if temperatures is None else torch.tensor(list(temperatures)))
        self.dtype = next((p.dtype for p in net.parameters()), torch.float32)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        outputs = self.net(((pixels - self.mean) / self.std).to(self.dtype))
        raw, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        logits = raw.float()
        calibrated = logits if self.temperatures is None else logits / self.temperatures
        return (torch.sigmoid(calibrated) if self.several else torch.softmax(logits, dim=1)), logits, *others


class BakedBoxes(nn.Module):
    """Pixels to candidates of a detector: cast, permute, normalise, the network. Takes uint8 (N, side, side, 3)."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        return self.net((pixels - self.mean) / self.std)
