"""Trials in this process, one after the other, or in processes of this machine, side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue
from typing import TextIO

from convscale.images.splits import DataSplits
from convscale.machine import start_python
from convscale.nas.engines.base import DEATHS
from convscale.nas.trial import Job, More, Result, run_job


class Here:
    """In this process."""

    def __init__(self, splits: DataSplits) -> None:
        self.splits = splits

    def run(self, jobs: Sequence[Job], more: More) -> Iterator[Result]:
        """One after the other."""
        for number, job in enumerate(jobs):
            if number and not more():
                return
            yield run_job(job, self.splits)

    def close(self) -> None:
        """Nothing is held."""


class Processes:
    """In processes of their own: one that dies takes no other with it, and its job is run again."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._running: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._closed = False

    def run(self, jobs: Sequence[Job], more: More) -> Iterator[Result]:
        """Side by side, as many as there are workers. A job that no process can be started for waits for one that is
        there, and fails where none is.
        """
        waiting, deaths, begun = deque(jobs), Counter[int](), False
        at_work: dict[Future[Result | None], tuple[Job, subprocess.Popen[str]]] = {}
        idle: list[subprocess.Popen[str]] = []
        pool = ThreadPoolExecutor(self.workers)
        try:
            while not self._closed:
                while waiting and len(at_work) < self.workers and (deaths[waiting[0].number] or not begun or more()):
                    begun = True
                    try:
                        process = self._take(idle)
                    except OSError as error:  # no memory, or no more processes
                        if at_work:
                            break
                        failed = f"its process can not be started: {error}"
                        yield Result(number=waiting.popleft().number, failed=failed)
                        continue
                    if process is None:
                        return
                    job = waiting.popleft()
                    at_work[pool.submit(_answer, process, job)] = job, process
                if not at_work:
                    return
                done = wait(at_work, return_when=FIRST_COMPLETED).done
                for future in [each for each in at_work if each in done]:
                    job, process = at_work.pop(future)
                    result = future.result()
                    if result is not None:
                        idle.append(process)
                        yield result
                        continue
                    self._end(process)
                    deaths[job.number] += 1
                    if deaths[job.number] < DEATHS:
                        waiting.appendleft(job)
                    elif not self._closed:
                        yield Result(number=job.number, failed=f"its process died {DEATHS} times")
        finally:
            pool.shutdown(wait=False)
            for process in idle:
                self._end(process)

    def _take(self, idle: list[subprocess.Popen[str]]) -> subprocess.Popen[str] | None:
        """One that waits, or a new one. What died while it waited was ended by no job."""
        while idle:
            process = idle.pop()
            if process.poll() is None:
                return process
            self._end(process)
        return self._start()

    def _start(self) -> subprocess.Popen[str] | None:
        """A process that waits for jobs; None once all were ended: nobody would end it."""
        with self._lock:
            if self._closed:
                return None
            process = start_python("convscale.nas.engines.local")
            self._running.append(process)
        return process

    def _end(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            if process in self._running:
                self._running.remove(process)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def close(self) -> None:
        """End the processes; no job is begun any more."""
        with self._lock:
            self._closed, running = True, list(self._running)
        for process in running:
            self._end(process)

    @property
    def pids(self) -> list[int]:
        """Of the processes that are there."""
        return [process.pid for process in self._running]


def _answer(process: subprocess.Popen[str], job: Job) -> Result | None:
    """What a process makes of a job; None: it died."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(job.to_dict()) + "\n")
        process.stdin.flush()
        return Result.from_dict(json.loads(process.stdout.readline()))
    except (OSError, ValueError):  # a pipe that broke, or was closed; half a line is no JSON
        return None


def work(lines: Iterator[str]) -> Iterator[str]:
    """A worker: jobs as lines of JSON to results as lines of JSON."""
    for line in lines:
        job = Job(**json.loads(line))
        yield json.dumps(replace(run_job(job), number=job.number).to_dict())


def lines_of_driver(stream: TextIO) -> Iterator[str]:
    """Lines as they come. This process ends with its driver, whose pipe closes then, in the middle of a trial too: the
    rest of it nobody would get, and whatever is timed next would be so on busy cores.
    """
    come: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in iter(stream.readline, ""):
            come.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield come.get()


if __name__ == "__main__":
    # What libraries print must not come between the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for text in work(lines_of_driver(sys.stdin)):
        print(text, file=results, flush=True)
