"""One decoder, one resize: what training sees, what a shipped network sees and what plain Pillow gives, bit for bit.

The golden pixels come from Pillow alone, by the steps that a model card tells.
"""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from convscale.artifact.answers import prepared
from convscale.images.decode import decode_image, parse_header
from convscale.images.preprocess import Preprocessing
from convscale.images.splits import FileSplit
from convscale.learn.loader import EvalImages

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def _photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth waves, edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 100 * np.sin(x / 9 + seed), 255.0 * ((x // 7 + y // 5) % 2), (x + y) % 256], axis=2)
    return Image.fromarray(np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8))


def _alpha(image: Image.Image) -> Image.Image:
    ramp = np.linspace(0, 255, image.width * image.height).reshape(image.height, image.width)
    image.putalpha(Image.fromarray(ramp.astype(np.uint8)))
    return image


def _see_through_palette() -> bytes:
    file = io.BytesIO()
    _photo(61, 47).quantize(8).save(file, "PNG", transparency=bytes([0, 128, 255, 3]))
    return file.getvalue()


def _as(format: str, image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
DEEP = Image.fromarray((np.random.default_rng(3).integers(0, 65536, (45, 80))).astype(np.uint16))
FILES = {
    "rgb.jpg": _as("JPEG", _photo(97, 131), quality=90),
    "half.jpg": _as("JPEG", _photo(64, 64), quality=75, subsampling=2),
    "progressive.jpg": _as("JPEG", _photo(120, 77), quality=85, progressive=True),
    "stored-as-rgb.jpg": _as("JPEG", _photo(50, 61), quality=90, keep_rgb=True),
    "gray.jpg": _as("JPEG", _photo(75, 64).convert("L"), quality=90),
    "cmyk.jpg": _as("JPEG", _photo(75, 64).convert("CMYK"), quality=90),
    "xmp.jpg": _as("JPEG", _photo(40, 90), quality=90, xmp=XMP),
    **{f"exif{n}.jpg": _as("JPEG", _photo(41, 63), quality=92, exif=_turned(n)) for n in range(1, 9)},
    "exif8.png": _as("PNG", _photo(41, 63), exif=_turned(8)),
    "rgba.png": _as("PNG", _alpha(_photo(61, 47))),
    "gray-alpha.png": _as("PNG", _alpha(_photo(61, 47).convert("L"))),
    "palette.png": _as("PNG", _photo(61, 47).quantize(16)),
    "see-through-palette.png": _see_through_palette(),
    "one-bit.png": _as("PNG", _photo(40, 40).convert("1")),
    "sixteen-bit.png": _as("PNG", DEEP),
    "colour-key.png": _as("PNG", Image.new("RGB", (40, 50), (7, 8, 9)), transparency=(7, 8, 9)),
    "odd.png": _as("PNG", _photo(1, 57)),
    "tiny.png": _as("PNG", _photo(3, 2)),
    "x.gif": _as("GIF", _photo(61, 47).quantize(32)),
    "x.webp": _as("WEBP", _alpha(_photo(61, 47)), lossless=True),
    "x.bmp": _as("BMP", _photo(61, 47)),
}


def golden(data: bytes, how: Preprocessing) -> np.ndarray:
    """Pillow, by hand."""
    image = Image.open(io.BytesIO(data))
    if how.channels == 1:
        image.draft("L", None)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if how.channels == 1 else "RGB")
    side = math.floor(how.height / how.crop_pct)
    short = min(image.size)
    size = (int(side * image.width / short), int(side * image.height / short))
    image = image.resize(size, RESAMPLING[how.interpolation])
    left, top = round((size[0] - how.width) / 2), round((size[1] - how.height) / 2)
    crop = image.crop((left, top, left + how.width, top + how.height))
    return np.asarray(crop).reshape(how.height, how.width, how.channels)


HOW = [(24, 0.875, "bilinear", 3), (33, 0.95, "bicubic", 3), (40, 1.0, "bilinear", 3), (25, 0.9, "bicubic", 1)]


@pytest.mark.parametrize("fast", [True, False], ids=["simplejpeg", "pillow alone"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_training_a_shipped_network_and_pillow_see_the_same(
    how: tuple[int, float, str, int], fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
    side, crop_pct, interpolation, channels = how
    zeros, ones = (0.0,) * channels, (1.0,) * channels
    preprocessing = Preprocessing(
        image_size=side, channels=channels, mean=zeros, std=ones, crop_pct=crop_pct, interpolation=interpolation
    )
    paths = []
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        paths.append(str(tmp_path / name))
    labels = torch.zeros(len(paths), dtype=torch.long)
    split = FileSplit(split="test", classes=("a",), labels=labels, channels=channels, paths=tuple(paths))
    evaluated = np.concatenate(list(EvalImages(split, preprocessing)))
    wrong = []
    for number, (path, data) in enumerate(zip(paths, FILES.values(), strict=True)):
        expected = golden(data, preprocessing)
        seen = {"path": prepared(path, path, preprocessing), "bytes": prepared("", data, preprocessing)}
        seen["a tensor"] = preprocessing.resize(split.read(number)).numpy()
        seen["evaluation"] = evaluated[number]
        wrong += [f"{Path(path).name} {what}" for what, pixels in seen.items() if not np.array_equal(pixels, expected)]
    assert wrong == []


def test_an_orientation_in_xmp_counts_where_exif_has_none() -> None:
    header = parse_header(FILES["xmp.jpg"])
    assert header is not None
    assert header.orientation == 6
    both = parse_header(_as("JPEG", _photo(8, 8), xmp=XMP, exif=_turned(3)))
    assert both is not None
    assert both.orientation == 3


def test_an_unreadable_exif_block_leaves_a_picture_as_it_stands() -> None:
    plain, odd = _as("JPEG", _photo(20, 30)), _as("JPEG", _photo(20, 30), exif=b"Exif\0\0not a TIFF block")
    np.testing.assert_array_equal(decode_image(odd), decode_image(plain))
