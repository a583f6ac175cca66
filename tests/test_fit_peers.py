"""The benchmark of ``fit`` beside an expert: what it does where there is nothing to compare."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fit_peers


def test_a_split_on_which_no_released_network_keeps_the_speed_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``fit`` took a scaled network, which nobody probed."""
    trained: list[str] = []

    def run_fit(*given: Any) -> dict[str, Any]:
        trained.append("fit")
        return {"sizes": {}, "seconds": 1.0}

    monkeypatch.setattr(fit_peers, "split_of", lambda *given, **options: None)
    monkeypatch.setattr(fit_peers, "write_manifest", lambda *given: None)
    monkeypatch.setattr(fit_peers, "run_fit", run_fit)
    monkeypatch.setattr(fit_peers, "run_timm_tuned", lambda *given: pytest.fail("timm was trained"))
    assert fit_peers.run_split("icons", 0, tmp_path, 100.0, argparse.Namespace()) is None
    monkeypatch.setattr(fit_peers, "weights_folder", lambda folder: folder)
    monkeypatch.setattr(fit_peers, "speed_asked", lambda *given: 123.0)
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(
        sys, "argv", ["fit_peers", "--sets", "icons", "--splits", "2", "--output", str(output), "--threads", "1"]
    )
    fit_peers.main()
    told = capsys.readouterr()
    assert [line.partition(";")[0] for line in told.err.splitlines()] == [
        f"icons {seed}: left out, fit found no released network that keeps 123 images/s" for seed in (0, 1)
    ]
    assert trained == ["fit"] * 3
    assert not output.exists()
    assert fit_peers.published_best({fit_peers.TAGS[0]: 96, fit_peers.TAGS[1]: 64}) == fit_peers.TAGS[1]
