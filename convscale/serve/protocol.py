"""The Open Inference Protocol, version 2 (REST), with Triton's extensions for binary tensors and classification: bytes
to arrays and back. Nothing here knows a web framework.

Sources: the protocol's ``inference_rest.md``; Triton's ``extension_binary_data.md``, ``extension_classification.md``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convscale.errors import UserError, short
from convscale.read import Limits, json_of

INPUT, OUTPUT = "images", "probabilities"
"""Names of the one input and the one output of every model."""
HEADER_LENGTH = "inference-header-content-length"
EXTENSIONS = ("binary_tensor_data", "classification", "model_repository")
_HEADER = Limits(size=2**20, depth=16, nodes=20_000)
"""Of the JSON before binary tensors."""
_MOST_ID = 256


class Problem(UserError):
    """What a client is told: a status of HTTP and one line."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True, kw_only=True)
class Takes:
    """What a model takes and gives."""

    name: str
    """The model's."""
    version: str
    """A whole number, as text."""
    platform: str
    """The format and the runtime."""
    image: tuple[int, int, int]
    """Height, width, channels of its input."""
    classes: tuple[str, ...]
    """Names of its outputs."""
    most_images: int
    """Of one request."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An output that a client asks for."""

    binary: bool = False
    """Behind the JSON, not in it."""
    classification: int = 0
    """The likeliest so many classes as text instead of all probabilities; 0: these."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """A request for inference, read and checked."""

    images: np.ndarray
    """uint8 (N, H, W, C)."""
    wanted: Wanted
    """What is to be said of them."""
    id: str | None = None
    """The client's own, given back."""


def server_metadata(version: str) -> dict[str, object]:
    """The answer to ``GET v2``."""
    return {"name": "convscale", "version": version, "extensions": list(EXTENSIONS)}


def model_metadata(takes: Takes) -> dict[str, object]:
    """The answer to ``GET v2/models/NAME``; -1 is any number of images."""
    return {
        "name": takes.name,
        "versions": [takes.version],
        "platform": takes.platform,
        "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, *takes.image]}],
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, len(takes.classes)]}],
    }


# ---------------------------------------------------------------- requests


def read_request(body: bytes, header_length: str | None, takes: Takes) -> Asked:
    """A request for inference.

    Args:
        body: JSON, or JSON and behind it the tensors.
        header_length: the value of ``Inference-Header-Content-Length``: bytes of the JSON; None: all of it is.
        takes: what the model takes.

    Raises:
        Problem: it is none, or not one for this model; what is wrong, and what would be right.
    """
    binary = memoryview(b"")
    try:
        if header_length is None:
            said = json_of(body, "the request")
        else:
            length = _header_length(header_length, len(body))
            binary = memoryview(body)[length:]
            said = json_of(body[:length], "the request's JSON", _HEADER)
    except Problem:
        raise
    except UserError as error:
        raise Problem(400, str(error)) from error
    said = _object(said, "the request")
    inputs = said.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1:
        raise Problem(400, f"inputs must be a list of one tensor, {INPUT!r}")
    images = _tensor(_object(inputs[0], "inputs[0]"), binary, takes)
    return Asked(images=images, wanted=_wanted(said, takes), id=_id(said))


def _header_length(text: str, size: int) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 12 or int(text) > size:
        raise Problem(
            400, f"Inference-Header-Content-Length is {short(text, 40)}; it must be a whole number up to {size}"
        )
    return int(text)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Problem(400, f"{where} must be an object")
    return value


def _parameters(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    return _object(value.get("parameters") or {}, f"{where}.parameters")


def _id(said: Mapping[str, Any]) -> str | None:
    found = said.get("id")
    if found is not None and (not isinstance(found, str) or len(found) > _MOST_ID):
        raise Problem(400, f"id must be text of at most {_MOST_ID} characters")
    return found


def _tensor(value: Mapping[str, Any], binary: memoryview, takes: Takes) -> np.ndarray:
    """The images, without a copy where they came as bytes."""
    name, datatype = value.get("name"), value.get("datatype")
    if name != INPUT:
        raise Problem(400, f"input {short(name, 80)} is unknown; model {takes.name!r} takes {INPUT!r}")
    if datatype != "UINT8":
        raise Problem(400, f"datatype of {INPUT!r} is {short(datatype, 40)}; it must be 'UINT8'")
    shape = _shape(value.get("shape"), takes)
    count = math.prod(shape)
    parameters = _parameters(value, "inputs[0]")
    if any(key.startswith("shared_memory") for key in parameters):
        raise Problem(400, "shared memory is not supported; send the tensor")
    if "binary_data_size" not in parameters:
        if len(binary):
            raise Problem(400, f"{len(binary)} bytes lie behind the JSON; no input has a binary_data_size")
        return _listed(value.get("data"), shape)
    size = parameters["binary_data_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size != count:
        raise Problem(400, f"binary_data_size is {short(size, 40)}; shape {list(shape)} has {count} bytes")
    if "data" in value:
        raise Problem(400, "an input has both data and binary_data_size; give one")
    if len(binary) != count:
        raise Problem(400, f"{len(binary)} bytes lie behind the JSON; binary_data_size says {count}")
    return np.frombuffer(binary, np.uint8).reshape(shape)


def _shape(value: object, takes: Takes) -> tuple[int, ...]:
    right = f"[N, {', '.join(map(str, takes.image))}]"
    if not isinstance(value, list) or not all(type(side) is int and 0 < side < 2**31 for side in value):
        raise Problem(400, f"shape is {short(value, 80)}; it must be {right}, N at least 1")
    if tuple(value[1:]) != takes.image:
        raise Problem(400, f"shape is {short(value, 80)}; it must be {right}")
    if value[0] > takes.most_images:
        raise Problem(413, f"{value[0]} images are asked for at once; at most {takes.most_images} are taken")
    return tuple(value)


def _listed(data: object, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of JSON, flat or nested."""
    if not isinstance(data, list):
        raise Problem(400, "an input has neither data nor binary_data_size; data must be a list of numbers")
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError):
        raise Problem(400, "data is nested unevenly; it must be flat, or nested as shape says") from None
    if array.dtype.kind not in "iu":
        raise Problem(400, "data must be whole numbers from 0 to 255")
    if array.size != math.prod(shape) or (array.ndim > 1 and array.shape != shape):
        raise Problem(400, f"data has {array.size} numbers of shape {list(array.shape)}; shape says {list(shape)}")
    if array.min() < 0 or array.max() > 255:
        raise Problem(400, "data must be whole numbers from 0 to 255")
    return array.astype(np.uint8).reshape(shape)


def _wanted(said: Mapping[str, Any], takes: Takes) -> Wanted:
    """How the answer is to come."""
    binary = _flag(_parameters(said, "the request"), "binary_data_output")
    outputs = said.get("outputs")
    if outputs is None or outputs == []:
        return Wanted(binary=binary)
    if not isinstance(outputs, list) or len(outputs) != 1:
        raise Problem(400, f"outputs must be a list of one tensor, {OUTPUT!r}")
    only = _object(outputs[0], "outputs[0]")
    if only.get("name") != OUTPUT:
        raise Problem(400, f"output {short(only.get('name'), 80)} is unknown; model {takes.name!r} gives {OUTPUT!r}")
    parameters = _parameters(only, "outputs[0]")
    if any(key.startswith("shared_memory") for key in parameters):
        raise Problem(400, "shared memory is not supported; take the tensor")
    top = parameters.get("classification", 0)
    if isinstance(top, bool) or not isinstance(top, int) or not 0 <= top < 2**31:
        raise Problem(400, f"classification is {short(top, 40)}; it must be a whole number of classes")
    binary = _flag(parameters, "binary_data") if "binary_data" in parameters else binary
    return Wanted(binary=binary, classification=min(top, len(takes.classes)))


def _flag(parameters: Mapping[str, Any], name: str) -> bool:
    found = parameters.get(name, False)
    if not isinstance(found, bool):
        raise Problem(400, f"{name} is {short(found, 40)}; it must be true or false")
    return found


# ---------------------------------------------------------------- answers


def write_answer(asked: Asked, probabilities: np.ndarray, takes: Takes) -> tuple[bytes, dict[str, str]]:
    """The body and the headers of an answer.

    Args:
        probabilities: float32 (N, classes), finite.
    """
    wanted = asked.wanted
    output: dict[str, Any] = {"name": OUTPUT}
    if wanted.classification:
        texts = top_texts(probabilities, takes.classes, wanted.classification)
        output |= {"datatype": "BYTES", "shape": [len(probabilities), wanted.classification]}
        data, listed = _packed(texts), texts
    else:
        output |= {"datatype": "FP32", "shape": list(probabilities.shape)}
        data = np.ascontiguousarray(probabilities, "<f4").tobytes() if wanted.binary else b""
        listed = [] if wanted.binary else probabilities.ravel().tolist()
    if wanted.binary:
        output["parameters"] = {"binary_data_size": len(data)}
    else:
        output["data"] = listed
    answer: dict[str, Any] = {"model_name": takes.name, "model_version": takes.version}
    if asked.id:
        answer["id"] = asked.id
    text = json.dumps({**answer, "outputs": [output]}, separators=(",", ":"), allow_nan=False).encode()
    if not wanted.binary:
        return text, {"content-type": "application/json"}
    return text + data, {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(text))}


def top_texts(probabilities: np.ndarray, classes: Sequence[str], top: int) -> list[str]:
    """``value:index:label`` of the likeliest classes of each image, image after image."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    return [f"{row[i]:f}:{i}:{classes[i]}" for row, chosen in zip(probabilities, best, strict=True) for i in chosen]


def _packed(texts: Sequence[str]) -> bytes:
    """Texts as Triton's BYTES: each behind its length, four bytes, the least first."""
    encoded = [text.encode("utf-8", "replace") for text in texts]
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)
