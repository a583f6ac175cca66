"""Trials as tasks of a Ray cluster: a local one, or one whose address is given."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from convscale.errors import UserError, first_line, naming_extras
from convscale.nas.engines.base import DEATHS, Place
from convscale.nas.trial import Job, More, Result, run_job

_PATIENCE_S = 5.0
"""Seconds in which a cluster's address must answer."""


def _task(job: dict[str, Any]) -> dict[str, Any]:
    """A job where it lands; the data is read there from the same place."""
    return run_job(Job(**job)).to_dict()


class Ray:
    """Tasks with their cores and GPUs; those of workers and machines that die are run again by Ray.

    Raises:
        UserError: the address does not answer.
    """

    def __init__(self, place: Place) -> None:
        with naming_extras("engine ray"):
            import ray
        self.ray, self.place = ray, place
        self.mine = not ray.is_initialized()
        if not self.mine:
            return
        path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {"env_vars": {"PYTHONPATH": path}}
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": env}
        if place.address is None:
            threads = place.threads or 1
            ray.init(num_cpus=place.workers * threads, include_dashboard=False, **quiet)
            return
        check_answers(place.address)
        try:
            ray.init(address=place.address, **quiet)
        except Exception as error:
            raise UserError(
                f"the Ray cluster at {place.address} can not be used: {first_line(error)}; start one with `ray start "
                "--head`, or leave the address out"
            ) from error

    def run(self, jobs: Sequence[Job], more: More) -> Iterator[Result]:
        """As many at a time as there are workers, so that none is begun after the time is up."""
        ray, place = self.ray, self.place
        task = ray.remote(_task).options(
            num_cpus=place.threads or 1, num_gpus=place.gpus, max_retries=DEATHS, retry_exceptions=False
        )
        waiting, running, begun = list(jobs), dict[Any, Job](), 0
        while waiting or running:
            while waiting and len(running) < place.workers and (not begun or more()):
                job = waiting.pop(0)
                running[task.remote(job.to_dict())] = job
                begun += 1
            if not running:
                return
            (ready, *_), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(ready)
            try:
                yield Result.from_dict(ray.get(ready))
            except Exception as error:  # Ray's own kinds, each with its reason
                yield Result(number=job.number, failed=f"on the cluster: {first_line(error)}")

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self.mine and self.ray.is_initialized():
            self.ray.shutdown()


def check_answers(address: str) -> None:
    """
    Raises:
        UserError: nobody listens at ``host:port``; ``auto`` and Ray's own ``ray://`` addresses are left to Ray.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"Ray address {address!r} is none; host:port, ray://host:port or auto would be right")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({first_line(error)}); start one with `ray start --head`, or leave "
            "the address out"
        ) from error
