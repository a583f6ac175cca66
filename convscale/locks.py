"""Locks on what is written: a run's on its output, so that a second run is told instead of mixing with it, and a short
one on a file that several processes write, which the next one waits for.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from convscale.errors import UserError

MARK = ".convscale"
"""A file that tells a folder of ours from a user's own."""
_HELD: set[int] = set()
"""Open files whose locks this process holds."""
_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
"""How what is locked is opened: a pipe would wait for its writer."""
_OLD_S = 86_400.0
"""Where nothing can be locked, what has not changed for so long is nobody's."""


class OutputLock:
    """The lock of one output, taken when its folder is there and let go at the end of a ``with``.

    It is the system's own (``flock``) and goes with the process, however that ends. It stands on the folder or file
    itself, so nothing is left behind; on NFS, which locks only what is open for writing, on the folder's mark.
    """

    def __init__(self) -> None:
        self._fd: int | None = None
        self._beside: str | None = None
        self.note = ""
        """Why none is held though the output is there; empty where one is."""

    def take(self, path: str | os.PathLike[str], what: str = "output folder") -> None:
        """Lock a folder or file that is there; again for the same is nothing.

        Args:
            path: what is written.
            what: what it is, for the message.

        Raises:
            UserError: another run holds it.
        """
        if self._fd is not None or not os.path.exists(path):
            return
        try:
            self._keep(_locked(path))
        except BlockingIOError as error:
            raise _held_by_another(path, what) from error
        except PermissionError:  # who writes will say why
            return
        except OSError:
            self.note = (
                f"{what} {os.fspath(path)} is not locked, since its file system has no locks; see that no other run "
                "writes there"
            )

    def take_name(self, path: str | os.PathLike[str], what: str = "output folder") -> None:
        """Lock the name of what is yet to be made, by an empty file beside it that goes with the lock.

        Raises:
            UserError: another run holds it.
        """
        folder, name = os.path.split(os.fspath(path))
        beside = os.path.join(folder, f".{name}.lock" if len(os.fsencode(name)) < 250 else f".{name[:60]}.lock")
        while self._fd is None:
            try:
                fd = os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError:  # who writes will say why
                return
            try:
                _flock(fd)
                there = os.stat(beside)
            except FileNotFoundError:  # its holder took it away before it let go
                os.close(fd)
                continue
            except OSError as error:
                os.close(fd)
                if error.errno in _BUSY:
                    raise _held_by_another(path, what) from error
                with suppress(OSError):
                    os.unlink(beside)
                return
            if os.path.samestat(there, os.fstat(fd)):
                self._keep(fd)
                self._beside = beside
            else:
                os.close(fd)

    def _keep(self, fd: int) -> None:
        self._fd, self.note = fd, ""
        _HELD.add(fd)

    def release(self) -> None:
        """Let it go."""
        if self._fd is not None and self._fd in _HELD:
            if self._beside is not None:
                with suppress(OSError):
                    os.unlink(self._beside)
            _HELD.discard(self._fd)
            os.close(self._fd)
        self._fd = self._beside = None

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _held_by_another(path: str | os.PathLike[str], what: str) -> UserError:
    return UserError(f"{what} {os.fspath(path)} is being written by another run; wait for it, or name another")


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes a temporary folder or file any more: its lock is free, or it is old where there are no
    locks.
    """
    try:
        os.close(_locked(path))
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        try:
            return time.time() - os.stat(path).st_mtime > _OLD_S
        except OSError:
            return False
    return True


@contextmanager
def alone(fd: int) -> Iterator[None]:
    """No other process is in here with the same file: the next one waits. Where the system or the file system has no
    locks, none does.

    Args:
        fd: the open file; what is written of it must be flushed in here.
    """
    with suppress(OSError):
        _flock(fd, wait=True)
    try:
        yield
    finally:
        with suppress(OSError, ImportError):  # at once, for those too who have the file from this process
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_UN)


def _locked(path: str | os.PathLike[str]) -> int:
    """The open file that holds the lock of a folder or file; BlockingIOError where another has it, another OSError
    where there can be none.
    """
    inside = os.path.join(path, MARK) if os.path.isdir(path) else path
    for place, how in ((path, _OPEN), (inside, _OPEN | os.O_RDWR)):
        fd = os.open(place, how)
        try:
            _flock(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in _BUSY:
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), os.fspath(path)) from error
            if error.errno != errno.EBADF:  # NFS, of what is open for reading alone
                raise
        else:
            return fd
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), os.fspath(path))


def _flock(fd: int, *, wait: bool = False) -> None:
    """Lock an open file; where another process has it, ``wait`` for it, or raise OSError at once."""
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "no locks on this system") from None
    fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _let_go_in_child() -> None:
    """A forked process, such as a loader's worker, must not keep a lock when its parent is gone."""
    for fd in _HELD:
        with suppress(OSError):
            os.close(fd)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
