"""Small networks and artefacts that several tests share; exporting takes seconds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.folder import seal
from convscale.images.preprocess import Preprocessing
from convscale.ship.export import export

OLD = Path(__file__).parent.parent / "old_files" / "v0_1" / "artefacts"


@pytest.fixture(autouse=True)
def all_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """All forms look equally fast, and INT8 pays: what a test's tiny network takes is chance."""
    monkeypatch.setattr("convscale.ship.export.first_look", lambda artifact, settings: 1.0)
    monkeypatch.setattr("convscale.ship.export.check_pays", lambda *rivals: None)
    monkeypatch.setattr("convscale.ship.forms.Search.first_look", lambda search, artifact: 1.0)


class Tiny(nn.Module):
    """A strided stem, a residual block with a blur and dropout, a linear head: what exporting must cope with, in
    milliseconds.
    """

    def __init__(self, classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.01, inplace=True)
        )
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)
        self.pretrained_cfg = {
            "input_size": (channels, 32, 32),
            "mean": (0.4,) * channels,
            "std": (0.3,) * channels,
            "crop_pct": 0.9,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu_(self.block(x) + x)
        return self.head(self.dropout(x.mean((2, 3))))


class OnMaps(nn.Module):
    """Linear layers on 4-d maps, as ConvNeXt has them: exporters write each as a product and a sum, or as a product
    alone where there is no bias.
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.up, self.down = nn.Linear(8, 16, bias=bias), nn.Linear(16, 8, bias=bias)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(torch.relu(self.stem(x)).permute(0, 2, 3, 1))
        return self.head(self.down(nn.functional.gelu(x)).mean((1, 2)))


def randomise(net: nn.Module, image_size: int = 32, channels: int = 3, least_variance: float = 0.1) -> nn.Module:
    """Random norms (negative weights too), then statistics of one training pass, so that logits depend on the image.

    Weights below 1 and variances that are not tiny keep deep networks well conditioned: float32 and float64 agree to
    1e-6. A deep network without many shortcuts needs a lower ``least_variance``, or all images look alike to it.
    """
    generator = torch.Generator().manual_seed(1)
    norms = [
        module
        for module in net.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None
    ]
    for norm in norms:
        nn.init.uniform_(norm.weight, -0.3, 0.3, generator=generator)
        with torch.no_grad():
            norm.weight += 0.5 * norm.weight.sign()
        nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
        norm.momentum = 1.0
    net.train()
    with torch.no_grad():
        net(torch.randn(8, channels, image_size, image_size, generator=generator))
    for norm in norms:
        if norm.running_var is not None:
            norm.running_var.clamp_(min=least_variance)
    return net.eval()


@pytest.fixture(scope="session")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Tiny())


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Pictures with some structure: seeded low-resolution noise, enlarged. uint8 (40, 32, 32, 3)."""
    coarse = np.random.default_rng(5).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="session")
def onnx_art(tiny: nn.Module, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(tiny, tmp_path_factory.mktemp("art") / "onnx", classes=list("abcde"), verify_images=images)


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    return Preprocessing(image_size=32, mean=(0.4,) * 3, std=(0.3,) * 3, crop_pct=0.9)


@pytest.fixture
def tuned(tmp_path: Path) -> Artifact:
    """An unbaked ONNX artefact, tuned to two streams and a batch of four, with names that need care."""
    folder = shutil.copytree(OLD / "onnx_fp32", tmp_path / "fashion")
    values = {key: value for key, value in load_artifact(folder).manifest.items() if key not in ("schema", "files")}
    runtime = {"name": "onnxruntime", "threads": 2, "streams": 2, "batch_size": 4}
    names = json.loads((folder / "classes.json").read_text())
    (folder / "classes.json").write_text(json.dumps(['line\nbreak "é"', *names[1:]]))
    seal(folder, {**values, "runtime": runtime})
    return load_artifact(folder)


@pytest.fixture
def tuned_openvino(tmp_path: Path) -> Artifact:
    """A baked OpenVINO artefact, tuned to two streams and a batch of six."""
    artifact = load_artifact(shutil.copytree(OLD / "openvino_fp32", tmp_path / "own"))
    artifact.keep(runtime={"name": "openvino", "threads": 2, "streams": 2, "batch_size": 6})
    return load_artifact(tmp_path / "own")
