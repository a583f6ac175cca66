"""Exit codes: 2 for bad input, 130 for a run that was told to stop or interrupted, one line each."""

from __future__ import annotations

import subprocess
import sys

import pytest

from convscale.cli import app as cli
from convscale.errors import Stopped, UserError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("no such model"), 2, "convscale: no such model"),
        (Stopped("told to stop"), 130, "convscale: told to stop"),
        (KeyboardInterrupt(), 130, "convscale: interrupted"),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object"),
            2,
            "convscale: out of memory; a smaller batch, image size or network would be right",
        ),
    ],
)
def test_what_ends_a_command(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", command)
    monkeypatch.setattr(sys, "argv", ["convscale"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    said = capsys.readouterr()
    assert (said.out, said.err.strip()) == ("", line)


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("recipes nosuch >&-", 2, "convscale: recipe 'nosuch' is unknown"),
        ("recipes small >&-", 0, ""),
        ("recipes nosuch 2>&-", 2, ""),
        ("recipes small <&- >&- 2>&-", 0, ""),
    ],
)
def test_a_closed_standard_stream_is_no_failure(command: str, code: int, said: str) -> None:
    run = [sys.executable, "-m", "convscale"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {command}', "sh", *run], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)
