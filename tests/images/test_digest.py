"""What a data set is known by: the same wherever it is named from, and by what earlier versions wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from convscale.images.digest import data_digest, is_digest_of
from convscale.images.splits import ArraySplit, FileSplit

CLASSES = ("x", "y")
NAMES = ("a.jpg", "b.jpg", "more/c.jpg")


def _files(folder: str, names: tuple[str, ...] = NAMES) -> FileSplit:
    labels = torch.tensor([0, 1, 1])
    return FileSplit(
        split="train", classes=CLASSES, labels=labels, channels=3, paths=tuple(str(Path(folder) / n) for n in names)
    )


def _as_written(names: list[str]) -> str:
    """By the bytes that go in."""
    found = hashlib.sha256(repr(("train", 3, CLASSES)).encode() + torch.tensor([0, 1, 1]).numpy().tobytes())
    found.update("".join(f"{name}\n" for name in names).encode())
    return found.hexdigest()[:16]


def test_a_set_has_one_digest_wherever_it_is_named_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "set"
    (place / "more").mkdir(parents=True)
    wanted = _as_written(["set/a.jpg", "set/b.jpg", "more/c.jpg"])
    for here, folder in ((place, "."), (place, "../set"), (tmp_path, "set"), (tmp_path, str(place))):
        monkeypatch.chdir(here)
        assert data_digest([_files(folder)]) == wanted
    monkeypatch.chdir(tmp_path)
    assert data_digest([_files("other")]) != wanted
    pixels = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    held = ArraySplit(split="train", classes=CLASSES, labels=torch.tensor([0, 1, 1]), channels=3, pixels=pixels)
    assert data_digest([held]) == _as_written(["train#0", "train#1", "train#2"])


def test_what_an_earlier_version_wrote_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named from within its folder, a set was without that folder's name."""
    before = _as_written(["a.jpg", "b.jpg", "more/c.jpg"])
    place = tmp_path / "set"
    place.mkdir()
    for here, folder in ((place, "."), (tmp_path, "set"), (tmp_path, str(place))):
        monkeypatch.chdir(here)
        assert data_digest([_files(folder)], older=True) == before
        assert is_digest_of(before, [_files(folder)])
        assert is_digest_of(data_digest([_files(folder)]), [_files(folder)])
        assert not is_digest_of(before, [_files(folder, ("a.jpg", "c.jpg", "more/c.jpg"))])
        assert not is_digest_of(None, [_files(folder)])
