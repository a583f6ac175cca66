"""The line on a terminal that says how long something will take."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convscale.cli import classify as classify_module
from convscale.cli import live
from convscale.cli.live import Live, count_aside, progress_line
from convscale.errors import UserError

OLD = Path(__file__).parent.parent / "old_files" / "v0_1" / "artefacts" / "onnx_fp32"
COLUMNS = 200


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_time_left_is_by_what_is_done_here() -> None:
    # 500 in 100 s: 9,500 more take 1,900 s; of 4,500 more after 5,000 that were there, 900 s
    assert progress_line("images", 500, 10_000, 100) == "   500 of 10,000 images, 31 min 40 s left"
    assert progress_line("images", 500, 10_000, 100, kept=5_000, more=", 3 bad") == (
        " 5,500 of 10,000 images, 3 bad, 15 min 00 s left"
    )
    assert progress_line("images", 1_500, None, 100, more=", 0 bad") == "1,500 images, 0 bad"
    assert progress_line("images", 12, 10, 100) == "12 of 10 images, 0 s left"  # some came while they were counted


def test_the_line_covers_what_a_longer_one_left_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], Terminal()
    monkeypatch.setattr("sys.stderr", told)
    line = Live("images", 1_000, clock=lambda: now[0])

    def after(seconds: float, count: int) -> str:
        told.seek(0)
        told.truncate()
        now[0] += seconds
        line(count)
        return told.getvalue()

    first = after(10, 100)
    assert first == "\r  100 of 1,000 images, 1 min 30 s left"
    assert after(0.1, 101) == ""  # not so often
    later = after(10, 900)
    assert later.rstrip() == "\r  900 of 1,000 images, 2 s left"
    assert len(later) == len(first)
    assert after(1, 1_000) == f"\r{' ' * (len(first) - 1)}\r"
    assert after(1, 0) == ""  # once more, from the start
    assert after(10, 500) == "\r  500 of 1,000 images, 10 s left"
    line.end()
    assert told.getvalue().endswith("\r")
    line.end()
    monkeypatch.setattr("sys.stderr", quiet := io.StringIO())
    now[0] += 10
    line(600)
    assert quiet.getvalue() == ""


def test_a_count_that_fails_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())

    def fails() -> list[str]:
        raise UserError("there is none")

    monkeypatch.setattr(live.threading.Thread, "start", lambda thread: thread.run())
    assert count_aside(fails)() is None
    assert count_aside(lambda: ["a", "b"])() == 2


def test_classify_counts_what_an_earlier_run_did(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = tmp_path / "photos", tmp_path / "rows.csv"
    folder.mkdir()
    for number in range(7):
        Image.fromarray(np.full((28, 28), 30 * number, np.uint8)).save(folder / f"{number}.png")
    monkeypatch.setattr(live, "_is_terminal", lambda: True)
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    monkeypatch.setattr(classify_module, "count_aside", lambda things: lambda: sum(1 for _ in things()))
    ask = ("classify", folder, "--model", OLD, "--output", rows, "-b", 2)
    code, _, err = call(*ask)
    counts = [part.partition(" of 7 images, 0 bad, ")[0] for part in err.split("\r") if " of 7 images" in part]
    assert (code, counts) == (0, ["2", "4", "6"])
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:4]))  # a header and three rows
    code, _, err = call(*ask, "--resume")
    counts = [part.partition(" of 7 images, 0 bad, ")[0] for part in err.split("\r") if " of 7 images" in part]
    assert (code, counts) == (0, ["5"])
    assert "s left" in err


def test_an_error_does_not_stand_behind_a_count(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, on_kept: object = None, **__: object) -> None:
        line = Live("images", 9)
        line(2)
        raise UserError("the disk is full")

    monkeypatch.setattr(live, "_is_terminal", lambda: True)
    monkeypatch.setattr(live, "EVERY_S", 0.0)
    monkeypatch.setattr(classify_module, "Live", fails)
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "a.png")
    code, _, err = call("classify", tmp_path, "--model", OLD)
    assert code == 2
    shown, gone, said = err.split("\r")[-3:]
    assert "2 of 9 images" in shown
    assert gone == " " * len(shown)
    assert said == "convscale: the disk is full\n"
