"""Where trials are to run, checked, and the engine for it."""

from __future__ import annotations

import re

from convscale.errors import UserError, check_text, check_whole
from convscale.images.splits import DataSplits
from convscale.learn.settings import usable_device
from convscale.machine import available_cores
from convscale.nas.engines.base import ENGINES, Engine, Place
from convscale.nas.engines.local import Here, Processes
from convscale.ship.cluster import check_answers


def place_for(
    *, engine: str, workers: int, address: str | None, threads: int | None, training: str, own: bool
) -> Place:
    """Where trials are to run.

    Args:
        engine: ``local`` or ``ray``.
        workers: trials at a time.
        address: of a Ray cluster; None: one of this machine.
        threads: compute threads of a trial; None: the cores over ``workers``.
        training: the device that trials are trained on. A cluster is asked for it by each trial where that lands, and
            gives it a card of its own, so that none is named by its number; this machine need not have one.
        own: the splits are in memory, so that no other process can read them.

    Raises:
        UserError: an unknown engine or device, an address that does not answer, or splits that only this process has.
    """
    check_text("engine", engine, ENGINES)
    if address is not None:
        if engine != "ray":
            raise UserError(f"address {address!r} is of a Ray cluster; give it with engine ray")
        check_answers(address)
    check_whole("workers", workers)
    if threads is not None:
        check_whole("threads_per_trial", threads)
    on_card = engine == "ray" and re.fullmatch(r"cuda(:\d+)?", training) is not None
    device = "cuda" if on_card else str(usable_device(training))
    if own and (workers > 1 or engine == "ray"):
        raise UserError("splits in memory are trained on in this process alone; give the data's folder, or workers 1")
    return Place(engine=engine, workers=workers, address=address, gpus=float(on_card), threads=threads, device=device)


def engine_for(place: Place, splits: DataSplits) -> Engine:
    """The engine of a place.

    Raises:
        UserError: a Ray cluster can not be used, or has no machine that a trial fits on.
    """
    if place.engine == "ray":
        from convscale.nas.engines.ray import Ray

        return Ray(place)
    return Processes(place.workers) if place.workers > 1 else Here(splits)


def threads_of(place: Place) -> int | None:
    """Compute threads that a job is told of; None: as many as its process has, or as Ray's machines have."""
    if place.threads is None and place.workers > 1 and place.engine == "local":
        return max(1, available_cores() // place.workers)
    return place.threads
