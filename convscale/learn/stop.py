"""Ending a run on a signal, with its state saved."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)


def _leave_terminal() -> None:
    """What is still said goes nowhere: to write to a terminal that is gone is an error, and would end the run before it
    has saved.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(fd).st_mode):
                os.dup2(nowhere, fd)
    os.close(nowhere)


@contextmanager
def stop_signal(wanted: bool) -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM, SIGHUP (the terminal was closed) and a first Ctrl-C ask the run to save and end instead of
    killing it; only where there is a folder to save into.
    """
    asked = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, _frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        if number == _HANGUP:
            _leave_terminal()

    known = [signal.SIGTERM, signal.SIGINT, *([] if _HANGUP is None else [_HANGUP])]
    wanted_signals = [
        number for number in known if signal.getsignal(number) is not signal.SIG_IGN
    ]  # as nohup and & set it
    before = {number: signal.signal(number, ask) for number in wanted_signals}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
