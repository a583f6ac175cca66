"""The one command for a card, run small on a processor: every row is there, in time, and what is left out is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.gpu as gpu


def run(*words: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", *words]
    return subprocess.run(
        [*command, "--output", str(tmp_path / "gpu.jsonl")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_correctness_is_looked_at_and_what_no_time_is_left_for_is_named(tmp_path: Path) -> None:
    done = run("--only", "correct", "steps", "--budget", "8", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {(row["dtype"], row["layout"]) for row in rows if row["stage"] == "correct"} <= {
        (dtype, layout)
        for dtype in ("float32", "float16", "bfloat16")
        for layout in ("channels_last", "contiguous_format")
    }
    allowed = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 5e-3}
    assert all(max(row["relative_error"].values()) < allowed[row["dtype"]] for row in rows if "dtype" in row)
    assert "== correct" in done.stdout
    assert "== steps" in done.stdout or "no time was left for: steps" in done.stdout


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
        {"stage": "compiled", "mode": "infer", "model": "resnet50", "images_per_s": 800.0},
        {"stage": "compiled", "mode": "train", "model": "resnet50", "images_per_s": 10.0},
    ]
    gpu.beside(rows, {"infer": {"resnet50": [100, 200, 400]}, "compiled": {"resnet50": [100, 400, 900]}})
    assert [row.get("measured_over_predicted") for row in rows] == [1.5, 2.0, None]
