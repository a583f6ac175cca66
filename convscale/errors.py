"""The one exception for what a user can put right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: one line that says what was wrong, the value, and what would be right.

    The command line prints it and exits with code 2; nothing else is caught there, so our own mistakes keep their
    traceback.
    """


class Stopped(UserError):
    """A run was told to stop and saved its state; the command line exits with 130, as after Ctrl-C."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The end of an unknown-name message: `` (nearest: a, b)``, or all known names when there are few and none is
    close.
    """
    known = list(known)
    close = get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return f" (nearest: {', '.join(close)})"
    return f" (known: {', '.join(sorted(known))})" if len(known) <= 24 else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
