"""Files of weights of other trainers on the command line: trained on from, and exported."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import convscale as cs
from convscale.images.preprocess import Preprocessing
from convscale.learn.checkpoint import Checkpoint
from convscale.learn.weights_file import NUMBERED, names_of

NAME = "mobilenetv2_050"
TRAIN = ("--img-size", "32", "-b", "8", "-j", "0", "--epochs", "1", "--set", "precision=fp32", "--set", "layout=nchw")
COLUMNS = 400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, bright in (("dark", 0), ("light", 160)):
        for number in range(12):
            path = tmp_path / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(bright, bright + 80, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return tmp_path / "data"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """What timm's trainer writes, of two classes that it names, with something else among the weights."""
    state = cs.export_weights(cs.create_model(NAME, num_classes=2))
    args = argparse.Namespace(model=NAME, class_names=["cat", "dog"], data_dir=tmp_path)
    checkpoint = {
        "arch": NAME,
        "args": args,
        "epoch": 3,
        "metric": np.float64(71.5),
        "state_dict": {**{f"module.{key}": value for key, value in state.items()}, "loss.centers": torch.zeros(3)},
    }
    torch.save(checkpoint, tmp_path / "model_best.pth.tar")
    return tmp_path / "model_best.pth.tar"


def test_a_training_starts_from_them_and_says_what_is_odd(call: Any, folder: Path, weights: Path) -> None:
    run = weights.parent / "run"
    code, _, err = call("train", "--model", NAME, "--data-dir", folder, "--output", run, "--init", weights, *TRAIN)
    assert code == 0, err
    said = " ".join(err.split())
    assert "weights: left out as no part of the network: loss.centers" in said
    assert "weights: their classifier, taken over, is for other classes: cat, dog" in said
    code, _, err = call(
        *("train", "--model", NAME, "--data-dir", folder, "--output", weights.parent / "on", "--init", run), *TRAIN
    )
    assert code == 0, err
    assert "weights:" not in err  # its own classes, in their order


def test_they_are_exported_with_their_classes(call: Any, weights: Path) -> None:
    out = weights.parent / "artefact"
    code, said, err = call("export", weights, "--output", out, "--img-size", "32", "--format", "torch")
    assert code == 0, err
    assert "note: weights: left out as no part of the network: loss.centers" in err
    assert f"{weights}, weights of {NAME}" in said + err
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog"]
    bare = weights.parent / "bare.pth"
    torch.save(cs.export_weights(cs.create_model(NAME, num_classes=3)), bare)
    code, _, err = call("export", bare, "--output", weights.parent / "other")
    assert code == 2
    assert "bare.pth does not say what network its weights are of; name it (--model)" in err
    code, _, err = call("export", bare, "--output", weights.parent / "other", "--model", "resnet18")
    assert code == 2
    assert "weights (timm layout) do not fit resnet18: missing " in err
    torch.save({key: value for key, value in torch.load(bare).items() if not key.startswith("classifier")}, bare)
    code, _, err = call("export", bare, "--output", weights.parent / "other", "--model", NAME)
    assert code == 2
    assert f"bare.pth has no classifier of {NAME}; train on from it (train --init)" in err


def test_classes_that_no_file_names_are_the_data_s(call: Any, folder: Path, tmp_path: Path) -> None:
    """timm's trainer writes no names: they became ``0`` and ``1``, which no data could be checked against."""
    state = cs.export_weights(cs.create_model(NAME, num_classes=2))
    torch.save({"arch": NAME, "state_dict": state}, tmp_path / "last.pth.tar")
    export = ("export", tmp_path / "last.pth.tar", "--data-dir", folder, "--img-size", "32", "--format", "torch")
    code, _, err = call(*export, "--output", tmp_path / "a")
    assert code == 0, err
    assert "the data's are taken in their order, dark, light\n" in err
    assert json.loads((tmp_path / "a" / "classes.json").read_text()) == ["dark", "light"]
    assert json.loads((tmp_path / "a" / "verification.json").read_text())["images"] == "given"
    shutil.copytree(folder / "light", folder / "white")
    code, _, err = call(*export, "--output", tmp_path / "b")
    assert (code, err.splitlines()[-1]) == (2, f"convscale: the data has 3 classes, {tmp_path / 'last.pth.tar'} 2")


def test_another_order_than_timm_s_is_said() -> None:
    """timm sorts folders by ``natural_key``: c2 before c10, case left out."""
    natural = pytest.importorskip("timm.utils.misc").natural_key
    made = Checkpoint(
        net=torch.nn.Identity(),
        classes=("0", "1"),
        preprocessing=Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        meta={NUMBERED: True},
        path=Path(),
    )
    for names in (("c10", "c2"), ("c2", "c10"), ("B", "a"), ("a", "B"), ("1", "a"), ("a1b", "a1c")):
        taken, note = names_of(made, names)
        assert taken == names
        assert ("timm puts numbers" in note) == (sorted(names, key=natural) != list(names))


class Runs:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return print, ("ran",)


@pytest.mark.parametrize("command", ["train", "export"])
def test_a_pickle_that_would_run_something_is_one_line(call: Any, folder: Path, tmp_path: Path, command: str) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1)}, "args": argparse.Namespace(a=Runs())}, tmp_path / "evil.pth")
    args: list[object] = ["export", tmp_path / "evil.pth", "--model", NAME]
    if command == "train":
        args = ["train", "--model", NAME, "--data-dir", folder, "--init", tmp_path / "evil.pth", *TRAIN]
    code, out, err = call(*args, "--output", tmp_path / "out")
    assert code == 2
    assert "ran" not in out.split()
    errors = [line for line in err.splitlines() if "evil.pth" in line]
    assert len(errors) == 1
    assert "is no file of weights alone (a foreign pickle), so it is not loaded: it names print" in errors[0]
    assert not (tmp_path / "out").exists()
