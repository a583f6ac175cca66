"""What is looked at before a runtime may open a file, without the onnx package: an artefact runs where that is not."""

from __future__ import annotations

import mmap
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TypeAlias

from convscale.errors import UserError

_Kinds: TypeAlias = dict[int, str]
# Of the messages that can hold a tensor, the fields that lead to one, by number (onnx.proto3 of ONNX 1.23, field
# numbers never change); values name the message below.
_BELOW: dict[str, _Kinds] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_GRAPH, _DATA_LOCATION, _KEY, _VALUE = 7, 14, 1, 2
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5

_Field: TypeAlias = tuple[int, int, int, int]
"""Number, wire type, and where its content begins and ends; of a varint its value and 0."""


def check_onnx(path: Path, listed: Container[str] | None = None) -> None:
    """Refuse an ONNX file that is damaged or that reads data from outside its own folder.

    Args:
        path: the file.
        listed: names of the files beside it whose checksums are right; None: any file beside it may be read.

    Raises:
        UserError: the file can not be parsed, or names external data that is absolute, leads out of the folder or
            through a link.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            locations = set(_locations(data))
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path.name} is no ONNX file ({error}); export it again") from error
    folder = path.parent.resolve()
    for location in locations:
        target = folder / location
        if (
            not location.strip("\0")
            or "\0" in location
            or Path(location).is_absolute()
            or ".." in Path(location).parts
            or target.is_symlink()
            or folder not in target.resolve().parents
        ):
            raise UserError(f"{path.name} wants data from {location!r}, outside its own folder; refused")
        if listed is not None and location not in listed:
            raise UserError(f"{path.name} wants data from {location!r}, of which there is no checksum; refused")


def _locations(data: mmap.mmap) -> Iterator[str]:
    """Where the stored tensors of a model lie outside its file: initialisers, constants in attributes, those of
    subgraphs, functions and training graphs. Empty for one that does not say where.
    """
    if not any(number == _GRAPH and wire == _LENGTH for number, wire, _, _ in _fields(data, 0, len(data))):
        raise ValueError("it has no graph")
    waiting = [("model", 0, len(data))]
    while waiting:
        kind, begin, end = waiting.pop()
        below, outside, said = _BELOW[kind], False, 0
        for number, wire, first, last in _fields(data, begin, end):
            if kind == "tensor" and number == _DATA_LOCATION and wire == _VARINT:
                outside |= first != 0
            elif wire != _LENGTH or number not in below:
                continue
            elif kind == "tensor":
                key, value = _entry(data, first, last)
                if key == "location":
                    said += 1
                    yield value
            else:
                waiting.append((below[number], first, last))
        if outside and not said:
            yield ""


def _entry(data: mmap.mmap, begin: int, end: int) -> tuple[str, str]:
    """Key and value of an entry of a mapping; the last of each counts."""
    texts = {_KEY: "", _VALUE: ""}
    for number, wire, first, last in _fields(data, begin, end):
        if wire == _LENGTH and number in texts:
            texts[number] = data[first:last].decode()
    return texts[_KEY], texts[_VALUE]


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[_Field]:
    """The fields of a message in Protocol Buffers' wire format.

    Raises:
        ValueError: it is none, or cut short.
    """
    while at < end:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("it has a field without a number")
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, wire, value, 0
            continue
        if wire == _LENGTH:
            size, at = _varint(data, at)
        elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
            size = 4 if wire == _FOUR_BYTES else 8
        else:
            raise ValueError(f"it has a field of wire type {wire}")
        if at + size > end:
            raise ValueError("it is cut short")
        yield number, wire, at, at + size
        at += size
    if at > end:
        raise ValueError("it is cut short")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A whole number of up to ten bytes, seven bits each, the least first; and where it ends."""
    value = data[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it has a number of more than ten bytes")
