"""Lines on the side: whoever read them is gone, or their disk is full, and what runs goes on, to its own exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from convscale.aside import aside
from convscale.cli.learn import _tell_run
from convscale.learn.progress import LiveProgress

_NUMBERS = ("epoch", "epochs", "images_per_s", "seconds_left", "train_loss", "val_loss", "val_top1", "best")
EPOCH: Any = {**dict.fromkeys(_NUMBERS, 1), "kind": "epoch", "val_map": None}


@pytest.fixture
def unread() -> Iterator[Any]:
    """A stream whose reader is gone."""
    there, here = os.pipe()
    os.close(there)
    stream = open(here, "w", buffering=1, encoding="utf-8")  # noqa: SIM115 - it can not be closed as others are
    yield stream
    with aside():
        stream.close()


def test_a_run_goes_on_when_nobody_reads_its_lines(unread: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """rich ended the process with code 1, before a training that was told to stop had saved its state."""
    before = os.stat(1)
    monkeypatch.setattr(sys, "stderr", unread)
    with LiveProgress() as live:
        live({"kind": "note", "text": "first"})
        live(EPOCH)
        live({"kind": "note", "text": "last"})
    monkeypatch.undo()
    assert os.stat(1) == before  # rich sends standard output nowhere, which another may still read


TELLER = """
import sys
from convscale.cli.app import main
from convscale.cli import app
from convscale.cli.options import say
from convscale.errors import Stopped

def command(**_):
    say("a note", err=True)
    print("a result")
    {ends}

app.app = command
main()
"""


@pytest.mark.parametrize(
    ("ends", "code"),
    [("raise Stopped('told to stop')", 130), ("raise KeyboardInterrupt", 130), ("return 3", 3), ("pass", 0)],
)
@pytest.mark.parametrize("where", ["gone", "full"])
def test_lines_on_the_side_are_not_the_exit_code(ends: str, code: int, where: str) -> None:
    if where == "gone":
        there, error = os.pipe()
        os.close(there)
    elif Path("/dev/full").exists():
        error = os.open("/dev/full", os.O_WRONLY)
    else:
        pytest.skip("no /dev/full on this system")
    command = [sys.executable, "-c", TELLER.format(ends=ends)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=error, timeout=240, check=False)
    os.close(error)
    assert (done.returncode, done.stdout) == (code, b"a result\n")


def test_a_stopped_training_ends_as_one_when_nobody_reads_its_result(
    unread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: Any = SimpleNamespace(describe=lambda: "top-1 89.80 %")
    monkeypatch.setattr(sys, "stdout", unread)
    with aside():
        _tell_run(run, Path("x"), False)
    unread.flush()  # nothing is held that would fail once more at the end
    with pytest.raises(BrokenPipeError):
        _tell_run(run, Path("x"), False)


def test_other_errors_are_none_of_it() -> None:
    with pytest.raises(ValueError, match=r"^no number$"), aside():
        raise ValueError("no number")
    with pytest.raises(typer.Exit), aside():
        raise typer.Exit(3)
