"""Detection on the command line: trained, judged, shipped, told in one line where it does not go."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from convscale.arch.spec import save_spec
from convscale.artifact.artifact import load_artifact
from convscale.cli.app import app
from convscale.errors import UserError
from tests.detect.sets import coco_set, small_spec

SMALL = ("--img-size", "64", "--detector", "neck_width=16", "--detector", "head_depth=1", "--head", "retinanet")


def run(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a spec and a run."""
    folder = tmp_path_factory.mktemp("cli")
    coco_set(folder / "set", 12)
    save_spec(small_spec(), folder / "net.yaml")
    data = ("--data-dir", folder / "set" / "all.json")
    told = run(
        *("train", "--task", "detection", "--model", folder / "net.yaml", *SMALL, *data, "--output", folder / "run"),
        *("--epochs", 1, "-b", 5, "-j", 0, "--json"),
    )
    assert json.loads(told)["finished"]
    return folder


def test_train_evaluate_export_classify_report(place: Path) -> None:
    data = ("--data-dir", place / "set" / "all.json")
    judged = json.loads(run("evaluate", place / "run", *data, "--split", "validation", "-j", 0, "--json"))
    row = json.loads((place / "run" / "log.jsonl").read_text())
    assert judged["map"] == pytest.approx(row["val_map"])
    assert judged["classes"] == ["red", "green"]
    made = json.loads(run("export", place / "run", *data, "--output", place / "art", "--nms", "outside", "--json"))
    assert made["verification"]["passed"]
    assert made["verification"]["nms"] == "outside"
    assert load_artifact(place / "art").manifest.category_ids == (1, 7)  # of the data, by the checkpoint
    images = sorted((place / "set" / "images").iterdir())[:3]
    out = place / "boxes.jsonl"
    run(
        "classify",
        *images,
        "--model",
        place / "art",
        "--output",
        out,
        "--coco",
        place / "r.json",
        "--draw",
        place / "d",
    )
    other = (
        "classify",
        *images,
        "--model",
        place / "art",
        "--output",
        place / "other.jsonl",
        "--coco",
        place / "r.json",
    )
    with pytest.raises(UserError, match=r"^--coco .*r\.json exists; use --overwrite or another name$"):
        run(*other)
    assert not (place / "other.jsonl").exists()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    said = [{"red": 1, "green": 7}[each["class"]] for row in rows for each in row["boxes"]]
    assert [each["category_id"] for each in json.loads((place / "r.json").read_text())] == said
    assert [row["path"] for row in rows] == [str(path) for path in images]
    assert len(json.loads((place / "r.json").read_text())) == sum(len(row["boxes"]) for row in rows)
    assert sorted(path.stem for path in (place / "d").iterdir()) == sorted(path.stem for path in images)
    shipped = json.loads(run("evaluate", place / "art", *data, "--split", "validation", "--json"))
    assert shipped["map"] == pytest.approx(judged["map"], abs=1e-3)
    for folder, under in (("run", "cpu, fp32, batch 16"), ("art", "cpu, onnxruntime, fp32, batch 32")):
        said = run("evaluate", place / folder, *data, "--split", "validation", "-j", 0)
        assert f" images/s (whole evaluation, {under})\n" in said
    run("report", place / "run")
    page = (place / "run" / "report.html").read_text()
    assert "Answered worst" in page
    assert page.count("data:image/png;base64,") == 2  # one validation picture, the best and the worst


@pytest.mark.slow
def test_measure_tells_the_parts_apart(place: Path) -> None:
    (told,) = json.loads(
        run("measure", place / "net.yaml", "--task", "detection", *SMALL, "-b", 2, "--seconds", 0.05, "--json")
    )
    assert list(told["parts_s"]) == ["backbone", "neck", "heads", "nms"]
    assert told["conditions"]["image_size"] == 64
    assert told["conditions"]["runtime"] == "onnxruntime"
    assert sum(told["parts_s"].values()) >= 0.99 * 2 / told["images_per_s"]
    assert told["num_classes"] == 20
    said = run("measure", place / "net.yaml", "--task", "detection", *SMALL, "-b", 2, "--seconds", 0.05)
    assert "; 20 classes" in " ".join(said.split())  # a long name of the device wraps the line


def test_a_trained_detector_is_measured_and_predicted_too(place: Path) -> None:
    """Names and specs alone were taken."""
    of_run = ("--task", "detection", "-b", 2, "--json")
    (told,) = json.loads(run("measure", place / "run", *of_run, "--seconds", 0.05))
    assert (told["num_classes"], told["conditions"]["image_size"]) == (2, 64)
    assert told["model"].startswith("retinanet-")
    (told,) = json.loads(run("predict", place / "run", *of_run, "--device", "rtx-4090"))
    assert (told["num_classes"], told["conditions"]["image_size"]) == (2, 64)
    for option in (("--head", "fcos"), ("--img-size", "64"), ("--detector", "num_classes=3")):
        with pytest.raises(UserError, match=f"^{option[0]} is for networks by name; .* is a trained detector"):
            run("predict", place / "run", *of_run, "--device", "rtx-4090", *option)


def test_predict_and_choose_know_detectors(place: Path) -> None:
    gpu = ("--device", "rtx-4090", "--task", "detection", *SMALL, "--json")
    (told,) = json.loads(run("predict", place / "net.yaml", *gpu))
    assert sum(told["parts_s"].values()) == pytest.approx(told["latency_s"])
    assert told["low"] < told["images_per_s"] < told["high"]
    (more,) = json.loads(run("predict", place / "net.yaml", *gpu, "--detector", "num_classes=80"))
    assert (told["num_classes"], more["num_classes"]) == (20, 80)
    chosen = json.loads(run("choose", *gpu, "--model", "resnet18", "--model", "poolnet", "--min-throughput", 1))
    assert (chosen["best"]["backbone"], chosen["num_classes"]) == ("resnet18", 20)
    assert chosen["best"]["top1"] > 69
    assert chosen["conditions"]["image_size"] == told["conditions"]["image_size"] == 64
    assert "stands on those at 8, 16, 32" in chosen["options"][1]["reason"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("measure", "resnet18", "--task", "boxes"), "--task 'boxes' is unknown"),
        (("measure", "resnet18", "--task", "detection", "--sweep"), "do not go with --task detection"),
        (("measure", "resnet18", "--task", "detection", "--runtime", "eager"), "a detector is measured as it ships"),
        (("choose", "--task", "detection", "--max-latency", "3"), "chooses by --min-throughput alone"),
        (("measure", "resnet18", "--task", "detection", "--detector", "neck=3"), "--detector neck is unknown"),
        (("measure", "resnet18", "--task", "detection", "--detector", "neck_width=x"), "must be a whole number"),
        (("measure", "resnet18", "--task", "detection", "--detector", "num_classes=0"), "num_classes is 0; it must be"),
        (("train", "--task", "detection", "--model", "resnet18", "--detector", "num_classes=3", "--data-dir", "/no",
          "--output", "x"), "--detector num_classes is for a detector that is timed; the data say how many there are"),
        (("train", "--task", "detection", "--model", "resnet18", "--set", "head=ml_decoder", "--data-dir", "/nowhere",
          "--output", "x"), "--set head=ml_decoder puts a head on a classifier; a detector's is chosen by --head"),
        (("train", "--task", "detection", "--model", "resnet18", "--data-dir", "/nowhere", "--output", "/tmp/x/y"),
         "data /nowhere does not exist"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_told(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            ("--head", "fcos"),
            "^--head fcos goes with --task detection; `train --set head=ml_decoder` puts ML-Decoder on a classifier$",
        ),
        (("--detector", "neck_width=8"), "^--detector neck_width=8 goes with --task detection; leave it out$"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("train", "--model", "resnet18", "--data-dir", "/nowhere", "--output", "x"),
        ("measure", "resnet18"),
        ("predict", "resnet18", "--device", "rtx-4090"),
        ("choose", "--device", "rtx-4090", "--min-throughput", "5"),
    ],
)
def test_what_a_detector_has_is_refused_for_classifiers(
    command: tuple[str, ...], option: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(app, [*command, *option], catch_exceptions=False)


@pytest.mark.parametrize("option", [("--task", "detection"), ("--head", "fcos"), ("--detector", "neck_width=8")])
def test_a_promise_is_measured_without_a_detectors_options(option: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"^--promised measures as was promised; give it without {option[0]}$"):
        CliRunner().invoke(app, ["measure", "x", "--promised", *option], catch_exceptions=False)


@pytest.mark.parametrize("option", [("--predictions",), ("--confusion",), ("--dataset", "coco")])
@pytest.mark.parametrize("shipped", [True, False])
def test_what_evaluates_classifiers_is_refused_for_detectors(
    option: tuple[str, ...], shipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = SimpleNamespace(net=SimpleNamespace(detector_spec=object()), classes=("red", "green"))
    artefact = SimpleNamespace(is_detector=True, classes=("red", "green"))
    monkeypatch.setattr("convscale.learn.checkpoint.load_checkpoint", lambda *_, **__: loaded)
    monkeypatch.setattr("convscale.artifact.artifact.load_artifact", lambda *_, **__: artefact)
    if shipped:
        (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(UserError, match=f"^{option[0]} is not for detectors, whose measure is mAP; leave it out$"):
        CliRunner().invoke(app, ["evaluate", str(tmp_path), "--data-dir", "/nowhere", *option], catch_exceptions=False)


@pytest.mark.parametrize(("option", "batch"), [((), None), (("-b", "256"), 256), (("-b", "64"), 64)])
def test_an_artefact_is_evaluated_at_the_batch_asked_for(
    option: tuple[str, ...], batch: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = SimpleNamespace(is_detector=True, classes=("red", "green"))
    monkeypatch.setattr("convscale.artifact.artifact.load_artifact", lambda *_, **__: artefact)
    monkeypatch.setattr("convscale.detect.data.open_boxes", lambda *_, **__: SimpleNamespace(notes=(), test=()))

    def stop(*_: object, batch_size: int | None, **__: object) -> None:
        raise UserError(f"at {batch_size}")

    monkeypatch.setattr("convscale.detect.evaluate.evaluate_detector", stop)
    (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(UserError, match=f"^at {batch}$"):
        CliRunner().invoke(app, ["evaluate", str(tmp_path), "--data-dir", ".", *option], catch_exceptions=False)


def test_a_network_is_not_given_to_an_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = SimpleNamespace(is_detector=True, classes=("red", "green"))
    monkeypatch.setattr("convscale.artifact.artifact.load_artifact", lambda *_, **__: artefact)
    (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(UserError, match="--model is not for an artefact, which has its network"):
        CliRunner().invoke(
            app, ["evaluate", str(tmp_path), "--data-dir", "/nowhere", "--model", "a:b"], catch_exceptions=False
        )
