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

    python check.py 127.0.0.1:8000

Needs tritonclient[http] and numpy; works with Triton and with OpenVINO Model Server's REST port.
"""

import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton

here = Path(__file__).parent
client = triton.InferenceServerClient(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000")
images = np.load(here / "inputs.npy")
tensor = triton.InferInput(@INPUT@, images.shape, @DATATYPE@)
tensor.set_data_from_numpy(images)
result = client.infer(@NAME@, [tensor])
for name in @OUTPUTS@:
    right = np.load(here / f"{name}.npy")
    worst = np.abs(result.as_numpy(name) - right).max() / max(1.0, np.abs(right).max())
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
    """Preferred, and the largest."""
    threads: int
    """Compute threads in all."""
    streams: int
    """Parts side by side: instances of ONNX Runtime, streams of OpenVINO."""
    computes: str = "fp32"
    """What float is computed in; ``bf16`` OpenVINO alone knows."""
    device: str = "cpu"
    """``cuda`` where the files run on a GPU."""
    """``cpu`` or ``cuda``."""
    tensorrt: str = ""
    """Where TensorRT runs it, in ``FP32``, ``FP16`` or ``INT8``; else empty."""


class Word(str):
    """A word of an enumeration, which stands without quotes."""


_Value: TypeAlias = "str | int | Mapping[str, _Value] | Sequence[_Value]"


def triton_config(name: str, backend: str, source: Port, outputs: Sequence[Port], how: Serving) -> str:
    """``config.pbtxt``: a ``ModelConfig`` in protobuf's text format.

    Args:
        backend: ``onnxruntime`` or ``openvino``.
    """
    parameters: dict[str, object]
    batch_size, on_gpu = how.batch_size, how.device == "cuda"
    if backend == "onnxruntime":
        instances = how.streams
        parameters = {"intra_op_thread_count": max(1, how.threads // how.streams), "inter_op_thread_count": 1}
    else:
        instances = 1
        parameters = {"INFERENCE_NUM_THREADS": how.threads, "NUM_STREAMS": how.streams}
        if how.computes == "bf16":
            parameters["HINT_BF16"] = "YES"
    config: dict[str, _Value] = {
        "name": name,
        "backend": backend,
        "max_batch_size": batch_size,
        "default_model_filename": "model.onnx" if backend == "onnxruntime" else "model.xml",
        "input": [{"name": source.name, "data_type": _kind(source), "dims": list(source.shape)}],
        "output": [
            {
                "name": port.name,
                "data_type": _kind(port),
                "dims": list(port.shape),
                "label_filename": "labels.txt",
            }
            for port in outputs
        ],
        "instance_group": [{"count": instances, "kind": Word("KIND_GPU" if on_gpu else "KIND_CPU")}],
        "dynamic_batching": {"preferred_batch_size": [batch_size], "max_queue_delay_microseconds": DELAY_US},
        "parameters": [{"key": key, "value": {"string_value": str(value)}} for key, value in parameters.items()],
        "version_policy": {"latest": {"num_versions": 1}},
        "model_warmup": [_warmup(source, count) for count in sorted({1, batch_size})],
    }
    if how.tensorrt:
        engine = {"name": "tensorrt", "parameters": [{"key": "precision_mode", "value": how.tensorrt}]}
        config["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": [engine]}}
    return "".join(_lines(config))


def _warmup(source: Port, count: int) -> dict[str, _Value]:
    """A request of so many copies of one reference image."""
    tensor: dict[str, _Value] = {
        "data_type": _kind(source),
        "dims": list(source.shape),
        "input_data_file": "one",
    }
    return {
        "name": f"batch of {count}",
        "batch_size": count,
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
    hint = "bf16" if how.computes == "bf16" else "f32"
    plugin = {"INFERENCE_NUM_THREADS": how.threads, "NUM_STREAMS": str(how.streams), "INFERENCE_PRECISION_HINT": hint}
    model = {
        "name": name,
        "base_path": f"/models/{name}",
        "target_device": "CPU",
        "nireq": 2 * how.streams,
        "plugin_config": plugin,
        "model_version_policy": {"latest": {"num_versions": 1}},
    }
    return {"model_config_list": [{"config": model}]}


def kserve_text(name: str, server: str, how: Serving) -> str:
    """An InferenceService, as text; where the files lie and what the image is called, only the user knows.

    Args:
        server: ``triton``, ``ovms`` or ``docker``.
    """
    threads, gpu = how.threads, ', nvidia.com/gpu: "1"' if how.device == "cuda" else ""
    # A label of DNS (RFC 1123): what Kubernetes takes for a name.
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:63].strip("-") or "model"
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
    runtime, model = ("kserve-tritonserver", "triton") if server == "triton" else ("kserve-openvino", "openvino_ir")
    return (
        head
        + f"""    model:
      modelFormat:
        name: {model}
      protocolVersion: v2
      runtime: {runtime}
      storageUri: pvc://models/{name}  # where this folder was copied to: CHANGE
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
