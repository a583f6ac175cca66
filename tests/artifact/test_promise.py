"""What an artefact was promised to do on a device that was not there: kept in its record, shown in its card."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from convscale.artifact import artifact as module
from convscale.artifact import facts
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.facts import alone_with, write_promise
from convscale.artifact.promise import Promise, promise_section, with_promise
from convscale.errors import UserError
from convscale.ship.export import export

PROMISE = Promise(
    device="l4",
    runtime="onnxruntime",
    precision="fp16",
    batch_size=256,
    image_size=32,
    images_per_s=2500.0,
    low=1250.0,
    high=5000.0,
    min_throughput=2000.0,
    confidence=0.66,
    doubts=("no measurement of a NVIDIA L4 was fitted",),
    versions={"convscale": "0.2.0"},
)


def test_a_promise_survives_json() -> None:
    assert Promise.from_dict(json.loads(json.dumps(PROMISE.to_dict()))) == PROMISE
    rectangle = replace(PROMISE, image_size=(192, 256), min_throughput=None, confidence=None)
    assert Promise.from_dict(json.loads(json.dumps(rectangle.to_dict()))) == rectangle
    assert Promise.from_dict({**PROMISE.to_dict(), "of a later version": 1}) == PROMISE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": ""}, "a promise's device must be a name, got ''"),
        ({"precision": "fp8"}, "a promise's precision must be one of fp32, amp"),
        ({"batch_size": 0}, "a promise's batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": True}, "a promise's batch_size must be a whole number of at least 1, got True"),
        ({"low": 2600.0}, "a promise's interval must hold its speed, got 2600.0 to 5000.0 around 2500.0"),
        ({"images_per_s": float("nan")}, "a promise's images_per_s must be a finite number above 0, got nan"),
        ({"confidence": 1.5}, "a promise's confidence must lie between 0 and 1, got 1.5"),
        ({"image_size": "big"}, "image_size must be a whole number"),
    ],
)
def test_impossible_promises(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Promise.from_dict({**PROMISE.to_dict(), **change})


def test_a_promise_that_lacks_a_field() -> None:
    with pytest.raises(UserError, match=r"a promise can not be read: .*images_per_s"):
        Promise.from_dict({k: v for k, v in PROMISE.to_dict().items() if k != "images_per_s"})
    with pytest.raises(UserError, match="a promise must be an object of JSON, got list"):
        Promise.from_dict([])


def test_the_card_says_the_prediction_its_interval_its_doubts_and_how_to_check_it() -> None:
    text = "\n".join(promise_section(PROMISE))
    assert "Predicted for l4, not measured: 2,500 images/s (80 % interval 1,250 to 5,000)" in text
    assert "onnxruntime, fp16, nchw, batch 256, 32 px, model only. Asked for were 2,000 images/s (66 % likely)." in text
    assert "- Doubt: no measurement of a NVIDIA L4 was fitted." in text
    assert 'convscale measure "this folder" --promised --output measured.jsonl' in text


def test_what_was_measured_before_training_is_no_prediction() -> None:
    """The middle half of the calls is narrow: 2,400 to 2,600, where one in ten more or less is as fast as then."""
    promise = replace(PROMISE, low=2400.0, high=2600.0, confidence=None, measured=True)
    assert Promise.from_dict(json.loads(json.dumps(promise.to_dict()))) == promise
    assert not Promise.from_dict({k: v for k, v in PROMISE.to_dict().items() if k != "measured"}).measured
    text = "\n".join(promise_section(promise))
    assert (
        "Measured on l4 before the network was trained: 2,500 images/s (middle half of the calls: 2,400 to 2,600), "
        "onnxruntime, fp16, nchw, batch 256, 32 px, model only. Asked for were 2,000 images/s." in text
    )
    assert "redicted" not in text
    assert str(promise).startswith(
        "2,500 images/s measured on l4 before training (middle half of the calls: 2,400 to 2,600), 2,000 asked for; "
    )
    assert replace(promise, min_throughput=None).floor == pytest.approx(2250.0)
    assert replace(promise, low=1000.0, min_throughput=None).floor == 1000.0
    with pytest.raises(UserError, match=r"a promise of a measurement has no confidence, got 0\.5"):
        replace(promise, confidence=0.5)
    with pytest.raises(UserError, match="a promise's measured is 'no'; it must be True or False"):
        replace(promise, measured="no")  # type: ignore[arg-type]


def test_floor_is_what_was_asked_else_the_lower_end() -> None:
    assert PROMISE.floor == 2000.0
    assert replace(PROMISE, min_throughput=None, confidence=None).floor == 1250.0


def test_export_with_a_promise(tiny: nn.Module, tmp_path: Path) -> None:
    art = export(tiny, tmp_path / "a", promise=PROMISE)
    assert art.promise == PROMISE
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.index("## Promised speed") < card.index("## Input")
    again = replace(PROMISE, device="t4")
    write_promise(tmp_path / "a", again)
    assert load_artifact(tmp_path / "a").promise == again
    written = (tmp_path / "a" / "README.md").read_text()
    assert written == card.replace("Predicted for l4", "Predicted for t4"), "in the place of the first"
    with pytest.raises(UserError, match="the promise is of 64 px, the artefact takes 32 px"):
        export(tiny, tmp_path / "b", promise=replace(PROMISE, image_size=64))
    assert not (tmp_path / "b").exists()


def test_a_promise_put_into_a_finished_artefact(onnx_art: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_art.folder, tmp_path / "copy"))
    before = (folder / "README.md").read_text()
    assert load_artifact(folder).promise is None
    write_promise(folder, PROMISE)
    art = load_artifact(folder)  # checksums hold
    assert art.promise == PROMISE
    assert (folder / "README.md").read_text() == with_promise(before, PROMISE)
    assert "README.md" in art.manifest.files
    faster = replace(PROMISE, images_per_s=2 * PROMISE.images_per_s, high=2 * PROMISE.high)
    write_promise(folder, faster)  # in the place of the first
    assert (folder / "README.md").read_text() == with_promise(before, faster)
    with pytest.raises(UserError, match=r"the promise is of 64 px, artefact .* takes 32 px"):
        write_promise(folder, replace(PROMISE, image_size=64))


def test_of_a_fit_the_artefact_inside_is_the_one_that_is_locked(onnx_art: Artifact, tmp_path: Path) -> None:
    """A promise and a tuning at once, one given the fit's folder, wrote one record without the other's values."""
    inside = Path(shutil.copytree(onnx_art.folder, tmp_path / "run" / "artifact"))
    (tmp_path / "run" / "fit.json").write_text("{}")
    with alone_with(inside), pytest.raises(UserError, match=r"run/artifact is being written by another run"):
        write_promise(tmp_path / "run", PROMISE)
    assert write_promise(tmp_path / "run", PROMISE).folder == inside
    assert load_artifact(inside).promise == PROMISE


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_an_artefact_is_whole_wherever_writing_a_promise_stops(
    onnx_art: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    folder = Path(shutil.copytree(onnx_art.folder, tmp_path / "copy"))
    done: list[str] = []

    def counting(write: object) -> object:
        def run(*args: object) -> None:
            done.append("write")
            if len(done) == stop_at:
                raise KeyboardInterrupt
            write(*args)  # type: ignore[operator]

        return run

    monkeypatch.setattr(module, "write_json", counting(module.write_json))
    monkeypatch.setattr(facts, "write_text", counting(facts.write_text))
    with pytest.raises(KeyboardInterrupt):
        write_promise(folder, PROMISE)
    monkeypatch.undo()
    art = load_artifact(folder)
    assert art.promise == (None if stop_at == 1 else PROMISE)


def test_a_damaged_promise_is_one_clear_line(onnx_art: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_art.folder, tmp_path / "copy"))
    record = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps({**record, "promise": {"device": "l4"}}))
    with pytest.raises(UserError, match=r"has a damaged artifact\.json: a promise can not be read") as caught:
        load_artifact(folder)
    assert "\n" not in str(caught.value)
