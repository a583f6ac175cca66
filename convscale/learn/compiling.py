"""``compile=auto``: whether ``torch.compile`` pays for the rest of a run, on a GPU with CUDA graphs or without them,
measured once the run's own steps are timed.

What is measured leaves no trace: norms' statistics, gradients and generators are put back, and weights are not changed.
So a run that is not compiled in the end is the one that it would have been without asking.

Of several processes none tries. Their passes are full of exchanges (norms' statistics, gradients), and a trial that
fails in one of them, say by its memory, would leave the others in one; without the exchanges it would time another
network. And what would be kept takes another wrapping than what is not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from convscale.errors import first_line
from convscale.learn.graphs import Graphed, drop_graphs, has_graphs, other_graphs
from convscale.learn.job import Job
from convscale.learn.schedule import epoch_at, image_size_at
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
"""Steps that are left out of a timing, and those that are timed. CUDA graphs are recorded with the second."""
MODES = ("default", "graphs")
"""How ``torch.compile`` is asked: as it is, or for CUDA graphs beside."""
SEVERAL = "several processes train together; compile=true would be right where it pays on one"
CPU = torch.device("cpu")
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
    mode: str = "default"
    """Of ``MODES`` what ``gain`` and ``compile_seconds`` are of, and how the rest is computed where it is compiled."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"compile.mode is {self.mode!r}; it must be {' or '.join(MODES)}")


class _Trial(NamedTuple):
    """The network as it was timed."""

    forward: nn.Module
    """How it is called."""
    seconds: float
    """Of a forward and backward pass."""
    compiling: float
    """Seconds; 0 where it is called as it is."""


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

    @property
    def graph(self) -> tuple[object, bool]:
        """What its compiled code is for at present."""
        ...


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
        device: where.
        world: processes that train together.
    """

    def __init__(
        self,
        choice: bool | str,
        forward: nn.Module,
        autocast: Callable[[], AbstractContextManager[object]],
        device: torch.device = CPU,
        world: int = 1,
    ) -> None:
        self.found: Compiled | None = None
        """What ``auto`` came to; None: not yet, or it was not asked for."""
        asked = {True: "default", "graphs": "graphs"}.get(choice)
        self.forward = forward if asked is None else compiled(forward, asked)
        self._open, self._autocast, self._device = choice == "auto", autocast, device
        self._alone = world == 1
        self._steps: list[tuple[float, float]] = []
        self._modes = MODES[:1]  # that are tried
        self._graph: object = None

    def record(self) -> dict[str, object]:
        """What a checkpoint says of it."""
        return {} if self.found is None else {"compile": asdict(self.found)}

    def go_on(self, kept: Mapping[str, Any] | None) -> nn.Module:
        """Take up what an earlier part of a run came to, where nothing is decided yet; how the network is called."""
        if self._open and kept is not None and self._can(found := Compiled(**kept)):
            self.found, self._open = found, False
            self.forward = compiled(self.forward, found.mode) if found.kept else self.forward
        return self.forward

    def _can(self, found: Compiled) -> bool:
        """Whether this machine can go on so, and this process alone."""
        able = "compiled" in installed_runtimes() and (found.mode == "default" or has_graphs(self._device))
        return (able and self._alone) or not found.kept

    def after(self, trainer: Trained, seconds: float, waited: float) -> float:
        """Batches up to an optimiser step took so long, waiting for images included: decide, once there is enough to go
        by, how the next are computed.

        Steps of another image size, or with other layers frozen, are no measure of those to come: counting begins anew.

        Returns:
            seconds that a trial took.
        """
        if not self._open:
            return 0.0
        if not self._alone:
            self._tell(trainer, Compiled(kept=False, why=f"not tried: {SEVERAL}"))
            return 0.0
        caught, trainer.forward = trainer.forward, self.forward
        if trainer.graph != self._graph:
            self._graph, self._steps = trainer.graph, []
            return 0.0
        batches = trainer.job.recipe.accumulate
        self._steps.append((seconds / batches, waited / batches))
        if isinstance(caught, _Caught) and caught.inputs:
            started = clock()
            self._tell(trainer, self._tried(trainer, caught.inputs))
            return clock() - started
        if len(self._steps) >= WARM + TIMED:
            self._modes, why = self._hopeful(trainer)
            if why:
                self._tell(trainer, Compiled(kept=False, why=f"not tried: {why}"))
            else:
                trainer.forward = _Caught(self.forward)
        return 0.0

    def _hopeful(self, trainer: Trained) -> tuple[tuple[str, ...], str]:
        """Of ``MODES`` those whose trial the time left could pay for; and why it can not, where there is none."""
        if not trainer.steady:
            return (), "what the network computes changes from step to step, and would be compiled over and over"
        steps = self._steps[WARM:]
        whole, waited = (statistics.fmean(each) for each in zip(*steps, strict=True))
        if waited > MOST_WAITING * whole:
            return (), f"{waited / whole:.0%} of a step is waiting for images"
        seconds, left = statistics.median(took - idle for took, idle in steps), _steps_left(trainer, whole)
        saved, cost = left * seconds * LEAST_GAIN, COMPILE_S * (1 + _graphs_to_come(trainer))
        if saved > cost:  # what is compiled again later is what is kept, not both
            return MODES if has_graphs(self._device) and saved > cost + COMPILE_S else MODES[:1], ""
        return (), (
            f"{LEAST_GAIN:.0%} of {left:,.0f} steps of {seconds:.3g} s would not pay for {cost:.0f} s of compiling"
        )

    def _tried(self, trainer: Trained, inputs: tuple[Any, ...]) -> Compiled:
        """The network timed as it is and compiled, on the same inputs; what ends the run sooner is taken."""
        trials, failed = dict[str, _Trial](), ""
        others = "graphs" in self._modes and other_graphs()
        with _traceless(trainer):
            for mode in ("", *self._modes):
                trial = self._trial(trainer, mode, inputs)
                if isinstance(trial, str):
                    failed = trial
                    break
                trials[mode] = trial
        if "default" not in trials:
            return Compiled(kept=False, why=f"not kept: the trial failed ({failed})")
        found = self._judged(trainer, trials, failed)
        if found.kept:
            trainer.forward = self.forward = trials[found.mode].forward
        if "graphs" in self._modes and not others and not (found.kept and found.mode == "graphs"):
            drop_graphs()
        return found

    def _judged(self, trainer: Trained, trials: Mapping[str, _Trial], failed: str) -> Compiled:
        """What is made of trials; ``failed`` says why that of CUDA graphs is missing, where it was tried."""
        again = _graphs_to_come(trainer)
        left = _steps_left(trainer, statistics.fmean(took for took, _ in self._steps[WARM:]))
        tried = [mode for mode in MODES if mode in trials]
        mode = min(tried, key=lambda mode: trials[mode].seconds * left + trials[mode].compiling * again)
        plain, quick, took = trials[""].seconds, trials[mode].seconds, trials[mode].compiling
        gain = 1 - quick / max(plain, 1e-9)
        kept = gain > LEAST_SAVED and (plain - quick) * left > took * again
        why = f"{'kept' if kept else 'not kept'}{' as CUDA graphs' if kept and mode == 'graphs' else ''}: "
        why += f"forward and backward {1000 * plain:.3g} ms, compiled {1000 * trials['default'].seconds:.3g} ms"
        why += f", as CUDA graphs {1000 * trials['graphs'].seconds:.3g} ms" if "graphs" in trials else ""
        why += f", {left:,.0f} times to go; compiling took "
        why += " and ".join(f"{trials[mode].compiling:.1f} s" for mode in tried)
        if again:
            why += f", {again} more to come"
        if failed:
            why += f"; CUDA graphs failed ({failed})"
        return Compiled(kept=kept, why=why, gain=gain, compile_seconds=took, mode=mode)

    def _trial(self, trainer: Trained, mode: str, inputs: tuple[Any, ...]) -> _Trial | str:
        """The network timed as it is (no mode) or compiled; or what went wrong."""
        try:
            forward = compiled(self.forward, mode) if mode else self.forward
            first, each = self._timed(trainer, forward, inputs)
        except Exception as error:  # no compiler, a network that can not be compiled, too little memory
            return first_line(error) or type(error).__name__
        return _Trial(forward, each, max(0.0, first - WARM * each) if mode else 0.0)

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


def compiled(net: nn.Module, mode: str = "default") -> nn.Module:
    """The network behind ``torch.compile`` in one of ``MODES``; it shares its parameters."""
    return Graphed(net) if mode == "graphs" else torch.compile(net)  # pyright: ignore[reportReturnType]


def _graph_at(trainer: Trained, epoch: int) -> tuple[object, bool]:
    """What an epoch's compiled code is for: the image size, and whether layers are frozen."""
    recipe = trainer.job.recipe
    return image_size_at(epoch, trainer.job.loader.image_size, recipe), epoch < recipe.freeze_epochs


def _graphs_to_come(trainer: Trained) -> int:
    """How often the network would have to be compiled again before the run's end."""
    job = trainer.job
    now = int(epoch_at(trainer.epoch, trainer.elapsed, job.max_seconds, job.recipe))
    return len({_graph_at(trainer, epoch) for epoch in range(now + 1, job.recipe.epochs)} - {trainer.graph})


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
