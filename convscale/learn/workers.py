"""Processes that make batches: what a signal does to them, and how it is told that one of them is gone."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch

from convscale.errors import UserError

_TROUBLE = (
    "dataloader worker",
    "bus error",
    "shared memory",
    "no space left",
    "ancdata",
    "too many open files",
    "unable to mmap",
)
_CAUGHT = "Caught "
"""What torch begins the message of an error with that a worker has sent; its last line is the error's own."""


def by_processes(data: torch.utils.data.Dataset[Any], workers: int, *, ahead: int) -> Iterator[Any]:
    """The items of ``data`` in order, each made by one of ``workers`` processes.

    Args:
        data: its items are whole batches.
        workers: processes, at least one.
        ahead: items that each of them makes before they are asked for.

    Raises:
        UserError: a process has ended or lacks memory, told when an item is asked for and nowhere else; or what one of
            them has raised.
    """
    try:
        yield from _items(data, workers, ahead)
    except UserError as error:
        raise _as_raised(error) from None
    except (RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[-1] if lines[0].startswith(_CAUGHT) else lines[0]
        if any(sign in reason.lower() for sign in _TROUBLE):
            advice = (
                f"memory or /dev/shm may be full: use fewer workers (now {workers}) or a smaller batch; workers=0 "
                "needs no shared memory"
            )
            raise UserError(f"a data loader process ended ({reason}); {advice}") from error
        raise


def _items(data: torch.utils.data.Dataset[Any], workers: int, ahead: int) -> Iterator[Any]:
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=ahead,
        collate_fn=_same,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    number = getattr(signal, "SIGCHLD", None)
    before = None if number is None else signal.getsignal(number)
    items = iter(loader)
    if number is not None and before is not None and signal.getsignal(number) is not before:
        # torch's handler raises wherever the main thread is when a worker dies; without it the loader looks for its
        # workers while it waits for one
        signal.signal(number, before)
    # SIGTERM, by which loaders end a process that hangs, and a program those that it leaves, does nothing to these
    rest = Finalize(None, _kill, (items._workers,), exitpriority=1)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield from items
    finally:
        items._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue] - after an error too
        rest()


def _kill(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C, the end of a terminal and often SIGTERM reach every process of a group; the run saves its state first,
    and then ends its workers. One whose parent is gone ends by itself.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def _as_raised(error: UserError) -> UserError:
    """What a worker raised, without the traceback that torch has put into its message."""
    kind, text = type(error), str(error)
    if not text.startswith(_CAUGHT):
        return error
    return kind(text.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].strip())


def _same(item: object) -> object:
    return item
