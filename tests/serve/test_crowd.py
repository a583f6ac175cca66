"""A thousand connections at once, each of which asks for something else and gets its own answer."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import tritonclient.http as triton

from convscale.artifact.artifact import Artifact
from convscale.serve.models import How, Named
from convscale.serve.settings import Limits
from tests.serve.conftest import pixels, running

COUNT = 1_000
PICTURES = 50


@pytest.fixture
def open_files() -> Iterator[None]:
    """Room for both ends of every connection, which are in this process."""
    resource = pytest.importorskip("resource", reason="open files are limited otherwise on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * COUNT + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{hard} files may be open here at most, {wanted} are needed")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def request_of(image: np.ndarray) -> bytes:
    made = triton.InferInput("images", (1, *image.shape), "UINT8")
    made.set_data_from_numpy(image[None])
    body, size = triton.InferenceServerClient.generate_request_body([made])
    head = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
    return f"{head}inference-header-content-length: {size}\r\n\r\n".encode() + body


@pytest.mark.slow
def test_a_thousand_connections_each_get_their_own_answer(artifact: Artifact, open_files: None, parts: str) -> None:
    images = pixels(artifact, PICTURES, seed=5)
    right, requests = artifact(images), [request_of(image) for image in images]
    assert len(np.unique(right, axis=0)) == PICTURES
    limits = Limits(connections=COUNT, header_s=120, body_s=120, answer_s=120, send_s=120)
    with running(Named("m", artifact.folder), how=How(queue_batches=COUNT), limits=limits) as one, ExitStack() as stack:
        lines = [stack.enter_context(socket.create_connection(one.address, timeout=60)) for _ in range(COUNT)]
        end = time.monotonic() + 60
        while len(one.connections()) < COUNT and time.monotonic() < end:  # all stand open before the first one asks
            time.sleep(0.01)
        assert len(one.connections()) == COUNT
        asked = {line: at % PICTURES for at, line in enumerate(lines)}
        for line, at in asked.items():
            line.sendall(requests[at])
        got, waiting = dict.fromkeys(lines, b""), selectors.DefaultSelector()
        for line in lines:
            waiting.register(line, selectors.EVENT_READ)
        end = time.monotonic() + 120
        while waiting.get_map() and time.monotonic() < end:
            for key, _ in waiting.select(1.0):
                part = key.fileobj.recv(65_536)  # pyright: ignore[reportAttributeAccessIssue] - a socket
                got[key.fileobj] += part  # pyright: ignore[reportArgumentType]
                if not part:
                    waiting.unregister(key.fileobj)
        assert {each[:13] for each in got.values()} == {b"HTTP/1.1 200 "}
        answers = np.array([np.frombuffer(each[-right[0].nbytes :], "<f4") for each in got.values()])
        assert np.abs(answers - right[[asked[line] for line in got]]).max() < 1e-6
