"""A promised speed beside a measured one."""

import json
import shutil
from dataclasses import replace

import pytest

import convscale as cs
from convscale.artifact.artifact import give_promise
from convscale.artifact.promise import Promise
from convscale.machine import Environment
from convscale.ship.confirm import Confirmation, check_promised_device
from convscale.speed.records import read_records

COLUMNS = 200
PROMISE = Promise(
    device="l4",
    title="NVIDIA L4",
    runtime="compiled",
    precision="amp",
    batch_size=4,
    image_size=32,
    images_per_s=1000.0,
    low=800.0,
    high=1250.0,
    asked=900.0,
    confidence=0.8,
    doubts=("no table is of it",),
)


@pytest.fixture
def artefact(onnx_art, tmp_path):
    """A copy that may be written to."""
    return cs.load_artifact(shutil.copytree(onnx_art.folder, tmp_path / "art"))


def test_a_promise_travels_in_the_record_and_the_card(artefact):
    assert artefact.promise is None
    give_promise(artefact, PROMISE)
    again = cs.load_artifact(artefact.folder)  # its checksums hold
    assert again.promise == PROMISE
    card = (artefact.folder / "README.md").read_text()
    assert (
        "- **Speed**: 1,000 images/s predicted (80 %: 800 to 1,250) on NVIDIA L4, compiled, amp, batch 4, 32 px, asked "
        "for 900; not measured there: `convscale measure FOLDER --promised` does so on the card; doubts: no table is "
        "of it"
    ) in card


def test_a_damaged_promise_is_told(artefact):
    give_promise(artefact, PROMISE)
    path = artefact.folder / "artifact.json"
    for damage in ({"promise": {"device": "l4"}}, {"promise": 5}):
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(ValueError, match="has a damaged promise; export it again"):
            _ = cs.load_artifact(artefact.folder).promise
    with pytest.raises(ValueError, match="the middle must lie between the ends"):
        replace(PROMISE, low=1100.0)


def test_on_the_device_itself_it_is_measured_and_compared(artefact, tmp_path, call):
    give_promise(artefact, replace(PROMISE, device="cpu", title="this CPU", asked=1.0, images_per_s=2.0, low=1.0))
    made = cs.confirm(artefact, seconds=0.05, record=tmp_path / "rows.jsonl")
    assert made.keeps
    assert made.measurement.conditions.batch_size == 4
    assert made.measurement.conditions.image_size == 32
    assert made.inside == (made.promise.low <= made.images_per_s <= made.promise.high)
    (row,) = read_records(tmp_path / "rows.jsonl")
    assert row.measurement.images_per_s == pytest.approx(made.images_per_s)
    assert f"{made.images_per_s / 2:.2f} x the 2 promised" in str(made)
    give_promise(artefact, replace(PROMISE, device="cpu", title="this CPU", asked=1e9, images_per_s=2.0, low=1.0))
    code, out, _ = call("measure", artefact.folder, "--promised", "--seconds", "0.05")
    assert code == 3
    assert "misses the 1,000,000,000 asked for" in " ".join(out.split())
    code, out, _ = call("measure", artefact.folder, "--promised", "--seconds", "0.05", "--json")
    assert (code, json.loads(out)["keeps"]) == (3, False)


@pytest.mark.parametrize(
    ("speed", "inside", "keeps", "words"),
    [
        (1000, True, True, "inside"),
        (700, False, False, "below"),
        (1300, False, True, "above"),
        (850, True, False, "inside"),
    ],
)
def test_inside_and_kept_are_two_things(speed, inside, keeps, words):
    conditions = cs.Conditions(batch_size=4, image_size=32, runtime="onnxruntime", threads=1)
    measured = cs.Measurement(times_s=(4 / speed,) * 5, conditions=conditions, environment=Environment.here())
    made = Confirmation(promise=PROMISE, measurement=measured)
    assert (made.inside, made.keeps) == (inside, keeps)
    assert f"{words} the interval 800 to 1,250" in str(made)
    assert "(promised for compiled, measured in onnxruntime)" in str(made)


def test_another_device_says_nothing(artefact, monkeypatch):
    with pytest.raises(ValueError, match="carries no promise"):
        cs.confirm(artefact)
    give_promise(artefact, PROMISE)
    with pytest.raises(ValueError, match="promised for NVIDIA L4; device 'cpu' is another, use cuda there"):
        cs.confirm(artefact, "cpu")
    with pytest.raises(ValueError, match="promised for NVIDIA L4; torch sees no CUDA GPU here"):
        cs.confirm(artefact)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    here = Environment(device_name="NVIDIA GeForce RTX 4090", cores=1)
    monkeypatch.setattr(Environment, "here", classmethod(lambda cls, device="cpu": here))
    with pytest.raises(ValueError, match="promised for NVIDIA L4; this is NVIDIA GeForce RTX 4090"):
        check_promised_device(PROMISE, "cuda")
    here = replace(here, device_name="NVIDIA L4")
    check_promised_device(PROMISE, "cuda:0")
    with pytest.raises(ValueError, match="not for device 'cuda'; use cpu"):
        check_promised_device(replace(PROMISE, device="cpu", title="this CPU"), "cuda")
