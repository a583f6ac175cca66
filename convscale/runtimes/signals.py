"""A thread's alternate signal stack, kept as it was while OpenVINO loads.

OpenVINO's CPU plugin gives the thread that loads it an alternate stack for signal handlers, and frees that memory when
the plugin is unloaded. Where another thread lets go of the last network, the first thread is left with a stack that no
longer exists, and its next signal (the end of a data loader's worker is one) kills the process with SIGSEGV. A thread's
own stack is large enough for handlers, so the plugin's one is taken off at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Give this thread its former alternate signal stack back, or none. Elsewhere than on Linux nothing is done."""
    if sys.platform != "linux":
        yield
        return
    change = ctypes.CDLL(None).sigaltstack
    before = _Stack()
    change(None, ctypes.byref(before))
    try:
        yield
    finally:
        change(ctypes.byref(before), None)
