"""What lies beside a laid-out model: the script that asks a server, its configuration, KServe's text, the container."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import urllib.request
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import onnxruntime as ort
import openvino as ov
import pytest
import yaml

from convscale.artifact.artifact import Artifact
from convscale.ship.layouts import write_layout
from convscale.ship.repository import Port, check_script, label_of

COLUMNS = 200

# ---------------------------------------------------------------- the script that asks


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 0.01), ("fp16", 0.01), ("int8", 0.1), ("bf16", 0.1)])
def test_the_script_allows_what_a_precision_may_differ_by(precision: str, allowed: float) -> None:
    port = Port(name="images", datatype="FP32", shape=(3, 8, 8))
    text = check_script("m", port, [replace(port, name="logits")], precision)
    assert f"    if not worst <= {allowed}:\n" in text
    compile(text, "check.py", "exec")


def test_the_script_asks_a_server_that_takes_one_image(
    tuned: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tuned to batches of one or two, a server refused all reference images in one request."""
    triton = pytest.importorskip("tritonclient.http")
    write_layout(tuned, "triton", tmp_path / "repo", name="m")
    model = tmp_path / "repo" / "m"
    session = ort.InferenceSession(str(model / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    asked: list[tuple[str, str]] = []

    class Client:
        def __init__(self, address: str) -> None:
            self.address = address

        def infer(self, name: str, inputs: Sequence[Any]) -> Any:
            (tensor,) = inputs
            assert tensor.shape()[0] == 1, "more than max_batch_size"
            asked.append((self.address, name))
            array = np.frombuffer(tensor._get_binary_data(), np.float32).reshape(tensor.shape())
            answers = dict(zip(["logits"], session.run(None, {tensor.name(): array}), strict=True))
            return SimpleNamespace(as_numpy=answers.get)

    monkeypatch.setattr(triton, "InferenceServerClient", Client)
    script = str(model / "reference" / "check.py")
    count = len(np.load(model / "reference" / "inputs.npy"))
    assert count > 1
    for words, expected in (([], ("127.0.0.1:8000", "m")), (["there:80", "label"], ("there:80", "label"))):
        asked.clear()
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(script)
        assert asked == [expected] * count
        assert capsys.readouterr().out.startswith("logits: relative difference ")
    right = np.load(model / "reference" / "logits.npy")
    right[-1] += 1  # the last image's
    np.save(model / "reference" / "logits.npy", right)
    with pytest.raises(SystemExit, match="logits differs from the reference"):
        runpy.run_path(script)


# ---------------------------------------------------------------- OpenVINO Model Server

_TEXTS = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
_MODEL = {
    "name": {"type": "string", "minLength": 1},
    "base_path": {"type": "string", "pattern": "^(/|gs://|s3://|azure://)"},
    "target_device": {"enum": ["CPU", "GPU", "NPU", "AUTO", "MULTI", "HETERO"]},
    "nireq": {"type": "integer", "minimum": 0},
    "plugin_config": _TEXTS,
    "batch_size": {"type": ["integer", "string"]},
    "shape": {"type": ["object", "string"]},
    "layout": {"type": ["object", "string"]},
    "model_version_policy": {
        "type": "object",
        "maxProperties": 1,
        "additionalProperties": False,
        "properties": {
            "all": {"type": "object", "maxProperties": 0},
            "specific": {"type": "object", "required": ["versions"]},
            "latest": {
                "type": "object",
                "required": ["num_versions"],
                "properties": {"num_versions": {"type": "integer", "minimum": 1}},
            },
        },
    },
}
OVMS_CONFIG = {
    "type": "object",
    "required": ["model_config_list"],
    "additionalProperties": False,
    "properties": {
        "model_config_list": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["config"],
                "additionalProperties": False,
                "properties": {
                    "config": {
                        "type": "object",
                        "required": ["name", "base_path"],
                        "additionalProperties": False,
                        "properties": _MODEL,
                    }
                },
            },
        }
    },
}
"""What OpenVINO Model Server's documentation says of ``config.json``: its ``docs/parameters.md`` (model configuration
options), ``docs/model_version_policy.md``, ``docs/starting_server.md``; other keys it refuses."""


@pytest.mark.parametrize("name", ["tuned", "tuned_openvino"])
def test_openvino_model_server_reads_its_configuration(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    artifact: Artifact = request.getfixturevalue(name)
    laid = write_layout(artifact, "ovms", tmp_path / "ovms", name="m")
    assert "openvino" in laid.checked
    config = json.loads((tmp_path / "ovms" / "config.json").read_text())
    jsonschema.Draft202012Validator(OVMS_CONFIG).validate(config)
    (entry,) = config["model_config_list"]
    entry = entry["config"]
    assert (entry["name"], entry["base_path"]) == ("m", "/models/m")
    # As the server: the folder that it is told, the highest version, its device and its options.
    folder = tmp_path / "ovms" / Path(entry["base_path"]).relative_to("/models") / "1"
    (file,) = [path for path in folder.iterdir() if path.suffix in (".xml", ".onnx")]
    compiled = ov.Core().compile_model(str(file), entry["target_device"], entry["plugin_config"])
    assert compiled.get_property("NUM_STREAMS") == 2
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 2
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    assert entry["nireq"] >= compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    reference = tmp_path / "ovms" / "m" / "reference"
    output = compiled.output(0).any_name
    found = compiled(np.load(reference / "inputs.npy"))[output]
    assert found == pytest.approx(np.load(reference / f"{output}.npy"), abs=1e-3)


# ---------------------------------------------------------------- KServe


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("My_Model.V2", "my-model-v2"),
        ("photos", "photos"),
        ("2024.best", "model-2024-best"),  # a service's name begins with a letter
        ("7", "model-7"),
        ("a" * 62 + ".b", "a" * 62),
    ],
)
def test_a_label_is_what_kserve_takes(name: str, label: str) -> None:
    assert label_of(name) == label
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", label)  # KServe's own IsvcNameFmt
    assert len(label) <= 63


@pytest.mark.parametrize(
    ("layout", "source", "model", "place"),
    [
        ("triton", "tuned", "triton", "repo"),
        ("triton", "tuned_openvino", "triton", "repo"),
        ("ovms", "tuned", "onnx", "repo/My_Model.V2"),
        ("ovms", "tuned_openvino", "openvino", "repo/My_Model.V2"),
        ("docker", "tuned", "", ""),
    ],
)
def test_kserve_is_valid_yaml_with_what_it_needs(
    layout: str, source: str, model: str, place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """``kserve-openvino`` starts with ``--model_path=/mnt/models --model_name={{.Name}}``, and takes the formats
    openvino, onnx and tensorflow: that was of a folder that holds no version, and of a format that it does not know.
    """
    write_layout(request.getfixturevalue(source), layout, tmp_path / "repo", name="My_Model.V2")
    text = (tmp_path / "repo" / "kserve.yaml").read_text()
    value = yaml.safe_load(text)
    assert (value["apiVersion"], value["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert value["metadata"]["name"] == "my-model-v2"
    predictor = value["spec"]["predictor"]
    if layout == "docker":
        (container,) = predictor["containers"]
        assert container["ports"] == [{"containerPort": 8000, "protocol": "TCP"}]
        assert container["image"] == "my-model-v2:latest"
        return
    served = predictor["model"]
    assert (served["protocolVersion"], served["modelFormat"]["name"]) == ("v2", model)
    assert served["resources"]["limits"]["cpu"] == "2"
    (change,) = [line for line in text.splitlines() if "CHANGE" in line and "storageUri" in line]
    if layout == "triton":
        assert "this folder, with My_Model.V2/ in it" in change
        assert (tmp_path / place / "My_Model.V2" / "config.pbtxt").is_file()
        return
    assert "the folder My_Model.V2/ of this one, with 1/ in it" in change
    assert (tmp_path / place / "1").is_dir()
    assert "python My_Model.V2/reference/check.py HOST:PORT my-model-v2" in text
    options = dict(word.removeprefix("--").split("=", 1) for word in served["args"])
    config = json.loads((tmp_path / "repo" / "config.json").read_text())["model_config_list"][0]["config"]
    assert json.loads(options.pop("plugin_config")) == config["plugin_config"]
    assert options == {"nireq": str(config["nireq"])}


# ---------------------------------------------------------------- the container


def test_an_image_has_a_name_that_docker_takes(
    tuned: Artifact, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    ask = ("export", tuned.folder, "--layout", "docker", "--output", tmp_path / "box", "--name", "My_Model")
    code, out, err = call(*ask)
    assert code == 0, err
    assert f"docker build -t my-model {tmp_path / 'box'}" in out
    first, *_, last = (tmp_path / "box" / "Dockerfile").read_text().splitlines()
    assert first == "# docker build -t my-model . && docker run -p 8000:8000 -e CONVSCALE_TOKEN=... my-model"
    assert "My_Model=models/My_Model" in json.loads(last.removeprefix("CMD "))  # clients ask for the name itself
    assert "image: my-model:latest" in (tmp_path / "box" / "kserve.yaml").read_text()


@contextmanager
def serving(command: Sequence[str], folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a server that a container's command starts, here on a free port."""
    words = [*command, "--host", "127.0.0.1", "--port", "0", "--json", "--log", "none"]
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            text = ""
            while not text.endswith("\n}\n"):
                line = process.stdout.readline()
                assert line, "it ended"
                text += line
            yield json.loads(text)["url"]
        finally:
            process.terminate()
            assert process.wait(30) == 0


def test_a_container_serves_from_what_it_copies(tuned: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "box"
    write_layout(tuned, "docker", out, name="m")
    lines = (out / "requirements.txt").read_text().splitlines()
    assert f"fastapi=={version('fastapi')}" in lines
    assert not any(line.startswith(("torch", "timm", "nncf", "openvino")) for line in lines)
    dockerfile = (out / "Dockerfile").read_text()
    command = json.loads(dockerfile.partition("\nCMD ")[2])
    assert command[:5] == ["python", "-m", "convscale", "serve", "m=models/m"]
    assert "USER 10001" in dockerfile
    # As in the container: that copy of the package, that command, another port, nothing that trains.
    blocked = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'scipy', 'onnx', 'timm', 'openvino')))"
    )
    code = f"{blocked}; from convscale.cli.app import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(out / "app")}
    with (
        serving([sys.executable, "-c", code, *command[3:5]], out, environment) as url,
        urllib.request.urlopen(f"{url}/v2/models/m", timeout=20) as answer,
    ):
        assert json.load(answer)["inputs"][0]["shape"] == [-1, 28, 28, 1]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["tuned", "tuned_openvino"])
def test_a_container_serves_from_what_it_installs(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Its ``RUN``, ``COPY``, ``ENV`` and ``CMD`` in an environment of its own, from the package index."""
    artifact: Artifact = request.getfixturevalue(name)
    box, place = tmp_path / "box", tmp_path / "srv"
    write_layout(artifact, "docker", box, name="My_Model")
    dockerfile = (box / "Dockerfile").read_text()
    venv.create(place / "venv", with_pip=False)
    python = str(place / "venv" / "bin" / "python")
    (asked,) = re.findall(r"^RUN pip install --no-cache-dir -r (\S+)$", dockerfile, re.MULTILINE)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-warn-script-location"]
    subprocess.run([*pip, "-r", asked], cwd=box, check=True)
    for source, target in re.findall(r"^COPY (\S+/) (\S+/)$", dockerfile, re.MULTILINE):
        shutil.copytree(box / source, place / target)
    (said,) = re.findall(r"^ENV (.+)$", dockerfile, re.MULTILINE)
    given = dict(word.split("=", 1) for word in said.split())
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= given | {"PYTHONPATH": given["PYTHONPATH"].replace("/srv", str(place))}
    (command,) = re.findall(r"^CMD (\[.+\])$", dockerfile, re.MULTILINE)
    images = np.random.default_rng(3).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    tensor = {"name": "images", "datatype": "UINT8", "shape": [3, 28, 28, 1], "data": images.ravel().tolist()}
    with serving([python, *json.loads(command)[1:]], place, environment) as url:
        body = json.dumps({"inputs": [tensor]}).encode()
        with urllib.request.urlopen(f"{url}/v2/models/My_Model/infer", body, timeout=60) as answer:
            (output,) = json.load(answer)["outputs"]
    assert np.reshape(output["data"], output["shape"]) == pytest.approx(artifact(images), abs=1e-5)
