"""Bad files on the command line: listed by check, allowed up to a rate."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convscale.errors import UserError
from convscale.images.check import check_data
from convscale.images.preprocess import Preprocessing
from convscale.images.sources import open_dataset
from convscale.learn.checkpoint import load_checkpoint, save_checkpoint
from convscale.learn.loader import readable
from convscale.nn.net import create_model
from tests.detect.sets import coco_set, cut_off, small_detector, small_spec

COLUMNS = 400


OLD = Path(__file__).parent.parent / "old_files" / "v0_1" / "artefacts" / "onnx_fp32"


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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    net = create_model(small_spec(), num_classes=2)
    how = Preprocessing(image_size=64, mean=(0.5,) * 3, std=(0.25,) * 3)
    return save_checkpoint(tmp_path / "step-1", net, classes=("a", "b"), preprocessing=how)


def test_what_was_trained_with_a_rate_is_evaluated_with_it(call, folder: Path, checkpoint: Path) -> None:
    options = ("evaluate", checkpoint, "--data-dir", folder, "--split", "all", "-j", 0, "--json")
    code, _, err = call(*options)
    assert code == 2
    assert "3 of 40" in err
    code, out, err = call(*options, "--max-bad-rate", 0.08)
    assert code == 0, err
    assert json.loads(out)["n"] == 35  # two are cut off in their pixels
    code, _, err = call(*options, "--max-bad-rate", 2)
    assert (code, err.strip()) == (2, "convscale: max_bad_rate is 2.0; it must be a share from 0 to 1")
    cut_off(folder / "a" / "12.png", folder / "b" / "13.png")  # headers are sound: seen once they are decoded
    code, _, err = call(*options, "--max-bad-rate", 0.08)
    assert code == 2
    assert "4 of 37 all images (10.8%) can not be decoded, at most 8.0% may be; first: " in err
    assert json.loads(call(*options, "--max-bad-rate", 0.11)[1])["n"] == 33


def test_what_was_trained_with_a_rate_is_exported_with_it(
    call, folder: Path, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*_: object, **options: Any) -> None:
        raise UserError(f"{len(options['verify_labels'])} images of the test set")

    monkeypatch.setattr("convscale.ship.export.export", export)
    options = ("export", checkpoint, "--output", tmp_path / "art")
    data, rate = ("--data-dir", folder), ("--max-bad-rate", 0.3)
    code, _, err = call(*options, *data)
    assert code == 2
    assert "3 of 40 train images (7.5%) are unreadable" in err
    code, _, err = call(*options, *data, *rate)
    held = readable(open_dataset(folder, max_bad_rate=0.3).test, load_checkpoint(checkpoint).preprocessing)[0]
    assert err.splitlines()[-1] == f"convscale: {len(held)} images of the test set"
    code, _, err = call(*options, *rate)
    assert (code, err.strip()) == (2, "convscale: --max-bad-rate is of the images of --data-dir; give both, or neither")


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_detectors_pictures_may_be_as_bad_as_is_said(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    file = coco_set(tmp_path / "set", 12)
    for number in (1, 2):
        (tmp_path / "set" / "images" / f"{number}.png").unlink()
    how = Preprocessing(image_size=64, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_checkpoint(tmp_path / "step-1", small_detector(), classes=("red", "green"), preprocessing=how)

    def stop(*_: object, **__: object) -> None:
        raise UserError("enough")

    monkeypatch.setattr("convscale.detect.evaluate.evaluate_detector", stop)
    monkeypatch.setattr("convscale.ship.export.export", stop)
    output = ("--output", tmp_path / "art") if command == "export" else ()
    options = (command, tmp_path / "step-1", "--data-dir", file, *output)
    code, _, err = call(*options)
    assert code == 2
    assert "2 of 12 pictures can not be used, at most 1.0% may be" in err
    assert call(*options, "--max-bad-rate", 0.2)[2].splitlines()[-1] == "convscale: enough"


@pytest.mark.skipif(sys.platform != "linux", reason="names are any bytes on Linux alone")
@pytest.mark.parametrize("command", ["classify", "explain"])
def test_names_that_are_no_utf8_come_in_by_a_list(
    command: str, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They met a traceback: standard input is strict, where the locale is neither C nor POSIX."""
    name = os.fsencode(tmp_path) + b"/a\xff.png"
    out = io.BytesIO()
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(out, "PNG")
    Path(os.fsdecode(name)).write_bytes(out.getvalue())
    given = io.TextIOWrapper(io.BytesIO(name + b"\n"), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdin", given)
    output, rows = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl"
    if command == "explain":
        output = tmp_path / "maps"
        rows = output / "maps.jsonl"
    code, _, err = call(command, "-", "--model", OLD, "--output", output)
    assert code == 0, err
    row = json.loads(rows.read_text())
    assert (os.fsencode(row["path"]), "error" in row) == (name, False)


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_pictures_of_a_detector_that_end_in_the_middle_count_too(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    place = tmp_path / "set"
    file = coco_set(place, 12)
    for split in ("train", "test"):
        file.with_name(f"{split}.json").write_text(file.read_text())
    file.unlink()
    cut_off(place / "images" / "1.png", place / "images" / "2.png")
    how = Preprocessing(image_size=64, mean=(0.5,) * 3, std=(0.25,) * 3)
    save_checkpoint(tmp_path / "step-1", small_detector(), classes=("red", "green"), preprocessing=how)

    def export(*_: object, verify_labels: list[object], **__: object) -> None:
        raise UserError(f"{len(verify_labels)} pictures")

    monkeypatch.setattr("convscale.ship.export.export", export)
    more = ("--output", tmp_path / "art") if command == "export" else ("-j", 0, "--json")
    options = (command, tmp_path / "step-1", "--data-dir", place, *more)
    code, _, err = call(*options)
    assert code == 2
    assert "2 of 12 test images (16.7%) can not be decoded, at most 1.0% may be; first: " in err
    _, out, err = call(*options, "--max-bad-rate", 0.2)
    if command == "evaluate":
        assert json.loads(out)["n"] == 10
        return
    assert err.splitlines()[-1] == "convscale: 10 pictures"
    assert sum(line.startswith("left out: ") for line in err.splitlines()) == 2
