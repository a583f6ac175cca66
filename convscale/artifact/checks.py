"""What is looked at before a runtime may open a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from convscale.errors import UserError

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from onnx import ModelProto, TensorProto


def check_onnx(path: Path) -> None:
    """Refuse an ONNX file that is damaged or that reads data from outside its own folder.

    Raises:
        UserError: the file can not be parsed, or names external data that is absolute, leads out of the folder or
            through a link.
    """
    import onnx

    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as error:
        raise UserError(f"{path.name} is no ONNX file ({type(error).__name__}); export it again") from error
    folder = path.parent.resolve()
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        target = folder / location
        if (
            not location
            or Path(location).is_absolute()
            or ".." in Path(location).parts
            or target.is_symlink()
            or folder not in target.resolve().parents
        ):
            raise UserError(f"{path.name} wants data from {location!r}, outside its own folder; refused")


def _tensors(model: ModelProto) -> list[TensorProto]:
    """Every stored tensor of a model: initialisers, constants in attributes, those of subgraphs, functions and training
    graphs.
    """
    import onnx

    tensors: list[TensorProto] = []
    waiting: list[Message] = [model]
    while waiting:
        message = waiting.pop()
        if isinstance(message, onnx.TensorProto):
            tensors.append(message)
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting.extend(value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else [value])
    return tensors
