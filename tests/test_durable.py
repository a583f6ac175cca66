"""What is written outlives a power cut: every file is flushed before the rename that shows it, its folder after."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from convscale.files import whole_folder, write_text


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Flushes (by inode) and renames (by the name that they give), in order; both still happen."""
    events: list[tuple[str, object]] = []

    def watched(name: str, what: Callable[..., object]) -> Callable[..., None]:
        real = getattr(os, name)

        def call(*args: object) -> None:
            events.append((name, what(*args)))
            real(*args)

        return call

    monkeypatch.setattr(os, "fsync", watched("fsync", lambda fd: os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "replace", watched("replace", lambda _source, target: Path(target).name))
    return events


def _inode(path: Path) -> int:
    return path.stat().st_ino


def test_a_file_is_flushed_then_renamed_then_its_folder_is_flushed(
    tmp_path: Path, told: list[tuple[str, object]]
) -> None:
    write_text(tmp_path / "fit.json", "{}")
    assert told == [("fsync", _inode(tmp_path / "fit.json")), ("replace", "fit.json"), ("fsync", _inode(tmp_path))]


def test_a_folder_is_flushed_file_by_file_before_it_takes_its_name(
    tmp_path: Path, told: list[tuple[str, object]]
) -> None:
    target = tmp_path / "runs" / "artifact"
    with whole_folder(target) as place:
        (place / "deeper").mkdir()
        (place / "model.onnx").write_bytes(b"x")
        (place / "deeper" / "weights").write_bytes(b"y")
    shown = told.index(("replace", "artifact"))
    files = {_inode(target / "model.onnx"), _inode(target / "deeper" / "weights")}
    assert files | {_inode(target)} <= {inode for kind, inode in told[:shown] if kind == "fsync"}
    assert told[shown + 1 :] == [("fsync", _inode(target.parent))]


def test_a_checkpoint_is_flushed_before_it_takes_its_name(tmp_path: Path, told: list[tuple[str, object]]) -> None:
    from convscale.images.preprocess import Preprocessing
    from convscale.learn.checkpoint import save_checkpoint
    from tests.learn.nets import CLASSES, small_net

    target = tmp_path / "checkpoints" / "step-00000001"
    preprocessing = Preprocessing(image_size=12, channels=1, mean=(0.5,), std=(0.25,))
    save_checkpoint(target, small_net(), classes=CLASSES, preprocessing=preprocessing, state={"step": 1})
    written = sorted(path.name for path in target.iterdir())
    assert written == ["SHA256SUMS", "checkpoint.json", "model.safetensors", "state.json", "state.safetensors"]
    shown = told.index(("replace", target.name))
    flushed = {inode for kind, inode in told[:shown] if kind == "fsync"}
    assert {_inode(path) for path in (target, *target.iterdir())} <= flushed
    assert ("fsync", _inode(target.parent)) in told[shown:]
