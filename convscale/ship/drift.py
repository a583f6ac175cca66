"""Where an artefact begins to differ from the network it was made from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import fx, nn

from convscale.artifact.artifact import Artifact
from convscale.runtimes.signals import signal_stack_kept
from convscale.runtimes.silence import quiet
from convscale.ship.layers import shipped_graph

NOTHING = 1e-4
"""A relative difference that float32 rounding alone can reach."""
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2, "int8": 0.2}
"""Relative difference of a layer's output that counts as drift."""


def first_drift(net: nn.Module, artifact: Artifact, images: np.ndarray | None) -> str | None:
    """The first layer, in running order, whose output in the artefact differs from the network's by more than its
    precision explains.

    Exporters keep the names of the captured graph's values, so the same graph is captured again, run operator by
    operator, and compared with the values of the same names inside the artefact.

    Args:
        images: a few images as the artefact takes them; None: there are none to look with.

    Returns:
        The layer's name in the network (``layer1.0.conv2``), or None where it can not be told (the format shows no
        inner values).
    """
    if images is None or artifact.format not in ("onnx", "openvino"):
        return None
    try:
        expected, names = _values(net, artifact, images)
        actual = (
            _onnx_values(artifact, images, list(expected))
            if artifact.format == "onnx"
            else _openvino_values(artifact, images, list(expected))
        )
    except Exception:
        # The gate has decided already; a name is a help, and failing to find one must not hide the reason.
        return None
    errors = {
        name: _relative(actual[name], value)
        for name, value in expected.items()
        if name in actual and actual[name].shape == value.shape
    }
    # A small difference that decides nonetheless (a near tie) starts where half of the final one is reached.
    limit = min(TOLERANCE[artifact.precision], max(0.5 * errors.get("logits", 0.0), NOTHING))
    return next((names[name] for name, error in errors.items() if not error <= limit), None)


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max()) / max(float(np.abs(b).max()), 1e-12)


def _values(net: nn.Module, artifact: Artifact, images: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Outputs of every layer by their names in the file, and the layers' names."""
    graph, layers, batch = shipped_graph(net, artifact.preprocessing, images, baked=artifact.baked)
    by_value = {layer.value: layer for layer in layers}
    values: dict[str, np.ndarray] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if n.name in by_value:
                # A later activation may overwrite it in place.
                values[by_value[n.name].file_value] = result.detach().float().numpy()[: len(images)].copy()
            return result

    with torch.no_grad():
        Recorder(graph).run(batch)
    return values, {layer.file_value: layer.name for layer in layers}


def _onnx_values(artifact: Artifact, images: np.ndarray, wanted: list[str]) -> dict[str, np.ndarray]:
    """Inner values of an ONNX file: a copy of it with more outputs, run without rewrites that would remove them."""
    import onnx
    import onnxruntime as ort

    model = onnx.load(os.fspath(artifact.model_path))
    outputs = {o.name for o in model.graph.output}
    have = {name for node in model.graph.node for name in node.output}
    chosen = [name for name in wanted if name in have]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in chosen if name not in outputs)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inner.onnx"
        onnx.save(model, os.fspath(path))
        session = ort.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    batch = artifact.input_batch(images)
    values = session.run(chosen, {session.get_inputs()[0].name: np.ascontiguousarray(batch)}) if chosen else []
    return {name: np.asarray(value) for name, value in zip(chosen, values, strict=True)}


def _openvino_values(artifact: Artifact, images: np.ndarray, wanted: list[str]) -> dict[str, np.ndarray]:
    """Inner values of an OpenVINO IR: its tensors that carry the exporter's names, put out as well."""
    with quiet():
        import openvino as ov

    core = ov.Core()
    model = core.read_model(os.fspath(artifact.model_path))
    chosen = []
    for op in model.get_ordered_ops():
        for output in op.outputs() if op.get_type_name() != "Result" else ():
            if hit := next((name for name in output.get_names() if name in wanted and name != "logits"), None):
                chosen.append(hit)
                break
    model.add_outputs(chosen)
    batch = artifact.input_batch(images)
    model.reshape(list(batch.shape))  # an open batch size would crash quantised networks, see OpenVinoRunner
    hint = "bf16" if artifact.manifest.computes == "bf16" else "f32"
    with signal_stack_kept():
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    outputs = compiled(np.ascontiguousarray(batch))
    return {name: np.array(outputs[name]) for name in (*chosen, "logits")}
