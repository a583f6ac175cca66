"""What one `fit` run wrote, as figures and tables need it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from convscale import words
from convscale.errors import UserError
from convscale.speed.timing import Measurement

GREEN, BLUE, SKY, ORANGE, RED, GREY = "#009e73", "#1f83c4", "#56b4e9", "#e69f00", "#d55e00", "#8a949e"
"""After the set of Okabe and Ito; states differ in marker and hatch too, so that nothing hangs on hue alone."""

STATES = {
    "winner": ("chosen", GREEN, "star", ""),
    "finalist": ("finalist, trained briefly", BLUE, "circle", ""),
    "kept": ("fast enough, not trained", SKY, "diamond-open", "."),
    "rejected": ("too slow", RED, "x-thin", "/"),
}
"""State of a candidate -> its words, colour, marker and hatch."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What the figures and the table say of one candidate."""

    name: str
    """As in the record; not escaped."""
    state: str
    """A key of ``STATES``."""
    images_per_s: float | None
    """Median speed; None where it was not measured."""
    iqr_rel: float | None
    """Interquartile range of the speed as a share of the median."""
    low: float
    """Speed at the slower quartile of its times; 0 where it was not measured."""
    high: float
    """Speed at the faster quartile."""
    brief_top1: float | None
    """Validation accuracy after the brief training, of 1."""
    record: Mapping[str, Any]
    """The candidate's JSON."""


def candidates(fit: Mapping[str, Any]) -> list[Candidate]:
    """All candidates of a run, fastest first."""
    winner = (fit.get("winner") or {}).get("name")
    asked = (fit.get("constraint") or {}).get("min_throughput")
    found = []
    for record in fit.get("candidates") or ():
        measurement = record.get("measurement")
        speed = words.speed(measurement)
        kept = record.get("kept")
        if kept is None:
            kept = speed is not None and (asked is None or speed >= asked)
        state = (
            "winner"
            if record.get("name") == winner
            else "finalist"
            if record.get("finalist")
            else "kept"
            if kept
            else "rejected"
        )
        low, high = words.quartiles(measurement) or (speed or 0.0, speed or 0.0)
        found.append(
            Candidate(
                name=str(record.get("name", "?")),
                state=state,
                images_per_s=speed,
                iqr_rel=words.spread(measurement),
                low=low,
                high=high,
                brief_top1=(record.get("brief") or {}).get("top1"),
                record=record,
            )
        )
    return sorted(found, key=lambda c: -(c.images_per_s or 0))


def measurement_warnings(measurement: Mapping[str, Any] | None) -> list[str]:
    """Why not to trust a measurement's median, and what was noted with it, one line each."""
    if not measurement:
        return []
    found = measurement.get("warnings")
    if found is None:
        try:
            found = Measurement.from_dict(measurement).warnings
        except UserError:  # a record without its raw times says nothing of their spread
            found = ()
    return [str(text) for text in (*found, *(measurement.get("notes") or ()))]


def hover(c: Candidate) -> str:
    """What a candidate's point says when pointed at: HTML as plotly understands it."""
    record, m = c.record, c.record.get("measurement") or {}
    lines = [
        f"<b>{escape(c.name)}</b> ({STATES[c.state][0]})",
        f"{words.rate(c.images_per_s)} images/s, IQR {words.percent(c.iqr_rel)}",
    ]
    if c.brief_top1 is not None:
        lines.append(
            f"{words.percent(c.brief_top1)} of validation right after "
            f"{words.plural((record['brief'] or {}).get('epochs') or 0, 'epoch')}"
        )
    lines.append(f"{words.large(record.get('params'))} params, {words.large(record.get('macs'))} MACs")
    lines.append(escape(words.conditions(m.get("conditions"))))
    lines.append(escape(words.shortened(words.machine(m.get("environment")), 60)))
    return "<br>".join(lines)


def read_fit(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``fit.json`` of a run.

    Raises:
        UserError: the folder has none, it is damaged, or its schema is newer than this version reads.
    """
    path = Path(run_dir) / "fit.json"
    if not path.is_file():
        raise UserError(f"{run_dir} holds no fit.json; name the output folder of a fit")
    try:
        fit = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); run the fit again") from error
    if not isinstance(fit, dict):
        raise UserError(f"{path} holds no object; run the fit again")
    schema = fit.get("schema", 1)
    if not isinstance(schema, int) or schema > 1:
        raise UserError(f"{path} has schema {schema!r}, this version of convscale reads up to 1; update convscale")
    return fit
