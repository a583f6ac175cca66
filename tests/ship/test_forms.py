"""Which form is shipped: what is tried, what is withheld, what wins. Times are made up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

import convscale as cs
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.ship import draft as draft_module
from convscale.ship import export as export_module
from convscale.ship import forms as module
from convscale.ship import tune as tune_module
from convscale.ship.forms import (
    FLOAT,
    FORMS,
    Search,
    TooSlow,
    export_fastest,
    export_forms,
    fastest_of,
    form_names,
)
from convscale.ship.request import ExportRequest
from convscale.ship.tune import Settings, Trial, Tuning
from convscale.ship.verify import Verification, Withheld

SECONDS = {"onnx-fp32": 1.0, "openvino-fp32": 0.9, "onnx-int8": 0.5, "onnx-int8-ort": 0.8, "openvino-int8": 0.55}
"""Of a call at first sight, by form."""
AGAIN = {"onnx-fp32": 1.0, "openvino-fp32": 0.9, "onnx-int8": 0.5, "onnx-int8-ort": 0.8, "openvino-int8": 0.4}
"""In turns at the end: what looked second was disturbed."""


def form_of(artifact: Artifact) -> str:
    return artifact.folder.name


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Which forms were timed in turns, each time. All run at a batch of 2; untuned settings take 1.25 s."""
    turns: list[list[str]] = []

    def trial(artifact: Artifact, seconds: float, streams: int = 2) -> Trial:
        runtime = "openvino" if artifact.format == "openvino" else "onnxruntime"
        return Trial(
            settings=Settings(runtime=runtime, threads=2, streams=streams, batch_size=2), times_s=(seconds,) * 3
        )

    def tune(artifact: Artifact, *, goal: str, **options: object) -> Tuning:
        best, usual = trial(artifact, SECONDS[form_of(artifact)]), trial(artifact, 1.25, streams=1)
        return Tuning(goal=goal, trials=(best, usual), best=best, usual=usual, environment=Environment.here())

    def in_turns(rivals: Sequence[tuple[Artifact, Settings]]) -> list[Trial]:
        turns.append([form_of(artifact) for artifact, _ in rivals])
        *forms, usual = [artifact for artifact, _ in rivals]
        return [*(trial(artifact, AGAIN[form_of(artifact)]) for artifact in forms), trial(usual, 1.25, streams=1)]

    monkeypatch.setattr(module, "tune", tune)
    monkeypatch.setattr(module, "TWIN_GAIN", 1e9)  # looks are real, and told apart by chance
    monkeypatch.setattr(module, "in_turns", in_turns)
    monkeypatch.setattr(module, "installed_runtimes", lambda: ("eager", "onnxruntime", "openvino"))
    monkeypatch.setattr(module, "no_bf16", lambda format: "this processor has none")
    return turns


def test_the_fastest_form_that_passed(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, made_up: list[list[str]]
) -> None:
    art, found = export_fastest(
        tiny, tmp_path / "a", batch_sizes=(2,), calibration_images=images, verify_images=images, max_drop=100.0
    )
    assert list(found.forms) == ["onnx-fp32", "onnx-int8", "onnx-int8-ort", "openvino-int8"]
    # Float is twice as slow as the best at first sight: it is looked at again only as what the gain is stated over.
    assert made_up == [["onnx-int8", "openvino-int8", "onnx-fp32"]]
    assert (found.winner, art.format, art.precision) == ("openvino-int8", "openvino", "int8")
    assert found.gain == pytest.approx(1.25 / 0.4)
    kept = load_artifact(tmp_path / "a").manifest["search"]
    assert kept["winner"] == "openvino-int8"
    assert kept["gain"] == pytest.approx(3.125)
    assert kept["forms"]["openvino-int8"]["images_per_s"] == pytest.approx(2 / 0.4)
    assert kept["forms"]["onnx-fp32"]["images_per_s"] == pytest.approx(2 / 1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_form_that_was_asked_for_and_can_not_be_made_is_in_the_record(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, made_up: list[list[str]]
) -> None:
    """For whoever reads it by a program: nothing is printed there."""
    told: list[tuple[str, str]] = []
    for bf16 in (False, True):
        _, found = export_fastest(
            tiny, tmp_path / f"{bf16}", batch_sizes=(2,), bf16=bf16, verify_images=images,
            on_form=lambda name, result: told.append((name, str(result))) if name != FLOAT else None,
        )  # fmt: skip
        why = {"openvino-bf16": {"failed": "this processor has none"}} if bf16 else {}
        forms = load_artifact(tmp_path / f"{bf16}").manifest["search"]["forms"]
        assert {name: forms[name] for name in forms if name != FLOAT} == why
        assert list(found.forms) == [FLOAT, *why]
    assert told == [("openvino-bf16", "this processor has none")]


def test_the_search_is_on_the_device_asked_for(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, made_up: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[tuple[str, str]] = []
    timed = module.tune

    def tune(artifact: Artifact, **options: Any) -> Tuning:
        devices.append((form_of(artifact), artifact.device))
        return timed(artifact, **options)

    monkeypatch.setattr(module, "tune", tune)
    monkeypatch.setattr(module, "need_device", lambda device: None)
    options: dict[str, Any] = {"calibration_images": images, "verify_images": images, "max_drop": 100.0}
    art, _ = export_fastest(tiny, tmp_path / "a", device="cuda:1", **options)
    # OpenVINO runs on processors: what only it could run is not made.
    assert devices == [("onnx-fp32", "cuda:1"), ("onnx-int8", "cuda:1"), ("onnx-int8-ort", "cuda:1")]
    assert art.device == "cuda:1"


def test_signed_8_bits_are_a_form_where_tensorrt_is_and_may_ship_in_it(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = "onnx-int8-signed"
    assert signed not in form_names(tiny, int8=True, device="cuda")
    monkeypatch.setattr(module, "installed_runtimes", lambda: ("onnxruntime", "openvino", "tensorrt"))
    assert signed in form_names(tiny, int8=True, device="cuda")
    assert signed not in [*form_names(tiny, int8=True), *form_names(tiny, int8=False, device="cuda")]
    options: dict[str, Any] = {"calibration_images": images, "verify_images": images, "max_drop": 100.0}
    forms = export_forms(tiny, tmp_path, [FLOAT, signed], search=Search(device="cuda"), **options)
    made = forms[signed]
    assert isinstance(made, Artifact)
    assert made.manifest["int8"]["made_for"] == "tensorrt"
    assert "tensorrt" not in made.checked_in
    assert "tensorrt" in load_artifact(made.folder, device="cuda").checked_in


def test_a_device_that_is_not_there_is_refused(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match="device 'cuda:2' is not there: there are 2 CUDA devices, counted from 0; use"):
        export_fastest(tiny, tmp_path / "b", device="cuda:2")
    with pytest.raises(UserError, match="device 'l4' is none of this machine's; cpu, cuda or cuda:N would be right"):
        export_fastest(tiny, tmp_path / "b", device="l4")


def test_int8_must_be_worth_it(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, made_up: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, winner in ((0.97, FLOAT), (0.94, "onnx-int8")):
        monkeypatch.setitem(SECONDS, "onnx-int8", seconds)
        monkeypatch.setitem(AGAIN, "onnx-int8", seconds)
        for slow in ("openvino-int8", "onnx-int8-ort"):
            monkeypatch.setitem(SECONDS, slow, 2.0)
        _, found = export_fastest(
            tiny, tmp_path / winner, calibration_images=images, verify_images=images, max_drop=100.0
        )
        assert found.winner == winner
        assert found.gain == pytest.approx(1.25 / AGAIN[winner])


def test_what_does_not_pass_is_not_shipped(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, made_up: list[list[str]]
) -> None:
    told: list[str] = []
    art, found = export_fastest(
        tiny, tmp_path / "a", batch_sizes=(2,), calibration_images=images, verify_images=images, max_drop=-1.0,
        on_form=lambda name, result: told.append(name),
    )  # fmt: skip
    # No INT8 form can lose less than nothing: both are withheld, and the float one is what is left.
    assert {name: type(result) for name, result in found.forms.items()} == {
        "onnx-fp32": Tuning,
        "onnx-int8": Withheld,
        "onnx-int8-ort": Withheld,
        "openvino-int8": Withheld,
    }
    assert told == ["onnx-fp32", "onnx-int8", "onnx-int8-ort", "openvino-int8"]
    assert art.precision == "fp32"
    assert "points of" in art.manifest["search"]["forms"]["onnx-int8"]["withheld"] or "disagrees" in str(
        art.manifest["search"]["forms"]["onnx-int8"]
    )


def test_nothing_is_left_where_float_fails(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convscale.ship.verify.MAX_RELATIVE", {"fp32": -1.0})
    with pytest.raises(Withheld, match="is withheld: the logits differ"):
        export_fastest(tiny, tmp_path / "a", verify_images=images)
    assert list(tmp_path.iterdir()) == []


def test_shared_work_is_done_once(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds: list[object] = []
    real = draft_module.fold
    monkeypatch.setattr(draft_module, "fold", lambda *args, **keywords: folds.append(args) or real(*args, **keywords))
    forms = export_forms(tiny, tmp_path, ["openvino-fp32", FLOAT], verify_images=images)
    assert len(folds) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx-fp32", "openvino-fp32"]
    one, two = (forms[name] for name in (FLOAT, "openvino-fp32"))
    assert isinstance(one, Artifact)
    assert isinstance(two, Artifact)
    assert np.allclose(one.logits(images), two.logits(images), atol=1e-4)


def test_forms_worth_trying(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed_runtimes", lambda: ("eager", "onnxruntime", "openvino"))
    monkeypatch.setattr(module, "no_bf16", lambda format: "this processor has none")
    assert form_names(tiny, int8=False, bf16=True) == [FLOAT]
    eight = ["onnx-int8", "onnx-int8-ort", "openvino-int8"]
    assert form_names(tiny, int8=True, torch=True) == ["onnx-fp32", "torch-fp32", *eight]
    monkeypatch.setattr(module, "no_bf16", lambda format: "")
    assert form_names(tiny, int8=False) == [FLOAT]
    assert form_names(tiny, int8=False, bf16=True) == [FLOAT, "openvino-bf16"]
    assert form_names(tiny, int8=True) == [FLOAT, *eight, "openvino-int8-bf16"]
    small = cs.create_model(cs.scale(cs.get_spec("tresnet_m"), depth=0.25, width=0.25), num_classes=5)
    assert form_names(small, int8=False, image_size=64) == ["onnx-fp32", "onnx-fp32-strided"]
    strided = [name for name in form_names(small, int8=True, image_size=64) if name.endswith("-strided")]
    assert strided == ["onnx-fp32-strided", "openvino-int8-strided", "openvino-int8-bf16-strided"]
    monkeypatch.setattr(module, "installed_runtimes", lambda: ("eager", "onnxruntime"))
    assert form_names(tiny, int8=True, bf16=True) == ["onnx-fp32", "onnx-int8", "onnx-int8-ort"]
    monkeypatch.setattr("convscale.ship.quantize.find_spec", lambda name: None if name == "nncf" else name)
    assert form_names(tiny, int8=True) == ["onnx-fp32", "onnx-int8-ort"]


@pytest.mark.parametrize(
    ("looks", "made"),
    [
        # What costs more than 1.5 times the best that passed is not made in full, nor INT8 slower than float.
        (
            {FLOAT: 10, "openvino-bf16": 5, "onnx-int8": 11, "onnx-int8-ort": 4, "openvino-int8": 3},
            ["openvino-int8", "onnx-int8-ort"],
        ),
        ({FLOAT: 10, "openvino-bf16": 5, "onnx-int8": 9, "onnx-int8-ort": 8, "openvino-int8": 6}, ["openvino-bf16"]),
        # Of two that pass, the slower one is near enough; where none does, the next is tried, and the next.
        (
            {FLOAT: 10, "openvino-bf16": 5, "onnx-int8": 4.4, "onnx-int8-ort": 4, "openvino-int8": 3, "none pass": 1},
            ["openvino-int8", "onnx-int8-ort", "onnx-int8", "openvino-bf16"],
        ),
    ],
)
def test_only_what_is_near_the_best_is_made_in_full(
    looks: dict[str, float],
    made: list[str],
    tiny: nn.Module,
    images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[str] = []
    real = module.export_as

    def export_as(net: object, folder: Path, request: ExportRequest, **options: object) -> Artifact:
        exported.append(folder.name)
        if request.int8 and "none pass" in looks:
            raise UserError("withheld")
        return load_artifact(tmp_path / FLOAT) if exported[1:] else real(net, folder, request, **options)

    seen: list[str] = []

    def first_look(search: Search, artifact: Artifact) -> float:
        seen.append(artifact.folder.name.removeprefix("look-"))
        return looks[seen[-1]]

    monkeypatch.setattr(module, "export_as", export_as)
    monkeypatch.setattr(module, "sketch", lambda net, folder, request, shared: SimpleNamespace(folder=folder))
    monkeypatch.setattr(Search, "first_look", first_look)
    names = [name for name in looks if name in FORMS]
    forms = export_forms(
        tiny, tmp_path, names, search=Search(), calibration_images=images, verify_images=images, max_drop=100.0
    )
    assert seen[: len(names)] == names  # then the twin of the best, with symmetric activations
    assert exported == [FLOAT, *made]
    assert list(forms) == [name for name in FORMS if name in names]
    left_out = {name: str(form) for name, form in forms.items() if isinstance(form, TooSlow)}
    assert set(left_out) == set(names) - {FLOAT, *made}
    if "openvino-bf16" in left_out:
        assert (
            left_out["openvino-bf16"]
            == "not made: at first sight (0.2 images/s) it costs 1.7 times the best that passed"
        )
        assert (
            left_out["onnx-int8"]
            == "not made: at first sight (0.09091 images/s) it costs 3.7 times the best that passed"
        )


def test_a_look_is_of_what_would_be_made(tiny: nn.Module, images: np.ndarray, tmp_path: Path) -> None:
    """The sketch of each form runs in its runtimes, in a moment, and leaves nothing."""
    names = [FLOAT, "onnx-int8-ort", "openvino-int8"]
    looked: list[str] = []

    class Watched(Search):
        def first_look(self, artifact: Artifact) -> float:
            looked.append(f"{artifact.format} {artifact.precision} {artifact.logits(images).shape}")
            return 1.0

    forms = export_forms(
        tiny, tmp_path, names, search=Watched(), calibration_images=images, verify_images=images, max_drop=100.0
    )
    assert looked == ["onnx fp32 (40, 5)", "onnx int8 (40, 5)", "openvino int8 (40, 5)"]
    assert [name for name, form in forms.items() if isinstance(form, Artifact)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_look_is_timed_in_the_best_runtime(onnx_art: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    asked: list[Settings] = []

    def first_look(artifact: Artifact, settings: Settings) -> float:
        asked.append(settings)
        return {"onnxruntime": 2.0, "openvino": 1.0}[settings.runtime]

    monkeypatch.setattr(module, "first_look", first_look)
    assert Search(threads=2).first_look(onnx_art) == 1.0
    assert [(s.runtime, s.threads, s.streams, s.batch_size) for s in asked] == [
        ("onnxruntime", 2, 2, 8),
        ("openvino", 2, 2, 8),
    ]
    assert Search(threads=2, goal="latency", runtimes=("onnxruntime",)).first_look(onnx_art) == 2.0
    assert (asked[-1].streams, asked[-1].batch_size) == (1, 1)


@pytest.mark.parametrize("passes", [True, False])
def test_the_gate_of_int8_is_held_in_each_runtime_that_it_may_ship_in(
    passes: bool, tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was held in ONNX Runtime, and the tuned artefact ran in OpenVINO."""
    real, held, looked = export_module.verify, [], []

    def verify(net: nn.Module, artifact: Artifact, *args: object, **options: object) -> Verification:
        found = real(net, artifact, *args, **options)  # pyright: ignore[reportArgumentType]
        if artifact.precision == "int8" and options.get("source"):  # not a try on the way
            held.append((artifact.runtime, found.n, found.max_drop, found.passed))
        return found if artifact.runtime == "onnxruntime" or passes else dataclasses.replace(found, passed=False)

    def first_look(artifact: Artifact, settings: Settings) -> float:
        looked.append((artifact.folder.name, settings.runtime))
        return {"onnxruntime": 0.9, "openvino": 0.5}[settings.runtime]

    monkeypatch.undo()
    monkeypatch.setattr(export_module, "verify", verify)
    monkeypatch.setattr(module, "first_look", first_look)
    names, form = [FLOAT, "onnx-int8-ort"], "onnx-int8-ort"
    forms = export_forms(
        tiny, tmp_path, names, search=Search(threads=1), calibration_images=images, verify_images=images, max_drop=100.0
    )
    art = forms[form]
    assert isinstance(art, Artifact)
    assert held == [("onnxruntime", 40, 100.0, True), ("openvino", 40, 100.0, True)]
    both = ["onnxruntime", "openvino"]
    assert art.manifest["int8"]["passed_in"] == (both if passes else both[:1])
    assert load_artifact(art.folder).checked_in == tuple(both if passes else both[:1])
    sketched = [(name, runtime) for name in (FLOAT, f"look-{form}") for runtime in both]
    # What was looked at where it does not pass is looked at once more.
    assert looked == [*sketched, *([] if passes else [(form, "onnxruntime")])]
    search = Search(threads=1, runtimes=("openvino",))
    if not passes:
        with pytest.raises(UserError, match="onnx-int8-ort passed its INT8 gate in onnxruntime, not in openvino"):
            search.first_look(art)
        return
    assert search.first_look(art) == 0.5


@pytest.mark.parametrize(("twin", "asked", "made"), [(0.2, True, True), (0.29, True, False), (0.2, False, False)])
def test_symmetric_activations_are_made_of_the_best_alone_and_where_they_are_faster(
    twin: float,
    asked: bool,
    made: bool,
    tiny: nn.Module,
    images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = {FLOAT: 1.0, "look-onnx-int8": 0.3, "look-openvino-int8": 0.4, "look-onnx-int8-symmetric": twin}
    exported: list[str] = []
    real = module.export_as

    def export_as(net: nn.Module, folder: Path, request: ExportRequest, **options: Any) -> Artifact:
        exported.append(folder.name)
        if request.int8:
            return load_artifact(tmp_path / FLOAT)
        return real(net, folder, request, **options)

    monkeypatch.setattr(module, "export_as", export_as)
    monkeypatch.setattr(module, "sketch", lambda net, folder, request, shared: SimpleNamespace(folder=folder))
    monkeypatch.setattr(Search, "first_look", lambda self, artifact: seconds[artifact.folder.name])
    monkeypatch.setattr(module, "_lost_runtimes", lambda artifact: False)
    forms = export_forms(
        tiny, tmp_path, [FLOAT, "onnx-int8", "openvino-int8"], search=Search(), calibration_images=images,
        verify_images=images, max_drop=100.0, twins=asked,
    )  # fmt: skip
    twins = ["onnx-int8-symmetric"] if made else []
    assert exported == [FLOAT, "onnx-int8", "openvino-int8", *twins]
    assert sorted(forms) == sorted(exported)
    assert FORMS["onnx-int8-symmetric"].int8 == "nncf-symmetric"


def test_strided_stem_is_shipped_as_one_convolution(tmp_path: Path) -> None:
    import onnx

    net = cs.create_model(cs.scale(cs.get_spec("tresnet_m"), depth=0.25, width=0.25), num_classes=5).eval()
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    forms = export_forms(net, tmp_path, [FLOAT, "onnx-fp32-strided"], image_size=64, verify_images=noise)
    for name, kernel, shapes in ((FLOAT, [3, 3], {"Reshape"}), ("onnx-fp32-strided", [12, 12], set())):
        art = forms[name]
        assert isinstance(art, Artifact)
        nodes = list(onnx.load(art.model_path).graph.node)
        first = next(i for i, node in enumerate(nodes) if node.op_type == "Conv")
        assert next(list(a.ints) for a in nodes[first].attribute if a.name == "kernel_shape") == kernel
        assert shapes <= {node.op_type for node in nodes[:first]}
        assert art.verification is not None
        assert art.verification["max_rel"] < 1e-4


def test_bad_input(tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"form 'onnx-int4' is unknown.*onnx-int8"):
        export_forms(tiny, tmp_path, [FLOAT, "onnx-int4"])
    with pytest.raises(UserError, match="goal 'speed' is unknown"):
        fastest_of(export_forms(tiny, tmp_path, [FLOAT]), goal="speed")
    assert set(SECONDS) <= set(FORMS)
    assert tune_module.GOALS == ("throughput", "latency")
