"""The memory of bodies: packed ones are counted as what they become, before they become it."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convscale.artifact.artifact import Artifact
from convscale.serve.answering import _PIECE, LARGE, _inflated, unpacked
from convscale.serve.models import Named
from convscale.serve.protocol import Problem
from convscale.serve.settings import Limits
from tests.serve.conftest import running
from tests.serve.test_server import ask

PATH = "/v2/models/m/infer"


def test_a_packed_body_takes_the_room_of_what_is_in_it(artifact: Artifact) -> None:
    """Hundreds of kilobytes that become gigabytes together were counted as hundreds of kilobytes."""
    packed = gzip.compress(bytes(3_000_000))
    assert len(packed) < 10_000
    with running(Named("m", artifact.folder), limits=Limits(body=4_000_000, bodies=2_000_000)) as one:
        one.guard.take(1_000, 0)  # somebody else is being answered
        status, headers, value = ask(one, PATH, packed, Content_Encoding="gzip")
        assert (status, headers["retry-after"]) == (503, "1")
        assert value == {"error": "the server is busy with other requests; try again"}
        assert one.guard._bodies == 1_000
        status, _, value = ask(one, PATH, gzip.compress(bytes(500_000)), Content_Encoding="gzip")
        assert (status, "not JSON" in value["error"]) == (400, True)  # it has room
        assert one.guard._bodies == 1_000
        one.guard.give(1_000)
        status, _, value = ask(one, PATH, packed, Content_Encoding="gzip")
        assert (status, "not JSON" in value["error"]) == (400, True)  # a lone one always has
        assert one.guard._bodies == 0


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize("size", [0, 1, _PIECE - 1, _PIECE, _PIECE + 1, 5 * _PIECE])
@pytest.mark.parametrize("packs", [True, False])
def test_pieces_are_the_whole(encoding: str, size: int, packs: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    data = bytes(size) if packs else noise
    body = (gzip.compress if encoding == "gzip" else zlib.compress)(data)
    assert packs or size < LARGE or len(body) > LARGE
    pieces = list(_inflated(body, encoding))
    assert b"".join(pieces) == data
    assert all(len(piece) <= _PIECE for piece in pieces)
    for wrong in (body[:-1], body + b"x", body + bytes(LARGE)):
        with pytest.raises(Problem, match="cut off, or something follows it"):
            list(_inflated(wrong, encoding))


def test_room_is_taken_before_it_is_filled() -> None:
    """While it is unpacked both are there; then what was packed is not."""
    held: list[int] = []
    body = zlib.compress(bytes(2 * _PIECE))
    guard = SimpleNamespace(settings=SimpleNamespace(limits=Limits()))
    one: Any = SimpleNamespace(guard=guard, hold=held.append)
    assert asyncio.run(unpacked(one, {"content-encoding": "deflate"}, body)) == bytes(2 * _PIECE)
    assert held == [len(body) + (pieces + 1) * _PIECE for pieces in range(3)] + [2 * _PIECE]
