"""A network that lies on a card when it is shipped: all is done on the processor, and it goes back.

The meta device stands in for the card: what mixes it with images in memory fails there too.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from torch import nn

from convscale.errors import UserError
from convscale.networks.foreign import Foreign
from convscale.networks.resolve import Network
from convscale.ship.export import export
from convscale.ship.forms import FLOAT, export_forms, form_names
from convscale.ship.request import on_processor
from tests.ship.conftest import Tiny, randomise


class Deep(Tiny):
    """Space-to-depth in front, as TResNet has it; its values come back from the card by ``cpu``."""

    def __init__(self) -> None:
        super().__init__(channels=12)
        self.stem[0] = nn.Conv2d(12, 8, 3, 1, 1, bias=False)
        self.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.4,) * 3, "std": (0.3,) * 3}
        self.moves: list[str] = []
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pixel_unshuffle(x, 2))

    def cpu(self) -> Self:
        self.moves.append("cpu")
        self.load_state_dict(self.kept, assign=True)
        return self

    def to(self, *args: object, **options: object) -> Self:
        self.moves.append(str(args[0]))
        return super().to(*args, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]


@pytest.fixture
def on_card() -> Deep:
    net = randomise(Deep()).eval()
    assert isinstance(net, Deep)
    net.kept = copy.deepcopy(net.state_dict())
    net.to("meta")
    net.moves.clear()
    return net


def test_a_deep_stem_is_looked_for_on_the_processor(on_card: Deep) -> None:
    assert form_names(on_card, int8=False) == [FLOAT, f"{FLOAT}-strided"]
    assert on_card.moves == ["cpu", "meta"]


def test_forms_are_made_on_the_processor_at_one_go(on_card: Deep, images: np.ndarray, tmp_path: Path) -> None:
    names = [FLOAT, f"{FLOAT}-strided"]
    forms = export_forms(on_card, tmp_path, names, verify_images=images)
    assert {name: getattr(made, "format", made) for name, made in forms.items()} == dict.fromkeys(names, "onnx")
    assert on_card.moves == ["cpu", "meta"]


@pytest.mark.parametrize("as_foreign", [False, True])
def test_a_single_export_too(on_card: Deep, images: np.ndarray, tmp_path: Path, as_foreign: bool) -> None:
    net: Network = Foreign("mine", "module", on_card) if as_foreign else on_card
    made = export(net, tmp_path / "a", verify_images=images)
    assert made.verification is not None
    assert made.verification["max_abs"] < 1e-4
    assert on_card.moves == ["cpu", "meta"]
    assert {p.device.type for p in on_card.parameters()} == {"meta"}


def test_what_is_refused_goes_back_too(on_card: Deep, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classes names 1 classes"):
        export(on_card, tmp_path / "a", classes=["one"])
    assert on_card.moves == ["cpu", "meta"]


def test_what_is_there_already_is_not_moved(on_card: Deep) -> None:
    on_card.cpu()
    for net in (on_card, "resnet18"):
        with on_processor(net):
            pass
    assert on_card.moves == ["cpu"]
