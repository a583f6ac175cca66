"""A run's live line for people: where it stands, how fast it is, how long it will take."""

from __future__ import annotations

import errno
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypedDict

from convscale import words
from convscale.aside import aside
from convscale.learn.record import EpochRow

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


class NoteEvent(TypedDict):
    """What a user should know."""

    kind: Literal["note"]
    text: str
    """One line."""


class StepEvent(TypedDict):
    """After a step of the optimiser."""

    kind: Literal["step"]
    epoch: int
    """Counted from 1."""
    epochs: int
    """Of the whole run."""
    step: int
    """Batches done in this epoch."""
    steps: int
    """Batches of an epoch."""
    loss: float
    """Of the last batch; NaN where none had a loss."""
    lr: float
    """Learning rate."""
    images_per_s: float
    """In this epoch so far."""
    wait_share: float
    """Share of this epoch's time so far that was waiting for images."""
    seconds_left: float
    """To the run's end, by what is done."""
    best: float | None
    """The best validation result; None before the first."""


class EpochEvent(EpochRow):
    """After an epoch: its row of the history, and where the run stands."""

    kind: Literal["epoch"]
    epochs: int
    """Of the whole run."""
    best: float
    """The best validation result."""
    seconds_left: float
    """To the run's end, by what is done."""


Event = NoteEvent | StepEvent | EpochEvent
"""A dictionary whose ``kind`` says which of the three it is."""
Progress = Callable[[Event], None]
"""Called with every event of a run."""


class LiveProgress:
    """A progress function that keeps one line alive on a terminal; elsewhere it prints a plain line per epoch, and one
    every ``interval_s`` within. What can not be told does not end the run.

    Use as a context manager, so that the line is finished whatever happens.
    """

    def __init__(self, label: str = "", *, interval_s: float = 30.0, console: Console | None = None) -> None:
        from rich.console import Console

        self.label, self.interval_s = label, interval_s
        if console is None:
            console = Console(stderr=True, highlight=False, soft_wrap=True)
            console.on_broken_pipe = self._unread
        self.console = console
        self._status: Status | None = None
        self._last = 0.0

    def __enter__(self) -> LiveProgress:
        if self.console.is_terminal:
            self._status = self.console.status(self.label or "training")
            with aside():
                self._status.start()
        self._last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            with aside():
                self._status.stop()
            self._status = None

    def __call__(self, event: Event) -> None:
        with aside():
            self._tell(event)

    def _tell(self, event: Event) -> None:
        now = time.monotonic()
        if event["kind"] == "note":
            lines = map(words.safe, event["text"].split("\n"))
            self.console.print("\n".join(lines), markup=False)
        elif event["kind"] == "epoch":
            self.console.print(self._prefix() + epoch_line(event), markup=False)
            self._last = now
        elif self._status is not None:
            if now - self._last > 0.2:
                self._status.update(self._prefix() + step_line(event))
                self._last = now
        elif now - self._last > self.interval_s:
            self.console.print(self._prefix() + step_line(event), markup=False)
            self._last = now

    def _unread(self) -> None:
        """Nobody reads any more. rich would end the process, before a run that was told to stop has saved its state."""
        self.console.quiet = True
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _prefix(self) -> str:
        return f"{self.label}: " if self.label else ""


class Relay:
    """A progress function whose hearer may change while others hold it.

    Args:
        to: who is told.
    """

    def __init__(self, to: Progress) -> None:
        self.to = to

    def __call__(self, event: Event) -> None:
        self.to(event)


def noted(progress: Progress | None, notes: list[str]) -> Progress:
    """A progress function that keeps the notes, and passes every event on: of several processes the first one does."""
    first = int(os.environ.get("RANK", "0")) == 0

    def tell(event: Event) -> None:
        if event["kind"] == "note":
            notes.append(event["text"])
        if progress is not None and first:
            progress(event)

    return tell


def logged(progress: Progress, folder: Path) -> Progress:
    """``progress``, which also writes every epoch for TensorBoard into ``folder``."""
    from torch.utils.tensorboard import SummaryWriter

    names = {
        "train_loss": "train/loss",
        "lr": "train/lr",
        "images_per_s": "train/images_per_s",
        "val_loss": "validation/loss",
    }
    names |= {"val_top1": "validation/top1", "val_map": "validation/map"}
    writer = SummaryWriter(str(folder))

    def tell(event: Event) -> None:
        if event["kind"] == "epoch":
            for key, name in names.items():
                if event.get(key) is not None:
                    writer.add_scalar(name, event[key], event["epoch"])
            writer.flush()
        progress(event)

    return tell


def step_line(event: StepEvent) -> str:
    """``epoch 3/10, step 120/421, loss 0.812, 1,520 images/s, best 89.80 %, 4 min 10 s left``."""
    text = f"epoch {event['epoch']}/{event['epochs']}, step {event['step']}/{event['steps']}, loss {event['loss']:.3f}"
    text += f", {event['images_per_s']:,.0f} images/s"
    if event["best"] is not None:
        text += f", best {event['best']:.2%}"
    if event["wait_share"] >= 0.05:
        text += f", waiting for data {event['wait_share']:.0%}"
    return f"{text}, {words.duration(event['seconds_left'])} left"


def epoch_line(event: EpochEvent) -> str:
    """``epoch 3/10: train loss 0.812, validation loss 0.301, top-1 89.80 % (best 89.80 %), 1,520 images/s, 4 min 10 s
    left``.
    """
    metric = f"mAP {event['val_map']:.2%}" if event["val_map"] is not None else f"top-1 {event['val_top1']:.2%}"
    loss = f", validation loss {event['val_loss']:.3f}" if math.isfinite(event["val_loss"]) else ""
    left = words.duration(event["seconds_left"])
    return (
        f"epoch {event['epoch']}/{event['epochs']}: train loss {event['train_loss']:.3f}{loss}, {metric} "
        f"(best {event['best']:.2%}), {event['images_per_s']:,.0f} images/s, {left} left"
    )
