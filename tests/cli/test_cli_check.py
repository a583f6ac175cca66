"""The command ``check``, from files to printed lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLUMNS = 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 11, 1 and 1 pictures; one of train is in test as well."""
    for number in range(26):
        split, name = "train" if number < 22 else "val" if number < 24 else "test", "ab"[number % 2]
        path = tmp_path / "photos" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
    copy = tmp_path / "photos" / "test" / "a" / "copy.png"
    copy.write_bytes((tmp_path / "photos" / "train" / "a" / "4.png").read_bytes())
    return tmp_path / "photos"


def test_warnings_are_lines(call: Any, folder: Path) -> None:
    code, out, err = call("check", folder, "--img-size", "32")
    assert (code, err) == (0, "")
    first, *warnings, last = out.splitlines()
    assert first == "22 train, 2 validation, 3 test images, 2 classes"
    assert warnings == [
        "warning: 1 pair of the same picture in two splits, where results are too good for it (1 equal, 0 alike): "
        f"{folder}/train/a/4.png (train) and {folder}/test/a/copy.png (test)",
        "warning: 100 % of 22 train images looked at are smaller than the input of 32 px: enlarging them adds time, no "
        "detail; try a smaller input",
    ]
    assert last.startswith("compared: the contents of 27 and the looks of 27 of 27 images (evenly taken), in ")


def test_json(call: Any, folder: Path) -> None:
    code, out, err = call("check", folder, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["classes"] == ["a", "b"]
    assert (found["train"], found["largest_class"], found["sizes"]) == (22, {"name": "a", "images": 11}, None)
    assert found["duplicates"]["across_splits"]["examples"] == [
        {
            "first": {"split": "train", "name": str(folder / "train" / "a" / "4.png"), "label": "a"},
            "second": {"split": "test", "name": str(folder / "test" / "a" / "copy.png"), "label": "a"},
            "exact": True,
        }
    ]
    assert len(found["warnings"]) == 1


def test_nothing_to_warn_about(call: Any, folder: Path) -> None:
    (folder / "test" / "a" / "copy.png").unlink()
    code, out, _ = call("check", folder, "--img-size", "20")
    assert code == 0
    assert "nothing to warn about" in out
    assert "warning" not in out


def test_bad_input(call: Any, folder: Path) -> None:
    code, out, err = call("check", folder / "nothing")
    assert (code, out) == (2, "")
    assert "does not exist" in err
    code, _, err = call("check", folder, "--img-size", "0")
    assert code == 2
    assert "image_size must be a whole number" in err
