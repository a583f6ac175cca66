"""What every request goes through, whatever it asks for: its number, its token, its limits, its line in the log.

Plain ASGI, around the application: no path of this machine, no traceback and no token ever reaches a client or the log.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Protocol, TypeAlias

from convscale.aside import aside
from convscale.serve.metrics import Metrics
from convscale.serve.protocol import Problem
from convscale.serve.settings import Settings

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,64}")
_INFERENCE = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/(infer|classify)")
OPEN = ("/", "/v2/health/live", "/v2/health/ready")
"""What needs no token: the page, and what an orchestrator asks."""
BUSY = "the server is busy with other requests; try again"
THROWN = "body thrown away"
"""In a request's state: its body was, since too much came at once."""
LEFT = 499
"""The status in the log of a client that did not wait for its answer; nobody receives it."""


class ClientLeft(Exception):
    """The client is gone."""


def inference_of(scope: Scope) -> re.Match[str] | None:
    """Model, version and kind of a request for inference; None: it is for something else."""
    return _INFERENCE.fullmatch(scope["path"]) if scope["method"] == "POST" else None


class Log:
    """Lines of JSON on standard error."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def write(self, event: str, **facts: object) -> None:
        """One line: the time, what happened, and its facts. One that can not be written is lost, and ends nothing."""
        if self.kind == "none" or sys.stderr is None:  # closed when the process began
            return
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": when, "event": event, **facts}, default=str)
        with aside():
            sys.stderr.write(f"{line}\n")  # in one piece: other processes write there too
            sys.stderr.flush()


class Told:
    """What a request's handler notes for its line in the log."""

    __slots__ = ("endpoint", "facts", "model")

    def __init__(self) -> None:
        self.endpoint, self.model = "other", ""
        self.facts: dict[str, object] = {}


class Behind(Protocol):
    """What answers, as far as the guard knows it."""

    def check_room(self, one: Guarded) -> None:
        """
        Raises:
            Problem: the request would not be taken now.
        """
        ...

    def places(self, model: str) -> int:
        """How many more requests a model would take now: the bodies of so many are never thrown away."""
        ...

    async def infer(
        self, one: Guarded, headers: Mapping[str, str], name: str, version: str | None
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the answer to a request for inference."""
        ...


class Guard:
    """Around an application. Requests for inference go past it, straight to what answers: a framework's way to its
    handlers would cost more than all that is done there.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics, log: Log, behind: Behind | None = None) -> None:
        self.app, self.settings, self.metrics, self.log, self.behind = app, settings, metrics, log, behind
        self.draining = False
        """Set once the server was told to stop: answers end their connections."""
        self._bodies = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await Guarded(self, scope, receive, send).answer()

    def take(self, count: int, held: int) -> None:
        """Reserve memory for a body, of which ``held`` bytes are reserved already. A lone one always has room.

        Raises:
            Problem: too much is being answered already.
        """
        if self._bodies > held and self._bodies + count > self.settings.limits.bodies:
            raise Problem(503, BUSY, {"retry-after": "1"})
        self._bodies += count

    def give(self, count: int) -> None:
        """Give it back."""
        self._bodies -= count


class Guarded:
    """One request on its way through."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.scope = guard, scope
        self._receive, self._send = receive, send
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(REQUEST_ID, b"")
        self.id = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()
        self.headers = headers
        self.told = Told()
        self.asked = inference_of(scope)
        scope.setdefault("state", {})["guarded"] = self
        self.told.facts["request_id"] = self.id.decode()
        self.status = 0
        self.size = self.reserved = 0
        self.read_by: float | None = None
        self.whole = False  # the body is there
        self.answer_by: float | None = None
        """By the event loop's clock, once the body is there."""

    async def answer(self) -> None:
        """Check, pass on, and write down."""
        guard, start = self.guard, time.perf_counter()
        guard.metrics.opened(1)
        try:
            self._check()
            if guard.behind is not None and self.asked and self.asked[3] == "infer":
                await self._infer(guard.behind, self.asked[1], self.asked[2])
            else:
                await guard.app(self.scope, self.receive, self.send)
        except Problem as problem:
            await self._refuse(problem)
        except ClientLeft:
            self.status = LEFT
        except Exception as error:  # our own mistake: the log has it, the client does not
            lines = traceback.format_exception(error)
            guard.log.write("error", request_id=self.id.decode(), error="".join(lines)[-4000:])
            if not self.status:
                await self._refuse(Problem(500, "the server failed; its log says why"))
        finally:
            guard.give(self.reserved)
            guard.metrics.opened(-1)
            self._write(time.perf_counter() - start)

    def _check(self) -> None:
        """
        Raises:
            Problem: no token, or a body that is announced as too large.
        """
        token, limits = self.guard.settings.token, self.guard.settings.limits
        if token is not None and self.scope["path"] not in OPEN:
            kind, _, shown = self.headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), token.encode()):
                raise Problem(401, "a token is needed: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
        self._check_kept()
        announced = self.headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limits.body:
            raise self._too_large()
        if self.guard.behind is not None:
            self.guard.behind.check_room(self)
        if announced.isdigit() and int(announced):
            self._reserve(int(announced))

    def _check_kept(self) -> None:
        if self.scope["state"].get(THROWN):
            raise Problem(503, BUSY, {"retry-after": "1"})

    def _reserve(self, count: int) -> None:
        if count > self.reserved:
            self.hold(count)

    def hold(self, count: int) -> None:
        """Have so many bytes reserved, no more and no less; :meth:`answer` gives them back.

        Raises:
            Problem: too much is being answered already.
        """
        if count > self.reserved:
            self.guard.take(count - self.reserved, self.reserved)
        else:
            self.guard.give(self.reserved - count)
        self.reserved = count

    def _too_large(self) -> Problem:
        most = self.guard.settings.limits.body
        return Problem(413, f"the request has more than {most:,} bytes; send fewer images at once")

    async def receive(self) -> Message:
        """The next part of the body, within the limits; then what the server says of the client."""
        if self.whole:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self.read_by = self.read_by or now + self.guard.settings.limits.body_s
        try:
            async with asyncio.timeout_at(self.read_by):
                message = await self._receive()
        except TimeoutError:
            seconds = self.guard.settings.limits.body_s
            raise Problem(408, f"the request was not there within {seconds:g} s", {"connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise ClientLeft
        self.size += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.whole:
            self.answer_by = asyncio.get_running_loop().time() + self.guard.settings.limits.answer_s
        self._check_kept()
        if self.size > self.guard.settings.limits.body:
            raise self._too_large()
        self._reserve(self.size)
        return message

    async def send(self, message: Message) -> None:
        """A part of the answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (REQUEST_ID, self.id), (b"x-content-type-options", b"nosniff")]
            if self.guard.draining:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refusal(self, problem: Problem) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a refusal: one line of JSON. Whoever still sends may end first, so that the line
        reaches them.
        """
        headers = {"content-type": "application/json", **problem.headers}
        if not self.whole and problem.status != 408 and not await self._swallow():
            headers["connection"] = "close"
        return problem.status, headers, json.dumps({"error": str(problem)}).encode()

    async def _infer(self, behind: Behind, name: str, version: str | None) -> None:
        """Answer a request for inference."""
        self.told.endpoint = "infer"
        given: dict[str, str] = {}
        for key, value in self.scope["headers"]:
            given.setdefault(key.decode("latin-1"), value.decode("latin-1"))
        body, headers = await behind.infer(self, given, name, version)
        await self._reply(200, headers, body)

    async def _refuse(self, problem: Problem) -> None:
        status, headers, body = await self.refusal(problem)
        await self._reply(status, headers, body)

    async def _reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        pairs.append((b"content-length", b"%d" % len(body)))
        await self.send({"type": "http.response.start", "status": status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})

    async def _swallow(self) -> bool:
        """Read what is left of the body, for a moment; whether all of it came."""
        most = 2 * self.guard.settings.limits.body
        try:
            async with asyncio.timeout(2.0):
                while self.size <= most:
                    message = await self._receive()
                    self.size += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return True
        except TimeoutError:
            pass
        return False

    def _write(self, seconds: float) -> None:
        told, scope = self.told, self.scope
        self.guard.metrics.request(told.endpoint, told.model, self.status, seconds)
        self.guard.log.write(
            "request",
            **told.facts,
            method=scope["method"],
            path=scope["path"][:200],
            status=self.status,
            bytes=self.size,
            ms=round(1000 * seconds, 2),
        )
