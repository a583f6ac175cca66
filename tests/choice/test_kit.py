"""A kit: what goes into it, and a real one measured here by its own script, without torch."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import convscale as cs
from convscale.choice.candidates import Candidate
from convscale.choice.carried import could_win, promise_of_option
from convscale.choice.decide import Choice, Option, decide
from convscale.choice.facts import NetworkFacts, Speed
from convscale.conditions import Conditions, Constraint
from convscale.errors import UserError
from convscale.predictor.calibrate import calibrate, observations_of
from convscale.predictor.calibration import save_calibration
from convscale.ship.kit import Kit
from convscale.speed.records import read_records

COLUMNS = 160
FLOOR = 1000.0
NETS = ("resnet18", "resnet200", "resnet34", "resnet50", "resnet101", "resnet152", "tresnet_m", "tresnet_l")


def option(number: int, middle: float, top1: float, *, spread: float = 0.5, name: str = "") -> Option:
    """A predicted option of a hand-made choice; ``spread``: half the interval in the logarithm."""
    spec = cs.get_spec(NETS[number])
    speed = Speed(images_per_s=middle, low=middle * math.exp(-spread), high=middle * math.exp(spread), kind="predicted")
    candidate = Candidate(name=name or spec.name, spec=spec, image_size=224, group=name or spec.name, top1=top1)
    return Option(candidate=candidate, facts=NetworkFacts(params=1, macs=number, speed=speed), batch_size=256)


def choice(*options: Option, kind: str = "predicted") -> Choice:
    constraint = Constraint(min_throughput=FLOOR)
    judged = decide(options, constraint)
    conditions = Conditions(device="l4", precision="amp", batch_size=256, runtime="onnxruntime")
    return Choice(**vars(judged), constraint=constraint, conditions=conditions, kind=kind, device="L4", floor=FLOOR)


def test_those_go_along_that_could_win() -> None:
    """Half-widths of 0.5 are deviations of 0.39: 5 % and 99 % lie 0.64 below and 0.91 above the floor."""
    made = choice(
        option(0, 2600, 70.0),  # over 99 %: the best for sure
        option(1, 3000, 69.0),  # sure as well, less accurate
        option(2, 1100, 75.0),  # maybe
        option(3, 800, 80.0),  # maybe, more accurate
        option(4, 500, 85.0),  # 3.8 %: will not win
        option(5, 560, 84.0),  # 6.9 %
        option(3, 800, 79.0, name="other weights"),  # the same network
        option(6, 790, 71.0),  # maybe, beaten by others on both counts
    )
    assert made.best.name == "resnet18"
    assert [o.name for o in could_win(made)] == ["resnet18", "resnet34", "resnet50", "resnet152", "tresnet_m"]
    assert [o.name for o in could_win(made, 3)] == ["resnet18", "resnet34", "resnet152"], "the ends of the front"


def test_where_the_best_is_not_sure_what_would_replace_it_goes_along() -> None:
    made = choice(option(0, 1200, 80.0), option(1, 2600, 70.0), option(2, 200, 90.0))
    assert made.best.name == "resnet200"  # a sure one is the choice
    assert [o.name for o in could_win(made)] == ["resnet200", "resnet18"]
    unsure = choice(option(0, 1200, 80.0), option(1, 1300, 70.0))
    assert unsure.best.name == "resnet18"
    assert [o.name for o in could_win(unsure)] == ["resnet18", "resnet200"]


def test_an_option_becomes_a_promise() -> None:
    made = choice(option(0, 1200, 80.0), option(1, 1300, 70.0))
    promise = promise_of_option(made)
    assert (promise.device, promise.runtime, promise.batch_size, promise.image_size) == ("l4", "onnxruntime", 256, 224)
    assert promise.images_per_s == 1200
    assert promise.min_throughput == FLOOR
    assert promise.confidence == pytest.approx(made.best.chance(FLOOR))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("kits") / "kit"
    return cs.write_kit(
        ["mobilenetv2_050", cs.scale("resnet18", width=0.25, name="mine")],
        folder,
        device="cpu",
        batch_size=2,
        image_sizes=[32],
    )


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which neither torch nor convscale can be imported."""
    folder = tmp_path_factory.mktemp("forbidden")
    for name in ("torch", "convscale", "onnx"):
        (folder / f"{name}.py").write_text("raise ImportError('forbidden here')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def run(kit: Kit, env: dict[str, str], *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(kit.folder / "measure.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=env)


def test_what_a_kit_holds(kit: Kit) -> None:
    assert sorted(path.name for path in kit.folder.iterdir()) == ["1.onnx", "2.onnx", "kit.json", "measure.py"]
    assert kit.total_bytes == sum(path.stat().st_size for path in kit.folder.iterdir())
    assert f"2 networks, {kit.total_bytes / 1e6:.1f} MB" in str(kit)
    value = json.loads((kit.folder / "kit.json").read_text())
    assert [n["model"] for n in value["networks"]] == ["mobilenetv2_050", "mine"]
    assert value["networks"][0]["params"] == 1_968_680  # timm's count
    assert (value["device"], value["driver"], value["processor"]) == ("cpu", "", True)
    assert value["conditions"]["batch_size"] == 2
    assert stat.S_IMODE(kit.folder.stat().st_mode) == 0o755


def test_a_kit_is_measured_here_without_torch_and_its_rows_are_taken(
    kit: Kit, no_torch: dict[str, str], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    asked = ("--seconds", 0.02, "--threads", 1, "--output", rows)
    done = run(kit, no_torch, *asked)
    assert (done.returncode, done.stderr) == (0, "")
    records = read_records(rows)
    assert [r.model for r in records] == ["mobilenetv2_050", "mine"]
    first = records[0].measurement
    assert first.conditions == Conditions(device="cpu", batch_size=2, image_size=32, runtime="onnxruntime", threads=1)
    assert len(first.times_s) >= 5
    assert first.environment.versions["onnxruntime"] == ort.__version__
    before = rows.read_bytes()
    rows.write_bytes(before.splitlines(keepends=True)[0])  # an interruption after the first
    again = run(kit, no_torch, *asked)
    assert "1/2 mobilenetv2_050.lamb_in1k @32: measured before" in again.stdout
    assert "2/2 mine @32: " in again.stdout
    assert rows.read_bytes().startswith(before.splitlines(keepends=True)[0])
    assert [r.model for r in read_records(rows)] == ["mobilenetv2_050", "mine"]
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]

    observations, unknown = observations_of(read_records(rows), "cpu")
    assert unknown == []
    save_calibration(calibrate(observations), tmp_path / "cpu.json")
    chosen = cs.choose(
        device="cpu",
        calibration=tmp_path / "cpu.json",
        measured=rows,
        batch_size=2,
        threads=1,
        image_sizes=[32],
        candidates=["mobilenetv2_050", "resnet18"],
        accuracy="none",
        min_throughput=0.01,
    )
    kinds = {o.spec.name: o.speed.kind for o in chosen.options if o.speed}
    assert kinds == {"mobilenetv2_050": "measured", "resnet18": "predicted"}
    with pytest.raises(UserError, match="has no row of 2 threads; its rows are of 1"):
        cs.choose(device="cpu", measured=rows, calibration=_two(tmp_path), batch_size=2, threads=2, min_throughput=0.01)


def test_a_row_of_another_kit_is_none_of_this_one(kit: Kit) -> None:
    """Two kits have a file 1.onnx: what tells their rows apart is the network."""
    names: dict[str, Any] = {"__name__": "measure", "__file__": str(kit.folder / "measure.py")}
    exec((kit.folder / "measure.py").read_text(), names)
    row = {"file": "1.onnx", "model": "resnet18", "params": 11, "macs": 18, "measurement": {"conditions": {}}}
    key = names["what_was_measured"]
    others = [{**row, "model": "resnet34"}, {**row, "params": 12}, {**row, "macs": 19}]
    assert len({key(each) for each in (row, *others)}) == 4
    assert key({**row, "notes": ["of another day"], "spec": None}) == key(row)


def _two(folder: Path) -> Path:
    """The calibration as if made with two threads."""
    value = json.loads((folder / "cpu.json").read_text())
    (folder / "two.json").write_text(json.dumps({**value, "threads": 2}))
    return folder / "two.json"


def test_a_missing_provider_is_one_line(kit: Kit, no_torch: dict[str, str]) -> None:
    done = run(kit, no_torch, "--provider", "cuda")
    assert done.returncode == 2
    assert done.stderr.startswith("measure.py: this onnxruntime has no CUDAExecutionProvider; pip install onnxruntime")
    assert done.stderr.count("\n") == 1


def test_a_damaged_row_or_kit_is_one_line(kit: Kit, no_torch: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n")
    done = run(kit, no_torch, "--output", tmp_path / "rows.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "line 1 is damaged; remove that line" in done.stderr
    (tmp_path / "measure.py").write_bytes((kit.folder / "measure.py").read_bytes())
    alone = Kit(folder=tmp_path, files=(), labels=(), total_bytes=0)
    done = run(alone, no_torch)
    assert (done.returncode, "kit.json can not be read" in done.stderr) == (2, True)


FAKE = """
import numpy as np
__version__ = "9.9"
log = []
class OrtValue:
    @staticmethod
    def ortvalue_from_numpy(array, place, number):
        print("array", array.dtype, array.shape, place, number)
        return array
class SessionOptions: pass
class Node:
    def __init__(self, name, type="tensor(float)", shape=(None, 3, 32, 32)):
        self.name, self.type, self.shape = name, type, shape
class Binding:
    def bind_ortvalue_input(self, name, value): print("input", name)
    def bind_output(self, name, place, number): print("output", name, place, number)
    def synchronize_outputs(self): pass
class InferenceSession:
    def __init__(self, path, options, providers):
        print("providers", providers)
        self.providers = ["CPUExecutionProvider"] if FALLS else [p[0] for p in providers]
    def get_providers(self): return self.providers
    def get_inputs(self): return [Node("images")]
    def get_outputs(self): return [Node("logits")]
    def io_binding(self): return Binding()
    def run_with_iobinding(self, binding): pass
def get_available_providers(): return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
"""


@pytest.mark.parametrize(
    ("provider", "card", "falls", "code", "says"),
    [
        ("cuda", "NVIDIA L4", False, 0, "providers [('CUDAExecutionProvider', {'device_id': 1})]"),
        ("tensorrt", "NVIDIA L4", False, 0, "'trt_fp16_enable': False}), ('CUDAExecutionProvider', {'device_id': 1})]"),
        ("cuda", "NVIDIA L4", True, 2, "CUDAExecutionProvider does not start here"),
        ("cuda", "NVIDIA T4", False, 2, "the kit was written for NVIDIA L4, this is 'NVIDIA T4'; write one for that"),
        ("cpu", "NVIDIA L4", False, 2, "the kit was written for NVIDIA L4, --provider cpu runs on another device"),
    ],
)
def test_a_gpu_by_stand_ins(
    kit: Kit, no_torch: dict[str, str], tmp_path: Path, provider: str, card: str, falls: bool, code: int, says: str
) -> None:
    """ONNX Runtime and ``nvidia-smi`` as they answer where a GPU is. None was measured."""
    value = json.loads((kit.folder / "kit.json").read_text())
    value |= {"device": "l4", "title": "NVIDIA L4", "driver": "NVIDIA L4", "processor": False}
    (tmp_path / "kit.json").write_text(json.dumps(value))
    (tmp_path / "measure.py").write_bytes((kit.folder / "measure.py").read_bytes())
    (tmp_path / "onnxruntime.py").write_text(FAKE.replace("FALLS", str(falls)))
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{card}'\n")
    tool.chmod(0o755)
    env = {**no_torch, "PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"}
    here = Kit(folder=tmp_path, files=(), labels=(), total_bytes=0)
    done = run(here, env, "--provider", provider, "--device-id", 1, "--seconds", 1e-6)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert done.stderr.count("\n") == (1 if code else 0)
    if code:
        return
    assert "array float32 (2, 3, 32, 32) cuda 1" in done.stdout
    assert "output logits cuda 1" in done.stdout
    record = read_records(tmp_path / "rows.jsonl")[0].measurement
    assert (record.conditions.device, record.environment.device_name) == ("cuda:1", "NVIDIA L4")
    assert record.conditions.runtime == {"cuda": "onnxruntime", "tensorrt": "tensorrt"}[provider]


def test_a_kit_in_half_precision_computes_in_it(tmp_path: Path) -> None:
    made = cs.write_kit(["mobilenetv2_050"], tmp_path / "kit", device="l4", batch_size=2, image_sizes=[32])
    assert made.files == ("1.half.onnx",)
    model = onnx.load(str(tmp_path / "kit" / "1.half.onnx"))
    kinds = {t.data_type for t in model.graph.initializer if len(t.dims) >= 2}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    value = json.loads((tmp_path / "kit" / "kit.json").read_text())
    assert "no autocast" in value["networks"][0]["notes"][0]
    assert value["networks"][0]["predicted"]["low"] < value["networks"][0]["predicted"]["images_per_s"]
    session = ort.InferenceSession(str(tmp_path / "kit" / "1.half.onnx"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": np.zeros((2, 3, 32, 32), np.float32)})
    assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"device": None}, "a kit of networks needs their device"),
        ({"device": "cuda"}, "a kit is for a device that is not here, got 'cuda'"),
        ({"runtime": "eager"}, "a kit is measured in onnxruntime or tensorrt, not in eager"),
        ({"precision": "bf16"}, "a kit is written in amp, fp16 or fp32, got precision 'bf16'"),
        ({"most": 9}, "most is 9; a kit holds 1 to 8 networks"),
        ({"networks": ["resnet18"], "image_sizes": list(range(32, 41))}, "a kit holds 1 to 8 networks, got 9"),
        ({"networks": ["tresnet_m"], "image_sizes": [33]}, "tresnet_m.* @33 can not be measured"),
    ],
)
def test_what_no_kit_can_be(tmp_path: Path, keywords: dict[str, object], message: str) -> None:
    options = {"networks": ["resnet18"], "device": "l4", "image_sizes": [32], **keywords}
    with pytest.raises(UserError, match=message):
        cs.write_kit(folder=tmp_path / "kit", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "kit").exists()


def test_what_a_choice_brings_along(tmp_path: Path) -> None:
    made = choice(option(0, 1200, 80.0), option(1, 1300, 70.0))
    with pytest.raises(UserError, match="a choice has its own conditions; give write_kit no batch_size"):
        cs.write_kit(made, tmp_path / "kit", batch_size=8)
    measured = choice(option(0, 1200, 80.0), option(1, 1300, 70.0), kind="measured")
    with pytest.raises(UserError, match="the choice was measured here"):
        cs.write_kit(measured, tmp_path / "kit")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        cs.write_kit(made, tmp_path / "other")
    with pytest.raises(UserError, match="holds something other than a kit; it is not overwritten"):
        cs.write_kit(made, tmp_path / "other", overwrite=True)


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    args = ["--device", "l4", "-b", 8, "--img-size", 32, "--accuracy", "none", "--min-throughput", 3000]
    args += ["--model", "mobilenetv2_050", "--kit", tmp_path / "kit"]
    code, out, _ = call("choose", *args, "--json")
    assert code == 0
    value = json.loads(out)
    assert value["conditions"]["runtime"] == "onnxruntime"
    assert value["kit"]["networks"] == [value["best"]["name"] + " @32"]
    assert value["kit"]["total_bytes"] == sum(p.stat().st_size for p in (tmp_path / "kit").iterdir())
    code, _, err = call("choose", *args)
    assert (code, "exists and is not empty" in err) == (2, True)
    code, out, _ = call("choose", *args, "--overwrite")
    assert (code, "kit: " in out) == (0, True)
    code, _, err = call("choose", "--min-throughput", 1, "--kit", tmp_path / "here")
    assert (code, "--kit is for a device that is not here, got 'cpu'" in err) == (2, True)
    code, _, err = call("choose", "--device", "l4", "--compiled", "--min-throughput", 1, "--kit", tmp_path / "here")
    assert (code, "a kit is measured in onnxruntime or tensorrt, not in compiled" in err) == (2, True)
