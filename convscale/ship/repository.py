"""The texts of model repositories: what Triton, OpenVINO Model Server and KServe read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from convscale.artifact.reference import TOLERANCE

DELAY_US = 5_000
"""How long Triton lets less than a batch wait."""
LEAST_TOLERANCE = 0.01
"""Relative difference of an output that the script of a repository allows in any precision: logits are no
probabilities."""
_TEMPLATE = '''"""Ask a server for the reference images, and compare with the answers that lie here.

    python check.py 127.0.0.1:8000 [NAME]

NAME is what the server calls the model: @NAME@ where none is given; under KServe see kserve.yaml. Needs
tritonclient[http] and numpy; works with Triton and with OpenVINO Model Server's REST port.
"""

import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton

here = Path(__file__).parent
client = triton.InferenceServerClient(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000")
model = sys.argv[2] if len(sys.argv) > 2 else @NAME@
images = np.load(here / "inputs.npy")
results = []
for i in range(len(images)):  # one by one: a server may take fewer in a request than lie here
    tensor = triton.InferInput(@INPUT@, [1, *images.shape[1:]], @DATATYPE@)
    tensor.set_data_from_numpy(images[i : i + 1])
    results.append(client.infer(model, [tensor]))
for name in @OUTPUTS@:
    found, right = np.concatenate([each.as_numpy(name) for each in results]), np.load(here / f"{name}.npy")
    worst = np.abs(found - right).max() / max(1.0, np.abs(right).max())
    print(f"{name}: relative difference {worst:.1e}")
    if not worst <= @TOLERANCE@:
        sys.exit(f"{name} differs from the reference")
'''


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or an output of a model file."""

    name: str
    """As it stands in the file."""
    datatype: str
    """``FP32``, ``FP16`` or ``UINT8``."""
    shape: tuple[int, ...]
    """Without the number of images."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a server is to run a model, as ``tune`` found it."""

    batch_size: int
    """Of all parts together, and the largest."""
    threads: int
    """Compute threads in all."""
    streams: int
    """Parts side by side: instances of ONNX Runtime, streams of OpenVINO."""
    computes: str = "fp32"
    """What float is computed in; ``bf16`` OpenVINO alone knows."""
    device: str = "cpu"
    """``cpu``, or ``cuda`` where the files run on a GPU."""
    tensorrt: str = ""
    """Where TensorRT runs it, in ``FP32``, ``FP16`` or ``INT8``; else empty."""

    @property
    def images_each(self) -> int:
        """Images of a batch that one part takes: a server gives each part batches of its own."""
        return max(1, self.batch_size // self.streams)


class Word(str):
    """A word of an enumeration, which stands without quotes."""


_Value: TypeAlias = "str | int | Mapping[str, _Value] | Sequence[_Value]"


def triton_config(name: str, backend: str, source: Port, outputs: Sequence[Port], how: Serving) -> str:
    """``config.pbtxt``: a ``ModelConfig`` in protobuf's text format.

    Args:
        backend: ``onnxruntime``, or ``openvino``, which joins no requests: where ``max_batch_size`` is not 0, that
            backend refuses a batch of any other size (or computes the rest of it for nothing).
    """
    parameters: dict[str, object]
    joins, on_gpu = backend == "onnxruntime", how.device == "cuda"
    free = [] if joins else [-1]  # the number of images, which Triton puts before what it batches
    if joins:
        parameters = {"intra_op_thread_count": max(1, how.threads // how.streams), "inter_op_thread_count": 1}
    else:
        parameters = {"INFERENCE_NUM_THREADS": how.threads, "NUM_STREAMS": how.streams}
        if how.computes == "bf16":
            parameters["HINT_BF16"] = "YES"
    config: dict[str, _Value] = {
        "name": name,
        "backend": backend,
        "max_batch_size": how.batch_size if joins else 0,
        "default_model_filename": "model.onnx" if joins else "model.xml",
        "input": [{"name": source.name, "data_type": _kind(source), "dims": [*free, *source.shape]}],
        "output": [
            {
                "name": port.name,
                "data_type": _kind(port),
                "dims": [*free, *port.shape],
                "label_filename": "labels.txt",
            }
            for port in outputs
        ],
        # An instance has one request at a time on its way, in OpenVINO too: fewer than streams, and threads stand idle.
        "instance_group": [{"count": how.streams, "kind": Word("KIND_GPU" if on_gpu else "KIND_CPU")}],
        "parameters": [{"key": key, "value": {"string_value": str(value)}} for key, value in parameters.items()],
        "version_policy": {"latest": {"num_versions": 1}},
    }
    sizes = {1, how.images_each}
    if joins:
        config["dynamic_batching"] = {
            "preferred_batch_size": [how.images_each],
            "max_queue_delay_microseconds": DELAY_US,
        }
        sizes.add(how.batch_size)
    config["model_warmup"] = [_warmup(source, count, joins=joins) for count in sorted(sizes)]
    if how.tensorrt:
        engine = {"name": "tensorrt", "parameters": [{"key": "precision_mode", "value": how.tensorrt}]}
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [engine]}}
    return "".join(_lines(config))


def _warmup(source: Port, count: int, *, joins: bool) -> dict[str, _Value]:
    """So many images at once: where requests are joined, so many requests of one image, else one request of all."""
    tensor: dict[str, _Value] = {"data_type": _kind(source), "dims": [*([] if joins else [count]), *source.shape]}
    if joins or count == 1:
        tensor["input_data_file"] = "one"
    else:
        tensor["zero_data"] = Word("true")
    return {
        "name": f"batch of {count}",
        "batch_size": count if joins else 1,
        "inputs": [{"key": source.name, "value": tensor}],
    }


def _kind(port: Port) -> Word:
    return Word(f"TYPE_{port.datatype}")


def _lines(values: Mapping[str, _Value], indent: str = "") -> list[str]:
    """Fields of a message in text format; a list is a field that is said several times."""
    lines: list[str] = []
    for key, value in values.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, Mapping):
                lines += [f"{indent}{key} {{\n", *_lines(each, f"{indent}  "), f"{indent}}}\n"]
            elif isinstance(each, str) and not isinstance(each, Word):
                lines.append(f"{indent}{key}: {json.dumps(each)}\n")
            else:
                lines.append(f"{indent}{key}: {each}\n")
    return lines


def ovms_config(name: str, how: Serving) -> dict[str, object]:
    """``config.json`` of a repository that is mounted at ``/models``; ``computes`` is said where it is ``fp32``, too:
    OpenVINO's own default is bfloat16 where that is native.
    """
    model = {
        "name": name,
        "base_path": f"/models/{name}",
        "target_device": "CPU",
        "nireq": _requests(how),
        "plugin_config": _plugin(how),
        "model_version_policy": {"latest": {"num_versions": 1}},
    }
    return {"model_config_list": [{"config": model}]}


def _plugin(how: Serving) -> dict[str, object]:
    """``plugin_config`` of OpenVINO Model Server."""
    hint = "bf16" if how.computes == "bf16" else "f32"
    return {"INFERENCE_NUM_THREADS": how.threads, "NUM_STREAMS": str(how.streams), "INFERENCE_PRECISION_HINT": hint}


def _requests(how: Serving) -> int:
    """``nireq`` of OpenVINO Model Server: one waits while one runs."""
    return 2 * how.streams


def label_of(name: str) -> str:
    """A model's name as KServe wants one, a label of DNS that begins with a letter; Docker takes it for an image."""
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    label = label if label[:1].isalpha() else f"model-{label}"
    return label[:63].strip("-")


def kserve_text(name: str, server: str, how: Serving, format: str) -> str:
    """An InferenceService, as text; where the files lie and what the image is called, only the user knows.

    Args:
        server: ``triton``, ``ovms`` or ``docker``.
        format: the model file's: ``onnx`` or ``openvino``.
    """
    threads, gpu = how.threads, ', nvidia.com/gpu: "1"' if how.device == "cuda" else ""
    label = label_of(name)
    head = f"""# Change the line that says CHANGE, then: kubectl apply -f kserve.yaml
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {label}
spec:
  predictor:
"""
    resources = f"""      resources:
        requests: {{cpu: "{threads}", memory: 1Gi}}
        limits: {{cpu: "{threads}", memory: 2Gi{gpu}}}
"""
    if server == "docker":
        return (
            head
            + f"""    containers:
    - name: kserve-container
      image: {label}:latest  # the image that was built of this folder: CHANGE
      env:
      - name: CONVSCALE_TOKEN
        valueFrom: {{secretKeyRef: {{name: {label}-token, key: token, optional: true}}}}
      ports:
      - containerPort: 8000
        protocol: TCP
      readinessProbe:
        httpGet: {{path: /v2/health/ready, port: 8000}}
      livenessProbe:
        httpGet: {{path: /v2/health/live, port: 8000}}
{resources}"""
        )
    if server == "triton":
        return (
            head
            + f"""    model:  # it answers to the name {name}, as its folder is called
      modelFormat:
        name: triton
      protocolVersion: v2
      runtime: kserve-tritonserver
      storageUri: pvc://models/repository  # where this folder, with {name}/ in it, was copied to: CHANGE
{resources}"""
        )
    # That runtime serves one model, by the service's name, and reads no config.json: what stands there is said again.
    return (
        head
        + f"""    model:  # it answers to the name {label}: python {name}/reference/check.py HOST:PORT {label}
      modelFormat:
        name: {format}
      protocolVersion: v2
      runtime: kserve-openvino
      storageUri: pvc://models/{name}  # where the folder {name}/ of this one, with 1/ in it, was copied to: CHANGE
      args:
      - --nireq={_requests(how)}
      - '--plugin_config={json.dumps(_plugin(how))}'
{resources}"""
    )


def check_script(name: str, source: Port, outputs: Sequence[Port], precision: str) -> str:
    """A script that asks a server for the reference images, and allows what an artefact of that precision may differ by
    on another processor.
    """
    values = {
        "TOLERANCE": max(LEAST_TOLERANCE, TOLERANCE.get(precision, max(TOLERANCE.values()))),
        "NAME": name,
        "INPUT": source.name,
        "DATATYPE": source.datatype,
        "OUTPUTS": [port.name for port in outputs],
    }
    text = _TEMPLATE
    for key, value in values.items():
        text = text.replace(f"@{key}@", json.dumps(value))
    return text
