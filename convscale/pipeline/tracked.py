"""A ``fit`` as one run of an experiment tracker: the winner's training, epoch by epoch, and what was shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from convscale.files import write_json
from convscale.learn.progress import Progress
from convscale.learn.trackers import Tracked, Tracking
from convscale.read import OWN, read_json
from convscale.show.fit_record import FitRecord

FILE = "tracking.json"
"""In the run's folder: which run of which tracker it is, so that a resumed fit goes on with that."""


@contextmanager
def tracked(
    kind: str | None, folder: Path, facts: Mapping[str, object], progress: Progress
) -> Iterator[Progress | Tracking]:
    """What the winner's training is told by: ``progress``, or a tracker before it.

    Args:
        kind: the tracker; None: none.
        folder: the fit's; the run has its name, and goes on where one was begun for it.
        facts: what the run is, for the tracker.
        progress: told of every event.

    Raises:
        UserError: the tracker is unknown, or not installed.
    """
    if kind is None:
        yield progress
        return
    run = Tracked(name=folder.resolve().name, folder=folder, facts=facts, again=_begun(folder, kind))
    tracking, finished = Tracking(kind, run, progress), False
    if tracking.id:
        write_json(folder / FILE, {"tracker": kind, "id": tracking.id})
    try:
        yield tracking
        finished = True
    finally:
        tracking.end(finished=finished)


def tell_result(told: Progress | Tracking, record: FitRecord) -> None:
    """What came of a fit: how good on the test set, how fast."""
    if not isinstance(told, Tracking):
        return
    shipped = record.artifact.measurement
    found = {
        "test_map": record.evaluation.mean_average_precision,
        "test_top1": record.evaluation.top1 if record.evaluation.mean_average_precision is None else None,
        "shipped_images_per_s": None if shipped is None else shipped.speed,
    }
    told.tell({name: value for name, value in found.items() if value is not None}, len(record.history))


def _begun(folder: Path, kind: str) -> str:
    """The id of the run that was begun for this folder; empty: none was."""
    if not (folder / FILE).is_file():
        return ""
    kept = read_json(folder / FILE, "tracker's record", OWN)
    known = isinstance(kept, dict) and kept.get("tracker") == kind and isinstance(kept.get("id"), str)
    return str(kept["id"]) if known else ""
