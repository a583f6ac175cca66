"""Several processes that train one network: started by torchrun, one per GPU (nccl) or on CPUs (gloo)."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from convscale.errors import UserError
from convscale.learn.recipe import Recipe

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together; with a world of 1 every method is free."""

    rank: int = 0
    """This process's number."""
    world: int = 1
    """How many there are."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def all_true(self, value: bool) -> bool:
        """Whether it is true everywhere."""
        return self.sum([float(not value)])[0] == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.world == 1:
            return values
        table = torch.tensor(values, dtype=torch.float64, device=_device())
        dist.all_reduce(table)
        return table.tolist()

    def least(self, values: torch.Tensor) -> torch.Tensor:
        """Each value's least over the processes, in its place; on the device that they talk by."""
        if self.world > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    def from_first(self, value: Value) -> Value:
        """The first process's value."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, net: torch.nn.Module) -> None:
        """Give every process the first one's weights."""
        if self.world > 1:
            for value in net.state_dict().values():
                dist.broadcast(value, src=0)

    def average(self, net: torch.nn.Module) -> None:
        """Give every process the mean of all gradients."""
        for grad in (param.grad for param in net.parameters()):
            if self.world > 1 and grad is not None:
                dist.all_reduce(grad)
                grad /= self.world

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in order of rank."""
        if self.world == 1:
            return [value]
        out = [value] * self.world
        dist.all_gather_object(out, value)
        return out


class Trouble:
    """What one process alone fails at: held until all know of it and end, so that none waits for one that is gone.

    Args:
        processes: this one among those that train together; one alone ends at once.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._error: Exception | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is raised in here is raised where all are asked next; the first counts."""
        try:
            yield
        except Exception as error:
            if self._processes.world == 1:
                raise
            self._error = self._error or error

    @property
    def rank(self) -> int:
        """This process's number where it has failed; -1: it has not."""
        return -1 if self._error is None else self._processes.rank

    def end(self, rank: int) -> None:
        """End where process ``rank``, of those that failed the last, is one at all (-1: none has failed).

        Raises:
            UserError: it has; where it is another, its own message says why.
            Exception: what was held here.
        """
        if self._error is not None:
            raise self._error
        if rank >= 0:
            raise UserError(
                f"process {rank} (counted from 0) of the {self._processes.world} that train together failed, and ends "
                "this one; its own message says why"
            )

    def settle(self) -> None:
        """End together where one has failed; asks the others."""
        if self._processes.world > 1:
            self.end(max(self._processes.gather(self.rank)))


def spread_over(net: torch.nn.Module, recipe: Recipe, *, steady: bool) -> torch.nn.parallel.DistributedDataParallel:
    """A network whose gradients are averaged over the processes while the backward pass runs.

    Gradients lie in what is sent, so that nothing is copied. The graph is said to be static where it is: not while
    layers are frozen, nor where some backward passes send nothing (accumulated batches) or a compiler cuts the graph,
    which ``compile=auto`` never comes to here.

    Args:
        net: on its device.
        recipe: what is trained.
        steady: every step uses the same parameters.
    """
    frozen = recipe.freeze_epochs > 0
    return torch.nn.parallel.DistributedDataParallel(
        net,
        find_unused_parameters=frozen,
        gradient_as_bucket_view=True,
        static_graph=steady and not frozen and recipe.accumulate == 1 and recipe.compile in (False, "auto"),
    )


def join(device: torch.device) -> tuple[Processes, torch.device]:
    """This process's place, from torchrun's environment, and its own device; joins the others the first time, until the
    process ends.

    Raises:
        UserError: one GPU is named for all of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(), device
    if device.type == "cuda" and device.index is not None:
        raise UserError(
            f"device {device} would put every process of torchrun on one GPU; give device cuda: each takes its own"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return Processes(rank=dist.get_rank(), world=dist.get_world_size()), device


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
