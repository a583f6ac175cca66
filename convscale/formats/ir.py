"""OpenVINO's own files: an ``.xml`` with the graph and a ``.bin`` with the weights."""

from __future__ import annotations

import os
from pathlib import Path

from convscale.errors import UserError, first_line
from convscale.files import refusing_full
from convscale.runtimes.base import need_runtime
from convscale.runtimes.silence import quiet


def write_ir(onnx_path: Path, xml_path: Path, *, half: bool = False) -> None:
    """Convert an ONNX file.

    Args:
        half: store the weights in half precision; they are computed with in float32 on a CPU.

    Raises:
        UserError: OpenVINO is not installed or lacks an operator, or the disk is full.
    """
    need_runtime("openvino")
    with quiet():
        import openvino as ov

        try:
            model = ov.Core().read_model(os.fspath(onnx_path))
            with refusing_full(xml_path):
                ov.save_model(model, os.fspath(xml_path), compress_to_fp16=half)
        except RuntimeError as error:
            raise UserError(f"OpenVINO can not take this network: {first_line(error)}") from error
