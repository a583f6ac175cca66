"""What convscale 0.1.0 wrote still opens, and says what it said then.

``tools/make_old_files.py`` made the files with the code of that version. Only the public API and the command line are
used, so that these tests outlive every move inside the package.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import convscale as cs

OLD = Path(__file__).parent / "old_files" / "v0_1"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
COLUMNS = 200
Call = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("briefly")


@pytest.fixture(autouse=True)
def _in_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in a copy of the old files, by the relative paths that they were made with."""
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(shutil.copytree(OLD, tmp_path / "v0_1"))


def output_of(call: Call, *args: object) -> str:
    """Standard output of a command that must succeed."""
    code, out, err = call(*args)
    assert code == 0, err
    return out


def fashion(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28, 1) and labels (N,) of the small Fashion-MNIST."""
    with gzip.open(f"data/fashion/{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 28, 28, 1)
    with gzip.open(f"data/fashion/{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8)
    return images, labels


def digests(folder: str) -> dict[str, str]:
    """Every file below a folder and its checksum."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


# Artefacts


@pytest.mark.parametrize(
    ("name", "atol"),
    [
        ("onnx_fp32", 1e-5),
        ("onnx_fp16", 1e-5),
        ("onnx_int8", 0.02),
        ("onnx_labels", 1e-5),
        ("openvino_fp32", 1e-5),
        ("openvino_int8", 0.02),
        ("torch_fp32", 1e-5),
    ],
)
def test_an_artefact_answers_as_it_did(name: str, atol: float) -> None:
    if name.startswith("openvino"):
        pytest.importorskip("openvino")
    artifact = cs.load_artifact(f"artefacts/{name}")
    assert f"{artifact.format}_{artifact.precision}" == name.replace("labels", "fp32")
    before = np.load(f"artefacts/{name}.npz")
    probabilities = artifact(before["images"])
    assert probabilities.shape == (4, len(artifact.classes))
    np.testing.assert_allclose(probabilities, before["probabilities"], rtol=0, atol=atol)
    np.testing.assert_allclose(artifact.logits(before["images"]), before["logits"], rtol=0, atol=20 * atol)


def test_what_an_artefact_knows_is_read() -> None:
    pytest.importorskip("openvino")
    tuned = cs.load_artifact("artefacts/openvino_fp32")
    assert (tuned.runtime, tuned.batch_size, tuned.threads, tuned.baked) == ("openvino", 64, 1, True)
    assert tuned.classes[:2] == ("T-shirt/top", "Trouser")
    assert tuned.verification is not None
    assert tuned.verification["n"] == 60
    labels = cs.load_artifact("artefacts/onnx_labels")
    assert labels.classes == ("image", "light")
    assert labels.thresholds == pytest.approx([*EXPECTED["evaluate_labels"]["thresholds"].values()])


def test_classify_goes_on_in_an_old_file_of_rows(call: Call) -> None:
    lines = Path("rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10
    output_of(
        call, "classify", "data/pictures", "--model", "artefacts/torch_fp32", "--output", "rows.jsonl", "--resume"
    )
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["path"] for row in rows] == [row["path"] for row in EXPECTED["rows"]]
    for row, before in zip(rows, EXPECTED["rows"], strict=True):
        assert row["classes"][0]["class"] == before["classes"][0]["class"]
        # written when a tensor library resized, whose pixels differ by one of 255 here and there from those of now
        assert row["classes"][0]["probability"] == pytest.approx(before["classes"][0]["probability"], abs=1e-3)


# Trainings


@pytest.mark.parametrize(
    ("checkpoint", "data", "key"),
    [("trainings/finished", "data/fashion", "evaluate"), ("checkpoint", "data/labels.jsonl", "evaluate_labels")],
)
def test_a_checkpoint_evaluates_as_it_did(call: Call, checkpoint: str, data: str, key: str) -> None:
    now, before = json.loads(output_of(call, "evaluate", checkpoint, "--data-dir", data, "--json")), EXPECTED[key]
    for name in ("split", "n", "classes", "bad", "confusion"):
        assert now[name] == before[name], name
    assert now["top5"] is None  # these have ten classes or fewer: it is told of more
    for name in ("loss", "top1", "mean_average_precision", "calibration_error", "per_class", "thresholds"):
        assert now[name] == (None if before[name] is None else pytest.approx(before[name], rel=1e-4)), name
    ev = cs.evaluate(checkpoint, data)  # by paths alone, too
    told = ("n", "loss", "top1", "baseline", "calibration_error", "per_class")
    assert {name: getattr(ev, name) for name in told} == {
        name: tuple(now[name]) if name == "per_class" else pytest.approx(now[name]) for name in told
    }


def test_a_checkpoint_exports_to_what_it_did(call: Call) -> None:
    output_of(call, "export", "trainings/finished", "--output", "new")
    before = np.load("artefacts/onnx_fp32.npz")
    np.testing.assert_allclose(cs.load_artifact("new")(before["images"]), before["probabilities"], rtol=0, atol=1e-5)


def test_a_finished_training_goes_on_for_another_epoch() -> None:
    before = EXPECTED["train"]
    run = cs.train(
        cs.load_spec("specs/resnet.yaml"),
        "data/fashion",
        output="trainings/finished",
        resume=True,
        epochs=4,
        seed=7,
        workers=0,
        keep=1,
    )
    assert run.finished
    assert run.history[:3] == before["history"]
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4]
    assert run.recipe.lr == 0.02  # the run's own, from its recipe.yaml
    assert run.best_metric >= before["best_metric"]
    assert sorted(path.name for path in Path("trainings/finished/checkpoints").glob("step-*")) == ["step-00000068"]


def test_an_interrupted_training_ends_as_if_it_had_not_been(call: Call) -> None:
    state = Path("trainings/interrupted/checkpoints/step-00000018/checkpoint.json")
    first = json.loads(state.read_text(encoding="utf-8"))["metrics"]["history"]
    assert [row["epoch"] for row in first] == [1]
    args = [*EXPECTED["train"]["args"], "--output", "trainings/interrupted", "--resume", "--json"]
    run = json.loads(output_of(call, "train", *args))
    assert run["finished"]
    assert run["history"][0] == first[0]  # its times too: that epoch was not trained again
    assert run["best_epoch"] in (2, 3)
    for row, before in zip(run["history"], EXPECTED["train"]["history"], strict=True):
        assert (row["epoch"], row["images"]) == (before["epoch"], before["images"])
        assert row["lr"] == pytest.approx(before["lr"], rel=1e-6)
        # Bit for bit on one thread; other processors and numbers of threads round differently.
        assert row["train_loss"] == pytest.approx(before["train_loss"], rel=1e-3)
        assert row["val_loss"] == pytest.approx(before["val_loss"], rel=1e-3)


def test_a_training_is_reported(call: Call) -> None:
    page = json.loads(output_of(call, "report", "trainings/finished", "--json"))["report"]
    text = Path(page).read_text(encoding="utf-8")
    assert f"{100 * EXPECTED['train']['best_metric']:.2f}" in text
    assert "<dt>batch_size</dt><dd>10</dd>" in text


# Runs of fit


def test_a_finished_fit_is_reported(call: Call) -> None:
    output_of(call, "report", "fits/finished")
    text = Path("fits/finished/report.html").read_text(encoding="utf-8")
    for words in ("tiny_resnet18", "tiny_mobilenetv1_100", f"{100 * EXPECTED['fit']['evaluation']['top1']:.2f}"):
        assert words in text


def test_a_finished_fit_resumes_without_training(call: Call) -> None:
    before, trained = EXPECTED["fit"], digests("fits/finished/train/checkpoints")
    candidates = json.loads(Path("fits/finished/fit.json").read_text(encoding="utf-8"))["candidates"]
    images, labels = fashion("t10k")
    answers = cs.load_artifact("fits/finished/artifact")(images)
    assert (answers.argmax(1) == labels).mean() == pytest.approx(before["evaluation"]["top1"])
    run = json.loads(output_of(call, "fit", *before["args"], "--output", "fits/finished", "--resume", "--json"))
    assert run["winner"] == before["winner"]
    assert run["evaluation"]["confusion"] == before["evaluation"]["confusion"]
    assert sorted(run["artifact"]["search"]["forms"]) == before["forms"]
    assert digests("fits/finished/train/checkpoints") == trained
    assert json.loads(Path("fits/finished/fit.json").read_text(encoding="utf-8"))["candidates"] == candidates
    np.testing.assert_allclose(cs.load_artifact("fits/finished/artifact")(images), answers, rtol=0, atol=1e-5)


def test_an_interrupted_fit_goes_on_where_it_stopped(call: Call) -> None:
    before = json.loads(Path("fits/interrupted/fit.json").read_text(encoding="utf-8"))
    assert "history" not in before
    state = Path("fits/interrupted/train/checkpoints/step-00000018/checkpoint.json")
    first = json.loads(state.read_text(encoding="utf-8"))["metrics"]["history"]
    run = json.loads(
        output_of(call, "fit", *EXPECTED["fit"]["args"], "--output", "fits/interrupted", "--resume", "--json")
    )
    after = json.loads(Path("fits/interrupted/fit.json").read_text(encoding="utf-8"))
    assert after["candidates"] == before["candidates"]  # measurements and the brief comparison are kept
    assert run["winner"]["name"] == before["winner"]["name"] == EXPECTED["fit"]["winner"]["name"]
    assert after["history"][0] == first[0]
    assert [row["epoch"] for row in after["history"]] == [1, 2, 3]
    assert run["evaluation"]["n"] == 60
    assert run["evaluation"]["top1"] == pytest.approx(EXPECTED["fit"]["evaluation"]["top1"], abs=0.04)
    assert Path("fits/interrupted/report.html").is_file()
    assert cs.load_artifact("fits/interrupted/artifact").verification is not None


def test_another_request_does_not_resume_an_old_fit(call: Call) -> None:
    code, _, err = call(
        "fit", *EXPECTED["fit"]["args"], "--min-throughput", "2", "--output", "fits/finished", "--resume"
    )
    assert code == 2
    assert "was made by another request (convscale fit --data-dir data/fashion --min-throughput 1 " in err


# Measurements and calibrations


def records() -> list[dict]:
    return [json.loads(line) for line in Path("records.jsonl").read_text(encoding="utf-8").splitlines()]


def test_records_are_reported(call: Call) -> None:
    output_of(call, "report", "--records", "records.jsonl", "--output", "new.html")
    text = Path("new.html").read_text(encoding="utf-8")
    assert [record["model"] for record in records()] == ["resnet18", "mobilenetv2_050", "tiny_resnet18", "resnet18"]
    for record in EXPECTED["records"]:
        assert record["model"] in text
    output_of(call, "report", "--records", "records.csv", "--output", "table.html")
    assert "resnet18" in Path("table.html").read_text(encoding="utf-8")


def test_choose_takes_an_old_record_for_a_measurement(call: Call) -> None:
    """Where machine and versions are the same: the fresh record says which those are here."""
    measure = "measure specs/resnet.yaml --runtime eager -b 2 --threads 1 --seconds 0.01 --record fresh.jsonl"
    output_of(call, *measure.split())
    here = json.loads(Path("fresh.jsonl").read_text(encoding="utf-8"))["measurement"]["environment"]
    old = records()[2]
    old["measurement"]["environment"] = here
    Path("kept.jsonl").write_text(json.dumps(old) + "\n", encoding="utf-8")
    choose = "choose --device cpu --runtime onnxruntime --model specs/resnet.yaml --accuracy none -b 2 --threads 1"
    choose += " --min-throughput 1 --records kept.jsonl --json"
    choice = json.loads(output_of(call, *choose.split()))
    assert len(Path("kept.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    assert choice["best"]["speed"]["images_per_s"] == pytest.approx(2 / np.median(old["measurement"]["times_s"]))


def test_old_records_calibrate(call: Call) -> None:
    lines = Path("records.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("two.jsonl").write_text("".join(lines[:2]), encoding="utf-8")
    output_of(call, "calibrate", "--device", "cpu", "--measurement", "two.jsonl", "--output", "new.json")
    now, before = (json.loads(Path(name).read_text(encoding="utf-8")) for name in ("new.json", "calibration_cpu.json"))
    assert (now.pop("format"), before.pop("format")) == (
        5,
        3,
    )  # format 4 has other names of kernels, 5 more coefficients
    assert {name: now[name] for name in before if isinstance(before[name], str | int)} == {
        name: value for name, value in before.items() if isinstance(value, str | int)
    }
    # coefficients begin at this version's set, so it is by what was measured that they are judged
    made = cs.load_calibration("new.json")
    for record in records()[:2]:
        told = cs.predict(record["model"], device="cpu", calibration=made, batch_size=2, image_size=32)
        assert told.images_per_s == pytest.approx(2 / np.median(record["measurement"]["times_s"]), rel=0.2)


@pytest.mark.parametrize("device", ["cpu", "rtx-4090"])
def test_an_old_calibration_predicts_what_it_did(call: Call, device: str) -> None:
    args = ("--device", device, "--calibration", f"calibration_{device}.json")
    now, before = json.loads(output_of(call, "predict", "resnet18", *args, "--json")), EXPECTED["predict"][device]
    threads = {"cpu": 1}.get(device)  # those of the calibration, which 0.1.0 did not say
    assert now["conditions"] == {**before["conditions"], "threads": threads}
    (made,), (old,) = now["predictions"], before["predictions"]
    assert made["images_per_s"] == pytest.approx(old["images_per_s"], rel=1e-3)
    assert made["low"] < old["images_per_s"] < made["high"]  # how wide they are is of the tables of this version
    told = cs.predict("resnet18", device=device, calibration=f"calibration_{device}.json")
    assert told == cs.predict("resnet18", device=device, calibration=cs.load_calibration(Path(args[3])))
    assert told.images_per_s == pytest.approx(old["images_per_s"], rel=1e-3)


def test_choose_predicts_by_an_old_calibration() -> None:
    choice = cs.choose(
        device="rtx-4090",
        min_throughput=1,
        candidates=["resnet18"],
        image_sizes=[224],
        calibration="calibration_rtx-4090.json",
    )
    before = EXPECTED["predict"]["rtx-4090"]["predictions"][0]
    assert choice.best.images_per_s == pytest.approx(before["images_per_s"], rel=1e-3)


# Specs and recipes


@pytest.mark.parametrize("name", sorted(EXPECTED["specs"]))
def test_a_spec_is_read(call: Call, name: str) -> None:
    spec, before = cs.load_spec(f"specs/{name}.yaml"), EXPECTED["specs"][name]
    assert cs.load_spec(f"specs/{name}.json") == spec
    cost = cs.count(spec)
    assert (spec.name, spec.input.size, cost.params, cost.macs) == tuple(before.values())
    now, then = (
        json.loads(output_of(call, "show", f"specs/{name}.yaml", "--json")),
        json.loads(Path(f"specs/{name}.json").read_text(encoding="utf-8")),
    )
    assert {key: now[key] for key in then} == then


def test_specs_of_known_networks_are_those_networks() -> None:
    assert cs.load_spec("specs/tresnet_m.yaml") == cs.get_spec("tresnet_m")
    assert cs.load_spec("specs/scaled.yaml") == cs.scale(cs.get_spec("efficientnet_b0"), phi=-2.0)


def test_a_recipe_is_read(call: Call) -> None:
    now, before = json.loads(output_of(call, "recipes", "recipe.yaml", "--json")), EXPECTED["recipe"]
    assert {key: now[key] for key in before} == before
    assert (now["lr"], now["epochs"], now["optimizer"]) == (0.5, 3, "rmsprop")
