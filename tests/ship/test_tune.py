"""Tuning: what is tried, what wins, what is kept. Times are made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.facts import alone_with, write_promise
from convscale.artifact.folder import CARD, staged_folder
from convscale.artifact.manifest import MANIFEST
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.runtimes.base import Opening, installed_runtimes, open_runtime
from convscale.ship import tune as module
from convscale.ship.tune import Settings, Trial, candidates, near_best, tune
from tests.artifact.test_promise import PROMISE


@pytest.fixture
def art(onnx_art: Artifact, tmp_path: Path) -> Artifact:
    return load_artifact(shutil.copytree(onnx_art.folder, tmp_path / "copy"))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[Settings, float]:
    """Seconds per call by setting: a call costs 10 ms and 10 ms per image; OpenVINO in two streams half of that;
    latency likes one thread.
    """
    asked: dict[Settings, float] = {}

    def call(artifact: Artifact, settings: Settings, opened: object) -> Callable[[], Settings]:
        seconds = 0.01 + 0.01 * settings.batch_size
        if settings.runtime == "openvino" and settings.streams == 2:
            seconds /= 2
        if settings.threads == 1:
            seconds *= 0.9
        asked[settings] = seconds
        return lambda: settings

    monkeypatch.setattr(module, "_call", call)
    monkeypatch.setattr(module, "_timed", lambda call, seconds, least: [asked[call()]] * 5)
    monkeypatch.setattr(module, "installed_runtimes", lambda: ("eager", "onnxruntime", "openvino"))
    return asked


def test_the_fastest_is_kept(art: Artifact, made_up: dict[Settings, float]) -> None:
    seen: list[Trial] = []
    found = tune(art, threads=2, batch_sizes=(1, 4, 32), on_trial=seen.append)
    assert found.best.settings == Settings(runtime="openvino", threads=2, streams=2, batch_size=32)
    # 32 / (0.33 / 2) against 32 / 0.33
    assert found.gain == pytest.approx(2.0)
    assert found.usual.settings == Settings(runtime="onnxruntime", threads=2, streams=1, batch_size=32)
    assert seen == list(found.trials)
    again = load_artifact(art.folder)
    assert (again.runtime, again.threads, again.streams, again.batch_size) == ("openvino", 2, 2, 32)
    assert again.manifest["tuning"]["best"]["images_per_s"] == pytest.approx(32 / 0.165)
    # Another runtime by hand does not inherit the streams of the tuned one.
    assert load_artifact(art.folder, runtime="onnxruntime").streams == 1


@pytest.mark.parametrize(("made_on", "opened_on"), [("cpu", "cuda"), ("cuda:1", "cpu"), ("cuda:1", "cuda")])
def test_a_tuning_is_of_its_kind_of_device(
    made_on: str, opened_on: str, art: Artifact, made_up: dict[Settings, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is opened: what was found is made up, and the driver is a stand-in."""
    kinds = (made_on.partition(":")[0], opened_on.partition(":")[0])
    monkeypatch.setattr("convscale.ship.confirm.card_name", lambda device: f"name of {device}")
    monkeypatch.setattr("convscale.runtimes.base.Runtime.runs_on", lambda self, device: True)
    found = tune(load_artifact(art.folder, device=made_on), threads=2, batch_sizes=(1, 2, 32))
    streams, name = found.best.settings.streams, found.environment.device_name
    assert streams > 1
    assert (name == f"name of {made_on}") == (kinds[0] == "cuda")
    again = load_artifact(art.folder, device=opened_on)
    assert again.manifest["runtime"]["device"] == kinds[0]
    assert (again.tuned, again.streams) == ((True, streams) if kinds[0] == kinds[1] else (False, 1))
    plain = {key: value for key, value in again.manifest["runtime"].items() if key != "device"}
    again.keep(runtime=plain)  # as earlier versions wrote it: tuned on a processor
    assert load_artifact(art.folder).tuned
    assert not load_artifact(art.folder, device="cuda").tuned


def test_latency_is_of_one_image(art: Artifact, made_up: dict[Settings, float]) -> None:
    found = tune(art, goal="latency", threads=2, save=False)
    assert found.best.settings == Settings(runtime="onnxruntime", threads=1, streams=1, batch_size=1)
    assert found.gain == pytest.approx(1 / 0.9)
    assert "tuning" not in load_artifact(art.folder).manifest


def test_noise_does_not_win(art: Artifact, made_up: dict[Settings, float], monkeypatch: pytest.MonkeyPatch) -> None:
    def at_second_look(rivals: Sequence[tuple[Artifact, Settings]]) -> list[Trial]:
        assert {settings.runtime for _, settings in rivals} == {"openvino", "onnxruntime"}
        return [Trial(settings=s, times_s=(1.0 if s.runtime == "onnxruntime" else 2.0,)) for _, s in rivals]

    monkeypatch.setattr(module, "in_turns", at_second_look)
    found = tune(art, threads=2, batch_sizes=(32,), save=False)
    assert found.best == found.usual
    assert found.gain == 1


def test_a_busy_moment_does_not_throw_the_best_out() -> None:
    def trial(batch_size: int, *times_s: float) -> Trial:
        return Trial(
            settings=Settings(runtime="openvino", threads=2, streams=1, batch_size=batch_size), times_s=times_s
        )

    # Per image: 0.1 s in its quiet calls (median 0.4), 0.11 s, 0.15 s.
    disturbed, steady, slow = trial(1, 0.1, 0.1, 0.4, 0.5, 0.6), trial(2, 0.22, 0.22, 0.22), trial(4, 0.6, 0.6, 0.6)
    assert near_best([slow, steady, disturbed], "throughput") == [disturbed, steady]
    assert near_best([slow, steady, disturbed], "latency") == [disturbed]


def test_candidates() -> None:
    found = candidates("throughput", ["onnxruntime", "eager"], 4, (1, 2, 8))
    assert {(s.runtime, s.streams, s.batch_size) for s in found} == {
        ("onnxruntime", 1, 1),
        ("onnxruntime", 1, 2),
        ("onnxruntime", 1, 8),
        ("onnxruntime", 2, 2),
        ("onnxruntime", 2, 8),
        ("onnxruntime", 4, 8),
        ("eager", 1, 1),
        ("eager", 1, 2),
        ("eager", 1, 8),
    }
    assert [s.threads for s in candidates("latency", ["openvino"], 4, ())] == [4, 2]


def test_a_runtime_that_can_not_run_it_is_passed_over(
    art: Artifact, made_up: dict[Settings, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._call

    def call(artifact: Artifact, settings: Settings, opened: object) -> Callable[[], object]:
        if settings.runtime == "onnxruntime":
            raise UserError("ONNX Runtime can not run model.onnx: no such kernel")
        return real(artifact, settings, opened)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "_call", call)
    found = tune(art, threads=2, batch_sizes=(4,), save=False)
    assert {trial.settings.runtime for trial in (*found.trials, found.usual, found.best)} == {"openvino"}
    assert found.to_dict()["failed"] == {"onnxruntime": "ONNX Runtime can not run model.onnx: no such kernel"}
    with pytest.raises(UserError, match="no such kernel"):
        tune(art, threads=2, batch_sizes=(4,), runtimes=["onnxruntime"], save=False)


@pytest.mark.parametrize(
    ("said", "ships_in"),
    [
        ({"passed_in": ["onnxruntime"]}, "onnxruntime"),
        ({}, "onnxruntime"),  # of a version that held the gate in the usual runtime alone
        ({"passed_in": 3}, "onnxruntime"),
        ({"passed_in": ["onnxruntime", "openvino"]}, "openvino"),
    ],
)
def test_int8_ships_only_in_a_runtime_in_which_it_passed(
    said: dict[str, object], ships_in: str, art: Artifact, made_up: dict[Settings, float]
) -> None:
    art.keep(precision="int8", int8=said)
    art = load_artifact(art.folder)
    found = tune(art, threads=2, batch_sizes=(1, 4, 32))
    # OpenVINO's two streams are twice as fast.
    assert found.best.settings.runtime == load_artifact(art.folder).runtime == ships_in
    if ships_in == "openvino":
        assert found.failed == {}
        assert tune(art, runtimes=["openvino"], save=False).best.settings.runtime == "openvino"
        return
    why = "artefact copy passed its INT8 gate in onnxruntime, not in openvino"
    assert found.failed == {"openvino": f"{why}; run it in onnxruntime, or export it again"}
    assert {trial.settings.runtime for trial in found.trials} == {"onnxruntime"}
    with pytest.raises(UserError, match=why):
        tune(art, runtimes=["openvino"])
    both = tune(art, threads=2, runtimes=["openvino", "onnxruntime"], save=False)
    assert both.best.settings.runtime == "onnxruntime"


def test_int8_that_was_made_for_tensorrt_is_tuned_in_it_on_a_card(
    art: Artifact, made_up: dict[Settings, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gate was held where there was none: no export could have held it in TensorRT."""
    art.keep(precision="int8", int8={"passed_in": ["onnxruntime"], "made_for": "tensorrt"})
    installed = ("onnxruntime", "openvino", "tensorrt")
    monkeypatch.setattr(module, "installed_runtimes", lambda: installed)
    monkeypatch.setattr(module, "_environment", lambda device: Environment(device_name="NVIDIA L4", cores=8))
    on_card = load_artifact(art.folder, device="cuda")
    assert on_card.checked_in == ("onnxruntime", "tensorrt")
    found = tune(on_card, threads=2, batch_sizes=(4,), runtimes=["tensorrt"], save=False)
    assert (found.best.settings.runtime, found.failed) == ("tensorrt", {})
    with pytest.raises(UserError, match="passed its INT8 gate in onnxruntime, not in openvino"):
        tune(load_artifact(art.folder), runtimes=["openvino"])


def test_the_model_card_states_the_tuned_speed(art: Artifact, made_up: dict[Settings, float]) -> None:
    before = (art.folder / "README.md").read_text().splitlines()
    assert "- **Speed**: not stated" in before
    tune(art, threads=2, batch_sizes=(4,))
    after = (art.folder / "README.md").read_text().splitlines()
    # 4 images in 0.05 / 2 s
    changed = [line for line in after if line not in before]
    assert len(changed) == 1
    assert changed[0].startswith("- **Speed**: 160.0 images/s, 25.0 ms a call (openvino ")
    assert "batch 4, 32 px, 2 threads in 2 streams; " in changed[0]
    assert len(after) == len(before)
    load_artifact(art.folder)  # its checksums hold


def test_an_artefact_is_tuned_by_one_run_at_a_time(art: Artifact, made_up: dict[Settings, float]) -> None:
    with alone_with(art.folder):
        with pytest.raises(UserError, match=r"artefact \S+copy is being written by another run; wait for it, or name"):
            tune(art, threads=2, batch_sizes=(4,))
        with (
            pytest.raises(UserError, match="is being written by another run"),
            staged_folder(art.folder, overwrite=True),
        ):
            pytest.fail("it would be replaced")
        tune(art, threads=2, batch_sizes=(4,), save=False)
    tune(art, threads=2, batch_sizes=(4,))
    assert sorted(path.name for path in art.folder.parent.iterdir()) == ["copy"]


def test_an_artefact_that_was_replaced_since_it_was_opened_gets_no_tuning(
    art: Artifact, made_up: dict[Settings, float]
) -> None:
    """The record of the one before was written over it, with checksums of files that were gone."""
    manifest = art.folder / MANIFEST
    other = json.loads(manifest.read_text())
    other["files"]["classes.json"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(other))
    card = (art.folder / CARD).read_bytes()
    with pytest.raises(UserError, match=r"artefact \S+copy was replaced since it was opened; nothing is put in"):
        tune(art, threads=2, batch_sizes=(4,))
    assert (json.loads(manifest.read_text()), (art.folder / CARD).read_bytes()) == (other, card)


def test_a_tuning_keeps_what_was_put_in_since_the_artefact_was_opened(
    art: Artifact, made_up: dict[Settings, float]
) -> None:
    write_promise(art.folder, PROMISE)
    tune(art, threads=2, batch_sizes=(4,))
    again = load_artifact(art.folder)
    assert (again.promise, again.threads) == (PROMISE, 2)


@pytest.mark.parametrize("streams", [1, 2])
def test_a_form_for_one_batch_size_changes_no_output(streams: int, art: Artifact) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    anyhow = open_runtime(art.model_path, "openvino", Opening(threads=2))
    fixed = open_runtime(art.model_path, "openvino", Opening(threads=2, streams=streams, batch_size=4))
    for n in (4, 1, 9, 4):
        batch = art.input_batch(pixels[:n])
        assert fixed(batch)[0].shape == (n, 5)
        assert np.allclose(fixed(batch)[0], anyhow(batch)[0], atol=1e-5)
    assert set(fixed._forms) == {4 // streams, None}  # pyright: ignore[reportAttributeAccessIssue]
    # A tuned artefact opens for its own batch.
    art.keep(runtime={"name": "openvino", "threads": 2, "streams": streams, "batch_size": 4})
    tuned = Artifact(art.folder, art.manifest)
    assert np.allclose(tuned(pixels), art(pixels), atol=1e-5)
    assert set(tuned.runner._forms) == {4 // streams, None}  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("threads", [2, 4])
def test_streams_change_no_output(
    runtime: str, threads: int, art: Artifact, tiny: nn.Module, images: np.ndarray
) -> None:
    one = open_runtime(art.model_path, runtime, Opening(threads=1))
    two = open_runtime(art.model_path, runtime, Opening(threads=threads, streams=2))
    for n in (1, 2, 7):
        batch = art.input_batch(images[:n])
        assert two(batch)[0].shape == (n, 5)
        assert np.allclose(two(batch)[0], one(batch)[0], atol=1e-5)
    with pytest.raises(UserError, match="streams must lie between 1 and the 2 threads, got 3"):
        open_runtime(art.model_path, runtime, Opening(threads=2, streams=3))


def test_bad_input(art: Artifact) -> None:
    with pytest.raises(UserError, match="goal 'speed' is unknown"):
        tune(art, goal="speed")
    with pytest.raises(UserError, match="format onnx runs in onnxruntime or openvino, not in eager"):
        tune(art, runtimes=["eager"])
    with pytest.raises(UserError, match=r"batch_sizes must be numbers of at least 1, got \[0\]"):
        tune(art, batch_sizes=[0])
    with pytest.raises(UserError, match="does not exist"):
        tune("nowhere")
    assert "onnxruntime" in installed_runtimes()
