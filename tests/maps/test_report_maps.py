"""Wrong examples of a fit, under the maps of what the network said."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import convscale as cs
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import ArraySplit
from convscale.maps.draw import overlaid
from convscale.pipeline import record
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


def test_what_has_no_exact_map_is_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MobileNetV3 or an ML-Decoder had no map at all. Covers are two steps of 16/7 px wide: where one reaches the
    right half the output falls, further left it can not.
    """
    test = split()
    net = Half(behind=True)
    monkeypatch.setattr(record, "COVERED", 3)
    found = mistakes(cs.evaluate(net, test, HOW), test, test, net, HOW)
    assert [each.map_method for each in found] == ["occlusion"] * 3 + [None]
    assert found[3].map is None
    drawn = pixels_of(found[0].map or "")
    assert (drawn[:, :4] == drawn[:, :4, :1]).all()  # gray
    assert drawn[8, 11, 0] > drawn[8, 11, 2] + 50  # red
    page = fit_page(FitRecord(wrong=found), Path("x"))
    assert "under an occlusion map" in page
    assert "under the class activation map" not in page
    assert page.count(found[0].map or "?") == 3


def test_the_report_shows_them() -> None:
    test = split()
    found = mistakes(cs.evaluate(Half(), test, HOW), test, test, Half(), HOW)
    page = fit_page(FitRecord(wrong=found), Path("x"))
    assert "What it looked at" in page
    assert page.count(found[0].map or "?") == 4
    assert "under the class activation map" in page
    assert "under an occlusion map" not in page
    assert "What it looked at" not in fit_page(FitRecord(wrong=mistakes_without()), Path("x"))


def mistakes_without() -> tuple:
    test = split()
    return mistakes(cs.evaluate(Half(), test, HOW), test, test)
