"""Which form is shipped: what is tried, what is withheld, what wins. Times are made up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import convscale as cs
from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.ship import forms as module
from convscale.ship import tune as tune_module
from convscale.ship.forms import FLOAT, FORMS, export_fastest, export_forms, fastest_of, form_names
from convscale.ship.tune import Settings, Trial, Tuning
from convscale.ship.verify import Withheld

SECONDS = {"onnx-fp32": 1.0, "openvino-fp32": 0.9, "onnx-int8": 0.5, "openvino-int8": 0.55}
"""Of a call at first sight, by form."""
AGAIN = {"onnx-fp32": 1.0, "openvino-fp32": 0.9, "onnx-int8": 0.5, "openvino-int8": 0.4}
"""In turns at the end: what looked second was disturbed."""


def form_of(artifact: Artifact) -> str:
    return f"{artifact.format}-{artifact.precision}"


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
    monkeypatch.setattr(module, "in_turns", in_turns)
    monkeypatch.setattr(module, "installed_runtimes", lambda: ("eager", "onnxruntime", "openvino"))
    return turns


def test_the_fastest_form_that_passed(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, made_up: list[list[str]]
) -> None:
    art, found = export_fastest(
        tiny, tmp_path / "a", batch_sizes=(2,), calibration_images=images, verify_images=images, max_drop=100.0
    )
    assert list(found.forms) == ["onnx-fp32", "onnx-int8", "openvino-int8"]
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


def test_int8_must_be_worth_it(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, made_up: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, winner in ((0.97, FLOAT), (0.94, "onnx-int8")):
        monkeypatch.setitem(SECONDS, "onnx-int8", seconds)
        monkeypatch.setitem(AGAIN, "onnx-int8", seconds)
        monkeypatch.setitem(SECONDS, "openvino-int8", 2.0)
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
        "openvino-int8": Withheld,
    }
    assert told == ["onnx-fp32", "onnx-int8", "openvino-int8"]
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
    real = module.export_as.__globals__["fold"]
    monkeypatch.setitem(
        module.export_as.__globals__, "fold", lambda *args, **keywords: folds.append(args) or real(*args, **keywords)
    )
    forms = export_forms(tiny, tmp_path, ["openvino-fp32", FLOAT], verify_images=images)
    assert len(folds) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx-fp32", "openvino-fp32"]
    one, two = (forms[name] for name in (FLOAT, "openvino-fp32"))
    assert isinstance(one, Artifact)
    assert isinstance(two, Artifact)
    assert np.allclose(one.logits(images), two.logits(images), atol=1e-4)


def test_forms_worth_trying(tiny: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "installed_runtimes", lambda: ("eager", "onnxruntime", "openvino"))
    assert form_names(tiny, int8=False) == [FLOAT]
    assert form_names(tiny, int8=True, torch=True) == ["onnx-fp32", "torch-fp32", "onnx-int8", "openvino-int8"]
    small = cs.create_model(cs.scale(cs.get_spec("tresnet_m"), depth=0.25, width=0.25), num_classes=5)
    assert form_names(small, int8=False, image_size=64) == ["onnx-fp32", "onnx-fp32-strided"]
    monkeypatch.setattr(module, "installed_runtimes", lambda: ("eager", "onnxruntime"))
    assert form_names(tiny, int8=True) == ["onnx-fp32", "onnx-int8"]


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
