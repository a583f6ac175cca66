"""A line on a terminal that counts what is done of something long, and says how long the rest will take."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from convscale import words
from convscale.aside import aside
from convscale.errors import UserError

EVERY_S = 0.2
"""Between two states of the line."""
_shown = list["Live"]()
"""Lines that stand on the terminal."""


class Live:
    """Called with how many are done so far; 0 begins anew. The line goes when all are, or at :meth:`end`; where
    standard error is no terminal there is none.

    Args:
        what: things are counted, in the plural.
        total: how many there are, or what tells that once it is known; None: nobody knows.
        clock: seconds.
    """

    def __init__(
        self,
        what: str,
        total: int | Callable[[], int | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._start = self._said_at = clock()
        self._width = 0
        self.kept = 0
        """Of all, those that an earlier run had done."""

    def __call__(self, count: int, more: str = "") -> None:
        """So many are done, of which there is ``more`` to say."""
        if not _is_terminal():
            return
        now = self._clock()
        total = self._total() if callable(self._total) else self._total
        if count == 0:
            self._start = now
        elif total is not None and self.kept + count >= total:
            self.end()
        elif now - self._said_at >= EVERY_S:
            self._said_at = now
            text = progress_line(self._what, count, total, now - self._start, kept=self.kept, more=more)
            self._width = max(self._width, len(text))  # what a longer line left would stay
            self._write(f"\r{text:<{self._width}}")
            if self not in _shown:
                _shown.append(self)

    def end(self) -> None:
        """Take the line away."""
        if self._width:
            self._write(f"\r{'':<{self._width}}\r")
            self._width = 0
        if self in _shown:
            _shown.remove(self)

    def _write(self, text: str) -> None:
        with aside():
            sys.stderr.write(text)
            sys.stderr.flush()


def take_away() -> None:
    """Take away what stands there still: an error, or an interrupt, ended what was counted."""
    for line in list(_shown):
        line.end()


def _is_terminal() -> bool:
    """Whether people watch: standard error may have been closed when the process began, or since."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


def progress_line(what: str, count: int, total: int | None, seconds: float, *, kept: int = 0, more: str = "") -> str:
    """``   512 of 10,000 images, 3 bad, 4 min 10 s left``: the time by what is done here, without what an earlier run
    had done (``kept``).
    """
    done = kept + count
    if total is None or count <= 0:
        return f"{done:,} {what}{more}"
    left = seconds * max(0, total - done) / count
    return f"{done:>{len(f'{total:,}')},} of {total:,} {what}{more}, {words.duration(left)} left"


def count_aside(things: Callable[[], Iterable[object]]) -> Callable[[], int | None]:
    """How many things there are, counted in a thread beside what is done with them; None until that is known."""
    found: list[int] = []

    def count() -> None:
        with suppress(UserError, OSError):  # who uses them says so
            found.append(sum(1 for _ in things()))

    if _is_terminal():
        threading.Thread(target=count, daemon=True).start()
    return lambda: found[0] if found else None
