"""export, tune and classify from the command line: what they write, and one line and exit code 2 for bad input."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import convscale as cs
from convscale.images.preprocess import Preprocessing
from convscale.ship import tune as tune_module

COLOURS = {"blue": (30, 40, 200), "green": (40, 200, 50), "red": (220, 30, 40)}
COLUMNS = 400
Call = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("briefly")


def write_pictures(folder: Path, train: int) -> Path:
    """Pictures of one colour each with some noise, one folder per colour."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", 8), ("test", 8)):
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 20, (36, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 16)


@pytest.fixture(scope="module")
def checkpoint(briefly: None, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small TResNet, trained for a moment."""
    folder = tmp_path_factory.mktemp("run") / "train"
    spec = cs.scale(cs.get_spec("tresnet_m"), depth=0.09, width=0.25)
    pre = Preprocessing(image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
    cs.train(spec, pictures, recipe="small", epochs=6, batch_size=16, preprocessing=pre, output=folder, workers=0)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from convscale.learn.checkpoint import load_checkpoint
    from convscale.ship.export import export

    loaded = load_checkpoint(checkpoint)
    return export(
        loaded.net, tmp_path_factory.mktemp("art") / "a", classes=loaded.classes, preprocessing=loaded.preprocessing
    ).folder


def refused(result: tuple[int, str, str], *texts: str) -> None:
    """Exit code 2 and one line that says each of ``texts``."""
    code, out, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert (code, out) == (2, "")
    assert len(lines) == 1, err
    assert lines[0].startswith("convscale: ")
    for text in texts:
        assert text in lines[0]


@pytest.mark.slow
def test_the_fastest_form_of_a_checkpoint(
    call: Call, checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_module, "_timed", lambda run, seconds, least: [run() or 0.01])
    settings = tune_module.candidates  # at one batch size: each of the six would be compiled for every form
    monkeypatch.setattr(tune_module, "candidates", lambda goal, names, cores, sizes: settings(goal, names, cores, (4,)))
    out = tmp_path / "a"
    options = ("--data-dir", pictures, "--format", "fastest", "--int8", "--max-drop", 100, "--card", "licence=CC0")
    code, text, err = call("export", checkpoint, "--output", out, *options)
    assert code == 0, err
    assert "agrees with the trained network on" in text
    eight = ("onnx-int8", "onnx-int8-ort", "openvino-int8", "openvino-int8-strided")
    for form in ("onnx-fp32", "onnx-fp32-strided", *eight):
        assert f"{form}: " in err
    card = (out / "README.md").read_text()
    assert "- **Licence**: CC0" in card
    assert "- **Recipe**: small" in card
    assert "- **Data**: pictures" in card
    assert "on validation, in epoch" in card
    assert "images/s" in card
    assert cs.load_artifact(out).manifest["search"]["winner"] in err
    # Validation judged it: 8 pictures of each colour.
    assert json.loads((out / "verification.json").read_text())["n"] == 24


def test_a_scaled_network_is_not_said_to_have_released_weights(tmp_path: Path) -> None:
    from convscale.cli.ship import _to_export

    spec = cs.scale("resnet18", width=0.25, depth=0.5)
    assert "." in spec.name
    cs.save_spec(spec, tmp_path / "mine.yaml")
    assert _to_export(str(tmp_path / "mine.yaml"), None).meta["untrained"] == f"{spec.name}, untrained"


def test_tune_keeps_what_it_found(call: Call, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "_timed", lambda run, seconds, least: [run() or 0.01])
    folder = shutil.copytree(artifact, tmp_path / "a")
    code, out, err = call("tune", folder, "-b", 2, "-b", 4, "--threads", 1, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    # Every call takes as long, so the larger batch wins.
    assert found["best"]["batch_size"] == 4
    assert {trial["runtime"] for trial in found["trials"]} == {"onnxruntime", "openvino"}
    assert cs.load_artifact(folder).batch_size == 4
    refused(call("tune", folder, "--goal", "sped"), "goal 'sped' is unknown")
    several = call("tune", folder, "--goal", "latency", "-b", 1, "-b", 4)
    refused(several, "--goal latency is of one image a call, got -b 4; leave -b out")
    code, out, err = call("tune", shutil.copytree(artifact, tmp_path / "b"), "--goal", "latency", "-b", 1, "--json")
    assert (code, json.loads(out)["best"]["batch_size"]) == (0, 1), err
    brief = ("--seconds", 0.01, "--json")
    for ask, size in ((("measure", folder), 4), (("measure", folder, "-b", 8), 8), (("measure", artifact), 8)):
        code, out, err = call(*ask, *brief)  # it was timed at 8 images, whatever it had been tuned to
        assert (code, json.loads(out)[0]["conditions"]["batch_size"]) == (0, size), err
    assert cs.measure(cs.load_artifact(folder), min_seconds=0.01).conditions.batch_size == 4
    assert cs.measure(cs.load_artifact(folder), batch_size=8, min_seconds=0.01).conditions.batch_size == 8


def test_classify_writes_rows_and_goes_on(call: Call, artifact: Path, pictures: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    code, out, err = call("classify", pictures / "test", "--model", artifact, "--output", rows, "--top", 2)
    assert (code, out) == (0, "")
    assert re.search(r"^24 images, 0 bad, [\d.,]+ images/s end to end \(cpu, onnxruntime, fp32, batch 32\)$", err, re.M)
    said = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [Path(row["path"]).parent.name for row in said] == [name for name in sorted(COLOURS) for _ in range(8)]
    assert all(len(row["classes"]) == 2 for row in said)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:10]))
    again = ("--output", rows, "--top", 2, "--resume", "auto", "--json")
    code, out, err = call("classify", pictures / "test", "--model", artifact, *again)
    assert (code, len(rows.read_text().splitlines())) == (0, 24)
    assert "14 images" in err
    told = json.loads(out)
    assert (told["images"], told["errors"], told["resumed"], told["output"]) == (14, 0, 10, str(rows))
    refused(
        call("classify", pictures / "test", "--model", artifact, "--output", rows, "--top", 2),
        "exists; use --resume, --overwrite",
    )
    refused(
        call("classify", pictures / "test", "--model", artifact, "--top", 4),
        "top must lie between 1 and the 3 classes, got 4",
    )


def test_where_there_is_no_such_device_nothing_is_written(
    call: Call, artifact: Path, pictures: Path, tmp_path: Path
) -> None:
    for device in ("cuda:0,1", "cuda:99"):
        args = ("--model", artifact, "--output", tmp_path / "rows.csv", "--device", device)
        code, out, err = call("classify", pictures / "test", *args)
        assert (code, out, err.startswith("convscale: "), err.count("\n")) == (2, "", True, 1)
        assert not (tmp_path / "rows.csv").exists()
    refused(call("tune", artifact, "--device", "cuda:0,1"), "device 'cuda:0,1' is none of this machine's; cpu, cuda or")


def test_a_list_on_standard_input(
    call: Call, artifact: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = tmp_path / "bomb.png"
    picture = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(picture, format="PNG")
    bomb.write_bytes(picture.getvalue())
    good = pictures / "test" / "red" / "00.png"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{good}\n{bomb}\n{tmp_path / 'gone.png'}\n"))
    code, out, _ = call("classify", "-", "--model", artifact)
    assert code == 0
    head, *lines = out.splitlines()
    assert head == "path,class,probability,error"
    assert [line.split(",")[0] for line in lines] == [str(good), str(bomb), str(tmp_path / "gone.png")]
    assert "above the cap" in lines[1]
    assert "No such file" in lines[2]


def damage(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(bytes(data))


def make_newer(folder: Path) -> None:
    manifest = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps(manifest | {"schema": 99}))


def point_outside(folder: Path) -> None:
    """Data outside the folder, with checksums that hold."""
    from convscale.artifact.folder import seal

    model = onnx.load(folder / "model.onnx")
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../secret.bin")
    onnx.save_model(model, folder / "model.onnx")
    manifest = json.loads((folder / "artifact.json").read_text())
    seal(folder, {key: value for key, value in manifest.items() if key not in ("files", "schema", "convscale")})


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (damage, "is damaged: the checksum of model.onnx is wrong"),
        (make_newer, "has schema 99, this version of convscale reads up to 2; update convscale"),
        (point_outside, "wants data from '../../secret.bin', outside its own folder; refused"),
    ],
)
@pytest.mark.parametrize("command", ["tune", "classify"])
def test_spoilt_artefacts(
    call: Call, artifact: Path, pictures: Path, tmp_path: Path, command: str, spoil: Callable[[Path], None], text: str
) -> None:
    folder = shutil.copytree(artifact, tmp_path / "a")
    spoil(folder)
    rows = tmp_path / "rows.csv"
    arguments = (
        ("tune", folder) if command == "tune" else ("classify", pictures / "test", "--model", folder, "--output", rows)
    )
    refused(call(*arguments), text)
    assert not rows.exists()


def test_foreign_files(call: Call, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"weights": 1}))
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), str(tmp_path / "model.pt2"))
    for name in ("model.pkl", "model.pt2"):
        refused(
            call("classify", pictures / "test", "--model", tmp_path / name),
            "foreign archives and pickles are not loaded",
        )
        refused(call("tune", tmp_path / name), "foreign archives and pickles are not loaded")
        refused(call("export", tmp_path / name, "--output", tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


def test_bad_exports_leave_nothing(
    call: Call, checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "a"
    few = write_pictures(tmp_path / "few", 3)
    export = ("export", checkpoint, "--output", out)
    refused(call(*export, "--img-size", 30), "30", "4")
    refused(call(*export, "--format", "tflite"), "format 'tflite' is unknown")
    refused(call(*export, "--int8"), "--int8 needs --data-dir")
    refused(
        call(*export, "--int8", "--data-dir", few),
        "INT8 needs at least 32 calibration images of the training set, got 9",
    )
    refused(call(*export, "--half", "--format", "torch"), "format torch has no half form")
    refused(call(*export, "--half", "--format", "fastest"), "--half does not go with --format fastest")
    refused(call(*export, "--max-drop", 2), "--max-drop 2 is what 8 bits may lose; give --int8 with it")
    refused(call(*export, "--device", "cuda"), "--device cuda goes with --format fastest, which tunes there")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_card = ("--format", "fastest", "--device", "cuda")
    refused(call(*export, *on_card), "device 'cuda' is not there: torch sees no CUDA GPU; use device cpu")
    refused(call(*export, "--card", "licence"), "--card takes key=value, got 'licence'")
    refused(call(*export, "--bf16"), "format onnx has no bf16 form; use format openvino")
    monkeypatch.setattr(tune_module, "_timed", lambda run, seconds, least: [run() or 0.01])
    monkeypatch.setattr("convscale.ship.export.routes_of", lambda form: ("onnxruntime",))
    refused(call(*export, "--data-dir", pictures, "--int8", "--max-drop", -1), "a is withheld: INT8 loses")
    monkeypatch.setattr("convscale.runtimes.base.find_spec", lambda name: None)
    refused(call(*export, "--format", "openvino"), "runtime openvino is not installed; pip install openvino")
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_export_says_which_state_it_uses_and_takes_no_other(checkpoint: Path, tmp_path: Path, call: Call) -> None:
    """Guards wrong answer 13 of issue E: one flipped bit in the best state shipped another network, with exit 0."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run)
    best, last = (max((run / "checkpoints").glob(f"{kind}-*")) for kind in ("best", "step"))
    code, out, err = call("export", run, "--output", tmp_path / "a")
    assert code == 0, err
    assert f"exported {best}, the best on validation, epoch " in out
    code, out, err = call("export", run, "--output", tmp_path / "b", "--json")
    assert code == 0, err
    assert f"exported {best}, the best on validation, epoch " in err
    weights = best / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 4
    weights.write_bytes(data)
    refused(call("export", run, "--output", tmp_path / "c"), f"{best} is damaged", f"name it: {last}")
    assert not (tmp_path / "c").exists()
    code, out, err = call("export", last, "--output", tmp_path / "d")
    assert code == 0, err
    assert f"exported {last}, a state of training, epoch 6" in out


@pytest.mark.parametrize("words", [["--int8", "qat"], ["--int8=qat"], ["--int8", "--qat"]])
def test_int8_qat_is_two_options_in_one(words: list[str]) -> None:
    from typer.main import get_command

    from convscale.cli.app import app

    command = get_command(app).commands["export"]  # type: ignore[attr-defined]
    parsed = command.make_context("export", ["net", *words, "--bake", "--output", "out"]).params
    assert (parsed["int8"], parsed["qat"], parsed["bake"], parsed["checkpoint"]) == (True, True, True, "net")
    parsed = command.make_context("export", ["qat", "--int8", "--output", "out"]).params
    assert (parsed["int8"], parsed["qat"], parsed["checkpoint"]) == (True, False, "qat")


def test_qat_on_ten_images_is_refused(call, tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        for split, count in (("train", 5), ("val", 2), ("test", 2)):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (32, 32), (number * 20, 60, 90 if name == "a" else 10)).save(place / f"{number}.png")
    net = ("train", "--data-dir", tmp_path / "data", "--model", "resnet18", "--epochs", 1, "--img-size", 32, "-b", 4)
    assert call(*net, "--output", tmp_path / "run")[0] == 0
    options = ("--data-dir", tmp_path / "data", "--int8", "qat", "--output", tmp_path / "art")
    code, _, err = call("export", tmp_path / "run", *options)
    assert code == 2
    assert err.splitlines()[-1].endswith("needs at least 64 calibration images of the training set, got 10")
    assert not (tmp_path / "art").exists()


def test_it_is_said_where_images_are_carved_that_may_have_been_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from convscale.cli.ship import _check_images
    from convscale.images.sources import open_dataset

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (32, 32), (number * 10, 60, 90)).save(tmp_path / name / f"{number}.png")
    loaded: Any = SimpleNamespace(classes=("a", "b"), meta={"splits": open_dataset(tmp_path).digests()})
    preprocessing = Preprocessing(image_size=16, mean=(0.0,) * 3, std=(1.0,) * 3)
    _check_images(tmp_path, loaded, preprocessing, False)
    assert capsys.readouterr().err == ""
    (tmp_path / "a" / "7.png").unlink()
    for int8, split in ((False, "test"), (True, "validation")):
        _check_images(tmp_path, loaded, preprocessing, int8)
        assert f"come, gone or changed, so another {split} set is carved" in " ".join(capsys.readouterr().err.split())


def test_suppression_is_refused_for_classifiers(call: Call, artifact: Path, tmp_path: Path) -> None:
    for where in ("inside", "outside", "rubbish"):
        made = call("export", "resnet18", "--output", tmp_path / "a", "--nms", where)
        refused(made, f"--nms {where} is for detectors, and this is a classifier; leave --nms out")
    laid = call("export", artifact, "--layout", "triton", "--output", tmp_path / "a", "--nms", "outside")
    refused(laid, "--nms is for a checkpoint; an artefact is laid out as it is")
    with pytest.raises(cs.UserError, match="nms 'rubbish' is unknown"):
        cs.export("resnet18", tmp_path / "a", nms="rubbish")
    with pytest.raises(cs.UserError, match="nms is 'outside', which is for detectors, and this is a classifier"):
        cs.export("resnet18", tmp_path / "a", nms="outside")
    assert not (tmp_path / "a").exists()
