"""Trials in this process, one after the other, or in processes of this machine, side by side."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TextIO

from convscale.images.splits import DataSplits
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
    """In processes of their own: one that dies takes no other with it, and its job is run again.

    They are started as commands: forking a process that runs torch's threads can hang, and multiprocessing's other way
    runs the caller's script again.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._running: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._closed = False

    def run(self, jobs: Sequence[Job], more: More) -> Iterator[Result]:
        """Side by side, as many as there are workers."""
        waiting, at_work, lock = deque(jobs), self.workers, threading.Lock()
        done: queue.SimpleQueue[Result | Exception | None] = queue.SimpleQueue()
        begun = threading.Event()

        def left_to_others(job: Job) -> bool:
            """Put a job back that this worker has no process for; False: no other worker is there to take it."""
            nonlocal at_work
            with lock:
                if at_work == 1:
                    return False
                at_work -= 1
                waiting.appendleft(job)
            return True

        def next_job() -> Job | None:
            """The next one; None: there is none, and this worker ends."""
            nonlocal at_work
            with lock:
                if waiting:
                    return waiting.popleft()
                at_work -= 1
            return None

        def work() -> None:
            process = None
            try:
                while (job := next_job()) is not None:
                    if self._closed or (begun.is_set() and not more()):
                        continue
                    begun.set()
                    try:
                        result, process = self._result(job, process)
                    except OSError as error:  # no memory, or no more processes
                        if left_to_others(job):
                            return
                        result = Result(number=job.number, failed=f"its process can not be started: {error}")
                        process = None
                    done.put(result)
                self._end(process)
            except Exception as error:  # of this file, not of a job: whoever waits for results gets it
                done.put(error)
            finally:  # else these would be waited for without end
                done.put(None)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self.workers)]
        for thread in threads:
            thread.start()
        left = len(threads)
        while left:
            result = done.get()
            if result is None:
                left -= 1
            elif isinstance(result, Exception):
                raise result
            else:
                yield result

    def _result(self, job: Job, process: subprocess.Popen[str] | None) -> tuple[Result, subprocess.Popen[str] | None]:
        """A job's result, and the process that is still there.

        Raises:
            OSError: no process can be started.
        """
        for _ in range(DEATHS):
            if process is None or process.poll() is not None:
                process = self._start()
            if process is None:
                break
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(job.to_dict()) + "\n")
                process.stdin.flush()
                return Result.from_dict(json.loads(process.stdout.readline())), process
            except (OSError, ValueError):  # it died; a half line is no JSON
                self._end(process)
                process = None
        return Result(number=job.number, failed=f"its process died {DEATHS} times"), process

    def _start(self) -> subprocess.Popen[str] | None:
        """A process that waits for jobs; None once all were ended: nobody would end it."""
        path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
        with self._lock:
            if self._closed:
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", "convscale.nas.engines.local"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
            self._running.append(process)
        return process

    def _end(self, process: subprocess.Popen[str] | None) -> None:
        if process is None:
            return
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
