"""Whatever the bytes are, every reader gives a result or one line that says why not: with files of the corpus, parts of
them changed, and anything else.

`tools/fuzz.py` runs the same readers under atheris, for as long as one likes.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.fuzz import READERS, Reader, outcome

EXAMPLES = 40
"""Of each reader; always the same ones."""
KINDS = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=12)
"""Of values in JSON."""
VALUES = st.recursive(
    KINDS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@st.composite
def _damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with a few of them changed, left out or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("put", "drop", "cut", "swap")))
        if kind == "put":
            data[at:at] = draw(st.binary(max_size=6))
        elif kind == "drop":
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == "cut":
            del data[at:]
        elif at < len(data):
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


@st.composite
def _forged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A JSON text in which one part is another value."""
    value: Any = json.loads(whole)
    parent: Any = None
    key: Any = None
    inner = value
    while isinstance(inner, dict | list) and inner and (parent is None or draw(st.booleans())):
        parent, key = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        inner = parent[key]
    new = draw(VALUES)
    if parent is None:
        value = new
    elif isinstance(parent, dict) and draw(st.booleans()):
        del parent[key]
        parent[draw(st.sampled_from((key, f"{key}x")))] = new
    else:
        parent[key] = new
    return json.dumps(value).encode()


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _inputs(reader: Reader) -> st.SearchStrategy[bytes]:
    seeds = [path.read_bytes() for path in reader.seeds]
    ways = [st.binary(max_size=200), st.sampled_from(seeds).flatmap(_damaged)]
    if texts := [seed for seed in seeds if reader.text and _is_json(seed) and json.loads(seed)]:
        ways += [st.sampled_from(texts).flatmap(_forged), VALUES.map(lambda value: json.dumps(value).encode())]
    return st.one_of(*reversed(ways))


def _told(reader: Reader, data: bytes) -> str:
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a decoder may warn of what it then reads
        return outcome(reader, data, Path(place))


@pytest.fixture(params=READERS, ids=lambda reader: reader.name)
def reader(request: pytest.FixtureRequest) -> Reader:
    return request.param


def test_each_file_of_the_corpus_ends_well(reader: Reader) -> None:
    told = {path.name: _told(reader, path.read_bytes()) for path in reader.seeds}
    assert told
    # What is right is read: a reader that refuses everything would pass all else here.
    assert told.get("right", "") == ""


def test_any_bytes_give_a_result_or_one_line(reader: Reader) -> None:
    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(_inputs(reader))
    def holds(data: bytes) -> None:
        _told(reader, data)

    holds()


def test_another_exception_is_no_refusal() -> None:
    def fails(data: bytes, _place: Path) -> object:
        raise KeyError(data)

    with pytest.raises(KeyError):
        _told(Reader(name="x", read=fails), b"x")


def test_a_refusal_of_two_lines_fails() -> None:
    from convscale.errors import UserError

    def says(data: bytes, _place: Path) -> object:
        raise UserError(data.decode())

    assert _told(Reader(name="x", read=says), b"one") == "one"
    for data in (b"one\ntwo", b""):
        with pytest.raises(AssertionError, match="not one line"):
            _told(Reader(name="x", read=says), data)
