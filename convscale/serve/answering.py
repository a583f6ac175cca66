"""What answers requests, whatever way they come in: the body is read and unpacked, pictures are decoded, images go
through a model's queue, and its answer comes back in time or not at all.
"""

from __future__ import annotations

import asyncio
import gzip
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NoReturn, ParamSpec, TypeVar

import numpy as np

from convscale.artifact.answers import NOT_FINITE, Said, checked_top
from convscale.errors import UserError
from convscale.images.decode import ImageError, decode_image, preload
from convscale.serve.batching import Answered, Closed, Overloaded
from convscale.serve.bell import Bell
from convscale.serve.guard import ClientLeft, Guarded, Log
from convscale.serve.metrics import Metrics
from convscale.serve.models import Model, Models, Version
from convscale.serve.protocol import HEADER_LENGTH, Problem, read_request, write_answer
from convscale.serve.settings import Settings

LARGE = 65_536
"""Bytes of JSON or of something packed that are not read in the event loop's own thread."""
LISTEN_S = 0.25
"""Until a worker hears what another was asked for."""
_PIECE = 262_144
"""Bytes that are unpacked at once."""
_WORTH_PACKING = 1_024
"""Bytes of an answer."""

P = ParamSpec("P")
T = TypeVar("T")


class Answering:
    """Models, and the way to them.

    Raises:
        UserError: a model can not be served.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics, self.log = settings, Metrics(), Log(settings.log)
        self.bell = Bell()
        self.models = Models(settings.models, settings.how, self.metrics.watching)
        for model in self.models.all.values():
            for version, why in model.passed_over:
                self.metrics.version(model.name, "refused")
                self.log.write("version refused", model=model.name, version=str(version), why=why)
        preload()
        self._decoders = ThreadPoolExecutor(settings.decoders, thread_name_prefix="decode")
        self._decoding: Counter[str] = Counter()  # of each model, as its queue's bound is

    def close(self) -> None:
        """Answer what waits, and end."""
        self.models.close()
        self._decoders.shutdown()

    # -- models

    def version(self, name: str, version: str | None) -> Version:
        """The version that answers.

        Raises:
            Problem: no such model, or version.
        """
        model = self.models.all.get(name)
        if model is None:
            raise Problem(404, f"model {name[:100]!r} is unknown; served: {', '.join(self.models.all)}")
        current = model.current
        if version is not None and version != current.takes.version:
            raise Problem(404, f"model {name!r} has no version {version[:20]!r}; served: {current.takes.version}")
        return current

    async def watch(self) -> None:
        """Look for new versions, for ever: every so often, and soon after another worker was asked to."""
        poll_s = self.settings.poll_s or math.inf
        pause = poll_s if self.bell.folder is None else min(poll_s, LISTEN_S)
        due_at = time.monotonic() + poll_s
        while pause < math.inf:
            await asyncio.sleep(pause)
            heard, now = self.bell.heard(), time.monotonic()
            due = self.bell.folder is None or now >= due_at
            due_at = now + poll_s if due else due_at
            for name, model in self.models.all.items():
                if due or name in heard:
                    with suppress(UserError):  # it is in the log; the old version stays
                        await self.refresh(model, again=name in heard)

    async def load(self, name: str) -> None:
        """Take up a model's new version because a client asks for it, in all workers.

        Raises:
            UserError: it is refused; the others do not hear of it.
        """
        await self.refresh(self.models.all[name], again=True)
        self.bell.ring(name)

    async def refresh(self, model: Model, *, again: bool = False) -> None:
        """Take up a model's new version, if there is one.

        Raises:
            UserError: it is refused.
        """
        loop = asyncio.get_running_loop()
        try:
            taken = await loop.run_in_executor(None, lambda: model.refresh(again=again))
        except Exception as error:
            self.metrics.version(model.name, "refused")
            self.log.write("version refused", model=model.name, why=str(error))
            raise error if isinstance(error, UserError) else UserError("it can not be opened") from error
        if taken is not None:
            self.metrics.version(model.name, "taken")
            self.log.write("version taken", model=model.name, version=taken.takes.version, checked=taken.checked)

    # -- tensors

    async def infer(
        self, one: Guarded, headers: Mapping[str, str], name: str, version: str | None
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of the answer to a request for inference.

        Raises:
            Problem: whatever is wrong with it.
        """
        model = self.version(name, version)
        one.told.model = name
        start = time.perf_counter()
        with model.batcher.coming():
            body = await unpacked(one, headers, await read_body(one))
            length = headers.get(HEADER_LENGTH)
            if length is None and len(body) > LARGE:
                asked = await in_pool(read_request, body, length, model.takes)
            else:
                asked = read_request(body, length, model.takes)
        self.metrics.stage(name, "read", time.perf_counter() - start)
        rows, model = await self._run(one, asked.images, model, named=version is not None)
        if not np.isfinite(rows).all():
            raise Problem(500, NOT_FINITE)
        made, said = write_answer(asked, rows, model.takes)
        return _packed(made, said, headers.get("accept-encoding", ""))

    # -- pictures

    async def decode(self, one: Guarded, pictures: Sequence[bytes], model: Version) -> list[np.ndarray | str]:
        """Each picture as the network takes it, or why it can not be read.

        Raises:
            Problem: the queue is full, or they are late.
            ClientLeft: nobody waits for them; those that are not begun are not decoded.
        """
        name = model.takes.name
        if self._decoding[name] and self._decoding[name] + len(pictures) > model.batcher.most_waiting:
            self._refuse_full(one, 1)
        start = time.perf_counter()
        preprocessing, most = model.artifact.preprocessing, self.settings.limits.pixels

        def decoded(data: bytes) -> np.ndarray | str:
            try:
                pixels = decode_image(data, name="picture", channels=preprocessing.channels, max_pixels=most)
                return preprocessing.resize(pixels)
            except ImageError as error:
                return str(error).removeprefix("picture: ")

        loop = asyncio.get_running_loop()
        self._decoding[name] += len(pictures)
        try:
            made = await self._within(
                one, asyncio.gather(*(loop.run_in_executor(self._decoders, decoded, each) for each in pictures))
            )
        except (Problem, ClientLeft) as error:
            self.metrics.dropped(name, "left" if isinstance(error, ClientLeft) else "late")
            raise
        finally:
            self._decoding[name] -= len(pictures)
        self.metrics.stage(name, "decode", time.perf_counter() - start)
        return made

    async def classify(
        self, one: Guarded, images: Sequence[np.ndarray | str], model: Version, top: int, *, named: bool
    ) -> tuple[list[dict[str, object]], Version]:
        """An answer for each picture, as plain values, and the version that gave them."""
        good = [image for image in images if isinstance(image, np.ndarray)]
        found_rows, model = await self._run(one, np.stack(good), model, named=named) if good else ((), model)
        rows, artifact = iter(found_rows), model.artifact
        said = Said(
            classes=artifact.classes, thresholds=artifact.thresholds, top=checked_top(top, len(artifact.classes))
        )
        found: list[dict[str, object]] = []
        for image in images:
            if isinstance(image, str):
                found.append({"error": image})
                continue
            row = next(rows)
            if not np.isfinite(row).all():
                found.append({"error": NOT_FINITE})
                continue
            answer = said.answer(row, "")
            found.append({"labels": list(answer.labels), "probabilities": list(answer.probabilities)})
        return found, model

    # -- the queue

    async def _run(
        self, one: Guarded, images: np.ndarray, model: Version, *, named: bool
    ) -> tuple[np.ndarray, Version]:
        """Probabilities, float32 (N, classes), and the version that gave them: another where that took over meanwhile,
        unless the client ``named`` one.

        Raises:
            Problem: the queue is full, the answer is late, or the model fails.
            ClientLeft: nobody waits for it.
        """
        name = model.takes.name
        future, model = self._submitted(one, images, model, named=named)
        try:
            answered = await self._within(one, future)
        except TimeoutError:
            raise Problem(504, "there was no answer in time", {"retry-after": "1"}) from None
        except (Problem, ClientLeft):
            raise
        except Exception as error:
            self.log.write("run failed", model=name, error=f"{type(error).__name__}: {error}"[:500])
            raise Problem(500, f"model {name!r} can not run this; the server's log says why") from error
        self.metrics.stage(name, "queue", answered.queue_s)
        one.told.facts |= {
            "model": name,
            "version": model.takes.version,
            "images": len(images),
            "queue_ms": round(1000 * answered.queue_s, 2),
            "run_ms": round(1000 * answered.run_s, 2),
            "batch": answered.batch,
        }
        return answered.rows, model

    async def _within(self, one: Guarded, work: asyncio.Future[T]) -> T:
        """What comes of some work for a request, while its client waits and its time lasts; else the work is cancelled.

        Raises:
            Problem: it is late.
            ClientLeft: nobody waits for it.
        """
        leaving = asyncio.ensure_future(one.receive())
        try:
            await asyncio.wait((work, leaving), timeout=self._left_s(one), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if leaving.done():
                raise ClientLeft
            limit = self.settings.limits.answer_s
            raise Problem(504, f"there was no answer within {limit:g} s", {"retry-after": "1"})
        finally:
            work.cancel()
            leaving.cancel()

    def _left_s(self, one: Guarded) -> float:
        """Until a request must be answered, from when its body was there."""
        limit = self.settings.limits.answer_s
        return limit if one.answer_by is None else max(0.0, one.answer_by - asyncio.get_running_loop().time())

    def _submitted(
        self, one: Guarded, images: np.ndarray, model: Version, *, named: bool
    ) -> tuple[asyncio.Future[Answered], Version]:
        try:
            return model.batcher.submit(images, self._left_s(one)), model
        except Overloaded as error:
            self._refuse_full(one, error.retry_after_s)
        except Closed:  # another version has taken over meanwhile; it takes images of the same size, or refuses
            now = self.models.all[model.takes.name].current
            same = (
                now.takes.classes == model.takes.classes and now.artifact.preprocessing == model.artifact.preprocessing
            )
            if named or now is model or not same:
                raise Problem(503, "the model changes; try again", {"retry-after": "1"}) from None
            return self._submitted(one, images, now, named=named)

    def check_room(self, one: Guarded) -> None:
        """Before anything is done for a request that would not be taken: under a crowd, refusals are most of the work.

        Raises:
            Problem: the queue that it asks for is full.
        """
        asked = one.asked
        model = self.models.all.get(asked[1]) if asked else None
        if asked is None or model is None:
            return
        try:
            model.current.batcher.check_room()
        except Overloaded as error:
            one.told.endpoint, one.told.model = asked[3], asked[1]
            self._refuse_full(one, error.retry_after_s)

    def places(self, model: str) -> int:
        """Images that a model's queue would still take; none where it is not served."""
        served = self.models.all.get(model)
        return served.current.batcher.most_waiting - served.current.batcher.waiting if served else 0

    def _refuse_full(self, one: Guarded, retry_after_s: int) -> NoReturn:
        self.metrics.dropped(one.told.model, "full")
        raise Problem(503, "the queue is full; try again later", {"retry-after": str(retry_after_s)})


# ---------------------------------------------------------------- bodies


async def read_body(one: Guarded) -> bytes:
    """All of a request's body; the guard bounds it.

    Raises:
        Problem: it is too large, or not there in time.
        ClientLeft: it never came.
    """
    parts: list[bytes] = []
    while not one.whole:
        message = await one.receive()
        parts.append(message.get("body", b""))
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def in_pool(call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Beside the event loop, so that other requests go on."""
    return await asyncio.get_running_loop().run_in_executor(None, lambda: call(*args, **options))


async def unpacked(one: Guarded, headers: Mapping[str, str], body: bytes) -> bytes:
    """A body without its content encoding.

    Raises:
        Problem: an unknown encoding, damaged, or more than is taken once it is unpacked.
    """
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Problem(415, f"content encoding {encoding[:40]!r} is unknown; gzip, deflate or none would be right")
    most, parts, total = one.guard.settings.limits.body, list[bytes](), 0
    inflating = _inflated(body, encoding)
    while True:
        one.hold(len(body) + total + _PIECE)  # before it is made: whatever many requests claim, their memory is counted
        piece = await in_pool(next, inflating, None)
        if piece is None:
            break
        parts.append(piece)
        total += len(piece)
        if total > most:
            raise Problem(413, f"the request has more than {most:,} bytes; send fewer images at once")
    one.hold(total)  # the packed body goes
    return b"".join(parts)


def _inflated(body: bytes, encoding: str) -> Iterator[bytes]:
    """What is in a packed body, in pieces of at most ``_PIECE`` bytes, whatever it claims.

    Raises:
        Problem: it is damaged.
    """
    opened = zlib.decompressobj(31 if encoding == "gzip" else 15)
    at = 0
    while not opened.eof:
        source = opened.unconsumed_tail or body[at : at + LARGE]
        at += 0 if opened.unconsumed_tail else len(source)
        try:
            piece = opened.decompress(source, _PIECE)
        except zlib.error as error:
            raise Problem(400, f"the body is no {encoding}: {error}") from error
        if piece:
            yield piece
        elif not source:
            break
    if not opened.eof or opened.unused_data or at < len(body):
        raise Problem(400, f"the body is no {encoding}: it is cut off, or something follows it")


def _packed(body: bytes, headers: dict[str, str], accepted: str) -> tuple[bytes, dict[str, str]]:
    """An answer in the first encoding that the client takes, where that is worth it."""
    if len(body) < _WORTH_PACKING or not accepted:
        return body, headers
    for word in accepted.lower().split(","):
        encoding, _, quality = word.strip().partition(";")
        if encoding in ("gzip", "deflate") and quality.replace(" ", "") not in ("q=0", "q=0.0"):
            packed = gzip.compress(body, 1) if encoding == "gzip" else zlib.compress(body, 1)
            return packed, {**headers, "content-encoding": encoding, "vary": "accept-encoding"}
    return body, headers
