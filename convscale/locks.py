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
    itself, so nothing is left behind. Where the file system has no locks, none is held and nothing is said.
    """

    def __init__(self) -> None:
        self._fd: int | None = None

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
            fd = os.open(path, _OPEN)
        except OSError:  # who writes will say why
            return
        try:
            _flock(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in _BUSY:
                raise UserError(
                    f"{what} {os.fspath(path)} is being written by another run; wait for it, or name another"
                ) from error
            return
        self._fd = fd
        _HELD.add(fd)

    def release(self) -> None:
        """Let it go."""
        if self._fd is not None and self._fd in _HELD:
            _HELD.discard(self._fd)
            os.close(self._fd)
        self._fd = None

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes a temporary folder or file any more: its lock is free, or it is old where there are no
    locks.
    """
    try:
        fd = os.open(path, _OPEN)
    except OSError:
        return False
    try:
        _flock(fd)
    except OSError as error:
        return error.errno not in _BUSY and time.time() - os.fstat(fd).st_mtime > _OLD_S
    finally:
        os.close(fd)
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
