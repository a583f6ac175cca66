"""``compile=auto``: whether ``torch.compile`` pays for the rest of a run, measured once the run's own steps are timed.

What is measured leaves no trace: norms' statistics, gradients and generators are put back, and weights are not changed.
So a run that is not compiled in the end is the one that it would have been without asking.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from convscale.errors import first_line
from convscale.learn.job import Job
from convscale.learn.schedule import image_size_at
from convscale.runtimes.base import installed_runtimes

LEAST_GAIN = 0.1
"""Share of a step that compiling is taken to save, before it is tried. An assumption."""
COMPILE_S = 60.0
"""Seconds that compiling forward and backward is taken to need, before it is tried. An assumption."""
LEAST_SAVED = 0.02
"""A share of a step below this is not told from the timing's own spread."""
MOST_WAITING = 0.5
"""Share of a step that may be waiting for images: above it a faster network would wait longer, and end no sooner."""
WARM, TIMED = 3, 10
"""Steps that are left out of a timing, and those that are timed."""
clock = time.perf_counter


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What ``compile=auto`` came to."""

    kept: bool
    """The rest of the run is compiled."""
    why: str
    """For people."""
    gain: float | None = None
    """Share of a forward and backward pass that it saves, below 0 where it is slower; None: not measured."""
    compile_seconds: float | None = None
    """What compiling took; None: not tried, or it failed."""


class Trained(Protocol):
    """What is to be known of a trainer; ``forward`` is how it calls its network."""

    job: Job
    net: nn.Module
    forward: nn.Module
    steady: bool
    steps_per_epoch: int
    epoch: int
    step: int
    elapsed: float


class _Caught(nn.Module):
    """The network as it is called, which keeps what it was called with."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.inputs = net, tuple[Any, ...]()

    def forward(self, *inputs: Any) -> Any:
        self.inputs = inputs
        return self.net(*inputs)


class Compiling:
    """How a trainer calls its network: as it is, compiled, or as a trial after its first steps shows (``auto``).

    Args:
        choice: the recipe's ``compile``.
        forward: the network as it is called.
        autocast: gives the context that it is called in.
    """

    def __init__(
        self, choice: bool | str, forward: nn.Module, autocast: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.found: Compiled | None = None
        """What ``auto`` came to; None: not yet, or it was not asked for."""
        self.forward = compiled(forward) if choice is True else forward
        self._open, self._autocast = choice == "auto", autocast
        self._steps: list[tuple[float, float]] = []
        self._graph: object = None

    def record(self) -> dict[str, object]:
        """What a checkpoint says of it."""
        return {} if self.found is None else {"compile": asdict(self.found)}

    def go_on(self, kept: Mapping[str, Any] | None) -> nn.Module:
        """Take up what an earlier part of a run came to, where nothing is decided yet; how the network is called."""
        if self._open and kept is not None and (not kept["kept"] or "compiled" in installed_runtimes()):
            self.found, self._open = Compiled(**kept), False
            self.forward = compiled(self.forward) if self.found.kept else self.forward
        return self.forward

    def after(self, trainer: Trained, seconds: float, waited: float) -> float:
        """Batches up to an optimiser step took so long, waiting for images included: decide, once there is enough to go
        by, how the next are computed.

        Steps of another image size, or with other layers frozen, are no measure of those to come: counting begins anew.

        Returns:
            seconds that a trial took.
        """
        if not self._open:
            return 0.0
        caught, trainer.forward = trainer.forward, self.forward
        if (graph := _graph_at(trainer, trainer.epoch)) != self._graph:
            self._graph, self._steps = graph, []
            return 0.0
        batches = trainer.job.recipe.accumulate
        self._steps.append((seconds / batches, waited / batches))
        if isinstance(caught, _Caught) and caught.inputs:
            started = clock()
            self._tell(trainer, self._tried(trainer, caught.inputs))
            return clock() - started
        if len(self._steps) >= WARM + TIMED:
            if why := trainer.job.processes.from_first(self._hopeless(trainer)):
                self._tell(trainer, Compiled(kept=False, why=f"not tried: {why}"))
            else:
                trainer.forward = _Caught(self.forward)
        return 0.0

    def _hopeless(self, trainer: Trained) -> str:
        """Why the time left can not pay for compiling; empty: it could."""
        if not trainer.steady:
            return "what the network computes changes from step to step, and would be compiled over and over"
        steps = self._steps[WARM:]
        whole, waited = (statistics.fmean(each) for each in zip(*steps, strict=True))
        if waited > MOST_WAITING * whole:
            return f"{waited / whole:.0%} of a step is waiting for images"
        seconds, left = statistics.median(took - idle for took, idle in steps), _steps_left(trainer, whole)
        if left * seconds * LEAST_GAIN > (cost := COMPILE_S * (1 + _graphs_to_come(trainer))):
            return ""
        return f"{LEAST_GAIN:.0%} of {left:,.0f} steps of {seconds:.3g} s would not pay for {cost:.0f} s of compiling"

    def _tried(self, trainer: Trained, inputs: tuple[Any, ...]) -> Compiled:
        """The network timed as it is and compiled, on the same inputs; what ends the run sooner is taken."""
        processes, failed, took, plain, quick = trainer.job.processes, "", 0.0, 1.0, 1.0
        fast = self.forward
        with _traceless(trainer):
            try:
                _, plain = self._timed(trainer, self.forward, inputs)
                fast = compiled(self.forward)
                first, quick = self._timed(trainer, fast, inputs)
                took = max(0.0, first - WARM * quick)
            except Exception as error:  # no compiler, a network that can not be compiled, too little memory
                failed = first_line(error) or type(error).__name__
        if not processes.all_true(not failed):
            return Compiled(kept=False, why=f"not kept: the trial failed ({failed or 'in another process'})")
        plain, quick, took = processes.from_first((plain, quick, took))
        gain, again = 1 - quick / max(plain, 1e-9), _graphs_to_come(trainer)
        left = _steps_left(trainer, statistics.fmean(took for took, _ in self._steps[WARM:]))
        kept = processes.from_first(gain > LEAST_SAVED and (plain - quick) * left > took * again)
        why = f"{'kept' if kept else 'not kept'}: forward and backward {1000 * plain:.3g} ms, compiled "
        why += f"{1000 * quick:.3g} ms, {left:,.0f} times to go; compiling took {took:.1f} s"
        if again:
            why += f", {again} more to come"
        if kept:
            trainer.forward = self.forward = fast
        return Compiled(kept=kept, why=why, gain=gain, compile_seconds=took)

    def _timed(self, trainer: Trained, forward: nn.Module, inputs: tuple[Any, ...]) -> tuple[float, float]:
        """Seconds of the first ``WARM`` forward and backward passes together, and of one of those after them."""
        times = []
        for _ in range(WARM + TIMED):
            before = clock()
            with self._autocast():
                outputs = forward(*inputs)
            outputs.float().square().mean().backward()
            trainer.net.zero_grad(set_to_none=True)
            if trainer.job.device.type == "cuda":
                torch.cuda.synchronize(trainer.job.device)
            times.append(clock() - before)
        return sum(times[:WARM]), statistics.median(times[WARM:])

    def _tell(self, trainer: Trained, found: Compiled) -> None:
        self.found, self._open = found, False
        trainer.job.progress({"kind": "note", "text": f"compile=auto, {found.why}"})


def compiled(net: nn.Module) -> nn.Module:
    """The network behind ``torch.compile``; it shares its parameters."""
    return torch.compile(net)  # pyright: ignore[reportReturnType]


def _graph_at(trainer: Trained, epoch: int) -> tuple[object, bool]:
    """What an epoch's compiled code is for: the image size, and whether layers are frozen."""
    recipe = trainer.job.recipe
    return image_size_at(epoch, trainer.job.loader.image_size, recipe), epoch < recipe.freeze_epochs


def _graphs_to_come(trainer: Trained) -> int:
    """How often the network would have to be compiled again before the run's end."""
    epochs = range(trainer.epoch, trainer.job.recipe.epochs)
    return len({_graph_at(trainer, epoch) for epoch in epochs} - {_graph_at(trainer, trainer.epoch)})


def _steps_left(trainer: Trained, seconds: float) -> float:
    """Batches to the run's end, which may be set by time; ``seconds`` is what one takes."""
    job, per_epoch = trainer.job, trainer.steps_per_epoch
    steps = float((job.recipe.epochs - trainer.epoch) * per_epoch - trainer.step)
    if job.max_seconds is not None:
        steps = min(steps, max(0.0, job.max_seconds - trainer.elapsed) / max(seconds, 1e-9))
    return steps


@contextmanager
def _traceless(trainer: Trained) -> Iterator[None]:
    """Passes in here change neither norms' statistics nor generators, and leave no gradient, as after a step."""
    device = trainer.job.device
    buffers = list(trainer.net.buffers())
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            trainer.net.zero_grad(set_to_none=True)
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
