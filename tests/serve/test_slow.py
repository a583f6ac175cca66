"""Clients that do not take their answer, and those that leave or wait too long while their pictures are decoded; over
both of uvicorn's readers and loops.
"""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convscale.artifact.artifact import Artifact
from convscale.images.decode import decode_image
from convscale.serve import answering as answering_module
from convscale.serve.guard import ClientLeft, Told
from convscale.serve.models import How, Named
from convscale.serve.protocol import Problem
from convscale.serve.server import _connections
from convscale.serve.settings import Limits
from tests.serve.conftest import Running, pixels, running

LARGE = 16_000_000
"""Bytes of an answer: more than two systems' buffers hold."""


def png(artifact: Artifact) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(artifact, 1)[0, :, :, 0]).save(file, "PNG")
    return file.getvalue()


def within(wanted: Any, seconds: float = 20) -> bool:
    """Whether something comes true."""
    end = time.monotonic() + seconds
    while not wanted() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(wanted())


# ---------------------------------------------------------------- answers that nobody takes


def with_large_answer(one: Running) -> None:
    from starlette.responses import Response
    from starlette.routing import Route

    answer = Route("/large", lambda _: Response(bytes(LARGE)))
    one.guard.app.router.routes.insert(0, answer)  # pyright: ignore


def never_reading(one: Running, more: bytes = b"") -> socket.socket:
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    line.connect(one.address)
    line.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n" + more + b"\r\n")
    return line


@pytest.mark.parametrize("more", [b"", b"connection: close\r\n"])
def test_a_client_that_never_reads_is_let_go(artifact: Artifact, parts: str, more: bytes) -> None:
    """It held its connection for ever, and a server that was to end waited for it for more than a minute."""
    with running(Named("m", artifact.folder), limits=Limits(send_s=0.3)) as one:
        with_large_answer(one)
        with never_reading(one, more):
            assert within(one.connections)
            (served,) = one.connections()
            reader = "h11" if parts.startswith("h11") else "httptools"
            assert any(f"{reader}_impl" in each.__module__ for each in type(served).__mro__)
            assert within(lambda: not one.connections())
    with running(Named("m", artifact.folder), limits=Limits(send_s=2.0)) as one:
        with_large_answer(one)
        line = never_reading(one, more)
        assert one.says(
            lambda line: line["event"] == "request"
        )  # the end of the block waits for its answer's time alone
    line.close()


def test_who_takes_its_answers_stays(parts: str) -> None:
    """The clock of an answer that was taken does not run for the next one; that of one that was not ends the line."""
    import uvicorn
    from uvicorn.server import ServerState

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

    class Wire(asyncio.Transport):
        held = said = 0
        ended = False

        def write(self, data: bytes | bytearray | memoryview) -> None:
            self.said += 1

        def get_write_buffer_size(self) -> int:
            return self.held

        def is_closing(self) -> bool:
            return False

        def abort(self) -> None:
            self.ended = True

        def close(self) -> None: ...

        def pause_reading(self) -> None: ...

        def resume_reading(self) -> None: ...

    async def asked() -> None:
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        made = _connections(Limits(send_s=0.2), lambda _: 0)
        line: Any = made(config=config, server_state=ServerState(), app_state={})  # pyright: ignore
        wire = Wire()
        line.connection_made(wire)
        for held in (7, 0, 7):
            before, wire.held = wire.said, 0  # it has taken what came before
            line.data_received(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            wire.held = held
            while wire.said == before or not line.cycle.response_complete:
                await asyncio.sleep(0.002)
            assert (line._taking is not None) == bool(held)
        wire.held = 0
        line.data_received(b"GET / HT")
        wire.held = 9  # of another answer
        await asyncio.sleep(0.5)
        assert not wire.ended
        line.pause_writing()
        first = line._taking
        line.resume_writing()  # it takes what it is given: its time begins anew
        assert first is not None
        assert first.cancelled()
        assert line._taking is not first
        line.pause_writing()
        line.data_received(b"TP/1.1\r\n")  # it asks on, and does not take
        while not wire.ended:
            await asyncio.sleep(0.01)
        line.connection_lost(None)

    asyncio.run(asyncio.wait_for(asked(), 20))


# ---------------------------------------------------------------- while pictures are decoded


class Slow:
    """A decoder that waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may = 0, threading.Event()
        monkeypatch.setattr(answering_module, "decode_image", self)

    def __call__(self, *arguments: Any, **options: Any) -> np.ndarray:
        self.begun += 1
        assert self.may.wait(60)
        return decode_image(*arguments, **options)


def form_of(data: bytes, count: int) -> bytes:
    """A whole request with pictures."""
    part = b'--b\r\ncontent-disposition: form-data; name="x"; filename="x"\r\n\r\n' + data + b"\r\n"
    body = count * part + b"--b--\r\n"
    head = f"POST /v2/models/m/classify HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
    return f"{head}content-type: multipart/form-data; boundary=b\r\n\r\n".encode() + body


def test_pictures_of_a_client_that_leaves_are_not_decoded(
    artifact: Artifact, parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    with running(Named("m", artifact.folder)) as one:
        try:
            with socket.create_connection(one.address) as line:
                line.sendall(form_of(png(artifact), 5))
                assert within(lambda: slow.begun)
            assert one.says(lambda line: line["event"] == "request")[0]["status"] == 499
        finally:
            slow.may.set()
        with socket.create_connection(one.address, timeout=20) as line:
            line.sendall(form_of(png(artifact), 2))
            assert line.recv(12) == b"HTTP/1.1 200"
        assert slow.begun == 3  # the one that was under way, and these two


def test_pictures_that_are_late_are_told(artifact: Artifact, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    with running(Named("m", artifact.folder), limits=Limits(answer_s=0.3)) as one:
        try:
            with socket.create_connection(one.address, timeout=20) as line:
                line.sendall(form_of(png(artifact), 5))
                answer = b""
                while part := line.recv(65_536):
                    answer += part
        finally:
            slow.may.set()
        assert answer.startswith(b"HTTP/1.1 504")
        assert b"there was no answer within 0.3 s" in answer
        assert b"retry-after: 1" in answer


def test_an_answer_has_one_time_from_its_body_on(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decoding took is not given to the network once more, and whoever left is seen in both."""
    settings = answering_module.Settings(models=(Named("m", artifact.folder),), how=How(), log="none", decoders=1)
    answering = answering_module.Answering(settings)
    model = answering.version("m", None)
    given: list[float] = []
    submit = model.batcher.submit

    def noted(images: np.ndarray, timeout_s: float) -> Any:
        given.append(timeout_s)
        return submit(images, timeout_s)

    monkeypatch.setattr(model.batcher, "submit", noted)

    async def asked() -> None:
        now = asyncio.get_running_loop().time()
        one: Any = SimpleNamespace(told=Told(), answer_by=now + 25, receive=lambda: asyncio.sleep(60))
        images = await answering.decode(one, [png(artifact)], model)
        ((answer,), _) = await answering.classify(one, images, model, 1, named=False)
        assert answer["labels"] == list(artifact.classify(png(artifact))[0].labels[:1])
        assert 0 < given[0] <= 25  # not the whole 30
        slow = Slow(monkeypatch)
        late: Any = SimpleNamespace(told=Told(), answer_by=now - 1, receive=lambda: asyncio.sleep(60))
        gone: Any = SimpleNamespace(told=Told(), answer_by=now + 25, receive=lambda: asyncio.sleep(0))
        model.batcher._run = lambda _: slow.may.wait(60)  # pyright: ignore
        for each, error in ((late, Problem), (gone, ClientLeft)):
            with pytest.raises(error):
                await answering.decode(each, [png(artifact)], model)
            with pytest.raises(error):
                await answering.classify(each, images, model, 1, named=False)
        slow.may.set()

    try:
        asyncio.run(asked())
    finally:
        answering.close()
