"""How ``convscale fit`` ends: its last line, and the exit code of a miss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from convscale.cli.fit import _finish
from convscale.errors import UserError
from convscale.pipeline.run import FitRun
from convscale.show.fit_record import fit_record
from tests.show.example import fit_record as example


def _run(missed: str | None = None, **evaluation: Any) -> FitRun:
    record = example() | {"missed": missed}
    record["evaluation"] |= evaluation
    nothing: Any = None
    return FitRun(output=Path("runs/a"), net=nothing, artifact=nothing, result=fit_record(record))


def test_the_last_line_has_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    _finish(_run(), as_json=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "92.08 % of 10,000 test images right (95 % interval 91.5 % to 92.6 %); artefact runs/a/artifact" in said
    _finish(_run(mean_average_precision=0.9), as_json=False)
    assert "mean average precision on 10,000 test images; artefact" in " ".join(capsys.readouterr().out.split())


def test_strict_refuses_what_came_out_too_slow(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end:
        _finish(_run("it is too slow"), as_json=False)
    assert end.value.exit_code == 3
    message = "it is too slow; --strict refuses it, the artefact stays in runs/a/artifact"
    for as_json in (False, True):
        with pytest.raises(UserError, match=message):
            _finish(_run("it is too slow"), as_json=as_json, strict=True)
    _finish(_run(), as_json=False, strict=True)
