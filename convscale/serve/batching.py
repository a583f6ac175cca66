"""Requests that wait together go through the network together.

An artefact runs a batch in each of its streams. While they run, requests gather; a stream that is free takes as many as
make up a batch. With less than a batch it waits for more only while another request is known to be on its way, and
never longer than the stated delay: a client by itself never waits.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
"""uint8 (N, H, W, C) -> float32 (N, classes)."""


class Overloaded(Exception):
    """The queue is full."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class Closed(Exception):
    """No further work is taken: another version has taken over, or the server stops."""


class Watcher(Protocol):
    """Is told what a batcher does, by its own thread."""

    def batch(self, images: int, run_s: float) -> None:
        """After each run."""
        ...

    def dropped(self, why: str) -> None:
        """Of each job that is not run: ``left`` or ``late``."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Answered:
    """What became of a job."""

    rows: np.ndarray
    """float32 (N, classes)."""
    queue_s: float
    """Waiting."""
    run_s: float
    """Of the whole batch it went in."""
    batch: int
    """Images of that."""


@dataclass(slots=True, eq=False)
class _Job:
    images: np.ndarray
    future: asyncio.Future[Answered]
    loop: asyncio.AbstractEventLoop
    deadline: float
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """The queue before one artefact, and the threads that call it.

    Args:
        run: the artefact.
        name: of the threads.
        alone: the artefact for a request that nobody else runs or waits beside, where another form answers it sooner.
        streams: batches that run side by side. Of several, as many more wait in the runtime, whole ones alone, so that
            it goes from one to the next without waiting for Python.
        batch_size: images of a batch; a job of more goes alone.
        max_delay_s: how long less than a batch waits for a request that is on its way.
        most_waiting: images that may wait; a job that finds the queue empty is always taken.
        watcher: told of every batch.
    """

    def __init__(
        self,
        run: Run,
        *,
        name: str,
        batch_size: int,
        max_delay_s: float,
        most_waiting: int,
        watcher: Watcher,
        alone: Run | None = None,
        streams: int = 1,
    ) -> None:
        self.batch_size, self.max_delay_s, self.most_waiting = batch_size, max_delay_s, most_waiting
        self._run, self._alone, self._watcher = run, alone, watcher
        self._streams = streams
        self._running = 0  # batches
        self._jobs: deque[_Job] = deque()
        self._waiting = 0  # images in the queue
        self._coming = 0
        self._last_coming = -math.inf
        self._closing = False
        self._rate = 0.0  # images/s, of the last batches
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._work, name=f"batches of {name}, {number}", daemon=True)
            for number in range(streams if streams == 1 else 2 * streams)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self._waiting

    def check_room(self, images: int = 1) -> None:
        """
        Raises:
            Overloaded: so many more images would not be taken now.
        """
        if self._jobs and self._waiting + images > self.most_waiting:
            seconds = self._waiting / self._rate if self._rate else 1.0
            raise Overloaded(max(1, min(60, math.ceil(seconds))))

    @contextmanager
    def coming(self) -> Iterator[None]:
        """While a request is read: others may wait for it."""
        with self._changed:
            self._coming += 1
            self._last_coming = time.perf_counter()
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify_all()

    def submit(self, images: np.ndarray, timeout_s: float) -> asyncio.Future[Answered]:
        """Put images into the queue; to be called in an event loop. Cancelling the future drops the job.

        Raises:
            Overloaded: the queue is full.
            Closed: no work is taken any more.
        """
        loop = asyncio.get_running_loop()
        with self._changed:
            if self._closing:
                raise Closed
            self.check_room(len(images))
            future: asyncio.Future[Answered] = loop.create_future()
            self._jobs.append(_Job(images, future, loop, time.perf_counter() + timeout_s))
            self._waiting += len(images)
            self._changed.notify_all()
        return future

    def close(self) -> None:
        """Take nothing more, answer all that waits, and end. Blocks until then."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    # -- the threads

    def _work(self) -> None:
        while (jobs := self._next_batch()) is not None:
            if jobs:
                by_itself = len(jobs) == len(jobs[0].images) == self._running == 1 and not self._jobs
                self._answer(jobs, self._alone if self._alone and by_itself else self._run)
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _next_batch(self) -> list[_Job] | None:
        """The jobs of a batch; None at the end."""
        with self._changed:
            while not self._jobs or (self._running >= self._streams and self._waiting < self.batch_size):
                if self._closing and not self._jobs:
                    return None
                self._changed.wait()
            self._running += 1
            self._wait_for_more()
            return self._take()

    def _wait_for_more(self) -> None:
        until = time.perf_counter() + self.max_delay_s
        while 0 < self._waiting < self.batch_size and self._coming and not self._closing:
            # What is on its way for longer than the delay, from a slow client, is not waited for.
            left = min(until, self._last_coming + self.max_delay_s) - time.perf_counter()
            if left <= 0:
                return
            self._changed.wait(left)

    def _take(self) -> list[_Job]:
        taken: list[_Job] = []
        count, now = 0, time.perf_counter()
        while self._jobs and (not taken or count + len(self._jobs[0].images) <= self.batch_size):
            job = self._jobs.popleft()
            self._waiting -= len(job.images)
            if job.future.cancelled() or job.deadline < now:
                self._watcher.dropped("left" if job.future.cancelled() else "late")
                _deliver([(job, TimeoutError())])
                continue
            taken.append(job)
            count += len(job.images)
        return taken

    def _answer(self, jobs: list[_Job], run: Run) -> None:
        start = time.perf_counter()
        try:
            images = jobs[0].images if len(jobs) == 1 else np.concatenate([job.images for job in jobs])
            rows = run(images)
        except Exception as error:  # whatever it is, who waits must hear of it, and the next batch goes on
            _deliver([(job, error) for job in jobs])
            return
        run_s = time.perf_counter() - start
        rate = self._running * len(rows) / run_s
        self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        results: list[tuple[_Job, Answered | BaseException]] = []
        at = 0
        for job in jobs:
            part = rows[at : at + len(job.images)]
            at += len(job.images)
            results.append((job, Answered(rows=part, queue_s=start - job.since, run_s=run_s, batch=len(rows))))
        _deliver(results)
        self._watcher.batch(len(rows), run_s)


def _deliver(results: Sequence[tuple[_Job, Answered | BaseException]]) -> None:
    """Hand results over to the event loop that waits for them, all at once."""
    try:
        results[0][0].loop.call_soon_threadsafe(_set, results)
    except RuntimeError:  # the loop is closed, so nobody waits
        return


def _set(results: Sequence[tuple[_Job, Answered | BaseException]]) -> None:
    for job, result in results:
        if job.future.done():
            continue
        if isinstance(result, BaseException):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
