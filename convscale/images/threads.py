"""Many small calls in threads, some at a time: a thread pool's own ``map`` makes a future for each, which takes longer
than looking at a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 8, chunk: int = 256
) -> Iterator[Result]:
    """``function`` of each item, in their order; an exception comes up where its item would."""

    def of_part(start: int) -> list[Result]:
        return [function(item) for item in items[start : start + chunk]]

    with ThreadPoolExecutor(workers) as pool:
        for results in pool.map(of_part, range(0, len(items), chunk)):
            yield from results
