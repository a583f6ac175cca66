"""Lines for people while something runs: one that can not be written is lost, and changes nothing about what runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def aside() -> Iterator[None]:
    """What is written in here may be lost: whoever read it is gone (``| tee log`` ends with the same Ctrl-C), or its
    disk is full. The next line is tried anew.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, OSError) and "closed file" not in str(error):
            raise
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # a stand-in, or none at all
                _let_go(stream)


def _let_go(stream: TextIO) -> None:
    """Of what a stream holds and can not write: the process' end would try it once more, and make it the exit code."""
    try:
        stream.flush()
        return
    except OSError:
        fd = stream.fileno()
    kept, nowhere = os.dup(fd), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, fd)
        stream.flush()
    finally:
        os.dup2(kept, fd)
        os.close(kept)
        os.close(nowhere)
