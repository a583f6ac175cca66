"""What all engines are like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from convscale.nas.trial import Job, More, Result

ENGINES = ("local", "ray")
DEATHS = 3
"""How often a job may take its process with it before it counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where trials are to run."""

    engine: str = "local"
    """``local`` or ``ray``."""
    workers: int = 1
    """Trials at a time."""
    address: str | None = None
    """Of a Ray cluster; None: one of this machine."""
    gpus: float = 0.0
    """GPUs that a trial takes on a Ray cluster; it sees no other."""
    threads: int | None = None
    """Compute threads of a trial; None: the cores of this machine, or of the cluster, over ``workers``."""
    device: str = "cpu"
    """What trials are trained on."""


class Engine(Protocol):
    """Runs jobs and gives their results as they come."""

    def run(self, jobs: Sequence[Job], more: More) -> Iterator[Result]:
        """Results in the order in which they are there. No job is begun once ``more`` says so; those begun end."""
        ...

    def close(self) -> None:
        """Let everything go."""
        ...
