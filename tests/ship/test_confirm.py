"""A promise on the day: kept or missed, inside or not, on the right device. GPUs are stand-ins: none was measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.facts import write_promise
from convscale.artifact.promise import Promise
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.predictor.calibrate import calibrate, observations_of
from convscale.predictor.predict import Prediction, predict
from convscale.runtimes import base
from convscale.runtimes.base import Opening
from convscale.runtimes.onnxruntime import BoundOnnxRunner, OnnxRunner, OnnxRuntime
from convscale.runtimes.tensorrt import Tensorrt
from convscale.ship import confirm as module
from convscale.ship.confirm import Confirmation, card_name, confirm, promise_of
from convscale.ship.export import export
from convscale.speed.records import Record, read_records
from convscale.speed.timing import Measurement

COLUMNS = 120
PROMISE = Promise(
    device="cpu",
    runtime="onnxruntime",
    precision="fp32",
    batch_size=4,
    image_size=32,
    threads=1,
    images_per_s=100.0,
    low=50.0,
    high=1e9,
    min_throughput=1.0,
    confidence=0.99,
)


@pytest.fixture
def folder(onnx_art: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(onnx_art.folder, tmp_path / "copy"))


def measured(seconds: float, batch_size: int = 100) -> Measurement:
    return Measurement(
        times_s=(seconds,) * 5,
        conditions=Conditions(device="cuda", batch_size=batch_size, image_size=32, runtime="onnxruntime"),
        environment=Environment(device_name="NVIDIA L4", cores=8),
    )


@pytest.mark.parametrize(
    ("images_per_s", "asked", "kept", "inside", "says"),
    [
        (100, 90.0, True, True, "keeps the 90 asked for; 100 were predicted (80 %: 80 to 125), so it is 100 %"),
        (85, 90.0, False, True, "misses the 90 asked for"),
        (75, 70.0, True, False, "keeps the 70 asked for"),
        (200, 90.0, True, False, "so it is 200 % of that and above the interval"),
        (85, None, True, True, "is not slower than promised (nothing was asked for)"),
        (75, None, False, False, "so it is 75 % of that and below the interval"),
    ],
)
def test_kept_and_inside_are_two_questions(
    images_per_s: float, asked: float | None, kept: bool, inside: bool, says: str
) -> None:
    promise = replace(PROMISE, images_per_s=100.0, low=80.0, high=125.0, min_throughput=asked, confidence=None)
    found = Confirmation(promise=promise, measurement=measured(100 / images_per_s))
    assert (found.kept, found.inside) == (kept, inside)
    assert found.ratio == pytest.approx(images_per_s / 100)
    assert says in str(found)


@pytest.mark.parametrize(
    ("images_per_s", "asked", "kept", "inside", "says"),
    [
        (99, None, True, True, "is not slower than promised (nothing was asked for); 100 were measured before"),
        (91, None, True, True, "(middle half of the calls: 99.5 to 100), so it is 91 % of that and as fast as then"),
        (89, None, False, False, "is slower than promised (nothing was asked for)"),
        (89, 80.0, True, False, "keeps the 80 asked for; 100 were measured before training"),
        (111, None, True, False, "so it is 111 % of that and faster than then"),
    ],
)
def test_what_was_measured_before_is_not_judged_by_its_quartiles(
    images_per_s: float, asked: float | None, kept: bool, inside: bool, says: str
) -> None:
    """They hold half of one run's calls; ten in a hundred more or less is as fast as then."""
    measure = {"images_per_s": 100.0, "low": 99.5, "high": 100.4, "confidence": None, "measured": True}
    promise = replace(PROMISE, min_throughput=asked, **measure)
    found = Confirmation(promise=promise, measurement=measured(100 / images_per_s))
    assert (found.kept, found.inside) == (kept, inside)
    assert says in str(found)


def test_a_prediction_becomes_a_promise() -> None:
    """800 to 1,250 around 1,000 is symmetric in the logarithm: nine in ten reach 800."""
    prediction = Prediction(
        images_per_s=1000.0,
        low=800.0,
        high=1250.0,
        latency_s=0.256,
        bound_by="memory",
        shares={},
        doubts=("a doubt",),
        conditions=Conditions(device="l4", precision="amp", batch_size=256, image_size=224, runtime="tensorrt"),
        peak_bytes=1,
    )
    promise = promise_of(prediction, 800.0)
    assert promise.confidence == pytest.approx(0.9, abs=0.001)
    assert (promise.device, promise.runtime, promise.batch_size, promise.image_size) == ("l4", "tensorrt", 256, 224)
    assert promise.doubts == ("a doubt",)
    assert set(promise.versions) == {"convscale"}
    assert promise_of(prediction).confidence is None


def test_a_promise_for_this_processor_is_measured_and_calibrates(folder: Path, tmp_path: Path) -> None:
    write_promise(folder, PROMISE)
    rows = tmp_path / "rows.jsonl"
    found = confirm(folder, output=rows, min_seconds=0.02)
    assert found.kept
    assert found.measurement.conditions == Conditions(
        device="cpu", batch_size=4, image_size=32, runtime="onnxruntime", threads=1
    )
    (record,) = read_records(rows)
    assert record.measurement == found.measurement


def test_the_record_is_what_calibrate_takes(tmp_path: Path) -> None:
    """Of a network whose spec the artefact keeps: the calibrated prediction is near what was measured."""
    export("mobilenetv2_050", tmp_path / "a", image_size=32, promise=PROMISE)
    found = confirm(tmp_path / "a", "cpu", output=tmp_path / "rows.jsonl", min_seconds=0.05)
    records = read_records(tmp_path / "rows.jsonl")
    observations, unknown = observations_of(records, "cpu")
    assert unknown == []
    assert records[0].spec is not None
    assert records[0].spec["name"] == "mobilenetv2_050"
    asked = {"device": "cpu", "precision": "fp32", "image_size": 32, "batch_size": 4, "runtime": "onnxruntime"}
    after = predict("mobilenetv2_050", calibration=calibrate(observations), **asked)
    before = predict("mobilenetv2_050", **asked)
    assert abs(np.log(after.images_per_s / found.images_per_s)) <= abs(np.log(before.images_per_s / found.images_per_s))
    assert after.low < found.images_per_s < after.high


def test_a_spec_in_a_record_is_built_where_the_name_is_unknown() -> None:
    from convscale import get_spec

    record = Record(model="mine", measurement=measured(0.1), spec=get_spec("resnet18").to_dict())
    again = Record.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again.spec == json.loads(json.dumps(record.spec))
    (observation,), unknown = observations_of([again], "l4")
    assert (observation.net, unknown) == (get_spec("resnet18"), [])
    _, unknown = observations_of([replace(again, spec={"no": "spec"})], "l4")
    assert unknown == ["mine"]


@pytest.mark.parametrize("source", ["convscale", "kit"])
def test_a_record_of_another_device_calibrates_nothing(source: str) -> None:
    record = Record(model="resnet18", measurement=measured(0.1), source=source)
    for device, title in (("rtx-4090", "NVIDIA GeForce RTX 4090"), ("cpu", "")):
        with pytest.raises(UserError) as caught:
            observations_of([record], device)
        assert f"resnet18 was measured on 'NVIDIA L4', the calibration is for {title}" in str(caught.value)
        assert "\n" not in str(caught.value)
    (observation,), _ = observations_of([record], "NVIDIA L4")
    assert observation.conditions.device == "l4"
    here = replace(record, measurement=replace(record.measurement, conditions=Conditions(device="cpu")))
    with pytest.raises(UserError, match="resnet18 was measured on 'NVIDIA L4', the calibration is for NVIDIA L4"):
        observations_of([here], "l4")  # what its processor did is not the card's
    (told,), _ = observations_of([replace(here, source="table.csv")], "l4")  # a table's device is told
    assert told.conditions.device == "l4"


def test_without_a_promise(folder: Path) -> None:
    with pytest.raises(UserError, match=r"carries no promise; `convscale measure .*` measures it"):
        confirm(folder)


@pytest.mark.parametrize(
    ("promised", "device", "card", "message"),
    [
        ("cpu", "cuda", "NVIDIA L4", r"promised for .*, got device 'cuda'; confirm it with device cpu"),
        ("l4", "cpu", "NVIDIA L4", "promised for NVIDIA L4, got device 'cpu'; confirm it with device cuda"),
        ("l4", "cuda", "NVIDIA L40S", "promised for NVIDIA L4, this card is 'NVIDIA L40S'; confirm it there"),
        ("i9-10940x", "cuda", "NVIDIA L4", "promised for Intel Core i9-10940X, got device 'cuda'"),
        ("i9-10940x", None, "", "promised for Intel Core i9-10940X, this processor is '.*'; confirm it there"),
        ("l4", "l4", "NVIDIA L4", "device 'l4' can not be measured here; cpu, cuda or cuda:N would be right"),
    ],
)
def test_another_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch, promised: str, device: str | None, card: str, message: str
) -> None:
    write_promise(folder, replace(PROMISE, device=promised))
    monkeypatch.setattr(module, "card_name", lambda device: card)
    with pytest.raises(UserError, match=message):
        confirm(folder, device)


@pytest.mark.parametrize("runtime", ["eager", "tensorrt"])
def test_a_promise_in_a_runtime_that_can_not_run_the_artefact_is_measured_in_its_own(
    folder: Path, runtime: str
) -> None:
    write_promise(folder, replace(PROMISE, runtime=runtime))
    found = confirm(folder, "cpu", min_seconds=0.02)
    assert (found.measurement.conditions.runtime, found.measurement.conditions.batch_size) == ("onnxruntime", 4)
    assert found.notes == (f"promised in {runtime}, measured in onnxruntime",)
    assert confirm(load_artifact(folder, runtime="openvino"), "cpu", min_seconds=0.02).notes == found.notes


class ProcessorAsCard(BoundOnnxRunner):
    """The GPU's way of running, on the processor."""

    place = "cpu"


def test_a_gpu_by_stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONNX Runtime's bound arrays on the processor in the place of a card's; promised as ``fit --device l4`` does."""
    promise = replace(PROMISE, device="l4", runtime="compiled", precision="amp", layout="nhwc", threads=None)
    write_promise(folder, promise)
    monkeypatch.setattr(module, "card_name", lambda device: "NVIDIA L4")
    opened: list[Opening] = []

    def opening(self: OnnxRuntime, source: Path, how: Opening) -> OnnxRunner:
        opened.append(how)
        return ProcessorAsCard(source, replace(how, device="cpu"))

    monkeypatch.setattr(OnnxRuntime, "open", opening)
    found = confirm(folder, min_seconds=0.02, output=tmp_path / "rows.jsonl")
    assert (opened[0].device, opened[0].streams, opened[0].batch_size) == ("cuda", 1, 4)
    assert found.measurement.environment.device_name == "NVIDIA L4"
    assert found.measurement.conditions.device == "cuda"
    assert found.notes == (
        "promised in compiled, measured in onnxruntime",
        "promised in amp, the artefact is in fp32",
        "promised in nhwc; onnxruntime lays out memory itself",
    )
    (record,) = read_records(tmp_path / "rows.jsonl")
    assert record.measurement.environment.device_name == "NVIDIA L4"


def test_a_promise_in_tensorrt_is_confirmed_in_tensorrt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens the file, on a card; on the processor, where it runs nothing, it is no runtime of the format."""
    write_promise(folder, replace(PROMISE, device="l4", runtime="tensorrt", threads=None))
    monkeypatch.setattr(module, "card_name", lambda device: "NVIDIA L4")
    monkeypatch.setattr(base, "find_spec", lambda name: find_spec("numpy" if name == "tensorrt" else name))
    opened: list[Opening] = []

    def opening(self: Tensorrt, source: Path, how: Opening) -> OnnxRunner:
        opened.append(how)
        return ProcessorAsCard(source, replace(how, device="cpu"))

    monkeypatch.setattr(Tensorrt, "open", opening)
    found = confirm(folder, min_seconds=0.02)
    assert [(how.device, how.batch_size) for how in opened] == [("cuda", 4)]
    assert (found.measurement.conditions.runtime, found.notes) == ("tensorrt", ())


def test_bound_arrays_give_what_copied_ones_give(onnx_art: Artifact, images: np.ndarray) -> None:
    how = Opening(threads=1)
    batch = onnx_art.input_batch(images)
    plain, bound = OnnxRunner(onnx_art.model_path, how), ProcessorAsCard(onnx_art.model_path, how)
    np.testing.assert_array_equal(bound(batch)[0], plain(batch)[0])
    assert bound(batch)[0].shape == (40, 5)


def test_the_card_that_was_asked_for_is_the_one_that_runs(onnx_art: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    asked: list[object] = []

    class Session:
        def __init__(self, path: str, options: object, providers: list[object]) -> None:
            asked.extend(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def get_inputs(self) -> list[object]:
            return [SimpleNamespace(type="tensor(float)", name="images")]

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    runner = OnnxRuntime().open(onnx_art.model_path, Opening(threads=1, device="cuda:1"))
    assert isinstance(runner, BoundOnnxRunner)
    assert asked == [("CUDAExecutionProvider", {"device_id": 1})]


def test_the_name_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert card_name("cuda:1") == "name of cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    done = subprocess.CompletedProcess([], 0, stdout="NVIDIA L4\n", stderr="")
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda args, **_: asked.append(args) or done)
    assert card_name("cuda:2") == "NVIDIA L4"
    assert asked[0][-2:] == ["-i", "2"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="device 'cuda' is not there: neither PyTorch nor nvidia-smi sees it"):
        card_name("cuda")


def test_confirming_needs_no_torch(folder: Path) -> None:
    """A machine that only runs artefacts has none."""
    write_promise(folder, PROMISE)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import convscale as cs\n"
        f"print(cs.confirm({str(folder)!r}, min_seconds=0.02).kept)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_on_the_command_line(folder: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = call("measure", folder, "--promised")
    assert (code, "carries no promise" in err, err.count("\n")) == (2, True, 1)
    write_promise(folder, PROMISE)
    rows = tmp_path / "rows.jsonl"
    code, out, err = call("measure", folder, "--promised", "--seconds", "0.02", "--output", rows)
    assert (code, err) == (0, "")
    assert "keeps the 1 asked for" in out
    assert len(read_records(rows)) == 1
    write_promise(folder, replace(PROMISE, min_throughput=1e8))
    code, out, _ = call("measure", folder, "--promised", "--seconds", "0.02", "--json")
    assert code == 3
    value = json.loads(out)
    assert (value["kept"], value["inside"], value["promise"]["min_throughput"]) == (False, True, 1e8)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("resnet18", "--promised"), "--promised takes an artefact folder, got 'resnet18'"),
        (("resnet18", "--output", "x.jsonl"), "--output goes with --promised"),
        (("{folder}", "{folder}", "--promised"), "--promised takes one artefact folder, got 2"),
        (("{folder}", "--promised", "-b", "4"), "--promised measures as was promised; give it without -b"),
        (("{folder}", "--promised", "--output", "x.csv"), "--promised writes JSON lines, got x.csv"),
        (("{folder}", "--promised", "--device", "cuda"), "got device 'cuda'; confirm it with device cpu"),
    ],
)
def test_bad_input(
    folder: Path, call: Callable[..., tuple[int, str, str]], args: tuple[str, ...], message: str
) -> None:
    write_promise(folder, PROMISE)
    code, out, err = call("measure", *(a.format(folder=folder) for a in args))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_half_precision_says_what_it_computes_in(tiny: nn.Module, tmp_path: Path) -> None:
    export(tiny, tmp_path / "half", half=True, promise=replace(PROMISE, precision="amp"))
    assert load_artifact(tmp_path / "half").precision == "fp16"
    found = confirm(tmp_path / "half", min_seconds=0.02)
    assert found.notes == ("the artefact stores half precision and computes in single",)
