"""Numbers on the command line: every one is finite and within bounds, or told in one line before a command begins."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

from convscale.errors import MOST_THREADS, MOST_WHOLE, UserError

_COUNTED = ("threads", "workers")


def with_numbers_checked(command: Callable[..., object], options: Mapping[str, str]) -> Callable[..., object]:
    """A command's function behind the check of its numbers; its own checks come after.

    Args:
        command: takes its options by keyword.
        options: what each keyword is called on the command line.
    """

    @functools.wraps(command)
    def checked(*args: object, **values: object) -> object:
        for name, value in values.items():
            for each in value if isinstance(value, list | tuple) else (value,):
                _check(options.get(name, name), each, MOST_THREADS if name in _COUNTED else MOST_WHOLE)
        return command(*args, **values)

    return checked


def _check(option: str, value: object, most: int) -> None:
    """Refuse a number beyond the bounds; what is no number is none of this."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value) or abs(value) > most:
        kind = "whole number" if isinstance(value, int) else "finite number"
        raise UserError(f"{option} is {value!r}; it must be a {kind} of at most {most}")
