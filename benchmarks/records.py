"""What benchmarks share: calls timed in turns, and records in which a row takes the place of an earlier one of the same
subject.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convscale.files import write_text


def machine() -> str:
    """What it ran on, for a record."""
    from convscale.machine import Environment

    here = Environment.here("cpu")
    return f"{here.device_name}, {here.cores} cores"


def replace_record(path: Path, row: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Write ``row`` into a file of JSON lines, over the row that agrees with it in ``keys`` where there is one, else at
    the end.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    same = [i for i, old in enumerate(rows) if all(old.get(key) == row.get(key) for key in keys)]
    if same:
        rows[same[0]] = dict(row)
    else:
        rows.append(dict(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(r) + "\n" for r in rows))


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each contender's calls: everybody for ``seconds``, then again, ``rounds`` times."""
    for call in calls.values():
        for _ in range(2):
            call()
    times: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            call()  # the caches are somebody else's still
            spent = 0.0
            while spent < seconds:
                start = time.perf_counter()
                call()
                times[label].append(time.perf_counter() - start)
                spent += times[label][-1]
    return times
