"""Bytes to arrays and back. What Triton's own client makes and reads is the measure."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from convscale.serve.protocol import (
    HEADER_LENGTH,
    Problem,
    Takes,
    model_metadata,
    read_request,
    top_texts,
    write_answer,
)

TAKES = Takes(
    name="m", version="3", platform="onnx_onnxruntime", image=(2, 3, 1), classes=("cat", "dog", "ö"), most_images=4
)
IMAGES = np.arange(12, dtype=np.uint8).reshape(2, 2, 3, 1)
ROWS = np.array([[0.25, 0.5, 0.25], [0.125, 0.125, 0.75]], np.float32)


def asked_by_triton(**options: Any) -> tuple[bytes, str | None]:
    """A request as tritonclient makes it."""
    tensor = triton.InferInput("images", [2, 2, 3, 1], "UINT8")
    tensor.set_data_from_numpy(IMAGES, binary_data=options.pop("binary", True))
    body, size = triton.InferenceServerClient.generate_request_body([tensor], **options)
    return body, None if size is None else str(size)


@pytest.mark.parametrize("binary", [True, False])
def test_reads_what_tritonclient_writes(binary: bool) -> None:
    asked = read_request(*asked_by_triton(binary=binary, request_id="a7"), TAKES)
    assert np.array_equal(asked.images, IMAGES)
    assert asked.images.dtype == np.uint8
    assert (asked.id, asked.wanted.binary, asked.wanted.classification) == ("a7", True, 0)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("top", [0, 2])
def test_tritonclient_reads_what_is_written(binary: bool, top: int) -> None:
    wanted = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=top)
    asked = read_request(*asked_by_triton(outputs=[wanted], request_id="x"), TAKES)
    body, headers = write_answer(asked, ROWS, TAKES)
    length = headers.get(HEADER_LENGTH)
    result = triton.InferenceServerClient.parse_response_body(body, header_length=length and int(length))
    said = result.get_response()
    assert (said["model_name"], said["model_version"], said["id"]) == ("m", "3", "x")
    found = result.as_numpy("probabilities")
    if top == 0:
        assert np.array_equal(found, ROWS)
        return
    texts = [[each.decode() if isinstance(each, bytes) else each for each in row] for row in found.tolist()]
    assert texts == [["0.500000:1:dog", "0.250000:0:cat"], ["0.750000:2:ö", "0.125000:0:cat"]]


def test_metadata_is_as_the_protocol_says() -> None:
    assert model_metadata(TAKES) == {
        "name": "m",
        "versions": ["3"],
        "platform": "onnx_onnxruntime",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 2, 3, 1]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}],
    }


def request(**changes: Any) -> dict[str, Any]:
    """A right request with its data in JSON, and some of its tensor's keys changed; None takes one away."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [2, 2, 3, 1], "data": IMAGES.ravel().tolist(), **changes}
    return {"inputs": [{key: value for key, value in tensor.items() if value is not None}]}


@pytest.mark.parametrize("data", [IMAGES.ravel().tolist(), IMAGES.tolist()], ids=["flat", "nested"])
def test_numbers_may_be_flat_or_nested(data: list) -> None:
    asked = read_request(json.dumps(request(data=data)).encode(), None, TAKES)
    assert np.array_equal(asked.images, IMAGES)
    assert (asked.id, asked.wanted.binary) == (None, False)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "the request must be an object"),
        ({}, "inputs must be a list of one tensor"),
        ({"inputs": [1, 2]}, "inputs must be a list of one tensor"),
        ({"inputs": ["a"]}, r"inputs\[0\] must be an object"),
        (request(name="x"), "input 'x' is unknown; model 'm' takes 'images'"),
        (request(datatype="FP32"), "datatype of 'images' is 'FP32'; it must be 'UINT8'"),
        (request(datatype=None), "datatype of 'images' is None"),
        (request(shape=[2, 3, 2, 1]), r"shape is \[2, 3, 2, 1\]; it must be \[N, 2, 3, 1\]"),
        (request(shape=[0, 2, 3, 1]), "N at least 1"),
        (request(shape=[True, 2, 3, 1]), "N at least 1"),
        (request(shape=[-1, 2, 3, 1]), "N at least 1"),
        (request(shape="2"), "shape is '2'"),
        (request(data=None), "neither data nor binary_data_size"),
        (request(data=[1, 2]), r"data has 2 numbers of shape \[2\]; shape says"),
        (request(data=[[1, 2], [3]]), "nested unevenly"),
        (request(data=[0.5] * 12), "whole numbers from 0 to 255"),
        (request(data=[256] * 12), "whole numbers from 0 to 255"),
        (request(data=[-1] * 12), "whole numbers from 0 to 255"),
        (request(data=[10**30] * 12), "whole numbers from 0 to 255"),
        (request(data=["a"] * 12), "whole numbers from 0 to 255"),
        (request(data=[None] * 12), "whole numbers from 0 to 255"),
        (request(parameters=[1]), r"inputs\[0\].parameters must be an object"),
        (request(parameters={"shared_memory_region": "r"}), "shared memory is not supported"),
        (request(parameters={"binary_data_size": 12}), "both data and binary_data_size"),
        ({**request(), "id": 5}, "id must be text"),
        ({**request(), "outputs": [{"name": "logits"}]}, "output 'logits' is unknown; model 'm' gives 'probabilities'"),
        ({**request(), "outputs": [{}, {}]}, "outputs must be a list of one tensor"),
        (
            {**request(), "outputs": [{"name": "probabilities", "parameters": {"classification": -1}}]},
            "classification is -1",
        ),
        ({**request(), "parameters": {"binary_data_output": 1}}, "binary_data_output is 1; it must be true or false"),
    ],
)
def test_what_is_wrong_is_told(value: object, said: str) -> None:
    with pytest.raises(Problem, match=said) as caught:
        read_request(json.dumps(value).encode(), None, TAKES)
    assert caught.value.status == 400


def test_too_many_images_are_another_status() -> None:
    with pytest.raises(Problem, match="5 images are asked for at once; at most 4") as caught:
        read_request(json.dumps(request(shape=[5, 2, 3, 1])).encode(), None, TAKES)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "length", "said"),
    [
        (b"", None, "is not JSON"),
        (b"{", None, "is not JSON"),
        (b'{"inputs": [NaN]}', None, "which is no finite number"),
        (b'{"inputs": 1, "inputs": 2}', None, "twice"),
        (b"[" * 200 + b"]" * 200, None, "nested more than"),
        (b"\xff\xfe", None, "no text in UTF-8"),
        (b"{}", "3", "a whole number up to 2"),
        (b"{}", "-1", "a whole number up to 2"),
        (b"{}", "x", "a whole number up to 2"),
        (b"{}", "²", "a whole number up to 2"),
        (b"{}", "9" * 5000, "a whole number up to 2"),
        (b"{}", "0", "is not JSON"),
        (b"{}", "1", "is not JSON"),
    ],
)
def test_malformed_bytes_are_told(body: bytes, length: str | None, said: str) -> None:
    with pytest.raises(Problem, match=said):
        read_request(body, length, TAKES)


@pytest.mark.parametrize(
    ("size", "tail", "said"),
    [
        (12, b"\0" * 11, "11 bytes lie behind the JSON; binary_data_size says 12"),
        (12, b"\0" * 13, "13 bytes lie behind the JSON"),
        (11, b"\0" * 11, r"binary_data_size is 11; shape \[2, 2, 3, 1\] has 12 bytes"),
        (-1, b"", "binary_data_size is -1"),
        (True, b"\0" * 12, "binary_data_size is True"),
        ("12", b"\0" * 12, "binary_data_size is '12'"),
        (None, b"\0" * 12, "no input has a binary_data_size"),
    ],
)
def test_binary_sizes_must_agree(size: object, tail: bytes, said: str) -> None:
    parameters = None if size is None else {"binary_data_size": size}
    head = json.dumps(request(data=[0] * 12 if size is None else None, parameters=parameters)).encode()
    with pytest.raises(Problem, match=said):
        read_request(head + tail, str(len(head)), TAKES)


def test_labels_stand_as_triton_writes_them() -> None:
    assert top_texts(ROWS[:1], TAKES.classes, 1) == ["0.500000:1:dog"]
