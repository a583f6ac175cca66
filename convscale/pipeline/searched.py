"""A baseline of the user's own before the rest of the way: ``fit``'s search."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from convscale.conditions import BEST, Conditions
from convscale.errors import UserError, check_number
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits
from convscale.nas.request import space_for
from convscale.nas.space import SearchSpace
from convscale.nas.study import search
from convscale.pipeline.place import checked_output
from convscale.pipeline.request import FitRequest
from convscale.runtimes.base import file_runtimes
from convscale.show.search_report import write_search_report


def with_baseline(asked: FitRequest, minutes: float, space: str | os.PathLike[str] | None = None) -> FitRequest:
    """The request with the best network of a search as its one candidate.

    The search's folder stands beside ``output``, its name ends in ``-search``. On ``resume`` the result of a search
    that was asked for the same is taken.

    Raises:
        UserError: candidates or weights are given too, or there is no limit on speed to search under; and as
            ``search``, on ``resume`` where another search was begun there.
    """
    check_number("search", minutes, "a number of minutes above 0", 1e-6)
    given = (asked.candidates, asked.start.weights_dir, asked.start.file, asked.training.init)
    if any(each is not None for each in given):
        raise UserError("search looks for a network of its own; leave out candidates, weights and init")
    if asked.constraint.max_memory_gb is not None:
        raise UserError(
            f"max_memory_gb is {asked.constraint.max_memory_gb:g}; a search keeps no limit on memory, leave it out or "
            "give max_params_m"
        )
    floor = asked.constraint.floor(asked.basis().conditions.batch_size)
    if not floor:
        raise UserError("search needs a limit on speed: min_throughput or max_latency_ms")
    folder = Path(f"{asked.output}-search")
    c = asked.basis().conditions

    def say(text: str) -> None:
        if asked.progress is not None:
            asked.progress({"kind": "note", "text": f"search: {text}"})

    splits, source = asked.data, None
    if not isinstance(splits, DataSplits):
        source = splits
        splits = open_dataset(source, max_bad_rate=asked.max_bad_rate, compare=False)
    checked_output(asked, splits)  # before minutes of searching
    study = search(
        splits,
        source=source,
        space=_within(space, splits, asked),
        device=c.device,
        min_throughput=floor,
        minutes=minutes,
        output=folder,
        batch_size=c.batch_size,
        precision=_precision(c),
        runtime=_runtime(c, asked),
        threads=None if asked.measured is not None else c.threads,  # rows and their threads are looked at by fit alone
        confidence=asked.constraint.confidence,
        image_size=asked.image_size,
        seed=asked.training.seed,
        resume=asked.resume,
        reuse=asked.resume,
        overwrite=asked.overwrite,
        say=say,
    )
    write_search_report(study.output)
    return replace(asked, candidates=[study.best.spec])


def _runtime(c: Conditions, asked: FitRequest) -> str | None:
    """That of a search; None: each network in the fastest, which on a GPU would cost each of them minutes."""
    if c.runtime != BEST:
        return c.runtime
    return asked.shipping.runtime or (None if c.device == "cpu" else file_runtimes(c.device)[0])


def _precision(c: Conditions) -> str | None:
    """That of a search; None: in float."""
    if c.runtime != BEST:
        return c.precision
    return None if c.device == "cpu" else "fp32"


def _within(
    space: str | os.PathLike[str] | None, splits: DataSplits, asked: FitRequest
) -> SearchSpace | str | os.PathLike[str] | None:
    """The space, without networks above the limit on parameters."""
    most = asked.constraint.max_params_m
    if most is None:
        return space
    found = space_for(space, splits, asked.image_size)
    return replace(found, max_params_m=min(most, found.max_params_m or most))
