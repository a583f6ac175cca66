"""ONNX files: write one from a captured network."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_map

from convscale.errors import UserError, first_line
from convscale.nn.modes import evaluating
from convscale.runtimes.silence import quiet

OPSET = 20
"""The operator set artefacts are written in; ONNX Runtime reads it from 1.17 on."""


def write_onnx(
    net: nn.Module,
    example: torch.Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    outputs: tuple[str, ...] = ("logits",),
    inputs: tuple[str, ...] = ("images",),
) -> None:
    """Write a network in eval mode as one ONNX file with a dynamic batch, by the exporter that stands on
    ``torch.export``.

    Args:
        net: a module or a graph from :func:`convscale.formats.fold.fold`.
        example: (N, C, H, W), N at least 2; its size is the file's, its batch is not. Or all arguments, tuples of such.
        outputs: a name for each output.
        inputs: a name for each input.

    Raises:
        UserError: an operator has no ONNX form; it is named.
    """
    given, batch = example if isinstance(example, tuple) else (example,), torch.export.Dim("batch", min=1)
    try:
        with evaluating(net), quiet(), torch.no_grad():
            torch.onnx.export(
                net,
                given,
                os.fspath(path),
                dynamo=True,
                dynamic_shapes=tree_map(lambda _: {0: batch}, given),
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{type(net).__name__} can not be written as ONNX: {_reason(error)}") from error
    _strip_traces(path)


def store_half(path: str | os.PathLike[str]) -> None:
    """Store a file's float32 weights in half precision, cast to float32 where they are used: half the bytes, computed
    as before.

    Raises:
        UserError: a weight is too large for half precision.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(os.fspath(path))
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        value = numpy_helper.to_array(tensor)
        if np.abs(value).max(initial=0) > np.finfo(np.float16).max:
            raise UserError(
                f"weight {tensor.name} reaches {np.abs(value).max():.3g}, half precision ends at 65504; export it "
                "without half"
            )
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), name=f"{name}_half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}_half"], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, os.fspath(path))


def _strip_traces(path: str | os.PathLike[str]) -> None:
    """Take out the exporter's notes: they name source files of the machine it ran on."""
    import onnx

    model = onnx.load(os.fspath(path))
    del model.metadata_props[:]
    for message in (
        model.graph,
        *model.graph.node,
        *model.graph.value_info,
        *model.graph.input,
        *model.graph.output,
        *model.graph.initializer,
    ):
        del message.metadata_props[:]
        message.doc_string = ""
    onnx.save(model, os.fspath(path))


def _reason(error: BaseException) -> str:
    """The innermost cause's first line: the exporter wraps what went wrong in several layers of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def compute_half(path: str | os.PathLike[str]) -> None:
    """Turn a float32 file into one that computes in half precision; its input and outputs stay float32.

    ONNX Runtime's own converter does it. On processors without half precision ONNX Runtime casts back, so a speed there
    says nothing.

    Raises:
        UserError: the converter does not know what to do with an operator.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(os.fspath(path))
    try:
        model = convert_float_to_float16(model, keep_io_types=True)
    except Exception as error:
        raise UserError(f"the network can not be written in half precision: {first_line(error)}") from error
    onnx.save(model, os.fspath(path))
