"""--overwrite never deletes what the run itself reads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import convscale as cs
from convscale.artifact.artifact import load_artifact
from convscale.detect.data import open_boxes
from convscale.errors import UserError
from convscale.files import MARK, check_output_dir, check_outside, file_or_none, new_output_dir, places_of
from convscale.images.sources import open_dataset
from convscale.learn.train import train
from convscale.pipeline.place import checked_output
from convscale.pipeline.run import fit
from convscale.ship.layouts import write_layout
from tests.detect.sets import coco_set
from tests.learn.nets import halves_data, small_net

COLUMNS = 120
OLD = Path(__file__).parent / "old_files" / "v0_1" / "artefacts" / "onnx_fp32"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder that --overwrite may replace, with a user's files in it."""
    folder = new_output_dir(tmp_path / "run")
    (folder / "weights").mkdir()
    for name in ("w.pt", "weights/resnet18.a1_in1k.pth", "rows.jsonl", "mine.yaml"):
        (folder / name).write_text("epochs: 1\n")
    return folder


def _pictures(folder: Path) -> Path:
    """A data set of two classes, five pictures each."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name / f"{number}.png")
    return folder


def _linked(folder: Path, pictures: Path) -> Path:
    """The same data set, whose pictures are links."""
    for picture in pictures.rglob("*.png"):
        link = folder / picture.relative_to(pictures)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(picture)
    return folder


def _listed(file: Path, pictures: Path) -> Path:
    """The same data set as a manifest."""
    rows = [f"{picture},{picture.parent.name}" for picture in sorted(pictures.rglob("*.png"))]
    file.write_text("\n".join(("path,label", *rows)) + "\n")
    return file


def _kept(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} >= {"w.pt", "weights", "rows.jsonl", "mine.yaml"}


def test_what_lies_in_the_folder_or_behind_a_link_is_inside(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    said = "holds init .*, which --overwrite would delete; use another name"
    beside = tmp_path / "run2"
    beside.mkdir()
    os.symlink(run, tmp_path / "link")
    os.symlink(beside, run / "to beside")
    inside = (
        run,
        run / "w.pt",
        str(run / "weights"),
        tmp_path / "link" / "w.pt",
        run / ".." / "run",
        run / "to beside",
    )
    for place in inside:
        for folder in (run, tmp_path / "link", f"{run}/"):
            with pytest.raises(UserError, match=said):
                check_outside(folder, [("init", place)])
    for place in (None, "pretrained", 3, small_net(), beside, tmp_path, run / "absent", "a\0b"):
        check_outside(run, [("init", place)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"output run holds init run/w.pt, which --overwrite would delete"):
        check_outside("run", [("init", "run/w.pt")])
    assert (file_or_none("run"), file_or_none("run/w.pt"), file_or_none(3)) == (None, "run/w.pt", None)
    inputs = [("init", run / "w.pt")]
    assert check_output_dir(run, resume=True, overwrite=True, inputs=inputs) == run  # then nothing is emptied
    with pytest.raises(UserError, match=said):
        check_output_dir(run, overwrite=True, inputs=inputs)


def test_fit(run: Path) -> None:
    said = "holds {} .*{}, which --overwrite would delete; use another name"
    data = halves_data()
    asked: Any = SimpleNamespace(
        output=run,
        overwrite=True,
        resume=False,
        start=SimpleNamespace(weights_dir=None, file=None),
        measured=None,
        training=SimpleNamespace(recipe="small"),
    )
    assert checked_output(asked, data) == run
    with pytest.raises(UserError, match=said.format("measured", "rows.jsonl")):
        checked_output(SimpleNamespace(**{**vars(asked), "measured": run / "rows.jsonl"}), data)  # type: ignore[arg-type]
    asked.start.file = run / "w.pt"
    with pytest.raises(UserError, match=said.format("init", "w.pt")):
        checked_output(asked, data)
    for what, name in (("weights_dir", "weights"), ("recipe", "mine.yaml")):
        options: dict[str, Any] = {what: str(run / name)}
        with pytest.raises(UserError, match=said.format(what, name)):
            fit(data, output=run, min_throughput=1.0, overwrite=True, **options)
    pictures = _pictures(run / "data")
    for given in (pictures, open_dataset(pictures)):
        for options in ({}, {"search": 5.0, "space": "small"}):
            with pytest.raises(UserError, match=said.format("data", "data")):
                fit(given, output=run, min_throughput=1.0, image_size=8, overwrite=True, **options)
    _kept(run)
    assert len(list(pictures.rglob("*.png"))) == 10


def test_train(run: Path) -> None:
    for what, name in (("init", "w.pt"), ("teacher", "w.pt"), ("recipe", "mine.yaml")):
        options: dict[str, Any] = {"recipe": "small", what: run / name}
        with pytest.raises(UserError, match=f"holds {what} .*{name}, which --overwrite would delete"):
            train(small_net(), halves_data(), output=run, overwrite=True, **options)
    _kept(run)


def test_data_that_are_open_already(run: Path, tmp_path: Path) -> None:
    """By the folder or manifest that was opened, where the files are, and where links lead to."""
    pictures = _pictures(run / "data")
    aside = _linked(tmp_path / "links", pictures), _listed(tmp_path / "list.csv", pictures)
    for place, held in ((pictures, "run/data"), (aside[0], "run/data/a"), (aside[1], "run/data/a")):
        for data in (place, open_dataset(place)):
            with pytest.raises(UserError, match=f"holds data [^ ]*/{held}, which --overwrite would delete"):
                train(small_net(), data, output=run, recipe="small", overwrite=True)
    with pytest.raises(UserError, match=r"holds data [^ ]*run/boxes/all.json, which --overwrite would delete"):
        cs.train_detector("resnet18", open_boxes(coco_set(run / "boxes")), output=run, overwrite=True)
    boxes = coco_set(tmp_path / "boxes")
    shutil.move(boxes.parent / "images", run / "boxes2")
    (boxes.parent / "images").symlink_to(run / "boxes2")
    with pytest.raises(UserError, match=r"holds data [^ ]*boxes/images, which --overwrite would delete"):
        cs.train_detector("resnet18", boxes, output=run, overwrite=True)
    _kept(run)
    assert len(list(pictures.rglob("*.png"))) == 10
    assert open_dataset(tmp_path / "links").digests() == open_dataset(pictures).digests()


def test_many_files_are_looked_at_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question for each of a million pictures took minutes on a network's disk."""
    pictures = _pictures(tmp_path / "data")
    chain = _linked(tmp_path / "chain", _linked(tmp_path / "links", pictures))
    (tmp_path / "loop.png").symlink_to("loop.png")
    asked: list[str] = []
    for name in ("lstat", "stat"):
        monkeypatch.setattr(os, name, lambda path, **_: asked.append(path))
    found = {
        name: [*places_of([*map(str, files)])]
        for name, files in {
            "plain": [
                pictures / "a" / "0.png",
                pictures / "a" / "1.png",
                pictures / "b" / "0.png",
                pictures / "c" / "0.png",
            ],
            "chain": [chain / "a" / "0.png", chain / "a" / "1.png"],
            "loop": [tmp_path / "loop.png"],
        }.items()
    }
    monkeypatch.undo()
    assert found == {
        "plain": [str(pictures / name) for name in "abc"],
        "chain": [str(tmp_path / name / "a") for name in ("chain", "links", "data")],
        "loop": [str(tmp_path)],
    }
    assert asked == []


def test_search(run: Path) -> None:
    said = r"holds data .*weights, which --overwrite would delete"
    with pytest.raises(UserError, match=said):
        cs.search(run / "weights", output=run, min_throughput=1.0, trials=2, overwrite=True)
    with pytest.raises(UserError, match=said):
        cs.find_scaling("efficientnet_b0", run / "weights", output=run, trials=2, overwrite=True)
    data = open_dataset(_pictures(run / "data"))
    with pytest.raises(UserError, match=r"holds data .*data, which --overwrite would delete"):
        cs.search(data, output=run, min_throughput=1.0, trials=2, image_size=8, overwrite=True)
    with pytest.raises(UserError, match=r"holds data .*data, which --overwrite would delete"):
        cs.find_scaling("efficientnet_b0", data, output=run, trials=2, overwrite=True)
    _kept(run)
    assert len(list(run.rglob("*.png"))) == 10


def test_a_layout_in_the_place_of_its_artefact(run: Path) -> None:
    shutil.copytree(OLD, run / "artifact")
    with pytest.raises(UserError, match=r"holds artefact .*artifact, which --overwrite would delete"):
        write_layout(load_artifact(run / "artifact"), "triton", run, overwrite=True)
    _kept(run)


def test_the_commands(call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object, **options: object) -> None:
        raise AssertionError("it was to be refused first")

    (run / "a.png").write_bytes(b"x")
    monkeypatch.setattr("convscale.maps.files.Explainer.open", lambda model: SimpleNamespace(number_of=str))
    commands = [
        ("explain", run / "a.png", "--model", OLD, "--output", run),
        ("classify", run / "a.png", "--model", OLD, "--output", run / "a.png"),
    ]
    code, _, err = call(*commands[0])
    assert (code, "exists and is not empty; use --overwrite or another name" in " ".join(err.split())) == (2, True)
    for command in commands:
        code, out, err = call(*command, "--overwrite")
        assert (code, out) == (2, "")
        assert "a.png, which --overwrite would delete; use another name" in " ".join(err.split())
    assert (run / "a.png").read_bytes() == b"x"
    made = shutil.copytree(OLD, tmp_path / "made")
    (made / "w.pt").write_bytes(b"x")
    monkeypatch.setattr("convscale.cli.ship._to_export", never)
    code, _, err = call("export", made / "w.pt", "--model", "resnet18", "--output", made, "--overwrite")
    assert code == 2
    assert "w.pt, which --overwrite would delete; use another name" in " ".join(err.split())
    assert (made / "w.pt").read_bytes() == b"x"
    code, _, err = call("export", made, "--model", "resnet18", "--output", made, "--overwrite")  # a checkpoint's folder
    assert (code, "holds checkpoint" in " ".join(err.split())) == (2, True)
    cs.save_spec(cs.get_spec("resnet18"), run / "best.yaml")
    monkeypatch.setattr("convscale.pipeline.run.fit", never)
    monkeypatch.setattr("convscale.learn.train.train", never)
    monkeypatch.setattr("convscale.nas.coefficients.find_scaling", never)
    monkeypatch.setattr("convscale.images.sources.open_dataset", never)
    asked = ("--data-dir", tmp_path, "--output", run, "--overwrite")
    for command in ("fit --min-throughput 1 --model", "train --recipe small --model", "search --scaling"):
        code, _, err = call(*command.split(), run / "best.yaml", *asked)
        assert code == 2
        assert "holds model" in " ".join(err.split())
    for what, name in (("model", "best.yaml"), ("measured", "rows.jsonl"), ("calibration", "mine.yaml")):
        kit = ("--device", "l4", "--min-throughput", 1, "--kit", run, "--overwrite")
        code, _, err = call("choose", *kit, f"--{what}", run / name)
        assert (code, f"holds {what}" in " ".join(err.split())) == (2, True)
    asked = ("--data-dir", _pictures(run / "data"), "--output", run, "--overwrite")
    for command in ("fit --min-throughput 1", "train --model resnet18", "search --min-throughput 1 --trials 2"):
        code, _, err = call(*command.split(), *asked)
        assert code == 2
        assert "data, which --overwrite would delete; use another name" in " ".join(err.split())
    assert (run / MARK).is_file()
    _kept(run)
