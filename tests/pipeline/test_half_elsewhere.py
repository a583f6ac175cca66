"""``fit --device l4``: what is predicted in half precision ships in it, or is promised in what ships; nothing is
trained.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from convscale.artifact.artifact import load_artifact, open_artifact
from convscale.choice.basis import Asked, basis_of
from convscale.choice.facts import SizedSpec
from convscale.choice.speeds import predicted
from convscale.runtimes.base import Opening
from convscale.runtimes.tensorrt import Tensorrt
from convscale.ship import confirm as confirm_module
from convscale.ship import verify as verify_module
from tests.pipeline.test_int8_elsewhere import SPEC, _asked, _shipped

DOUBT = "int8 reaches every layer"  # the stand-in of a prediction has it


def _fp32(runtime: str) -> float:
    """Images/s predicted in float32."""
    basis = basis_of(Asked(device="l4", runtime=runtime, batch_size=64, precision="fp32"))
    return predicted(SizedSpec(SPEC, 8), basis).images_per_s


@pytest.mark.parametrize(("runtime", "precision"), [("tensorrt", None), ("onnxruntime", "fp16")])
def test_half_precision_ships_where_it_is_promised(
    runtime: str, precision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _asked(tmp_path, runtime, int8=False, precision=precision)
    art, record, _ = _shipped(tmp_path, asked, 5000.0)
    assert (art.precision, art.manifest.computes, record.now.artifact.precision) == ("fp16", "fp16", "fp16")
    graph = onnx.load(art.model_path).graph
    assert {each.data_type for each in graph.initializer if len(each.dims) > 1} == {onnx.TensorProto.FLOAT16}
    assert [node.op_type for node in graph.node].count("Cast") == 2  # the input and the logits, as a kit's
    promise = art.promise
    assert (promise.precision, promise.images_per_s, promise.doubts) == (precision or "amp", 5000.0, (DOUBT,))
    assert (record.now.missed, record.now.choice_notes, record.now.artifact.predicted) == (None, (), None)
    checked = art.verification
    assert (checked["precision"], checked["passed"]) == ("fp16", True)
    assert 0 < checked["max_rel"] < 0.01
    assert "as onnx (fp16, which a GPU computes in)." in (art.folder / "README.md").read_text()
    here = "onnxruntime has no fp16 here: float operations were computed in fp32"
    assert (art.fallbacks("onnxruntime"), art.computed_in("onnxruntime")) == ((here,), "fp32")
    for module in ("artifact.artifact", "runtimes.base"):
        monkeypatch.setattr(f"convscale.{module}.need_runtime", lambda name: None)
    there = load_artifact(art.folder, runtime=runtime, device="cuda")
    assert (confirm_module._differences(there, promise), there.computed_in(runtime)) == ((), "fp16")
    opened: list[str] = []
    monkeypatch.setattr(Tensorrt, "open", lambda self, path, how: opened.append(how.precision))
    open_artifact(there, "tensorrt", Opening(device="cuda"))
    assert opened == ["fp16"]


@pytest.mark.parametrize(("int8", "floor"), [(False, 1e9), (True, 100.0)])
def test_where_the_gate_withholds_it_float32_ships_and_its_own_prediction_decides(
    int8: bool, floor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(verify_module.MAX_RELATIVE, "fp16", -1.0)
    monkeypatch.setattr(verify_module, "MAX_BATCH_RELATIVE", -1.0)
    asked = _asked(tmp_path, "tensorrt", int8=int8, floor=floor, max_drop=0.0)
    art, record, said = _shipped(tmp_path, asked, 2e9)
    assert (art.precision, art.manifest.computes) == ("fp32", "fp32")
    promise = art.promise
    assert (promise.precision, promise.images_per_s, promise.runtime) == ("fp32", _fp32("tensorrt"), "tensorrt")
    assert record.now.artifact.predicted.precision == "fp32"
    *eight, note = record.now.choice_notes
    assert note.startswith("half precision does not pass its gate (the logits differ by ")
    assert note.endswith("): what is shipped and promised is in float32")
    assert len(eight) == int8
    assert {note, *eight} <= set(said)
    speed, gap = f"{promise.images_per_s:,.0f}", f"{1 - promise.images_per_s / 1e9:.0%}"
    missed = f"half precision does not ship, and float32 is predicted at {speed} images/s, {gap} below the "
    assert record.now.missed == (None if floor == 100.0 else f"{missed}1,000,000,000 asked for")


@pytest.mark.parametrize("withheld", [False, True])
def test_half_weights_that_miss_the_gate_ship_in_float32_where_pytorch_is_promised(
    withheld: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if withheld:
        monkeypatch.setitem(verify_module.MAX_RELATIVE, "fp16", -1.0)
    art, record, said = _shipped(tmp_path, _asked(tmp_path, None, int8=False, precision="fp16"), 5000.0)
    stored = {each.data_type for each in onnx.load(art.model_path).graph.initializer if len(each.dims) > 1}
    if not withheld:
        assert (art.precision, art.promise.precision, record.now.choice_notes) == ("fp16", "fp16", ())
        assert stored == {onnx.TensorProto.FLOAT16}
        return
    assert (art.precision, art.promise.precision, stored) == ("fp32", "fp32", {onnx.TensorProto.FLOAT})
    (note,) = record.now.choice_notes
    assert note.startswith("half precision does not pass its gate (the logits differ by ")
    assert note.endswith("): what is shipped and promised is in float32")
    assert note in said
    assert (art.promise.runtime, art.promise.images_per_s) == ("compiled", _fp32("compiled"))


@pytest.mark.parametrize(("runtime", "precision"), [("onnxruntime", "amp"), ("compiled", "fp16")])
def test_for_a_processor_float32_ships_and_is_promised(runtime: str, precision: str, tmp_path: Path) -> None:
    asked = _asked(tmp_path, runtime, int8=False, precision=precision)
    asked = replace(asked, where=replace(asked.where, device="i9-10940x", batch_size=1))
    art, record, _ = _shipped(tmp_path, asked, 2e9)
    graph = onnx.load(art.model_path).graph
    assert {each.data_type for each in graph.initializer if len(each.dims) > 1} == {onnx.TensorProto.FLOAT}
    single = basis_of(replace(asked.where, precision="fp32"))
    promised = predicted(SizedSpec(SPEC, 8), single).images_per_s
    assert (art.promise.precision, art.promise.images_per_s) == ("fp32", promised)
    assert record.now.artifact.predicted.precision == "fp32"
    assert record.now.choice_notes == (
        "a processor computes half precision in float32: what is shipped and promised is in float32",
    )


def test_what_can_not_be_written_in_half_precision_ships_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(model: object, **options: object) -> None:
        raise KeyError("Odd")

    monkeypatch.setattr("onnxruntime.transformers.float16.convert_float_to_float16", convert)
    art, record, _ = _shipped(tmp_path, _asked(tmp_path, "onnxruntime", int8=False), 2e9)
    assert art.promise.precision == "fp32"
    why = "half precision does not pass its gate (the network can not be written in half precision: 'Odd')"
    assert record.now.choice_notes == (f"{why}: what is shipped and promised is in float32",)


def test_no_file_computes_in_bfloat16(tmp_path: Path) -> None:
    art, record, _ = _shipped(tmp_path, _asked(tmp_path, "tensorrt", int8=False, precision="amp_bf16"), 2e9)
    assert (art.manifest.computes, art.promise.precision, art.promise.images_per_s) == (
        "fp32", "fp32", _fp32("tensorrt")
    )  # fmt: skip
    assert record.now.choice_notes == (
        "no file computes in amp_bf16 there: what is shipped and promised is in float32",
    )


@pytest.mark.parametrize(
    ("runtime", "precision", "doubt"),
    [
        (None, None, "it is of compiled in amp; the file that ships computes in fp32"),
        ("onnxruntime", "fp32", None),
    ],
)
def test_a_promise_of_pytorch_says_what_the_file_computes_in(
    runtime: str | None, precision: str | None, doubt: str | None, tmp_path: Path
) -> None:
    art, record, _ = _shipped(tmp_path, _asked(tmp_path, runtime, int8=False, precision=precision), 5000.0)
    assert (art.precision, art.promise.precision, art.promise.images_per_s) == ("fp32", precision or "amp", 5000.0)
    assert art.promise.doubts == (DOUBT, *([doubt] if doubt else []))
    assert record.now.artifact.predicted is None


def test_a_module_that_nothing_predicts_says_so_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify_module.MAX_RELATIVE, "fp16", -1.0)
    art, _, _ = _shipped(tmp_path, _asked(tmp_path, "tensorrt", int8=False), 5000.0, network=None)
    assert (art.promise.precision, art.promise.images_per_s) == ("amp", 5000.0)
    assert art.promise.doubts == (DOUBT, "it is of tensorrt in amp; the file that ships computes in fp32")
