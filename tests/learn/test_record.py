"""A run's folder as a typed value: this version's, an older one's, and ones that can not be read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convscale.errors import UserError
from convscale.images.digest import data_digest
from convscale.images.preprocess import Preprocessing
from convscale.learn.checkpoint import load_checkpoint
from convscale.learn.progress import Event
from convscale.learn.recipe import Recipe
from convscale.learn.record import SCHEMA_VERSION, metric_of, read_train_run
from convscale.learn.train import train
from convscale.networks.pictures import taught_of
from convscale.show.train_report import write_train_report
from tests.learn.nets import CLASSES, halves_data, small_net

OLD_ROW = {"epoch": 1, "train_loss": None, "val_loss": 0.5, "val_top1": 0.75, "val_map": None, "lr": 0.1}
OLD_ROW |= {"images_per_s": 20.0, "wait_share": 0.1, "seconds": 7.5, "skipped_steps": 2}
NEW_ROW = {**OLD_ROW, "epoch": 2, "train_loss": 0.25, "val_top1": 0.5, "images": 90, "train_seconds": 3.0}


def _old_run(folder: Path, rows: list[dict[str, Any]], about: dict[str, Any] | None = None) -> Path:
    """As the first version wrote it: rows without counts of images, checkpoints without a record version."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: mine\nbatch_size: 8\nlr: 1e-3\n")
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoints" / "best-00000012").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000024").mkdir()
    preprocessing = {"image_size": 28, "channels": 1, "mean": [0.5], "std": [0.25], "crop_pct": 1.0}
    values = {"format_version": 1, "classes": ["a", "b"], "preprocessing": preprocessing, "steps_per_epoch": 12}
    values |= {"versions": {"torch": "2.13.0"}, "seed": 3, **(about or {})}
    (folder / "checkpoints" / "step-00000024" / "checkpoint.json").write_text(json.dumps(values))
    (folder / "checkpoints" / "best-00000012" / "checkpoint.json").write_text('{"classes": ["of an older state"]}')
    return folder


def test_a_run_is_read_as_it_was(tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = Recipe(name="x", epochs=2, batch_size=32, augment="none", precision="fp32", layout="nchw")
    data = halves_data()
    run = train(small_net(), data, recipe=recipe, output=tmp_path / "run", seed=4, progress=events.append)
    record = read_train_run(tmp_path / "run")
    assert record.schema_version == SCHEMA_VERSION == 1
    assert list(record.history) == run.history
    assert [*record.history[0]] == [*run.history[0]]  # in the same order, so that a resumed run's log stays the same
    assert [event["kind"] for event in events] == [*["step"] * 3, "epoch"] * 2
    assert (record.recipe, record.seed, record.classes) == (recipe, 4, CLASSES)
    assert record.preprocessing == run.preprocessing
    assert record.best is not None
    assert (metric_of(record.best), record.best["images"]) == (run.best_metric, 96)
    assert set(record.versions) == {"convscale", "torch", "python"}
    assert (record.val_images, record.data_digest) == (len(data.validation), data_digest((data.train, data.validation)))
    for net in (run.net, load_checkpoint(tmp_path / "run", net=small_net()).net):  # what an artefact of it will say
        assert (known := taught_of(net)) is not None
        assert known.data_digest == record.data_digest


def test_an_old_run_is_read(tmp_path: Path) -> None:
    record = read_train_run(_old_run(tmp_path / "run", [OLD_ROW, NEW_ROW]))
    first, second = record.history
    assert math.isnan(first["train_loss"])
    assert (first["images"], first["train_seconds"]) == (96, 4.8)  # 12 steps of 8 at 20 images/s
    assert second == NEW_ROW
    assert record.best == first
    assert record.recipe == Recipe(name="mine", batch_size=8, lr=1e-3)
    assert record.preprocessing == Preprocessing(image_size=28, channels=1, mean=(0.5,), std=(0.25,), crop_pct=1.0)
    assert (record.schema_version, record.classes, record.seed) == (0, ("a", "b"), 3)
    assert record.versions == {"torch": "2.13.0"}
    assert not record.multilabel


def test_an_old_run_is_reported(tmp_path: Path) -> None:
    report = write_train_report(_old_run(tmp_path / "run", [OLD_ROW, NEW_ROW]))
    html = " ".join(report.read_text().split())
    assert "Best on validation: top-1 75.00" in html
    for fact in ("28 px", "a, b", "torch 2.13.0", "convscale train · mine"):
        assert fact in html
    with pytest.raises(UserError, match=r"has neither a fit.json nor a training run's log.jsonl"):
        write_train_report(tmp_path)


def test_several_labels_are_judged_by_mean_average_precision(tmp_path: Path) -> None:
    rows = [{**NEW_ROW, "val_map": 0.4, "val_top1": 0.9}, {**NEW_ROW, "epoch": 3, "val_map": 0.6, "val_top1": 0.1}]
    record = read_train_run(_old_run(tmp_path / "run", rows))
    assert record.multilabel
    assert record.best == rows[1]


def test_a_run_without_an_epoch_is_read(tmp_path: Path) -> None:
    record = read_train_run(_old_run(tmp_path / "run", []))
    assert (record.history, record.best) == ((), None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.jsonl", None, "is no training run's folder: it has no log.jsonl"),
        ("recipe.yaml", None, "is no training run's folder: it has no recipe.yaml"),
        ("log.jsonl", '{"epoch": 1,', "its log can not be read"),
        ("log.jsonl", '{"epoch": "one"}', "its log can not be read .epoch must be a number, got 'one'"),
        ("log.jsonl", "[1]", "its log can not be read .an object was expected"),
        ("recipe.yaml", "lr: [", "its log can not be read"),
        ("recipe.yaml", "learning: 1", "has no key 'learning'"),
        ("checkpoints/step-00000024/checkpoint.json", '{"classes": 3}', "its log can not be read .a list was expected"),
        (
            "checkpoints/step-00000024/checkpoint.json",
            '{"record_version": 2}',
            "record version 2, this convscale reads up",
        ),
    ],
)
def test_what_can_not_be_read_is_one_line(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    folder = _old_run(tmp_path / "run", [NEW_ROW])
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_train_run(folder)
    assert "\n" not in str(caught.value)


def test_reading_loads_no_torch() -> None:
    code = "import sys, convscale.learn.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
