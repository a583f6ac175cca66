"""Bad files on the command line: listed by check, allowed up to a rate."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscale.errors import UserError
from convscale.images.check import check_data
from convscale.images.sources import open_dataset

COLUMNS = 400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 20; three files are empty, two cut off in their pixels."""
    place, random = tmp_path / "data", np.random.default_rng(0)
    for number in range(40):
        path = place / "ab"[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        out = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(out, "PNG")
        whole = out.getvalue()
        path.write_bytes(b"" if number in (3, 10, 20) else whole[:400] if number in (7, 8) else whole)
    (place / "a" / ".hidden.png").touch()
    return place


def test_check_lists_every_bad_file(call, folder: Path) -> None:
    code, out, err = call("check", folder)
    assert code == 0, err
    listed = [line.split(": ")[1] for line in out.splitlines() if line.startswith("bad: ")]
    assert sorted(Path(name).name for name in listed) == ["03.png", "07.png", "08.png", "10.png", "20.png"]
    assert f"note: left out: hidden or system files: 1 (first: {folder}/a/.hidden.png)" in out
    found = json.loads(call("check", folder, "--json")[1])
    assert len(found["bad"]) == 5
    assert found["left_out"]["left_out"][0]["count"] == 1


@pytest.mark.parametrize("whole", [False, True])
def test_check_lists_the_files_where_none_of_a_class_or_a_set_can_be_read(call, folder: Path, whole: bool) -> None:
    for path in folder.glob("*/*.png" if whole else "b/*.png"):
        path.write_bytes(b"")
    code, out, err = call("check", folder)
    assert (code, err) == (0, "")
    listed = {line.split(": ")[1] for line in out.splitlines() if line.startswith("bad: ")}
    assert {str(path) for path in folder.glob("b/*.png")} < listed
    assert len(listed) == (40 if whole else 20 + 3)
    assert out.startswith("0 train, 0 validation, 0 test images, 2 classes\n") == whole
    with pytest.raises(UserError, match="no readable image is left of" if not whole else "no readable image"):
        open_dataset(folder, max_bad_rate=1.0)


def test_check_lists_files_whose_headers_alone_are_whole(call, folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    code, out, err = call("check", folder)
    assert (code, err) == (0, "")
    assert sum(line.startswith("bad: ") for line in out.splitlines()) == 40


def test_a_quick_check_decodes_fewer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convscale.images import check

    monkeypatch.setattr(check, "MOST_DECODED", 2)
    splits = open_dataset(folder, max_bad_rate=1.0)
    assert len(check_data(splits).bad) < 5
    assert len(check_data(splits, every=True).bad) == 5


def test_the_rate_travels_with_the_data(folder: Path) -> None:
    with pytest.raises(UserError, match=r"3 of 40 train images \(7.5%\) are unreadable"):
        open_dataset(folder)
    splits = open_dataset(folder, max_bad_rate=0.08)
    assert splits.max_bad_rate == 0.08
    assert len(splits.unreadable) == 3
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"max_bad_rate is .*; it must be a share from 0 to 1"):
            open_dataset(folder, max_bad_rate=rate)


@pytest.mark.parametrize("command", ["train", "fit", "classify"])
def test_the_rate_is_an_option(call, folder: Path, tmp_path: Path, command: str) -> None:
    arguments = {
        "train": ("--model", "resnet18", "--data-dir", folder, "--output", tmp_path / "run"),
        "fit": ("--data-dir", folder, "--output", tmp_path / "run"),
        "classify": (folder, "--model", tmp_path),
    }[command]
    code, _, err = call(command, *arguments, "--max-bad-rate", "2")
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "it must be a share from 0 to 1" in err
