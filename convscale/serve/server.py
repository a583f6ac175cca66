"""The server around the application: its socket, its connections, its processes, and how it stops.

Told to stop (SIGTERM, Ctrl-C) it says so to whoever asks for its health, ends each connection with its next answer, and
after a moment takes no new ones. What was accepted is answered.
"""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from convscale.errors import UserError
from convscale.machine import available_cores
from convscale.serve.answering import Answering
from convscale.serve.app import build
from convscale.serve.guard import THROWN, Guard, Log, inference_of
from convscale.serve.metrics import SHARED
from convscale.serve.settings import Limits, Settings

if TYPE_CHECKING:
    import uvicorn

SWITCH_S = 0.0005
"""How soon a thread of Python gives way: a batch that is done waits for that long behind the event loop at most."""
_START_S = 600.0
"""Until a worker has opened its models."""
_SOON_S = 10.0
"""A worker that ends so soon after it began is not started again at once, but after as long a pause."""
_SAME_STOP_S = 1.0
"""Signals that come together are one stop: a terminal or systemd tells each worker, and so does their parent."""
_LINGER_S = 0.5
"""Until a connection that was refused is closed."""
_FULL = b'{"error": "too many connections are open; try again"}'
_NO_ROOM = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)

Started = Callable[[list[dict[str, object]]], object]
"""Called once all models answer, with a few facts of each."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody else listens at.

    Raises:
        UserError: the port is in use or not allowed, or the host is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"host {host!r} is unknown ({error}); 127.0.0.1 is this machine alone") from error
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(2_048)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; end what uses it, or give another --port") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UserError(f"port {port} of {host} is not allowed; give a --port above 1023") from error
        raise UserError(f"host {host} can not be listened at: {error.strerror}; 127.0.0.1 always can") from error
    sock.set_inheritable(True)
    return sock


def serve(settings: Settings, sock: socket.socket, *, workers: int = 1, started: Started) -> None:
    """Serve until told to stop.

    Args:
        workers: processes, each with its own models; the cores are shared out among them.
        started: called once all models answer.

    Raises:
        UserError: a model can not be served.
    """
    if workers == 1:
        _serve_here(settings, sock, started)
        return
    share = max(1, available_cores() // workers)
    how = settings.how if settings.how.threads else replace(settings.how, threads=share)
    with tempfile.TemporaryDirectory(prefix="convscale-metrics-") as folder:
        os.environ[SHARED] = folder
        try:
            _Workers(replace(settings, how=how, decoders=share), sock, workers, Path(folder)).run(started)
        finally:
            del os.environ[SHARED]


def _serve_here(settings: Settings, sock: socket.socket, started: Started) -> None:
    sys.setswitchinterval(SWITCH_S)
    answering = Answering(settings)
    server_of(build(answering), settings, lambda: started(facts_of(answering))).run(sockets=[sock])


def facts_of(answering: Answering) -> list[dict[str, object]]:
    """Of each model."""
    return [
        {
            "model": model.name,
            "version": model.current.takes.version,
            "runtime": model.current.artifact.runtime,
            "batch_size": model.current.batcher.batch_size,
            "checked": model.current.checked,
        }
        for model in answering.models.all.values()
    ]


# ---------------------------------------------------------------- one process


def server_of(guard: Guard, settings: Settings, started: Callable[[], object]) -> uvicorn.Server:
    """uvicorn, with connections that can not be held open, and an end that leaves no request unanswered."""
    import uvicorn

    limits = settings.limits
    config = uvicorn.Config(
        guard,  # pyright: ignore[reportArgumentType] - plain ASGI
        http=_connections(limits, guard.behind.places if guard.behind else lambda _: 0),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(5, round(limits.header_s)),
        timeout_graceful_shutdown=round(limits.body_s + limits.answer_s + limits.send_s) + 1,
    )

    class Draining(uvicorn.Server):
        """Goes on for a moment when it is told to stop."""

        stop_at = float("inf")
        _told_at = 0.0

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Listen, and say so."""
            await super().startup(sockets)
            started()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """The first time drain; told once more later on, end at once."""
            now = time.monotonic()
            if not guard.draining:
                guard.draining, self._told_at, self.stop_at = True, now, now + settings.drain_s
            elif now - self._told_at > _SAME_STOP_S:
                self.should_exit = self.force_exit = True

        async def on_tick(self, counter: int) -> bool:
            """Whether to end."""
            self.should_exit = self.should_exit or time.monotonic() >= self.stop_at
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """End, once all that stood before the door was let in and has said what it wants."""
            doors = [sock.dup() for sock in sockets or ()]
            for server in self.servers:
                server.close()
            for sock in sockets or ():
                sock.close()
            for late in [each for door in doors for each in _let_in(door)]:
                await asyncio.get_running_loop().connect_accepted_socket(self._connection, late)
            end = time.monotonic() + _LINGER_S
            while any(each.cycle is None for each in self.server_state.connections) and time.monotonic() < end:  # pyright: ignore
                await asyncio.sleep(0.01)
            await super().shutdown([])

        def _connection(self) -> asyncio.Protocol:
            made = cast("Callable[..., asyncio.Protocol]", config.http_protocol_class)
            return made(config=config, server_state=self.server_state, app_state=self.lifespan.state)

    return Draining(config)


def _let_in(door: socket.socket) -> list[socket.socket]:
    """All who wait at a listening socket, which is closed at once behind the last."""
    found: list[socket.socket] = []
    door.setblocking(False)
    with door, suppress(OSError):
        while True:
            found.append(door.accept()[0])
    for each in found:
        each.setblocking(False)
    return found


def _connections(limits: Limits, places: Callable[[str], int]) -> type[asyncio.Protocol]:
    """uvicorn's protocol, with httptools where that is installed, and its connections bounded in number and in time."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Base

    class Bounded(Base):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        """Closes a connection that does not say what it wants, or does not take what it asked for."""

        _asking: asyncio.TimerHandle | None = None
        _taking: asyncio.TimerHandle | None = None
        _refused = False
        come = 0
        """Bytes that came on any connection since those that nobody has read were counted."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
            """Let it in, if there is room."""
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refused = True
                if len(self.connections) > 2 * limits.connections:
                    transport.abort()
                    return
                transport.write(_NO_ROOM)
                # Closed at once, what the client sends would make its system throw the answer away.
                self.loop.call_later(_LINGER_S, transport.close)
                return
            self._await_request()

        def data_received(self, data: bytes) -> None:
            """The clock runs while a request's head comes, not while it is answered."""
            if self._refused or self.transport.is_closing():
                return
            if self._taking is not None and not self.transport.get_write_buffer_size():
                self._taken()
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._answered()
                Bounded.come += len(data)
                if Bounded.come > limits.unread:
                    self._make_room()
            elif self._asking is None:
                self._await_request()

        def connection_lost(self, exc: Exception | None) -> None:
            """The end."""
            self._answered()
            self._taken()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            """An answer is written: from now on its client has so long to take it."""
            super().on_response_complete()
            self._taken()
            self._await_taking()

        def resume_writing(self) -> None:
            """Its client takes what it is given: what is left has its time anew."""
            super().resume_writing()
            self._taken()
            self._await_taking()

        def pause_writing(self) -> None:
            """More is written than the client takes."""
            super().pause_writing()
            self._await_taking()

        def _await_taking(self) -> None:
            if self._taking is None and self.transport.get_write_buffer_size():
                self._taking = self.loop.call_later(limits.send_s, self._not_taken)

        def _taken(self) -> None:
            if self._taking is not None:
                self._taking.cancel()
                self._taking = None

        def _not_taken(self) -> None:
            self._taking = None
            if self.transport.get_write_buffer_size():
                self.transport.abort()  # closed, it would wait for its client without end

        def _make_room(self) -> None:
            """Throw the body away that has just come, where with those of others it is too much to be held.

            A system hands over a body's first 256 kB at once: before any request is looked at, a crowd's would be here.
            """
            cycle = self.cycle
            crowd = [each.cycle for each in self.connections if each.cycle and each.cycle.body]  # pyright: ignore
            held = sum(len(each.body) for each in crowd)
            lone = len(crowd) == 1  # it always has room
            if held > limits.unread and cycle.body and not lone and not self._has_place(crowd):
                cycle.scope["state"][THROWN] = True
                held -= len(cycle.body)
                cycle.body = bytearray()
            Bounded.come = held

        def _has_place(self, crowd: list[Any]) -> bool:
            """Whether the queue that the request is for would take it, and those of the crowd that are for it too."""
            asked = inference_of(self.cycle.scope)
            if asked is None:
                return False
            to_model = asked[0][: asked.end(1) + 1]
            return sum(each.scope["path"].startswith(to_model) for each in crowd) <= places(asked[1])

        def _await_request(self) -> None:
            self._asking = self.loop.call_later(limits.header_s, self._too_slow)

        def _answered(self) -> None:
            if self._asking is not None:
                self._asking.cancel()
                self._asking = None

        def _too_slow(self) -> None:
            self._asking = None
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.close()

    return Bounded


# ---------------------------------------------------------------- several processes


def _work(settings: Settings, sock: socket.socket, parent: Connection) -> None:
    """A worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def said(facts: list[dict[str, object]]) -> None:
        parent.send(facts)

    try:
        _serve_here(settings, sock, said)
    except UserError as error:
        with suppress(OSError):
            parent.send(str(error))
        sys.exit(2)


def _end_with_parent() -> None:
    """Tell this process to stop once its parent is gone: who is killed tells nobody, and the port would stay taken."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class _Worker:
    """A process, and what is known of it."""

    process: BaseProcess
    pipe: Connection
    """Where it says facts of its models once it serves, or why it can not."""
    since: float
    """When it began, by ``time.monotonic``."""
    again_at: float | None = None
    """It ended, and another begins then in its place; None: it runs, as far as is known."""


class _Workers:
    """Processes that listen at one socket; one that dies is started again."""

    def __init__(self, settings: Settings, sock: socket.socket, count: int, metrics: Path) -> None:
        self._settings, self._sock, self._count, self._metrics = settings, sock, count, metrics
        self._context = multiprocessing.get_context("spawn")
        self._stop = threading.Event()
        self._log = Log(settings.log)

    def run(self, started: Started) -> None:
        """Until told to stop.

        Raises:
            UserError: a worker can not start, or dies as soon as it is started again and no other is left.
        """
        before = {each: signal.signal(each, self._told) for each in (signal.SIGTERM, signal.SIGINT)}
        running: list[_Worker] = []
        try:
            for _ in range(self._count):
                running.append(self._begun())
            facts = [self._ready(each.process, each.pipe) for each in running]
            if not self._stop.is_set():
                started(facts[0])
            while not self._stop.wait(0.2):
                for at, each in enumerate(running):
                    running[at] = self._kept(each, [other for other in running if other is not each])
        finally:
            for each in running:
                each.process.terminate()
            self._sock.close()  # or who comes later would wait at a door that nobody opens
            limits = self._settings.limits
            end = time.monotonic() + limits.body_s + limits.answer_s + limits.send_s + 5
            for each in running:
                each.process.join(max(0.1, end - time.monotonic()))
                if each.process.is_alive():
                    each.process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, *_: object) -> None:
        self._stop.set()

    def _begun(self) -> _Worker:
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(self._settings, self._sock, there))
        process.start()
        there.close()
        return _Worker(process, here, time.monotonic())

    def _ready(self, process: BaseProcess, pipe: Connection) -> list[dict[str, object]]:
        """What a worker says once it serves."""
        end = time.monotonic() + _START_S
        while not pipe.poll(0.1):
            if self._stop.is_set():
                return []
            if not process.is_alive() and not pipe.poll(0):
                raise UserError(f"a worker ended with code {process.exitcode} before it served; use --workers 1")
            if time.monotonic() > end:
                raise UserError(f"a worker does not serve after {_START_S:.0f} s; use fewer --workers")
        try:
            said: Any = pipe.recv()
        except EOFError:
            raise UserError(f"a worker ended with code {process.exitcode} before it served; use --workers 1") from None
        if isinstance(said, str):
            raise UserError(said)
        return said

    def _kept(self, worker: _Worker, others: list[_Worker]) -> _Worker:
        """The worker, or another in its place: at once where it had served, else after a pause.

        Raises:
            UserError: it ended soon after it began, and no other is left.
        """
        if worker.process.is_alive():
            return worker
        now = time.monotonic()
        if worker.again_at is None:
            from prometheus_client.multiprocess import mark_process_dead

            code, why = worker.process.exitcode, _last_word(worker.pipe)
            worker.pipe.close()
            self._log.write("worker ended", pid=worker.process.pid, code=code, why=why or f"code {code}")
            soon = bool(why) or now - worker.since < _SOON_S
            if soon and not any(other.process.is_alive() for other in others):
                raise UserError(why or f"a worker ended with code {code} soon after it began; the log says why")
            mark_process_dead(worker.process.pid, str(self._metrics))
            worker.again_at = now + _SOON_S if soon else now
        return self._begun() if now >= worker.again_at else worker


def _last_word(pipe: Connection) -> str:
    """Why a worker that ended could not serve; empty where it did not say."""
    said: Any = ""
    with suppress(EOFError, OSError):
        while pipe.poll():
            said = pipe.recv()
    return said if isinstance(said, str) else ""
