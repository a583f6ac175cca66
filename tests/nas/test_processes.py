"""Trials in processes of this machine, by a stand-in for these."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from convscale.nas.engines import local
from convscale.nas.engines.local import Processes
from convscale.nas.space import SearchSpace
from convscale.nas.trial import Job, Result
from tests.nas.test_study import job


class Stuck:
    """A process that answers nothing until it is killed."""

    pid = 0

    def __init__(self, *_: object, **__: object) -> None:
        self.ended = threading.Event()
        self.stdin = io.StringIO()
        self.stdout = SimpleNamespace(readline=self.answer, close=lambda: None)

    def answer(self) -> str:
        self.ended.wait(20)
        return ""

    def poll(self) -> int | None:
        return -9 if self.ended.is_set() else None

    def kill(self) -> None:
        self.ended.set()

    def wait(self) -> int:
        return -9


def test_nothing_is_begun_once_all_are_ended(tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that still waited were run in new processes, which nobody ended."""
    begun: list[Stuck] = []

    def start(*_: object, **__: object) -> Stuck:
        begun.append(Stuck())
        return begun[-1]

    monkeypatch.setattr(local.subprocess, "Popen", start)
    engine, jobs, found = Processes(2), [job(number, None, tiny) for number in range(5)], list[Result]()
    running = threading.Thread(target=lambda: found.extend(engine.run(jobs, lambda: True)), daemon=True)
    running.start()
    end = time.monotonic() + 20
    while len(begun) < 2 and time.monotonic() < end:
        time.sleep(0.002)
    engine.close()
    running.join(2)
    assert not running.is_alive()
    assert [each.ended.is_set() for each in begun] == [True, True]
    assert found == []  # those that were at work are neither trained nor failed
    assert (engine._start(), engine.pids, list(engine.run(jobs, lambda: True))) == (None, [], [])


_ENDLESS = """
import runpy, sys, time
from convscale.nas import trial

def run_job(job):
    print("begun", job.number, file=sys.stderr, flush=True)
    time.sleep(600)

trial.run_job = run_job
runpy.run_module("convscale.nas.engines.local", run_name="__main__")
"""


def test_a_trial_ends_with_its_driver(tiny: SearchSpace) -> None:
    """It was trained to its end by a search that was killed, beside the next one that timed its candidates."""
    command, pipe = [sys.executable, "-c", _ENDLESS], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True) as process:
        try:
            assert process.stdin is not None
            assert process.stderr is not None
            process.stdin.write(json.dumps(job(7, None, tiny).to_dict()) + "\n")
            process.stdin.flush()
            assert process.stderr.readline() == "begun 7\n"
            process.stdin.close()  # as the system does for whoever is killed
            assert process.wait(60) == 0
        finally:
            process.kill()


def results_of(engine: Processes, jobs: list[Job]) -> tuple[list[Result], list[Exception]]:
    """What the engine gives within two seconds, and what it raises."""
    found, raised = list[Result](), list[Exception]()

    def run() -> None:
        try:
            found.extend(engine.run(jobs, lambda: True))
        except Exception as error:
            raised.append(error)

    running = threading.Thread(target=run, daemon=True)
    running.start()
    running.join(2)
    assert not running.is_alive()
    engine.close()
    return sorted(found, key=lambda result: result.number), raised


def test_a_process_that_can_not_be_started_fails_its_job(tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search hung for ever."""

    def start(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(local.subprocess, "Popen", start)
    found, raised = results_of(Processes(2), [job(number, None, tiny) for number in range(3)])
    assert [result.number for result in found] == [0, 1, 2]
    why = "its process can not be started: [Errno 11] Resource temporarily unavailable"
    assert {result.failed for result in found} == {why}
    assert not raised


def test_a_fault_of_a_worker_reaches_the_search(tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(process: object, job: Job) -> Result:
        raise RuntimeError(f"a fault at {job.number}")

    monkeypatch.setattr(local.subprocess, "Popen", Stuck)
    monkeypatch.setattr(local, "_answer", answer)
    found, raised = results_of(Processes(1), [job(3, None, tiny), job(4, None, tiny)])
    assert (found, [str(error) for error in raised]) == ([], ["a fault at 3"])


class Dies(Stuck):
    """A process that dies of every job."""

    def answer(self) -> str:
        self.kill()
        return '{"number": '


def test_a_job_that_kills_its_process_is_given_up(tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the third, though the time is over by then: it was begun before. What was not begun stays."""
    begun: list[Stuck] = []

    def start(*_: object, **__: object) -> Stuck:
        begun.append(Dies())
        return begun[-1]

    monkeypatch.setattr(local.subprocess, "Popen", start)
    engine = Processes(1)
    (found,) = engine.run([job(0, None, tiny), job(1, None, tiny)], lambda: False)
    assert (found.number, found.failed, len(begun)) == (0, "its process died 3 times", 3)
    assert engine.pids == []


class Answers(Stuck):
    """A process that answers each job, after a moment."""

    def answer(self) -> str:
        time.sleep(0.05)
        asked = json.loads(self.stdin.getvalue().splitlines()[-1])
        return json.dumps(Result(number=asked["number"], curve=(0.5,)).to_dict()) + "\n"


def test_one_process_that_can_not_be_started_leaves_its_job_to_others(
    tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It failed all jobs of the round at once, while the one that ran had its first."""
    begun: list[Stuck] = []
    lock = threading.Lock()

    def start(*_: object, **__: object) -> Stuck:
        with lock:
            if begun:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            begun.append(Answers())
            return begun[0]

    monkeypatch.setattr(local.subprocess, "Popen", start)
    found, raised = results_of(Processes(2), [job(number, None, tiny) for number in range(5)])
    assert ([result.number for result in found], raised) == ([0, 1, 2, 3, 4], [])
    assert [(result.failed, result.accuracy) for result in found] == [("", 0.5)] * 5


class AnswersOnce(Answers):
    """A process that dies once it has answered."""

    def answer(self) -> str:
        if self.ended.is_set():
            return ""
        text = super().answer()
        self.kill()
        return text


def test_a_process_that_died_while_it_waited_is_no_death_of_the_next_job(
    tiny: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.subprocess, "Popen", AnswersOnce)
    monkeypatch.setattr(local, "DEATHS", 1)
    engine = Processes(1)
    found, raised = results_of(engine, [job(number, None, tiny) for number in range(3)])
    assert ([(result.number, result.failed) for result in found], raised) == ([(0, ""), (1, ""), (2, "")], [])
    assert engine.pids == []
