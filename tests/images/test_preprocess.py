"""Preprocessing against Pillow and hand calculation."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from convscale.arch.zoo import get_tag, list_models
from convscale.errors import UserError
from convscale.images.preprocess import Preprocessing


def _photo(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(0)
    wave = np.stack([127 + 90 * np.sin(x / 17), 127 + 90 * np.cos(y / 11), (x + y) % 256], axis=2)
    return np.clip(wave + rng.normal(0, 9, wave.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("mode", "pil"), [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)]
)
def test_resize_agrees_with_pillow(mode: str, pil: Image.Resampling) -> None:
    image = _photo(300, 451)
    ours = Preprocessing(image_size=64, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=0.8, interpolation=mode).resize(image)
    # 64 / 0.8 = 80: 300 x 451 -> 80 x 120, then the centre 64 x 64 from (8, 28)
    golden = np.asarray(Image.fromarray(image).resize((120, 80), pil))[8:72, 28:92]
    assert ours.shape == (64, 64, 3)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, golden)


PHOTOS = [_photo(*sides) for sides in ((375, 500), (501, 333), (97, 211), (640, 480))]


def _assert_like_timm(preprocessing: Preprocessing) -> None:
    """Same sizes as timm's evaluation transform, and the pixels that Pillow gives there."""
    create_transform = pytest.importorskip("timm.data").create_transform
    size = (3, preprocessing.height, preprocessing.width)
    asked = {name: getattr(preprocessing, name) for name in ("interpolation", "crop_pct", "crop_mode")}
    timms = create_transform(size, **asked)
    timms_resize, timms_crop = timms.transforms[:2]
    for photo in PHOTOS:
        resized = timms_resize(Image.fromarray(photo))
        assert preprocessing.resized(*photo.shape[:2]) == (resized.height, resized.width)
        np.testing.assert_array_equal(preprocessing.resize(photo), np.asarray(timms_crop(resized)))


def test_every_released_weights_sees_the_pixels_that_timm_gives_it() -> None:
    """timm rounds the resized side down: rounding to nearest was a pixel off for 38 of the first 142 weights."""
    tags = [get_tag(name) for name in list_models(pretrained=True)]
    combinations = sorted({(tag.image_size, tag.crop_pct, tag.interpolation) for tag in tags})
    assert (len(tags), len(combinations)) == (326, 38)
    for size, crop_pct, interpolation in combinations:
        _assert_like_timm(
            Preprocessing(
                image_size=size, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=crop_pct, interpolation=interpolation
            )
        )


@pytest.mark.parametrize("size", [(192, 256), (256, 192), (64, 200), (224, 225), (33, 31)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
def test_rectangles_are_cut_as_timm_cuts_them(size: tuple[int, int], crop_pct: float) -> None:
    _assert_like_timm(
        Preprocessing(image_size=size, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=crop_pct, interpolation="bicubic")
    )


@pytest.mark.parametrize("size", [224, (192, 256), (33, 31)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squashed_pictures_are_those_of_timm(size: int | tuple[int, int], crop_pct: float, interpolation: str) -> None:
    squash = Preprocessing(
        image_size=size,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        crop_pct=crop_pct,
        interpolation=interpolation,
        crop_mode="squash",
    )
    _assert_like_timm(squash)


def test_nothing_of_a_squashed_picture_is_lost() -> None:
    """A strip of 20 x 4000: its ends are seen, and it is resized whole."""
    strip = np.zeros((20, 4000, 3), np.uint8)
    strip[:, :400], strip[:, -400:] = 90, 200
    squash = Preprocessing(image_size=10, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0, crop_mode="squash")
    golden = np.asarray(Image.fromarray(strip).resize((10, 10), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(squash.resize(strip), golden)
    # of the triangle around an end 300 parts of 350 lie in the bright tenth
    ends = [golden[5, 0, 0], golden[5, 5, 0], golden[5, 9, 0]]
    assert ends == [pytest.approx(90 * 6 / 7, abs=1), 0, pytest.approx(200 * 6 / 7, abs=1)]


def test_a_crop_mode_is_said_where_it_is_not_the_usual_one() -> None:
    """What reads no crop mode refuses the key, and texts from before it are read and written as they were."""
    squash = Preprocessing(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), crop_mode="squash")
    assert squash.to_dict()["crop_mode"] == "squash"
    assert Preprocessing.from_dict(json.loads(json.dumps(squash.to_dict()))) == squash
    assert "crop_mode" not in Preprocessing(image_size=8, mean=(0, 0, 0), std=(1, 1, 1)).to_dict()


def test_resize_gives_a_tensor_for_a_tensor_and_leaves_the_right_size_alone() -> None:
    image = torch.from_numpy(_photo(32, 32))
    same = Preprocessing(image_size=32, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0).resize(image)
    assert torch.equal(same, image)
    crop = Preprocessing(image_size=28, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=0.875).resize(image)
    assert torch.equal(crop, image[2:30, 2:30])


def test_channels_are_made_to_fit() -> None:
    gray = np.full((8, 8), 77, np.uint8)
    gray.setflags(write=False)  # as Pillow gives them
    rgb = Preprocessing(image_size=8, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0).resize(gray)
    assert rgb.shape == (8, 8, 3)
    assert (rgb == 77).all()
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[..., 1] = 100
    luma = Preprocessing(image_size=8, channels=1, mean=(0,), std=(1,), crop_pct=1.0).resize(colour)
    assert luma.shape == (8, 8, 1)
    assert (luma == 59).all()  # 0.587 * 100


def test_normalize_by_hand_in_both_layouts() -> None:
    preprocessing = Preprocessing(image_size=4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    batch = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    batch[..., 0], batch[..., 1], batch[1, 2, 3, 2] = 255, 51, 204
    out = preprocessing.normalize(batch)
    assert out.shape == (2, 3, 4, 5)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[:, 0], torch.full((2, 4, 5), 1.0))
    torch.testing.assert_close(out[:, 1], torch.full((2, 4, 5), -0.2))
    assert out[1, 2, 2, 3].item() == pytest.approx(0.4)
    assert torch.equal(preprocessing.normalize(batch.permute(0, 3, 1, 2).contiguous()), out)
    assert batch.dtype == torch.uint8
    assert batch[0, 0, 0, 0] == 255


def test_dict_round_trip() -> None:
    preprocessing = Preprocessing(
        image_size=28, channels=1, mean=(0.286,), std=(0.353,), crop_pct=1.0, interpolation="bicubic"
    )
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing
    assert preprocessing.to_dict()["mean"] == [0.286]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 0}, "image_size must be .* got 0"),
        ({"channels": 4}, "channels must be 1 .* got 4"),
        ({"mean": (0.5,)}, "mean must have one value per channel"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"crop_pct": 1.5}, "crop_pct must lie in .* got 1.5"),
        ({"interpolation": "bilinaer"}, "interpolation 'bilinaer' is unknown .*bilinear"),
        ({"interpolation": ["bilinear"]}, "interpolation .* is unknown"),
        ({"crop_mode": "border"}, "crop_mode 'border' is unknown"),
        ({"crop_mode": ["squash"]}, "crop_mode .* is unknown"),
        ({"image_size": 16_385}, "image_size is 16385; it must be at most 16,384 pixels a side"),
        ({"crop_pct": 1e-300}, r"crop_pct is 1e-300; it must be a share from 0\.01 to 1|crop_pct must lie in"),
        ({"crop_pct": "1"}, "crop_pct is '1'; it must be a share"),
        ({"mean": None}, "mean is None; it must be numbers"),
        ({"std": ["x", 1, 1]}, "std is .* it must be numbers"),
    ],
)
def test_bad_fields_are_named(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preprocessing(**{"image_size": 8, "mean": (0, 0, 0), "std": (1, 1, 1), **change})


def test_bad_input_is_named() -> None:
    preprocessing = Preprocessing(image_size=8, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(UserError, match=r"uint8 \(height, width, 1 or 3\), got torch.float32"):
        preprocessing.resize(torch.zeros(8, 8, 3))
    with pytest.raises(UserError, match=r"3 channels in its last or second dimension, got \(1, 4, 8, 8\)"):
        preprocessing.normalize(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"unknown key 'men' .*mean"):
        Preprocessing.from_dict({"image_size": 8, "men": [0], "std": [1]})


def test_normalize_array_equals_normalize_for_every_pixel_value_of_every_released_weights() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    values[..., 1] = values[:, ::-1, :, 1]
    for mean, std in {(tag.mean, tag.std) for tag in map(get_tag, list_models(pretrained=True))}:
        preprocessing = Preprocessing(image_size=16, mean=mean, std=std)
        out = preprocessing.normalize_array(values)
        assert (out.shape, out.dtype, out.flags["C_CONTIGUOUS"]) == ((1, 3, 16, 16), np.float32, True)
        np.testing.assert_array_equal(out, preprocessing.normalize(torch.from_numpy(values)).numpy())
        by_hand = (values.astype(np.float64) / 255 - mean) / std
        np.testing.assert_allclose(out, by_hand.transpose(0, 3, 1, 2), atol=1e-6)


def test_a_rectangle_keeps_its_sides_and_a_square_stays_a_number() -> None:
    square = Preprocessing(image_size=[24, 24], mean=(0, 0, 0), std=(1, 1, 1))  # type: ignore[arg-type]
    assert (square.image_size, square.height, square.width) == (24, 24, 24)
    assert square.to_dict()["image_size"] == 24
    wide = Preprocessing(image_size=(24, 40), mean=(0, 0, 0), std=(1, 1, 1))
    assert (wide.height, wide.width) == (24, 40)
    assert wide.to_dict()["image_size"] == [24, 40]
    assert Preprocessing.from_dict(json.loads(json.dumps(wide.to_dict()))) == wide
    assert wide.resize(_photo(50, 60)).shape == (24, 40, 3)


def test_a_stored_square_has_the_digest_it_always_had() -> None:
    """Artefacts and checkpoints name their files' SHA-256: this text was written before rectangles were known."""
    stored = (
        '{"image_size": 224, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], '
        '"crop_pct": 0.875, "interpolation": "bicubic"}'
    )
    assert json.dumps(Preprocessing.from_dict(json.loads(stored)).to_dict()) == stored


def test_it_loads_no_torch() -> None:
    script = (
        "import sys, numpy as np\n"
        "from convscale.images.preprocess import Preprocessing\n"
        "p = Preprocessing(image_size=4, mean=(0, 0, 0), std=(1, 1, 1))\n"
        "p.normalize_array(np.zeros((1, 4, 4, 3), np.uint8)), p.resize(np.zeros((9, 7, 3), np.uint8))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
