"""Two gloo processes train a detector as one does on the same global batch, and judge it together."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import convscale as cs
from convscale.learn.recipes import get_recipe
from convscale.learn.train import TrainRun
from tests.detect.sets import coco_set, small_spec

PLAIN = {"optimizer": "sgd", "lr": 0.02, "weight_decay": 1e-4, "ema_decay": 0.9, "precision": "fp32", "epochs": 2}
"""Not AdamW, which makes a full step of the smallest difference."""


def learnt(file: Path, batch_size: int, output: Path | None = None) -> TrainRun:
    """RetinaNet, whose loss is a mean over pictures; FCOS divides by the batch's own number of positive places."""
    recipe = get_recipe("detect-small").override({**PLAIN, "batch_size": batch_size})
    small = {"neck_width": 64, "head_depth": 1, "score_threshold": 0.001}
    return cs.train_detector(
        small_spec(), file, head="retinanet", recipe=recipe, image_size=64, detector=small, output=output, workers=0
    )


def summary(run: TrainRun) -> dict[str, Any]:
    weights = {name.replace("norm.", ""): value for name, value in run.net.state_dict().items()}
    return {"weights": weights, "history": [(row["train_loss"], row["val_map"]) for row in run.history]}


def work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    run = learnt(Path(folder) / "set" / "all.json", 2, Path(folder) / "run")
    torch.save(summary(run), Path(folder) / f"{rank}.pt")


def test_two_processes_equal_one_on_the_same_global_batch(tmp_path: Path) -> None:
    """A third of the pictures has no box, so that now and then one process has background alone."""
    file = coco_set(tmp_path / "set", 40)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    single = summary(learnt(file, 4))
    assert first["weights"].keys() == single["weights"].keys()
    for name, value in single["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name]), name
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)
    for mine, reference in zip(first["history"], single["history"], strict=True):
        assert mine[0] == pytest.approx(reference[0], rel=1e-4)
        assert mine[1] == pytest.approx(reference[1], abs=2e-3)
    assert single["history"][1][1] > 0.005
    assert (tmp_path / "run" / "detection.json").is_file()
