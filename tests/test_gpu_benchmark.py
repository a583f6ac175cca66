"""The one command for a card, run small on a processor: every row is there, in time, and what is left out is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.gpu as gpu


def test_kernels_are_compared_in_three_types_and_both_layouts() -> None:
    rows = list(gpu.correct(gpu.Card("cpu", tiny=True)))
    assert {(row["dtype"], row["layout"]) for row in rows} == {
        (dtype, layout)
        for dtype in ("float32", "float16", "bfloat16")
        for layout in ("channels_last", "contiguous_format")
    }
    allowed = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
    assert all(max(row["relative_error"].values()) < allowed[row["dtype"]] for row in rows)


def test_what_a_stage_had_found_is_kept_and_what_no_time_is_left_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 100.0, 298.0])
    allowed: list[float] = []

    def gather(name: str, options: object, seconds: float) -> tuple[list[dict[str, object]], str]:
        allowed.append(seconds)
        return [{"stage": name, "what": "copy", "gb_per_s": 1.0}], f"stopped after {seconds:.0f} s"

    monkeypatch.setattr(gpu, "gather", gather)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    words = ["gpu", "--device", "cpu", "--only", "ceilings", "infer", "waits", "--output", str(tmp_path / "gpu.jsonl")]
    monkeypatch.setattr("sys.argv", words)
    gpu.main()
    out = capsys.readouterr().out
    assert allowed == [gpu.STAGES["ceilings"], gpu.STAGES["infer"]]
    assert "== ceilings: 1 rows, stopped after 12 s" in out
    assert out.rstrip().endswith("no time was left for: waits")
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["ceilings", "infer"]


def test_without_a_card_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch sees no CUDA GPU here" in done.stderr


def test_predictions_stand_beside_speeds() -> None:
    rows = [
        {"stage": "infer", "model": "resnet50", "images_per_s": 300.0},
        {"stage": "infer", "model": "resnet50", "layout": "nchw", "images_per_s": 70.0},
        {"stage": "compiled", "mode": "infer", "model": "resnet50", "images_per_s": 800.0},
        {"stage": "compiled", "mode": "train", "model": "resnet50", "images_per_s": 10.0},
    ]
    gpu.beside(
        rows,
        {
            "infer": {"resnet50": [100, 200, 400], "resnet50, nchw": [50, 100, 200]},
            "compiled": {"resnet50": [100, 400, 900]},
        },
    )
    assert [row.get("measured_over_predicted") for row in rows] == [1.5, 0.7, 2.0, None]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_a_process_of_ddp_trains_alike() -> None:
    """On a processor, where both must be exact; on a card they say how far apart runs are."""
    card = gpu.Card("cpu", tiny=True)
    assert next(gpu.resume(card)) == {
        "killed_by": 9,
        "resumed": True,
        "largest_loss_difference": 0.0,
        "largest_weight_difference": 0.0,
    }
    assert next(gpu.ddp(card)) == {"processes": 1, "epochs": 2, "largest_relative_loss_difference": 0.0}
