"""Trials as tasks of a Ray cluster: a local one, or one whose address is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from convscale.errors import UserError, first_line, naming_extras
from convscale.machine import available_cores, import_path
from convscale.nas.engines.base import DEATHS, Place
from convscale.nas.trial import Job, More, Result, run_job
from convscale.ship.cluster import begin


def _task(job: dict[str, Any]) -> dict[str, Any]:
    """A job where it lands; the data is read there from the same place."""
    return run_job(Job(**job)).to_dict()


def _most_threads(machines: Sequence[tuple[int, int]], workers: int) -> int:
    """The most cores that each of ``workers`` trials at a time can have, or of as many as there are cards for.

    Args:
        machines: cores of each, and trials that its cards would take.
    """
    side_by_side = min(workers, sum(trials for _, trials in machines))
    for threads in range(max(cores for cores, _ in machines), 1, -1):
        if sum(min(cores // threads, trials) for cores, trials in machines) >= side_by_side:
            return threads
    return 1


class Ray:
    """Tasks with their cores and GPUs; those of workers and machines that die are run again by Ray.

    Raises:
        UserError: the address does not answer, or no machine has what a trial takes.
    """

    def __init__(self, place: Place) -> None:
        with naming_extras("engine ray"):
            import ray
        self.ray, self.place = ray, place
        self.mine = not ray.is_initialized()
        if self.mine:
            cores = max(available_cores(), place.workers * (place.threads or 1))
            begin(ray, place.address, cores=cores, environment={"PYTHONPATH": import_path()})
        try:
            self.threads = self._threads()
        except UserError:
            self.close()
            raise

    def _threads(self) -> int:
        """Cores of a trial, which it takes and computes with: as asked for, else as many as let all workers that there
        are cards for run at a time, each on one machine.

        Raises:
            UserError: no machine has as many, or a GPU where trials are trained on one: Ray would wait for ever.
        """
        place, alive = self.place, [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        machines = [
            (int(each.get("CPU", 0)), int(each.get("GPU", 0) / place.gpus) if place.gpus else place.workers)
            for each in alive
            if each.get("GPU", 0) >= place.gpus
        ]
        if not machines:
            raise UserError(
                f"no machine of the Ray cluster has a GPU, and training_device is {place.device}; add one, or use cpu"
            )
        threads = place.threads or _most_threads(machines, place.workers)
        most = max(cores for cores, _ in machines)
        if most < threads:
            raise UserError(
                f"threads_per_trial is {threads}, and no machine of the Ray cluster has more than {most} cores"
                f"{' beside a GPU' if place.gpus else ''}; ask for at most as many"
            )
        return threads

    def run(self, jobs: Sequence[Job], more: More) -> Iterator[Result]:
        """As many at a time as there are workers, so that none is begun after the time is up."""
        ray, place = self.ray, self.place
        task = ray.remote(
            num_cpus=self.threads,
            num_gpus=place.gpus,
            max_calls=1 if place.gpus else 0,  # one process for each trial on a card: CUDA keeps to the first it saw
            max_retries=DEATHS,
            retry_exceptions=False,
        )(_task)
        waiting, running, begun = list(jobs), dict[Any, Job](), 0
        while waiting or running:
            while waiting and len(running) < place.workers and (not begun or more()):
                job = waiting.pop(0)
                running[task.remote(replace(job, threads=self.threads).to_dict())] = job
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
