"""What keeps a GPU busy while it trains: the next batch is fetched and copied while it computes on this one, and cuDNN
chooses its algorithms by timing them. On a CPU batches come one after the other, as they are; where several processes
must know of the next one, that is fetched before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from convscale.learn.loader import Batch

cuda = torch.cuda


class InTurn:
    """Batches as they are asked for.

    Args:
        source: where they come from; closed with this, so that its processes end.
    """

    def __init__(self, source: Iterator[Batch]) -> None:
        self.source = source

    def __next__(self) -> Batch:
        return next(self.source)

    @property
    def filled(self) -> bool | None:
        """Whether the next batch has images; None: it is not here yet. What is raised in its place has none."""
        return None

    def prepare(self) -> float:
        """Fetch what is asked for next, where that can be done meanwhile.

        Returns:
            seconds that the device had nothing to do.
        """
        return 0.0

    def close(self) -> None:
        """Let go of everything, before the source has ended too."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()


class Before(InTurn):
    """Batches as they are, the next one fetched when it is to be prepared: what is in it is known a step before."""

    def __init__(self, source: Iterator[Batch]) -> None:
        super().__init__(source)
        self._waiting: Batch | Exception | None = None

    def __next__(self) -> Batch:
        waiting, self._waiting = self._waiting, None
        if isinstance(waiting, Exception):
            raise waiting
        return next(self.source) if waiting is None else waiting

    @property
    def filled(self) -> bool | None:
        waiting = self._waiting
        return None if waiting is None else not isinstance(waiting, Exception) and _has_images(waiting)

    def prepare(self) -> float:
        before = time.perf_counter()
        if self._waiting is None:
            try:
                self._waiting = next(self.source)
            except Exception as error:  # the end among them; raised in its turn
                self._waiting = error
        return time.perf_counter() - before

    def close(self) -> None:
        self._waiting = None
        super().close()


class Ahead(InTurn):
    """Batches on a CUDA device, one ahead: from pinned memory, copied on a stream of its own while the device computes.

    Indices and messages stay on the CPU, where they are read. What the source raises is raised when its batch is asked
    for, not before.

    Args:
        source: batches on the CPU.
        device: where they go.
    """

    def __init__(self, source: Iterator[Batch], device: torch.device) -> None:
        super().__init__(source)
        self.device = device
        self.stream = cuda.Stream(device)
        self._waiting: tuple[Batch, list[torch.Tensor], Any] | Exception | None = None
        """The next batch, its tensors on the device, and the event after their copy; or what came in its place."""

    def __next__(self) -> Batch:
        if self._waiting is None:
            self._fetch()
        waiting, self._waiting = self._waiting, None
        assert waiting is not None
        if isinstance(waiting, Exception):
            raise waiting
        batch, tensors, copied = waiting
        computing = cuda.current_stream(self.device)
        computing.wait_event(copied)  # the stream waits, the host does not
        for tensor in tensors:
            _held_for(tensor, computing)
        return batch

    @property
    def filled(self) -> bool | None:
        waiting = self._waiting
        return None if waiting is None else not isinstance(waiting, Exception) and _has_images(waiting[0])

    def prepare(self) -> float:
        if self._waiting is not None:
            return 0.0
        computed = cuda.Event()
        computed.record(cuda.current_stream(self.device))
        before = time.perf_counter()
        self._fetch()
        return time.perf_counter() - before if computed.query() else 0.0

    def close(self) -> None:
        self._waiting = None
        super().close()

    def _fetch(self) -> None:
        try:
            batch = next(self.source)
        except Exception as error:  # the end among them; raised in its turn
            self._waiting = error
            return
        tensors: list[torch.Tensor] = []

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                tensors.append(_pinned(value).to(self.device, non_blocking=True))
                return tensors[-1]
            if isinstance(value, tuple):
                return tuple(map(moved, value))
            return {name: moved(each) for name, each in value.items()} if isinstance(value, dict) else value

        parts = [field.name for field in dataclasses.fields(batch) if field.name not in ("indices", "bad")]
        with cuda.stream(self.stream):
            batch = dataclasses.replace(batch, **{name: moved(getattr(batch, name)) for name in parts})
            copied = cuda.Event()
            copied.record(self.stream)
        self._waiting = batch, tensors, copied


def _has_images(batch: Batch) -> bool:
    return len(batch.indices) > 0


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """In memory that the device copies from by itself; PyTorch keeps it until the copy is done."""
    return tensor.pin_memory() if tensor.numel() else tensor


def _held_for(tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Its memory, which belongs to the stream that copied, is given to nobody before ``stream`` has used it."""
    tensor.record_stream(stream)


def in_time(source: Iterator[Batch], device: torch.device, *, several: bool = False) -> InTurn:
    """Batches for a device: one ahead on CUDA; known a step before where ``several`` processes must agree on them."""
    if device.type == "cuda":
        return Ahead(source, device)
    return Before(source) if several else InTurn(source)


@contextmanager
def chosen_algorithms(device: torch.device) -> Iterator[None]:
    """cuDNN times its algorithms for a shape that it meets first, as in ``measure``; the setting is put back."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
