"""What several processes that train one network decide alike at every step, in one small exchange.

It is made late, behind the backward pass, where the device is waited for anyway, and the host waits once for both. So
it also says whether the next batch has images everywhere, where that batch has been fetched ahead. Batches that are
accumulated are asked about one by one, but for the first of a step: one that some process lacks must be left out by all
before its forward pass, which norms with shared statistics make together, and there is no exchange in between. So is
the first batch of an epoch, before which there was no step.

It also says whether a process has failed at something that it does alone (pictures that can not be read, a disk that is
full). Up to the exchange that one takes part in whatever the others do; then all end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from convscale.learn.distributed import Trouble
from convscale.learn.job import Job
from convscale.learn.loader import Batch
from convscale.learn.on_device import InTurn

_NOTHING = torch.empty(0, dtype=torch.long)


class Agreeing:
    """A run's processes at their decisions; one alone decides by itself.

    Args:
        job: processes, device, when to stop, and whether time ends the run.
    """

    def __init__(self, job: Job) -> None:
        self._processes, self._device, self._stop = job.processes, job.device, job.stop
        self.trouble = Trouble(job.processes)
        self._several = job.processes.world > 1
        self._timed = self._several and job.max_seconds is not None
        self._goes_on = True
        self._next: tuple[InTurn, bool] | None = None
        """Where the next batch comes from, and whether it has images in all processes; None: not asked yet."""
        self._sent = self._seconds = self._late = 0.0
        """Of this process's update what the exchange told of; the first process's, as all know them; what came behind
        the exchange."""

    def next_of(self, batches: InTurn) -> Batch:
        """The next batch; one without images where something is raised in its place, which ends all processes with this
        step.
        """
        with self.trouble.held():
            return next(batches)
        return Batch(images=_NOTHING, labels=_NOTHING, indices=_NOTHING)

    def have_images(self, batches: InTurn, batch: Batch) -> bool:
        """Whether the batch that ``batches`` has just given has images in all processes: all must take part in it."""
        known, self._next = self._next, None
        if known is not None and known[0] is batches:
            return known[1]
        return self._processes.all_true(len(batch.indices) > 0)

    def ask(self, values: Sequence[torch.Tensor], batches: InTurn, seconds: float) -> tuple[bool, list[float]]:
        """The one exchange of an update.

        Args:
            values: scalars on the device: the gradients' norm, then losses; none where no batch had images.
            batches: where the next batch comes from.
            seconds: that the update took so far.

        Returns:
            Whether every loss of every process is finite, and ``values`` as numbers.

        Raises:
            UserError: another process has failed.
            Exception: this one has.
        """
        if not self._several:
            numbers = torch.stack(list(values)).tolist() if values else []
            return all(map(math.isfinite, numbers[1:])), numbers
        here, filled = self._processes.first, batches.filled
        self._sent, told = seconds, self._late + seconds if here else math.inf
        goes_on = float(not self._stop()) if self.trouble.rank < 0 else -1.0 - self.trouble.rank
        flags = torch.tensor([goes_on, float(filled is not False), told], dtype=torch.float64)
        found = torch.stack(list(values)).double() if values else torch.ones(1, dtype=torch.float64)
        if self._device.type == "cuda":  # nothing here waits for the device
            flags, found = flags.pin_memory().to(self._device, non_blocking=True), found.to(self._device)
        finite = torch.isfinite(found[1:]).all().double()
        least = self._processes.least(torch.cat([finite.reshape(1), flags]))
        right, goes_on, full, self._seconds, *numbers = torch.cat([least, found]).tolist()
        self.trouble.end(-1 - round(goes_on))
        self._goes_on, self._next = goes_on > 0, None if filled is None else (batches, full > 0)
        return right > 0, numbers if values else []

    def go_on(self) -> bool:
        """Whether nobody was told to stop; of several processes, before their last exchange."""
        return self._goes_on if self._several else not self._stop()

    def spent(self, seconds: float) -> float:
        """What an update that took so long adds to the run's time. Where that ends the run it is the first process's:
        all must agree on the schedule. What its exchange could not tell of comes with the next.
        """
        if not self._timed:
            return seconds
        self._late = seconds - self._sent
        return self._seconds

    def rest(self) -> float:
        """What of the updates' time no exchange has told of yet."""
        late, self._late = self._late, 0.0
        return late
