"""Model repositories for the big servers: their own schema reads them, and their runtimes run what lies there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
import pytest
import yaml

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.errors import UserError
from convscale.ship import containers
from convscale.ship.layouts import write_layout
from tests.serve.conftest import as_detector
from tests.ship.conftest import OLD

COLUMNS = 200
pytest.importorskip("tritonclient.grpc.model_config_pb2")


def parsed(path: Path) -> Any:
    """A ``config.pbtxt`` as Triton reads it."""
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())


def test_a_triton_repository_is_what_its_schema_says(tuned: Artifact, tmp_path: Path) -> None:
    laid = write_layout(tuned, "triton", tmp_path / "repo", name="m.1")
    assert laid.checked == ("onnxruntime", "openvino")
    config = parsed(tmp_path / "repo" / "m.1" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("m.1", "onnxruntime", 4)
    (source,) = config.input
    assert (source.name, source.data_type, list(source.dims)) == ("images", 11, [1, 28, 28])  # TYPE_FP32
    (sink,) = config.output
    assert (sink.name, list(sink.dims), sink.label_filename) == ("logits", [10], "labels.txt")
    assert list(config.dynamic_batching.preferred_batch_size) == [2]  # four images over two instances
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, 2)  # KIND_CPU
    assert config.parameters["intra_op_thread_count"].string_value == "1"
    assert [each.batch_size for each in config.model_warmup] == [1, 2, 4]
    assert all(list(each.inputs["images"].dims) == [1, 28, 28] for each in config.model_warmup)
    warm = config.model_warmup[0].inputs["images"]
    data = (tmp_path / "repo" / "m.1" / "warmup" / warm.input_data_file).read_bytes()
    assert len(data) == 4 * np.prod(list(warm.dims))
    labels = (tmp_path / "repo" / "m.1" / "labels.txt").read_text(encoding="utf-8").splitlines()
    assert labels == ['line\\nbreak "é"', *tuned.classes[1:]]
    assert {path.name for path in (tmp_path / "repo").iterdir() if path.is_dir()} == {"m.1"}


@pytest.mark.parametrize(
    ("runtime", "more", "engine"),
    [
        ("onnxruntime", {}, None),
        ("tensorrt", {}, "FP32"),
        ("tensorrt", {"precision": "fp16", "computes": "fp16"}, "FP16"),
        ("tensorrt", {"precision": "int8"}, "INT8"),
    ],
)
def test_what_was_tuned_on_a_gpu_runs_on_one(
    runtime: str, more: dict[str, str], engine: str | None, tuned: Artifact, tmp_path: Path
) -> None:
    """With the batch that was found there, though the layout is written where there is none."""
    found = {"name": runtime, "threads": 6, "streams": 1, "batch_size": 64, "device": "cuda"}
    tuned.keep(runtime=found, **more)
    artifact = load_artifact(tuned.folder)
    laid = write_layout(artifact, "triton", tmp_path / "repo", name="m")
    config = parsed(tmp_path / "repo" / "m" / "config.pbtxt")
    (group,) = config.instance_group
    assert (config.backend, group.count, group.kind) == ("onnxruntime", 1, 1)  # KIND_GPU
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (64, [64])
    engines = config.optimization.execution_accelerators.gpu_execution_accelerator
    expected = [] if engine is None else [("tensorrt", {"precision_mode": engine})]
    assert [(each.name, dict(each.parameters)) for each in engines] == expected
    service = yaml.safe_load((tmp_path / "repo" / "kserve.yaml").read_text())
    assert service["spec"]["predictor"]["model"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert laid.notes == ()
    for layout in ("ovms", "docker"):
        laid = write_layout(artifact, layout, tmp_path / layout, name="m")
        assert laid.notes == (f"it was tuned on cuda, and {layout} runs it on a processor, not tuned",)
        assert "nvidia" not in (tmp_path / layout / "kserve.yaml").read_text()


def test_what_lies_there_gives_the_reference_answers(tuned: Artifact, tmp_path: Path) -> None:
    write_layout(tuned, "triton", tmp_path / "repo")
    model = tmp_path / "repo" / "fashion"
    session = ort.InferenceSession(str(model / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    inputs = np.load(model / "reference" / "inputs.npy")
    (logits,) = session.run(None, {"images": inputs})
    assert logits == pytest.approx(np.load(model / "reference" / "logits.npy"), abs=1e-4)
    exp = np.exp(logits - logits.max(1, keepdims=True))
    answers = json.loads((model / "reference" / "answers.json").read_text())
    assert exp / exp.sum(1, keepdims=True) == pytest.approx(np.array(answers["probabilities"]), abs=1e-5)
    assert answers["labels"] == [tuned.classes[i] for i in logits.argmax(1)]
    compile((model / "reference" / "check.py").read_text(), "check.py", "exec")


def test_a_container_takes_the_plain_build_of_what_runs_it(tuned: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"onnxruntime-gpu": "1.2.3"}

    def installed(name: str) -> str:
        if name == "onnxruntime" or (name == "onnxruntime-gpu" and name not in there):
            raise PackageNotFoundError(name)
        return there.get(name, "1")

    monkeypatch.setattr(containers, "version", installed)
    assert "onnxruntime==1.2.3" in containers.requirements(tuned)
    there.clear()
    with pytest.raises(UserError, match="writes down what is installed here, and onnxruntime is not"):
        containers.requirements(tuned)


def test_a_baked_int8_network_takes_bytes(tmp_path: Path) -> None:
    write_layout(load_artifact(OLD / "onnx_int8"), "triton", tmp_path / "repo", name="m")
    config = parsed(tmp_path / "repo" / "m" / "config.pbtxt")
    assert (config.input[0].data_type, list(config.input[0].dims)) == (2, [28, 28, 1])  # TYPE_UINT8
    assert [port.name for port in config.output] == ["probabilities", "logits"]


def test_tritons_openvino_backend_is_asked_for_what_it_can_do(tuned_openvino: Artifact, tmp_path: Path) -> None:
    """``ProcessRequests`` of its ``openvino.cc``: with a ``max_batch_size`` every batch must have that size, without
    one an execution takes a single request. The warm-up of one image had neither, and the server did not start.
    """
    laid = write_layout(tuned_openvino, "triton", tmp_path / "triton", name="m")
    config = parsed(tmp_path / "triton" / "m" / "config.pbtxt")
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("openvino", "model.xml", 0)
    assert not config.HasField("dynamic_batching")
    assert [list(port.dims) for port in (*config.input, *config.output)][:2] == [[-1, 28, 28, 1], [-1, 10]]
    # One request on its way for each instance: NUM_STREAMS 2 with one of them left a core idle.
    assert (config.parameters["NUM_STREAMS"].string_value, config.instance_group[0].count) == ("2", 2)
    model = ov.Core().compile_model(str(tmp_path / "triton" / "m" / "1" / config.default_model_filename), "CPU")
    sizes = []
    for warm in config.model_warmup:
        assert warm.batch_size == 1  # requests
        shape = list(warm.inputs["images"].dims)
        assert model(np.zeros(shape, np.uint8))["probabilities"].shape == (shape[0], 10)
        sizes.append(shape[0])
        if warm.inputs["images"].input_data_file:
            data = (tmp_path / "triton" / "m" / "warmup" / warm.inputs["images"].input_data_file).read_bytes()
            assert len(data) == np.prod(shape)
        else:
            assert warm.inputs["images"].zero_data
    assert sizes == [1, 3]
    (note,) = laid.notes
    assert note.endswith("ask for 3 images in a request, with 2 requests on the way")
    assert write_layout(tuned_openvino, "ovms", tmp_path / "ovms").notes == ()


@pytest.mark.parametrize(("computes", "hint", "other"), [("fp32", "f32", ""), ("bf16", "bf16", "YES")])
def test_servers_compute_as_the_record_says(computes: str, hint: str, other: str, tmp_path: Path) -> None:
    artifact = load_artifact(shutil.copytree(OLD / "openvino_fp32", tmp_path / "m"))
    artifact.keep(precision=computes, computes=computes)
    artifact = load_artifact(tmp_path / "m")
    write_layout(artifact, "ovms", tmp_path / "ovms")
    (entry,) = json.loads((tmp_path / "ovms" / "config.json").read_text())["model_config_list"]
    assert entry["config"]["plugin_config"]["INFERENCE_PRECISION_HINT"] == hint
    write_layout(artifact, "triton", tmp_path / "triton")
    config = parsed(tmp_path / "triton" / "m" / "config.pbtxt")
    assert config.parameters["HINT_BF16"].string_value == other


def test_a_layout_is_of_the_artefact_that_was_asked_for(
    tuned: Artifact, call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --layout, --qat, --bf16 and --with-features were dropped in silence."""
    asked: list[dict[str, Any]] = []
    data = {"calibration_images": np.zeros(0), "verify_images": np.zeros(0), "verify_labels": np.zeros(0)}
    monkeypatch.setattr("convscale.cli.ship._check_images", lambda *_: data)

    def export(net: object, out: Path, **options: Any) -> Artifact:
        asked.append({name: options[name] for name in ("int8", "bf16", "half", "bake", "with_features", "format")})
        return load_artifact(shutil.copytree(tuned.folder, out))

    monkeypatch.setattr("convscale.ship.export.export", export)
    words = ("--data-dir", tmp_path, "--int8", "qat", "--bf16", "--with-features", "--bake", "--format", "openvino")
    net = ("export", "mobilenetv2_050", "--img-size", 32, *words)
    code, _, err = call(*net, "--output", tmp_path / "plain")
    assert code == 0, err
    code, _, err = call(*net, "--output", tmp_path / "repo", "--layout", "triton")
    assert code == 0, err
    assert (tmp_path / "repo" / "repo" / "1" / "model.onnx").is_file()
    right = {"int8": "qat", "bf16": True, "half": False, "bake": True, "with_features": True, "format": "openvino"}
    assert asked == [right, right]


def test_of_a_fit_the_layout_holds_what_it_shipped(
    tuned: Artifact, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Its training was exported anew: in another form than the one that fit had chosen and judged."""
    shutil.copytree(tuned.folder, tmp_path / "fit" / "artifact")
    (tmp_path / "fit" / "fit.json").write_text("{}")
    ask = ("export", tmp_path / "fit", "--layout", "triton", "--name", "m", "--output", tmp_path / "repo")
    code, _, err = call(*ask, "--bake")
    said = f"--bake is for a checkpoint; what fit shipped, {tmp_path / 'fit' / 'artifact'}, is laid out as it is"
    assert (code, said in err) == (2, True), err
    code, _, err = call(*ask)
    assert code == 0, err
    write_layout(tuned, "triton", tmp_path / "right", name="m")
    for name in ("config.pbtxt", "1/model.onnx"):
        assert (tmp_path / "repo" / "m" / name).read_bytes() == (tmp_path / "right" / "m" / name).read_bytes()


def test_bad_input_is_one_line(tuned: Artifact, call: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    torch = OLD / "torch_fp32"
    for arguments, said in (
        ((torch, "--layout", "triton"), "--layout triton needs an ONNX or OpenVINO form"),
        (("resnet18", "--layout", "ovms", "--format", "torch"), "give --format onnx or openvino, not torch"),
        ((tuned.folder, "--layout", "seldon"), "layout 'seldon' is unknown"),
        (("resnet18", "--layout", "seldon"), "layout 'seldon' is unknown"),
        ((tuned.folder, "--layout", "triton", "--name", "a/b"), "model name 'a/b' can not stand in an address"),
        ((tuned.folder, "--name", "a"), "--name goes with --layout"),
        (
            (tuned.folder, "--layout", "triton", "--int8"),
            "--int8 is for a checkpoint; an artefact is laid out as it is",
        ),
        (
            (tuned.folder, "--layout", "triton", "--format", "openvino"),
            "--format is for a checkpoint; an artefact is laid out as it is",
        ),
        ((tuned.folder, "--layout", "triton", "--max-drop", 2), "--max-drop 2 is what 8 bits may lose; give --int8"),
    ):
        code, out, err = call("export", *arguments, "--output", tmp_path / "repo")
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert said in err
        assert not (tmp_path / "repo").exists()
    code, _, err = call("export", tuned.folder, "--layout", "ovms", "--output", tmp_path / "full", "--overwrite")
    assert (code, "holds something other than a layout" in err) == (2, True)
    assert (tmp_path / "full" / "mine").read_text() == "x"


def test_where_a_layout_goes_is_checked_before_the_export(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes minutes with --qat."""

    def export(*_: object) -> None:
        raise AssertionError("nothing is to be exported")

    monkeypatch.setattr("convscale.cli.ship._to_export", export)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for output, more, said in (
        ("full", (), "exists and is not empty; use --overwrite"),
        ("full", ("--overwrite",), "holds something other than a layout"),
        ("file", (), "is a file; name a folder"),
        ("a b", (), "model name 'a b' can not stand in an address"),
        ("new", ("--name", "a/b"), "model name 'a/b' can not stand in an address"),
    ):
        code, _, err = call("export", "resnet18", "--layout", "triton", "--output", tmp_path / output, *more)
        assert (code, said in err, len(err.splitlines())) == (2, True, 1), err


@pytest.mark.parametrize("layout", ["triton", "ovms", "docker"])
def test_a_detector_is_told_in_one_line(
    layout: str, call: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = as_detector(load_artifact(shutil.copytree(OLD / "onnx_fp32", tmp_path / "boxes")))
    network = SimpleNamespace(net=SimpleNamespace(detector_spec=object()))
    monkeypatch.setattr("convscale.cli.ship._to_export", lambda *_: network)
    for what in (artefact, "mine"):  # one that is there, and one that would take minutes to make
        code, out, err = call("export", what, "--layout", layout, "--output", tmp_path / "repo")
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert "detector" in err
        assert "--layout takes classifiers" in err
        assert not (tmp_path / "repo").exists()


def test_the_command_says_what_to_start_and_replaces_only_when_told(
    tuned: Artifact, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    words = ("export", tuned.folder, "--layout", "triton", "--output", tmp_path / "repo")
    code, out, _ = call(*words)
    assert code == 0
    assert f"tritonserver --model-repository={tmp_path / 'repo'}" in out
    assert call(*words)[0] == 2
    code, out, _ = call(*words, "--overwrite", "--json")
    value = json.loads(out)
    assert (code, value["name"], value["checked"]) == (0, "fashion", ["onnxruntime", "openvino"])
    assert "fashion/1/model.onnx" in value["files"]


def test_int8_is_not_laid_out_for_a_server_whose_runtime_it_did_not_pass_in(tmp_path: Path) -> None:
    artifact = load_artifact(shutil.copytree(OLD / "onnx_int8", tmp_path / "m"))
    with pytest.raises(UserError, match="artefact m passed its INT8 gate in onnxruntime, not in openvino"):
        write_layout(artifact, "ovms", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
    assert write_layout(artifact, "triton", tmp_path / "triton").checked == ("onnxruntime",)  # openvino is not asked
    artifact.keep(int8={**artifact.manifest["int8"], "passed_in": ["onnxruntime", "openvino"]})
    assert "openvino" in write_layout(artifact, "ovms", tmp_path / "repo").checked


def test_a_file_that_says_something_else_is_not_laid_out(
    tuned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convscale.ship import layouts

    right = layouts.sample_of(tuned)
    wrong = layouts.Sample(
        images=right.images,
        inputs=right.inputs,
        outputs=(right.outputs[0] + 1,),
        probabilities=right.probabilities,
    )
    monkeypatch.setattr(layouts, "sample_of", lambda _: wrong)
    with pytest.raises(UserError, match=r"model\.onnx says something else in onnxruntime"):
        write_layout(tuned, "triton", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()
