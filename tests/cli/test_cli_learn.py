"""The commands about learning, from files to printed results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from convscale.learn.recipes import get_recipe, list_recipes

TRAIN = (
    "--model",
    "mobilenetv2_050",
    "--img-size",
    "32",
    "-b",
    "8",
    "-j",
    "0",
    "--epochs",
    "1",
    "--set",
    "precision=fp32",
    "--set",
    "layout=nchw",
)
COLUMNS = 200


def _write(path: Path, seed: int, bright: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(bright, bright + 80, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, bright in (("dark", 0), ("light", 160)):
        for number in range(20):
            _write(tmp_path / "data" / name / f"{number}.png", number, bright)
    return tmp_path / "data"


def test_a_rectangle_is_trained_kept_and_evaluated(call: Any, folder: Path, tmp_path: Path) -> None:
    rectangle = [*TRAIN]
    rectangle[rectangle.index("--img-size") + 1] = "32x64"
    code, _, err = call("train", "--data-dir", folder, "--output", tmp_path / "run", *rectangle)
    assert code == 0, err
    (about,) = (tmp_path / "run" / "checkpoints").glob("best-*/checkpoint.json")
    assert json.loads(about.read_text())["preprocessing"]["image_size"] == [32, 64]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["image_size"] == [32, 64]
    code, out, err = call("evaluate", tmp_path / "run", "--data-dir", folder)
    assert code == 0, err
    assert "top-1" in out
    assert "is not the data that the network was trained on" not in err
    (folder / "dark" / "3.png").unlink()
    code, _, err = call("evaluate", tmp_path / "run", "--data-dir", folder)
    assert code == 0, err
    assert "note: this is not the data that the network was trained on" in err
    rectangle[rectangle.index("--img-size") + 1] = "32by64"
    code, _, err = call("train", "--data-dir", folder, "--output", tmp_path / "other", *rectangle)
    assert code == 2
    assert "image_size must be a whole number of pixels from 1 to 10000, or height x width" in " ".join(err.split())
    assert not (tmp_path / "other").exists()


def test_train_resume_teach_and_evaluate(call: Any, folder: Path, tmp_path: Path) -> None:
    code, out, err = call(
        "train", "--data-dir", folder, "--output", tmp_path / "run", *TRAIN, "--tensorboard", "--resume", "auto"
    )
    assert code == 0, err
    assert "carved from train" in err
    assert "1 epochs in" in out
    assert "cost: " in out
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    code, out, err = call(
        "train",
        "--data-dir",
        folder,
        "--output",
        tmp_path / "run",
        *TRAIN[:-6],
        "--epochs",
        "2",
        "--resume=auto",
        "--json",
    )
    assert code == 0, err
    assert [row["epoch"] for row in json.loads(out)["history"]] == [1, 2]
    assert (
        yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["precision"] == "fp32"
    )  # the first run's, though not said again
    taught = call(
        "train", "--data-dir", folder, "--output", tmp_path / "student", *TRAIN, "--teacher", tmp_path / "run", "--json"
    )
    assert taught[0] == 0, taught[2]
    assert yaml.safe_load((tmp_path / "student" / "recipe.yaml").read_text())["distill_weight"] == 0.5

    code, out, err = call("report", tmp_path / "run")
    assert code == 0, err
    page = (tmp_path / "run" / "report.html").read_text()
    code, out, err = call("report", tmp_path / "run", "--output", tmp_path / "elsewhere.html")
    assert code == 0, err
    assert (tmp_path / "elsewhere.html").read_text() == page
    assert "Best on validation: top-1" in page
    assert "<dt>batch_size</dt><dd>8</dd>" in page
    assert page.count("Loss by epoch") == 1

    code, out, err = call("evaluate", tmp_path / "run", "--data-dir", folder, "--split", "all", "--confusion")
    assert code == 0, err
    assert "on 40 images (always the most frequent class: 50.00%)" in out
    assert "95 % interval" in out
    assert "top-5" not in out
    assert "calibration error" in out
    assert "images/s" in out
    newest = max((tmp_path / "run" / "checkpoints").glob("best-*"))
    (newest / "model.safetensors").write_bytes(b"")
    code, out, err = call("evaluate", tmp_path / "run", "--data-dir", folder, "--json")
    assert (code, out) == (2, "")
    assert f"{newest.name} is damaged" in err
    last = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert str(last) in err
    code, out, err = call("evaluate", last, "--data-dir", folder, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["split"], found["n"], found["classes"]) == ("test", 4, ["dark", "light"])
    assert np.array(found["confusion"]).sum() == 4
    assert (found["top5"], found["baseline"]) == (None, 0.5)


def test_several_labels_have_thresholds(call: Any, tmp_path: Path) -> None:
    lines = []
    for number in range(32):
        _write(tmp_path / f"{number}.png", number, 120 if number % 2 else 10)
        split = ("train", "train", "val", "test")[number // 2 % 4]
        lines.append(
            json.dumps(
                {"path": f"{number}.png", "labels": ["image", "light"] if number % 2 else ["image"], "split": split}
            )
        )
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    code, out, err = call(
        "train",
        "--data-dir",
        tmp_path / "m.jsonl",
        "--output",
        tmp_path / "run",
        "--recipe",
        "multilabel",
        *TRAIN,
        "--set",
        "policy=none",
    )
    assert code == 0, err
    code, out, err = call("evaluate", tmp_path / "run", "--data-dir", tmp_path / "m.jsonl")
    assert code == 0, err
    assert "mAP" in out
    assert sum("above 0." in line for line in out.splitlines()) == 2
    code, out, err = call("evaluate", tmp_path / "run", "--data-dir", tmp_path / "m.jsonl", "--json")
    assert set(json.loads(out)["thresholds"]) == {"image", "light"}
    code, out, err = call("evaluate", tmp_path / "run", "--data-dir", tmp_path / "m.jsonl", "--confusion")
    said = "--confusion is of one label per image, and these have several; leave it out"
    assert (code, out, err) == (2, "", f"convscale: {said}\n")  # it printed no matrix, and said nothing


def test_recipes(call: Any, tmp_path: Path) -> None:
    code, out, _ = call("recipes")
    assert code == 0
    assert all(any(line.startswith(name) for line in out.splitlines()) for name in list_recipes())
    code, out, _ = call("recipes", "efficientnet", "--set", "lr=0.5", "--output", tmp_path / "mine.yaml")
    assert code == 0
    assert yaml.safe_load(out)["lr"] == 0.5
    assert get_recipe(tmp_path / "mine.yaml") == get_recipe("efficientnet").override({"lr": 0.5})
    assert call("recipes", "efficientnet", "--output", tmp_path / "mine.yaml")[0] == 2
    assert call("recipes", "--output", tmp_path / "x.yaml")[0] == 2
    assert [row["name"] for row in json.loads(call("recipes", "--json")[1])] == list_recipes()


def _bomb(path: Path) -> None:
    """A PNG whose header claims 600 megapixels."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("none", (), "no images found"),
        ("one class", (), "only 1 class ('dark'); a classifier needs at least 2"),
        ("one image", (), "class 'dark' has 1 image(s), too few to carve a split from train"),
        ("bombs", (), "(600 megapixels) is above the cap of 80"),
        ("text", (), "not a JPEG, PNG, WEBP, GIF, BMP, TIFF, JPEG2000, PPM, AVIF or HEIF image"),
        ("good", ("--lr", "0"), "lr must lie between 1e-09 and 100, got 0.0"),
        ("good", ("--lr", "1e9"), "lr must lie between 1e-09 and 100, got 1000000000.0"),
        ("good", ("-b", "99"), "batch_size 99 is larger than the train set (32 images); use at most 32"),
        ("good", ("--set", "leraning_rate=1"), "has no key 'leraning_rate'"),
        ("good", ("--recipe", "bad.yaml"), "recipe bad.yaml is no valid YAML"),
        ("good", ("--output", "/proc/x"), "output folder /proc/x can not be written"),
        ("good", ("--output", "/dev/null"), "output /dev/null is a file; name a folder"),
        ("good", ("--init", "foreign.pth"), "foreign.pth"),
        ("good", ("--teacher", "nowhere"), "checkpoint nowhere does not exist"),
        ("good", ("--dataset", "cifra10"), "torchvision data set 'cifra10' is unknown (nearest: cifar10"),
        ("good", ("--device", "cuda:7"), "device 'cuda:7'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    call: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    kind: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    import pickle

    monkeypatch.chdir(tmp_path)
    for name in ("dark", "light"):
        for path in (folder / name).iterdir():
            if (
                kind == "none"
                or (kind == "one class" and name == "light")
                or (kind == "one image" and path.stem != "0")
            ):
                path.unlink()
            elif kind == "bombs":
                _bomb(path)
            elif kind == "text":
                path.write_text("<html>")
    if kind == "one class":
        (folder / "light").rmdir()
    Path("foreign.pth").write_bytes(pickle.dumps(Path("x")))
    Path("bad.yaml").write_text("epochs: [")
    code, out, err = call(
        "train", "--data-dir", folder, *(() if "--output" in options else ("--output", "run")), *TRAIN, *options
    )
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("convscale: ")
    assert message in last
    assert "Traceback" not in err
    assert out == ""
    assert not Path("run").exists()


def test_a_checkpoint_of_another_architecture_is_refused(call: Any, folder: Path, tmp_path: Path) -> None:
    assert call("train", "--data-dir", folder, "--output", tmp_path / "run", *TRAIN)[0] == 0
    args = ["train", "--data-dir", folder, "--output", tmp_path / "run", *TRAIN, "--resume"]
    args[args.index("mobilenetv2_050")] = "mobilenetv2_100"
    code, _, err = call(*args)
    assert code == 2
    assert "is of another architecture" in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--model", "mobilenetv2_050", "--set", "seed=1"), "has no key 'seed'"),
        (("train", "--model", "mobilenetv2_050", "--set", "epochs=no"), "epochs must be a whole number"),
        (("train", "--model", "mobilenetv2_050", "--set", "epsilon=-1"), "epsilon must lie between 0 and 1"),
        (("train", "--model", "mobilenetv2_050", "-b", 8, "--set", "batch_size=99999999999"), "batch_size must"),
        (("train", "--model", "mobilenetv2_050", "--keep", "0"), "keep is 0"),
        (("fit", "--min-throughput", "1", "--set", "image_size=64"), "use image_size= (--img-size)"),
        (("fit", "--min-throughput", "1", "--brief-epochs", "0"), "brief_epochs is 0"),
        (("fit", "--min-throughput", "1", "--max-minutes", "0"), "max_minutes is 0"),
        (("fit", "--min-throughput", "1", "--epochs", "0"), "epochs must lie between"),
    ],
)
def test_bad_requests_are_one_line_and_write_nothing(
    call: Any, folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = call(*arguments, "--data-dir", folder, "--output", tmp_path / "run")
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "keys",
    [
        ("--schedule", "constant", "--set", "optimizer=schedule-free", "--set", "ema_decay=0"),
        ("--epochs", 5, "--set", "schedule_epochs=8"),
    ],
)
def test_keys_are_judged_beside_the_flags_and_the_recipe_that_they_change(
    call: Any, tmp_path: Path, keys: tuple[object, ...]
) -> None:
    """Not beside the defaults of a recipe that nobody asked for: it is the data that are missing here."""
    code, _, err = call(
        "train", "--model", "mobilenetv2_050", *keys, "--data-dir", tmp_path / "none", "--output", tmp_path / "run"
    )
    assert code == 2
    assert "none" in err, err
    assert "schedule" not in err, err


def test_epochs_may_be_set_as_a_recipe_key(call: Any, folder: Path, tmp_path: Path) -> None:
    code, out, err = call(
        "train",
        "--data-dir",
        folder,
        "--output",
        tmp_path / "run",
        *TRAIN[:6],
        "--set",
        "epochs=1",
        *TRAIN[10:],
        "--json",
    )
    assert code == 0, err
    assert len(json.loads(out)["history"]) == 1
    for bad in (("-b", "0"), ("-j", "-1"), ("--device", "tpu")):
        code, _, err = call("evaluate", tmp_path / "run", "--data-dir", folder, *bad)
        lines = [line for line in err.strip().splitlines() if not line.startswith("note: ")]
        assert (code, len(lines)) == (2, 1), err
