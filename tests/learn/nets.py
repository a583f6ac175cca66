"""Small networks and data for the tests of learning."""

from __future__ import annotations

import torch
from torch import nn

from convscale.images.splits import ArraySplit, DataSplits

CLASSES = ("dark", "left", "top")


def small_net(classes: int = 3, channels: int = 1) -> nn.Module:
    """Two convolutions with batch norm, dropout (so that random state matters), a linear head."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32, classes),
    )


class Poison(nn.Module):
    """Gives NaN for some calls in training."""

    def __init__(self, bad: range) -> None:
        super().__init__()
        self.body, self.bad, self.calls = small_net(), bad, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.body(x)
        if self.training:
            self.calls += 1
            if self.calls - 1 in self.bad:
                out = out * float("nan")
        return out


def halves(count: int, seed: int = 0, split: str = "train") -> ArraySplit:
    """12 x 12 gray images of noise: nothing, the left half, or the top half is bright; a net learns it in seconds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 90, (count, 12, 12, 1), generator=generator, dtype=torch.uint8)
    pixels[labels == 1, :, :6] += 120
    pixels[labels == 2, :6] += 120
    return ArraySplit(split=split, classes=CLASSES, labels=labels, channels=1, pixels=pixels)


def halves_data(train: int = 96) -> DataSplits:
    return DataSplits(
        train=halves(train), validation=halves(30, 1, "validation"), test=halves(30, 2, "test"), classes=CLASSES
    )
