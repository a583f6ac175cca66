"""The code of a model card, run by itself on many kinds of pictures, against ``Artifact.classify``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.images.preprocess import Preprocessing
from convscale.ship.export import export
from tests.ship.conftest import Tiny, randomise

STAMPS = Path("/usr/share/tuxpaint/stamps")
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "camera", "logo", "text")
"""What scikit-image carries in its package: colour, gray and see-through pictures."""


def _sources() -> list[Image.Image]:
    data = pytest.importorskip("skimage.data")
    pictures = [Image.fromarray(getattr(data, name)()) for name in PHOTOGRAPHS]
    stamps = sorted(STAMPS.rglob("*.png"))
    return pictures + [Image.open(path) for path in stamps[:: max(1, len(stamps) // 20)]]


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _see_through(image: Image.Image, random: np.random.Generator) -> Image.Image:
    ramp = np.outer(np.linspace(0, 255, image.height), np.linspace(0.2, 1, image.width)) + random.uniform(0, 60)
    image = image.convert("RGB")
    image.info.clear()
    image.putalpha(Image.fromarray(np.clip(ramp, 0, 255).astype(np.uint8)))
    return image


def write_pictures(folder: Path, count: int) -> list[str]:
    """``count`` files: crops of real pictures in turn as each kind of file."""
    folder.mkdir()
    random, sources, paths = np.random.default_rng(0), _sources(), []
    for i in range(count):
        source, kind = sources[i % len(sources)], i % 11
        sides = [int(random.integers(min(side, 30), min(side, 400) + 1)) for side in source.size]
        left, top = (int(random.integers(0, had - kept + 1)) for had, kept in zip(source.size, sides, strict=True))
        crop = source.crop((left, top, left + sides[0], top + sides[1]))
        path = folder / f"{i:03}.{'jpg' if kind < 5 else 'webp' if kind == 9 else 'gif' if kind == 10 else 'png'}"
        plain, quality = crop.convert("RGB"), int(random.integers(60, 98))
        plain.info.clear()
        if kind in (0, 1):
            plain.save(path, quality=quality, progressive=bool(i % 2), subsampling=i % 3)
        elif kind == 2:
            plain.save(path, quality=quality, exif=_turned(1 + i % 8))
        elif kind == 3:
            plain.convert("L").save(path, quality=quality)
        elif kind == 4:
            plain.convert("CMYK").save(path, quality=quality)
        elif kind == 5:
            crop.save(path)
        elif kind == 6:
            _see_through(crop, random).save(path, exif=_turned(1 + i % 8))
        elif kind == 7:
            _see_through(crop, random).quantize(32).save(path)
        elif kind == 8:
            Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 251).save(path)
        elif kind == 9:
            _see_through(crop, random).save(path, quality=quality)
        else:
            plain.quantize(64).save(path)
        paths.append(str(path))
    return paths


def said_by_the_card(artifact: Artifact, paths: list[str]) -> list[list]:
    """What the card's own code answers, in a process that knows neither convscale nor torch."""
    card = (artifact.folder / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert "convscale" not in code
    function = code.split("def classify")[1].splitlines()
    assert len(function) <= 20
    script = (
        "import sys\nsys.modules.update(dict.fromkeys(('convscale', 'torch', 'torchvision', 'simplejpeg')))\n"
        f"{code}\n"
        "answers = [classify(path) for path in json.load(sys.stdin)]\n"
        "print(json.dumps([a if isinstance(a, list) else [a[0], float(a[1])] for a in answers]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        input=json.dumps(paths),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        cwd=artifact.folder,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _sharp(channels: int = 3) -> nn.Module:
    """A network that tells pictures apart by their colours: a random one has the same answer for nearly all."""
    net = Tiny(channels=channels)
    randomise(net, channels=channels)
    plain = (torch.rand(256, channels, 1, 1, generator=torch.Generator().manual_seed(0)) - 0.4) / 0.3
    with torch.no_grad():
        net.head.weight.mul_(20)
        net.head.bias.sub_(net.eval()(plain.expand(-1, -1, 32, 32)).mean(0))
    return net


def test_the_code_of_a_card_has_the_same_answers_on_300_pictures(tmp_path: Path) -> None:
    net = _sharp()
    artifact = export(net, tmp_path / "art", format="onnx", classes=["a", "b", "c", "d", "e"])
    paths = write_pictures(tmp_path / "pictures", 300)
    answers = artifact.classify(paths, top=1)
    assert [answer.error for answer in answers if answer.error] == []
    said = said_by_the_card(artifact, paths)
    assert [answer.labels[0] for answer in answers] == [label for label, _ in said]
    np.testing.assert_allclose([a.probabilities[0] for a in answers], [value for _, value in said], atol=2e-6)
    assert len({label for label, _ in said}) >= 3, "pictures that all look the same prove nothing"


@pytest.mark.parametrize(
    ("channels", "size", "crop_pct", "interpolation", "bake", "several", "crop_mode"),
    [
        (1, 32, 0.9, "bicubic", False, False, "center"),
        (3, (24, 40), 0.875, "bilinear", True, False, "center"),
        (1, (40, 24), 0.95, "bilinear", True, True, "center"),
        (3, 32, 1.0, "nearest", False, True, "center"),
        (3, (24, 40), 0.9, "bicubic", False, False, "squash"),
    ],
)
def test_gray_rectangular_baked_and_many_labels(
    channels: int, size: int | tuple[int, int], crop_pct: float, interpolation: str, bake: bool, several: bool,
    crop_mode: str, tmp_path: Path,
) -> None:  # fmt: skip
    net = _sharp(channels)
    preprocessing = Preprocessing(
        image_size=size, channels=channels, mean=(0.4,) * channels, std=(0.3,) * channels, crop_pct=crop_pct,
        interpolation=interpolation, crop_mode=crop_mode,
    )  # fmt: skip
    thresholds = [0.3, 0.5, 0.2, 0.9, 0.4] if several else None
    artifact = export(net, tmp_path / "art", preprocessing=preprocessing, bake=bake, thresholds=thresholds)
    paths = write_pictures(tmp_path / "pictures", 44)
    answers, said = artifact.classify(paths, top=None if several else 1), said_by_the_card(artifact, paths)
    if several:
        assert [sorted(answer.labels) for answer in answers] == said
    else:
        assert [answer.labels[0] for answer in answers] == [label for label, _ in said]
        np.testing.assert_allclose([a.probabilities[0] for a in answers], [value for _, value in said], atol=2e-6)


def test_the_card_states_sides_and_rounding(tmp_path: Path) -> None:
    how = Preprocessing(image_size=(24, 40), mean=(0.4,) * 3, std=(0.3,) * 3, crop_pct=0.875, interpolation="bicubic")
    card = (export(randomise(Tiny()), tmp_path / "a", preprocessing=how).folder / "README.md").read_text()
    for words in (
        "divided by `min(height / 27, width / 45)` and rounded to nearest (ties to even)",  # 24 / 0.875, 40 / 0.875
        "by Pillow's `Image.resize` with `BICUBIC`: antialiased",
        "40 x 24 px (width x height) from the centre; `left = round((width - 40) / 2)`",
        "composed on white at full size, in 8 bits",
        "turned as its EXIF orientation says",
        "float32 (N, 3, 24, 40)",
    ):
        assert words in card
