"""From files to trained weights: folders, several labels per image, weights to start from, a teacher."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convscale.errors import UserError
from convscale.images.sources import open_dataset
from convscale.learn.checkpoint import load_checkpoint
from convscale.learn.evaluate import evaluate, predict_split
from convscale.learn.recipe import Recipe
from convscale.learn.train import train
from tests.learn.nets import halves_data, small_net

PLAIN: dict[str, Any] = {"precision": "fp32", "layout": "nchw"}


def _write(path: Path, marks: set[str], seed: int) -> None:
    """A noisy picture with a bright top, left and middle, as ``marks`` say."""
    pixels = np.random.default_rng(seed).integers(0, 80, (24, 30, 3), dtype=np.uint8)
    if "top" in marks:
        pixels[:8, :, 0] += 150
    if "left" in marks:
        pixels[:, :8, 1] += 150
    if "middle" in marks:
        pixels[10:16, 12:20, 2] += 170
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(("left", "middle", "top")):
        for number in range(24):
            _write(tmp_path / "data" / name / f"{number:02d}.jpg", {name}, 100 * label + number)
    return tmp_path / "data"


@pytest.mark.parametrize("recipe", ["small", "finetune"])
def test_a_name_and_a_folder_are_enough(folder: Path, tmp_path: Path, recipe: str) -> None:
    broken = folder / "top" / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    options: dict[str, Any] = {"batch_size": 8, "image_size": 32, "workers": 0, "drop_rate": 0.0, **PLAIN}
    run = train("mobilenetv2_050", folder, recipe=recipe, epochs=2, output=tmp_path / "run", **options)
    assert run.classes == ("left", "middle", "top")
    assert any(note.startswith(f"left out: {broken}: JPEG image is truncated") for note in run.notes)
    assert run.preprocessing.image_size == 32
    assert run.preprocessing.mean == (0.485, 0.456, 0.406)
    loaded = load_checkpoint(tmp_path / "run")  # builds the network from its spec
    data = open_dataset(folder)
    ours, theirs = (predict_split(net, data.validation, run.preprocessing)[0] for net in (run.net, loaded.net))
    torch.testing.assert_close(ours, theirs)
    assert loaded.meta["metrics"]["best"]["epoch"] == run.best_epoch


def test_too_many_unreadable_images_end_the_run(folder: Path) -> None:
    for number in range(6):
        path = folder / "top" / f"{number:02d}.jpg"
        path.write_bytes(path.read_bytes()[:400])
    recipe = Recipe(name="x", epochs=2, batch_size=8, augment="resized-crop", image_size=16, **PLAIN)
    with pytest.raises(
        UserError, match=r"train images .* can not be decoded, at most 1\.0% may be; first: .*truncated"
    ):
        train(small_net(channels=3), folder, recipe=recipe, workers=0)


def test_bad_validation_images_are_told_once_and_counted_where_they_are_not_held(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convscale.learn.loader.MEMORY_BYTES", 1)
    data = open_dataset(folder, max_bad_rate=0.4)  # 6 images for validation
    recipe = Recipe(name="x", epochs=2, batch_size=8, augment="resized-crop", image_size=16, **PLAIN)
    for number in range(3):
        path = Path(data.validation.name(number))
        path.write_bytes(path.read_bytes()[:400])
        if number == 1:
            run = train(small_net(channels=3), data, recipe=recipe, workers=0)
            told = [note for note in run.notes if note.startswith("left out: ")]
            assert told == [f"left out: {data.validation.name(each)}: JPEG image is truncated" for each in (0, 1)]
    with pytest.raises(
        UserError, match=r"^3 of 6 validation images \(50\.0%\) can not be decoded, at most 40\.0% may be"
    ):
        train(small_net(channels=3), data, recipe=recipe, workers=0)


def test_as_many_of_validation_may_be_unreadable_as_is_said(folder: Path) -> None:
    recipe = Recipe(name="x", epochs=1, batch_size=8, augment="resized-crop", image_size=16, **PLAIN)
    for name in (open_dataset(folder).validation.name(at) for at in (0, 1)):
        Path(name).write_bytes(Path(name).read_bytes()[:400])
    run = train(small_net(channels=3), open_dataset(folder, max_bad_rate=0.5), recipe=recipe, workers=0)
    assert sum("JPEG image is truncated" in note for note in run.notes) == 2
    with pytest.raises(UserError, match=r"2 of \d+ validation images .* can not be decoded, at most 1\.0% may be"):
        train(small_net(channels=3), folder, recipe=recipe, workers=0)


def test_several_labels(tmp_path: Path) -> None:
    names, lines = ("left", "middle", "top"), []
    for number in range(120):
        marks = {name for bit, name in enumerate(names) if number >> bit & 1}
        _write(tmp_path / f"{number:03d}.jpg", marks, number)
        split = "test" if number >= 104 else "val" if number >= 88 else "train"
        lines.append(json.dumps({"path": f"{number:03d}.jpg", "labels": sorted(marks), "split": split}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    data = open_dataset(tmp_path / "m.jsonl")
    recipe = Recipe(
        name="x",
        epochs=20,
        batch_size=8,
        lr=0.02,
        augment="shift-crop",
        shift=0,
        flip=0,
        image_size=24,
        loss="asymmetric",
        label_smoothing=0,
        **PLAIN,
    )
    torch.manual_seed(0)
    run = train(small_net(channels=3), data, recipe=recipe)
    assert run.history[-1]["val_map"] > run.history[0]["val_map"]
    result = evaluate(run.net, data.test, run.preprocessing)
    assert result.mean_average_precision > 0.9
    assert run.thresholds is not None
    logits, kept, _, _ = predict_split(run.net, data.validation, run.preprocessing)
    said = logits.sigmoid() > torch.tensor(run.thresholds)
    truth = data.validation.labels[kept].bool()
    assert (said == truth).float().mean() > 0.85


def test_weights_to_start_from(tmp_path: Path) -> None:
    from convscale.nn.net import create_model

    spec_net = create_model("mobilenetv2_050", num_classes=3, in_chans=1)
    first = train(
        spec_net,
        halves_data(),
        recipe=Recipe(name="x", epochs=1, augment="none", batch_size=16, **PLAIN),
        output=tmp_path / "run",
    )
    frozen = Recipe(name="x", epochs=1, augment="none", batch_size=16, lr=1e-9, freeze_epochs=1, **PLAIN)
    second = train("mobilenetv2_050", halves_data(), recipe=frozen, init=tmp_path / "run")
    name = (
        "stem.0.conv.weight" if "stem.0.conv.weight" in first.net.state_dict() else next(iter(first.net.state_dict()))
    )
    assert torch.equal(first.net.state_dict()[name], second.net.state_dict()[name])
    with pytest.raises(UserError, match="init='pretrained' needs a name"):
        train(spec_net, halves_data(), recipe=frozen, init="pretrained")
    data = halves_data()
    parts = {split: getattr(data, split) for split in ("train", "validation")}
    two = {
        split: dataclasses.replace(part, classes=("a", "b"), labels=part.labels % 2) for split, part in parts.items()
    }
    with pytest.raises(UserError, match=r"network has 3 classes, the data 2; create_model\(\.\.\., num_classes=2\)"):
        train(spec_net, dataclasses.replace(data, **two, classes=("a", "b")), recipe=frozen)


def test_a_network_of_ones_own_starts_from_its_own_checkpoint(tmp_path: Path) -> None:
    """It is given, so nothing needs to be built; its classes are told where they have other names."""
    recipe = Recipe(name="x", epochs=1, batch_size=16, augment="none", lr=0.05, ema_decay=0, **PLAIN)
    first = train(small_net(), halves_data(), recipe=recipe, output=tmp_path / "run")
    still = recipe.override({"lr": 1e-9})
    for start in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "best-00000006"):
        again = train(small_net(), halves_data(), recipe=still, init=start)
        for name, value in again.net.named_parameters():
            torch.testing.assert_close(value, first.net.state_dict()[name], rtol=0, atol=1e-6)
    data = halves_data()
    parts = {
        name: dataclasses.replace(getattr(data, name), classes=("x", "y", "z")) for name in ("train", "validation")
    }
    named = train(small_net(), dataclasses.replace(data, classes=("x", "y", "z"), **parts), recipe=still, init=start)
    assert named.notes == ("weights: their classifier, taken over, is for other classes: dark, left, top",)


def test_a_teacher_is_imitated() -> None:
    data = halves_data()
    plain = Recipe(name="x", epochs=6, batch_size=16, lr=0.05, augment="none", ema_decay=0, **PLAIN)
    torch.manual_seed(5)
    teacher = train(small_net(), data, recipe=plain).net
    wrong = nn.Sequential(
        teacher, _Roll()
    )  # says the next class: what is learned must come from it, not from the labels
    student = train(small_net(), data, recipe=plain.override({"distill_weight": 1.0}), teacher=wrong).net
    predicted = predict_split(student, data.test, train_preprocessing(data))[0].argmax(1)
    assert ((predicted - 1) % 3 == data.test.labels).float().mean() > 0.9


class _Roll(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, 1)


def train_preprocessing(data: Any) -> Any:
    from convscale.learn.prepare import choose_preprocessing

    return choose_preprocessing(small_net(), data, Recipe(name="x"))


def test_tensorboard_is_written(tmp_path: Path) -> None:
    recipe = Recipe(name="x", epochs=1, batch_size=16, augment="none", **PLAIN)
    train(small_net(), halves_data(), recipe=recipe, output=tmp_path / "run", tensorboard=True)
    events = list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert b"validation/top1" in events[0].read_bytes()
