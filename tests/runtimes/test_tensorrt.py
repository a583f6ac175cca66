"""TensorRT by ONNX Runtime's provider: what a stand-in for it is asked for; nothing of it is installed here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError
from convscale.runtimes import base
from convscale.runtimes.base import Opening, installed_runtimes, open_runtime, runtimes_of
from convscale.runtimes.onnxruntime import BoundOnnxRunner

HERE = "CPUExecutionProvider"
ASKED: list[Any] = []


class Session(ort.InferenceSession):
    """On the processor; says that the providers asked for took it."""

    def __init__(self, path: str, options: ort.SessionOptions, providers: list[Any]) -> None:
        ASKED.append(providers)
        super().__init__(path, options, providers=[HERE])

    def get_providers(self) -> list[str]:
        return [name for name, _ in ASKED[-1]]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with TensorRT, as far as ONNX Runtime says. Gives the cache folder."""
    del ASKED[:]
    known = ["TensorrtExecutionProvider", "CUDAExecutionProvider", HERE]
    monkeypatch.setattr(ort, "get_available_providers", lambda: known)
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(base, "find_spec", lambda name: find_spec("numpy" if name == "tensorrt" else name))
    monkeypatch.setattr(BoundOnnxRunner, "place", "cpu")
    monkeypatch.setenv("CONVSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_tensorrt_is_asked_for(onnx_art: Artifact, there: Path, precision: str) -> None:
    open_runtime(onnx_art.model_path, "tensorrt", Opening(device="cuda:1", precision=precision, threads=1))
    ((first, settings), second) = ASKED[0]
    assert (first, second) == ("TensorrtExecutionProvider", ("CUDAExecutionProvider", {"device_id": 1}))
    place = Path(settings["trt_engine_cache_path"])
    assert place.is_dir()
    assert place.parent == there / "tensorrt"
    assert settings["device_id"] == 1
    assert (settings["trt_fp16_enable"], settings["trt_int8_enable"]) == (precision == "fp16", False)
    assert settings["trt_engine_cache_enable"] is True
    # the same file's engines lie in the same folder, another's in another
    open_runtime(onnx_art.model_path, "tensorrt", Opening(device="cuda", precision=precision, threads=1))
    assert ASKED[1][0][1]["trt_engine_cache_path"] == str(place)


def test_files_in_8_bits_are_run_in_8_bits(tmp_path: Path, there: Path) -> None:
    from onnx import TensorProto, helper, save

    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    scale = [helper.make_tensor("s", TensorProto.FLOAT, [], [0.5]), helper.make_tensor("z", TensorProto.UINT8, [], [3])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    save(
        helper.make_model(
            helper.make_graph(nodes, "g", info[:1], info[1:], scale),
            opset_imports=[helper.make_opsetid("", 18)],
            ir_version=10,
        ),
        tmp_path / "a.onnx",
    )
    runner = open_runtime(tmp_path / "a.onnx", "tensorrt", Opening(device="cuda", threads=1))
    assert ASKED[0][0][1]["trt_int8_enable"] is True
    (found,) = runner(np.array([[0.6, -9.0]], np.float32))
    np.testing.assert_array_equal(found, [[0.5, -1.5]])  # halves from -1.5 on


def test_without_a_place_for_engines_none_are_kept(
    onnx_art: Artifact, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.write_text("a file where the folder should be")
    open_runtime(onnx_art.model_path, "tensorrt", Opening(device="cuda", threads=1))
    settings = ASKED[0][0][1]
    assert settings == {"device_id": 0, "trt_fp16_enable": False, "trt_int8_enable": False}


def test_an_artefact_runs_in_it_on_a_gpu_alone(onnx_art: Artifact, there: Path) -> None:
    assert runtimes_of("onnx", "cuda") == ("onnxruntime", "openvino", "tensorrt")
    opened = load_artifact(onnx_art.folder, runtime="tensorrt", device="cuda")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(opened(images), onnx_art(images), atol=1e-5)
    assert ASKED[0][0][0] == "TensorrtExecutionProvider"
    with pytest.raises(UserError, match="runs in onnxruntime or openvino, not in tensorrt"):
        load_artifact(onnx_art.folder, runtime="tensorrt")


def test_where_it_is_not(onnx_art: Artifact, monkeypatch: pytest.MonkeyPatch, there: Path) -> None:
    how = Opening(device="cuda", threads=1)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", HERE])
    with pytest.raises(UserError, match="no TensorrtExecutionProvider; pip install onnxruntime-gpu tensorrt, or use"):
        open_runtime(onnx_art.model_path, "tensorrt", how)
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == "tensorrt" else find_spec(name))
    assert "tensorrt" not in installed_runtimes()
    with pytest.raises(UserError, match="runtime tensorrt is not installed; pip install onnxruntime-gpu tensorrt"):
        open_runtime(onnx_art.model_path, "tensorrt", how)


def test_it_does_not_start(onnx_art: Artifact, monkeypatch: pytest.MonkeyPatch, there: Path) -> None:
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CUDAExecutionProvider", HERE])
    with pytest.raises(
        UserError, match=r"TensorrtExecutionProvider does not start here \(are CUDA, cuDNN and TensorRT"
    ):
        open_runtime(onnx_art.model_path, "tensorrt", Opening(device="cuda", threads=1))
