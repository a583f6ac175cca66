"""Wrong examples of a fit, under the maps of what the network said."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import convscale as cs
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import ArraySplit
from convscale.maps.draw import overlaid
from convscale.pipeline.record import mistakes
from convscale.show.fit_record import FitRecord
from convscale.show.report import fit_page

HOW = Preprocessing(image_size=16, channels=1, mean=(0.5,), std=(0.25,), crop_pct=1.0)


class Half(nn.Module):
    """Says class 1 where the right half is bright, and never looks elsewhere: its map is known."""

    def __init__(self, *, behind: bool = False) -> None:
        super().__init__()
        self.keep = nn.Conv2d(1, 2, 1, bias=False)
        self.classifier = nn.Linear(2, 2)
        with torch.no_grad():
            self.keep.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
            self.classifier.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
            self.classifier.bias.copy_(torch.tensor([0.0, 0.5]))
        self.behind = behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self.keep(x).relu_().mean((2, 3))
        return self.classifier(pooled.sin() if self.behind else pooled)


def split() -> ArraySplit:
    pixels = torch.zeros(4, 16, 16, 1, dtype=torch.uint8)
    pixels[:, :, 8:] = 250
    return ArraySplit(split="test", classes=("left", "right"), labels=torch.zeros(4).long(), channels=1, pixels=pixels)


def pixels_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)


def test_mistakes_carry_the_map_of_what_was_said() -> None:
    """Red over the right half, as in the network's known map; gray over the left."""
    test = split()
    found = mistakes(cs.evaluate(Half(), test, HOW), test, test, Half(), HOW)
    assert len(found) == 4
    drawn = pixels_of(found[0].map or "")
    expected = overlaid(test.pixels[0].numpy(), np.repeat(np.repeat([[0.0, 1.0]], 8, 1), 16, 0)).astype(int)
    assert np.abs(drawn - expected).max() <= 2
    assert (drawn[:, :6] == drawn[:, :6, :1]).all()
    assert drawn[8, 12, 0] > drawn[8, 12, 2] + 50


def test_what_has_no_exact_map_is_shown_without() -> None:
    test = split()
    net = Half(behind=True)
    assert [each.map for each in mistakes(cs.evaluate(net, test, HOW), test, test, net, HOW)] == [None] * 4


def test_the_report_shows_them() -> None:
    test = split()
    found = mistakes(cs.evaluate(Half(), test, HOW), test, test, Half(), HOW)
    page = fit_page(FitRecord(wrong=found), Path("x"))
    assert "What it looked at" in page
    assert page.count(found[0].map or "?") == 4
    assert "What it looked at" not in fit_page(FitRecord(wrong=mistakes_without()), Path("x"))


def mistakes_without() -> tuple:
    test = split()
    return mistakes(cs.evaluate(Half(), test, HOW), test, test)
