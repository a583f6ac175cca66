"""The look into an ONNX file before it is opened, against files that the onnx package writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

from convscale.artifact.checks import check_onnx
from convscale.errors import UserError


def outside(*locations: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    for location in locations:
        tensor.external_data.add(key="offset", value="0")
        tensor.external_data.add(key="location", value=location)
    return tensor


def graph_of(*nodes: onnx.NodeProto, tensors: tuple[onnx.TensorProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "g", [], [], list(tensors))


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph)


def in_attribute(value: object) -> onnx.ModelProto:
    return model_of(graph_of(helper.make_node("Constant", [], ["x"], value=value)))


def in_training(tensor: onnx.TensorProto) -> onnx.ModelProto:
    model = model_of(graph_of())
    model.training_info.add().algorithm.initializer.append(tensor)
    return model


def in_sparse(tensor: onnx.TensorProto) -> onnx.ModelProto:
    graph = graph_of()
    graph.sparse_initializer.add().values.CopyFrom(tensor)
    return model_of(graph)


def in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Constant", [], ["x"], value=tensor)
    function = helper.make_function("d", "f", [], ["x"], [node], [helper.make_opsetid("", 17)])
    return helper.make_model(graph_of(), functions=[function])


PLACES: dict[str, Callable[[onnx.TensorProto], onnx.ModelProto]] = {
    "initializer": lambda tensor: model_of(graph_of(tensors=(tensor,))),
    "attribute": in_attribute,
    "list of tensors": lambda tensor: in_attribute([tensor, tensor]),
    "subgraph": lambda tensor: in_attribute(graph_of(tensors=(tensor,))),
    "list of graphs": lambda tensor: in_attribute([graph_of(), graph_of(tensors=(tensor,))]),
    "sparse initializer": in_sparse,
    "function": in_function,
    "training": in_training,
}


@pytest.mark.parametrize("place", PLACES)
def test_data_outside_the_folder_is_found_wherever_it_hides(place: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(PLACES[place](outside("weights.bin")).SerializeToString())
    check_onnx(path)  # beside the file it may lie
    for locations in (("../weights.bin",), ("/etc/passwd",), ("weights.bin", "../weights.bin"), ("a\0b",), ()):
        path.write_bytes(PLACES[place](outside(*locations)).SerializeToString())
        with pytest.raises(UserError, match="outside its own folder; refused"):
            check_onnx(path)


def test_data_without_a_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(PLACES["initializer"](outside("weights.bin")).SerializeToString())
    check_onnx(path, {"model.onnx", "weights.bin"})
    with pytest.raises(UserError, match=r"wants data from 'weights\.bin', of which there is no checksum; refused"):
        check_onnx(path, {"model.onnx"})


def test_what_is_said_in_two_parts_is_found(tmp_path: Path) -> None:
    """Protocol Buffers join the parts of a message that is written twice."""
    whole = model_of(graph_of())
    more = onnx.ModelProto()
    more.graph.initializer.append(outside("../weights.bin"))
    path = tmp_path / "model.onnx"
    path.write_bytes(whole.SerializeToString() + more.SerializeToString())
    assert onnx.load(path, load_external_data=False).graph.initializer[0].external_data[1].value == "../weights.bin"
    with pytest.raises(UserError, match="outside its own folder"):
        check_onnx(path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 100, b"hello world", onnx.ModelProto(ir_version=8).SerializeToString()]
)
def test_what_is_no_model_is_told(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.onnx is no ONNX file \(.*\); export it again"):
        check_onnx(path)


def test_any_bytes_give_an_answer_or_a_user_error(tmp_path: Path) -> None:
    path, draw = tmp_path / "model.onnx", random.Random(0)
    good = in_attribute(graph_of(tensors=(outside("weights.bin"),))).SerializeToString()
    refused = 0
    for _ in range(500):
        data = bytearray(good[: draw.randint(1, len(good))])
        for _ in range(draw.randint(0, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            check_onnx(path)
        except UserError:
            refused += 1
    assert 100 < refused < 500
