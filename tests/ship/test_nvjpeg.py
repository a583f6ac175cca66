"""JPEGs decoded on a GPU, by a stand-in: torchvision's decoder on the processor, a few values brighter."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from convscale.errors import MissingExtra, UserError
from convscale.images.decode import MAX_PIXELS
from convscale.ship.nvjpeg import is_plain
from convscale.ship.stream import classify, classify_stream
from tests.ship.test_stream import Colours, colour

ORIENTATION = 0x0112


class OnCard(Colours):
    """Colours, opened on a GPU."""

    device = "cuda:1"
    is_detector = False


class Card:
    """What is in torchvision's place."""

    def __init__(self, brighter: int = 0) -> None:
        self.brighter = brighter
        self.calls: list[int] = []
        self.lasts = 1_000
        """Calls that it answers."""
        self.decode = torchvision.io.decode_jpeg

    def __call__(self, files: list[torch.Tensor], *, mode: Any, device: str) -> list[torch.Tensor]:
        assert device == "cuda:1"
        assert mode == torchvision.io.ImageReadMode.RGB
        if len(self.calls) >= self.lasts:
            raise RuntimeError("torchvision not compiled with nvJPEG support\nmore")
        self.calls.append(len(files))
        return [(self.decode(file, mode=mode).int() + self.brighter).clamp(0, 255).byte() for file in files]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    monkeypatch.setattr(torchvision.io, "decode_jpeg", made)
    monkeypatch.setattr("convscale.ship.nvjpeg.need_cuda", lambda *_: None)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine pictures of one colour each: JPEGs, but a PNG, a turned one, one that is cut off and one with inks."""
    place = tmp_path / "photos"
    place.mkdir()
    for i in range(9):
        Image.new("RGB", (16, 16), colour(i)).save(place / f"{i}.{'png' if i == 1 else 'jpg'}", quality=95)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (16, 16), colour(3)).save(place / "3.jpg", exif=exif)
    (place / "5.jpg").write_bytes((place / "5.jpg").read_bytes()[:-6])
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(place / "6.jpg")
    return place


def named(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.iterdir())


def run(folder: Path, artifact: Any, decode: str = "nvjpeg") -> tuple[list[str], list[str]]:
    """Lines of the output, and what was told."""
    told: list[str] = []
    output = folder.parent / f"{decode}.csv"
    classify(named(folder), artifact, output, decode=decode, on_note=told.append, overwrite=True)
    return output.read_text().splitlines(), told


def test_plain_jpegs_are_decoded_on_the_card_a_batch_at_a_time(folder: Path, card: Card) -> None:
    mine, told = run(folder, OnCard())
    usual, nothing = run(folder, OnCard(), "cpu")
    assert mine == usual
    assert mine[6].split(",")[0].endswith("5.jpg")
    assert [bool(line.split(",")[-1]) for line in mine[1:]] == [number == 5 for number in range(9)]  # what is wrong
    # batches of 4: 0 2 (PNG and the turned one left out), 4 7 (the cut off and inks), 8; a trial before the first
    assert card.calls == [1, 2, 2, 1]
    assert told == [
        "decoded by nvJPEG: in the first batch pixels differ from the usual decoder's by up to 0 of 255 (0.00 in the "
        "mean), and 0 of 2 answers change"
    ]
    assert nothing == []


def test_how_far_pixels_are_off_and_what_that_changes_is_said_of_the_first_batch(folder: Path, card: Card) -> None:
    card.brighter = 60  # of 200, 50, 0 and 0, 50, 200: the first channel stays first, the last becomes no other
    _, told = run(folder, OnCard())
    (line,) = told
    assert "differ from the usual decoder's by up to 60 of 255" in line
    assert "0 of 2 answers change" in line
    several = OnCard()
    several.thresholds = (0.5, 0.5, 0.5)  # (200, 50, 0): 0.8 is above, (255, 110, 60): 0.6; (0, 50, 200): 0.8 and 0.54
    card.brighter = 110  # (255, 160, 110): 0.49
    _, told = run(folder, several)
    assert "2 of 2 answers change" in told[0]


@pytest.mark.parametrize(
    ("lasts", "told"),
    [
        (1, "nvJPEG gave the first batch up (torchvision not compiled with nvJPEG support); the processor decodes it"),
        (2, "decoded by nvJPEG: "),
    ],
)
def test_what_the_card_gives_up_the_processor_decodes(lasts: int, told: str, folder: Path, card: Card) -> None:
    """The trial is the first call, the first batch the second."""
    card.lasts = lasts
    mine, lines = run(folder, OnCard())
    assert mine == run(folder, OnCard(), "cpu")[0]
    assert card.calls == [1, 2][:lasts]
    assert [line[: len(told)] for line in lines] == [told]


def test_what_is_not_there_is_told_in_one_line(
    folder: Path, card: Card, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(artifact: Any, message: str, decode: str = "nvjpeg") -> None:
        with pytest.raises(UserError, match=message):
            classify(named(folder), artifact, tmp_path / "rows.csv", decode=decode)
        assert not (tmp_path / "rows.csv").exists()

    refused(OnCard(), "decode 'gpu' is unknown", "gpu")
    here = OnCard()
    here.device = "cpu"
    refused(here, r"works on a GPU, and the artefact is opened on cpu; give device 'cuda' \(--device cuda\), or leave")
    boxes = OnCard()
    boxes.is_detector = True
    refused(boxes, "is for classifiers, and this is a detector")
    card.lasts = 0
    refused(OnCard(), r"this torchvision can not \(torchvision not compiled with nvJPEG support\); leave it out")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        refused(OnCard(), "device 'cuda:1' is not there: torch sees no CUDA GPU; leave decode 'nvjpeg' out")
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(MissingExtra, match="decode 'nvjpeg' needs torchvision"):
        classify(named(folder), OnCard(), tmp_path / "rows.csv", decode="nvjpeg")  # type: ignore[arg-type]


def encoded(mode: str = "RGB", size: tuple[int, int] = (16, 16), **options: Any) -> bytearray:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format=options.pop("format", "JPEG"), **options)
    return bytearray(file.getvalue())


def test_what_is_plain() -> None:
    turned = Image.Exif()
    turned[ORIENTATION] = 3
    plain = encoded()
    assert is_plain(plain, MAX_PIXELS)
    assert is_plain(encoded("L"), MAX_PIXELS)
    assert is_plain(encoded(exif=Image.Exif()), MAX_PIXELS)
    assert not is_plain(encoded("CMYK"), MAX_PIXELS)
    assert not is_plain(encoded(format="PNG"), MAX_PIXELS)
    assert not is_plain(encoded(exif=turned), MAX_PIXELS)
    assert not is_plain(plain[:-2], MAX_PIXELS)
    assert not is_plain(plain, 255)
    for transform, expected in ((0, False), (1, True)):  # stored as red, green and blue, or as luma and chroma
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + bytes([transform])
        assert is_plain(plain[:2] + adobe + plain[2:], MAX_PIXELS) is expected


def test_without_it_nothing_is_asked_of_the_card(folder: Path, card: Card) -> None:
    assert len(list(classify_stream(named(folder), OnCard()))) == 9  # type: ignore[arg-type]
    assert card.calls == []
