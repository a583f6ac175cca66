"""Two runs never write into one output; what another is writing is never removed; a closed terminal saves."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from convscale import locks
from convscale.errors import UserError
from convscale.files import new_output_dir, whole_folder
from convscale.learn import stop
from convscale.learn.distributed import Processes
from convscale.learn.prepare import begin_folder
from convscale.learn.progress import Relay
from convscale.locks import OutputLock, alone, is_abandoned

HOLDER = """
import sys, time
from convscale.locks import OutputLock
with OutputLock() as lock:
    lock.take(sys.argv[1])
    print("held", flush=True)
    time.sleep(600)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def test_a_second_run_is_refused_in_one_line_until_the_first_is_gone(tmp_path: Path) -> None:
    run = new_output_dir(tmp_path / "run")
    with hold(run) as other:
        try:
            with (
                OutputLock() as lock,
                pytest.raises(UserError, match="is being written by another run; wait") as caught,
            ):
                lock.take(run)
            assert str(caught.value).startswith(f"output folder {run} ")
        finally:
            other.kill()  # no end that a process can have leaves the lock behind
    with OutputLock() as lock:
        lock.take(run)
        lock.take(run)
    assert [path.name for path in run.iterdir()] == [".convscale"]


def test_a_run_that_was_made_meanwhile_is_not_emptied(tmp_path: Path) -> None:
    """Two runs are asked for at once, with --overwrite: neither finds a folder when it begins to prepare."""
    run = tmp_path / "run"
    request: Any = SimpleNamespace(output=run, keep=2, overwrite=True, resume=False, tensorboard=False, track=None)
    job: Any = SimpleNamespace(output=run, net=nn.Linear(1, 1), processes=Processes(), stop=lambda: False)
    new_output_dir(run)
    (run / "state").write_text("precious")
    with hold(run) as other:
        try:
            with OutputLock() as lock, pytest.raises(UserError, match="is being written by another run"):
                begin_folder(request, job, Relay(lambda _: None), lock)
        finally:
            other.kill()
    assert (run / "state").read_text() == "precious"


def test_one_process_is_two_runs_too(tmp_path: Path) -> None:
    with OutputLock() as first:
        first.take(tmp_path)
        with pytest.raises(UserError, match="another run"):
            OutputLock().take(tmp_path)
    with OutputLock() as second:
        second.take(tmp_path)
    OutputLock().take(tmp_path / "not there yet")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    taking = "import sys; from convscale.locks import OutputLock, is_abandoned as old; OutputLock().take(sys.argv[1]);"
    done = subprocess.run([sys.executable, "-c", f"{taking} print(old(sys.argv[1]))", str(pipe)], timeout=30)
    assert done.returncode == 0


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A loader's worker outlives a killed training by seconds; the training must be able to go on at once."""
    ready, wait = os.pipe(), os.pipe()
    holder = os.fork()
    if holder == 0:
        OutputLock().take(tmp_path)
        if os.fork() == 0:  # the worker
            os.write(ready[1], b"x")
            os.read(wait[0], 1)
        else:
            time.sleep(600)
        os._exit(0)
    assert os.read(ready[0], 1) == b"x"
    with pytest.raises(UserError, match="another run"):
        OutputLock().take(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with OutputLock() as lock:
        lock.take(tmp_path)
    os.write(wait[1], b"x")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def none(_fd: int, *, wait: bool = False) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_flock", none)
    with OutputLock() as first, OutputLock() as second:
        first.take(tmp_path)
        second.take(tmp_path)
    assert not is_abandoned(tmp_path)  # it may be another's: only what is old is nobody's
    os.utime(tmp_path, (0, 0))
    assert is_abandoned(tmp_path)
    with open(tmp_path / "counts", "w") as file, alone(file.fileno()):
        file.write("1")
    assert (tmp_path / "counts").read_text() == "1"


READER = """
import sys
from convscale.locks import alone
with open(sys.argv[1]) as file:
    print("here", flush=True)
    with alone(file.fileno()):
        print(file.read())
"""


def test_who_reads_a_file_waits_for_who_writes_it(tmp_path: Path) -> None:
    with open(tmp_path / "counts", "w") as file, alone(file.fileno()):
        other = subprocess.Popen([sys.executable, "-c", READER, tmp_path / "counts"], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        time.sleep(0.3)
        file.write("whole")
        file.flush()
    said, _ = other.communicate(timeout=60)
    assert said == "whole\n"


def _as_on_nfs(fd: int) -> None:
    """A lock is one of a byte range there, which needs a file that is open for writing (flock(2), "NFS details")."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_on_nfs_the_lock_stands_on_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_flock", _as_on_nfs)
    run = tmp_path / "run"
    run.mkdir()
    with OutputLock() as lock:
        lock.take(run)
        assert lock.note.startswith(f"output folder {run} is not locked, since its file system has no locks; see that")
        new_output_dir(run)
        lock.take(run)
        assert lock.note == ""
        for _ in range(2):  # it stays where it stands
            with pytest.raises(UserError, match="is being written by another run"):
                OutputLock().take(run)
            new_output_dir(run, overwrite=True)
        (tmp_path / "rows.csv").touch()
        with OutputLock() as file:
            file.take(tmp_path / "rows.csv", "output")
            with pytest.raises(UserError, match=r"output \S+rows.csv is being written by another run"):
                OutputLock().take(tmp_path / "rows.csv", "output")
    with whole_folder(tmp_path / "art", check=lambda: None) as staging:
        (room,) = tmp_path.glob(".art.*.tmp")
        assert not is_abandoned(room)
        with pytest.raises(UserError, match="is being written"), whole_folder(tmp_path / "art", check=lambda: None):
            pytest.fail("it begins")
        (staging / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["art", "rows.csv", "run"]


def test_who_has_no_lock_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_fd: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "_flock", none)
    run, told = tmp_path / "run", list[Any]()
    request: Any = SimpleNamespace(output=run, keep=2, overwrite=True, resume=False, tensorboard=False, track=None)
    job: Any = SimpleNamespace(output=run, net=nn.Linear(1, 1), processes=Processes(), stop=lambda: False)
    with OutputLock() as lock:
        begin_folder(request, job, Relay(told.append), lock)
    why = f"output folder {run} is not locked, since its file system has no locks; see that no other run writes there"
    assert told == [{"kind": "note", "text": why}]


def test_what_is_being_written_is_not_abandoned(tmp_path: Path) -> None:
    target = tmp_path / "step-00000001"
    with whole_folder(target) as staging:
        (room,) = tmp_path.glob(".step-00000001.*.tmp")
        assert not is_abandoned(room)
        (staging / "a").write_text("a")
    assert (target / "a").read_text() == "a"
    assert is_abandoned(target)
    assert not is_abandoned(tmp_path / "none")


def test_overwriting_keeps_the_folder_that_the_lock_stands_on(tmp_path: Path) -> None:
    run = new_output_dir(tmp_path / "run")
    (run / "train").mkdir()
    (run / "train" / "log.jsonl").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jpg").write_text("x")
    (run / "link").symlink_to(tmp_path / "data")
    before = run.stat().st_ino
    with OutputLock() as lock:
        lock.take(run)
        new_output_dir(run, overwrite=True)
        assert run.stat().st_ino == before
        with pytest.raises(UserError, match="another run"):
            OutputLock().take(run)
    assert [path.name for path in run.iterdir()] == [".convscale"]
    assert (tmp_path / "data" / "x.jpg").read_text() == "x"  # a link is taken off, not followed


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_save_and_end(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    muted: list[bool] = []
    monkeypatch.setattr(stop, "_leave_terminal", lambda: muted.append(True))
    before = signal.getsignal(number)
    with stop.stop_signal(True) as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert signal.getsignal(number) is before
    assert muted == [True] * (number == signal.SIGHUP)


def test_a_run_under_nohup_does_not_end_with_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.stop_signal(True) as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


TALKER = """
import sys, time
from convscale.learn.stop import stop_signal
with stop_signal(True) as asked:
    print("ready", flush=True)
    while not asked():
        time.sleep(0.05)
    print("saved", flush=True)  # to a terminal that is gone: an error, without care
open(sys.argv[1], "w").write("saved")
"""


def test_a_closed_terminal_is_survived_until_the_state_is_saved(tmp_path: Path) -> None:
    master, slave = os.openpty()
    command = [sys.executable, "-c", TALKER, str(tmp_path / "state")]
    with subprocess.Popen(command, stdout=slave, stderr=slave, stdin=subprocess.DEVNULL) as run:
        os.close(slave)
        said = b""
        while not said.endswith(b"\n"):  # the whole line: a terminal that goes in its middle fails the print itself
            said += os.read(master, 64)
        assert said == b"ready\r\n"
        os.close(master)
        run.send_signal(signal.SIGHUP)
        assert run.wait(60) == 0
    assert (tmp_path / "state").read_text() == "saved"
