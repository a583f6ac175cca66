"""Every model of the zoo, timm's networks and specs of the user's own become artefacts that say the same."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import convscale as cs
from convscale.formats.fold import fold
from convscale.images.preprocess import Preprocessing
from convscale.ship.export import export
from tests.ship.conftest import randomise

SIZE, CLASSES = 64, 7
PRE = Preprocessing(image_size=SIZE, mean=(0.4,) * 3, std=(0.3,) * 3)


def check(net: nn.Module, folder: Path) -> None:
    """The artefact's logits are the network's own at batch 1, 2 and 5; golden values are PyTorch's."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    with torch.no_grad():
        logits = net((torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.4) / 0.3).numpy()
    assert np.abs(logits - logits[:1]).max() > 0.01 * np.abs(logits).max(), "the images make no difference"
    art = export(net, folder / "a", preprocessing=PRE, verify_images=pixels)
    for n in (1, 2, 5):
        found = art.logits(pixels[:n], batch_size=n)
        assert found.shape == (n, CLASSES)
        assert np.abs(found - logits[:n]).max() < 1e-3 * np.abs(logits).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", cs.list_models())
def test_every_model_of_the_zoo(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    least_variance = 1e-3 if name.startswith("hgnetv2") else 0.1
    check(randomise(cs.create_model(name, num_classes=CLASSES), SIZE, least_variance=least_variance), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", cs.list_models())
def test_every_model_folds_exactly(name: str) -> None:
    torch.manual_seed(0)
    net = randomise(cs.create_model(name, num_classes=CLASSES), SIZE)
    x = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        double = copy.deepcopy(net).double()
        exact = double(x.double())
        largest = exact.abs().max()
        assert (fold(double, x.double(), strided_stem=True)(x.double()) - exact).abs().max() < 1e-10 * largest
        own = (net(x).double() - exact).abs().max()
        assert (fold(net, x)(x).double() - exact).abs().max() <= 4 * own


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "resnet50d",
        "tresnet_m",
        "tf_efficientnet_b0",
        "mixnet_s",
        "mobilenetv3_large_100",
        "regnety_002",
        "convnext_atto",
    ],
)
def test_networks_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(randomise(timm.create_model(name, num_classes=CLASSES), SIZE), tmp_path)


@pytest.mark.slow
def test_a_scaled_spec_and_one_of_the_users_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scaled = cs.scale(cs.get_spec("efficientnet_b0"), depth=0.3, width=0.3)
    check(randomise(cs.create_model(scaled, num_classes=CLASSES), SIZE), tmp_path / "scaled")
    cs.save_spec(cs.scale(cs.get_spec("resnet50d"), depth=0.25, width=0.3, divisor=4), tmp_path / "mine.yaml")
    check(
        randomise(cs.create_model(cs.load_spec(tmp_path / "mine.yaml"), num_classes=CLASSES), SIZE), tmp_path / "mine"
    )
