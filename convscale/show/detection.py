"""What a detector's training has to show: mAP per class and by size, precision-recall curves, the best and worst
pictures with their boxes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from convscale import words
from convscale.errors import UserError
from convscale.read import OWN, read_bytes, read_json
from convscale.show.json_values import from_json
from convscale.show.page import Column, Figures, Section, cell, drawings, paragraph, table, tile, tiles, titled

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MOST_CURVES = 8
"""Classes that curves are drawn of: those with the lowest and highest AP50 among more."""
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#e377c2", "#8c564b")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A picture that was drawn."""

    file: str
    """In ``examples``."""
    picture: str = ""
    """The picture's own name."""
    quality: float | None = None
    """F1 of its boxes above 0.3 at IoU 0.5."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The pictures that were drawn."""

    best: tuple[Example, ...] = ()
    """Answered best."""
    worst: tuple[Example, ...] = ()
    """Answered worst."""


@dataclass(frozen=True, kw_only=True)
class DetectionRecord:
    """A detector's evaluation, as ``detection.json`` says it."""

    split: str = ""
    """Which."""
    n: int = 0
    """Pictures."""
    boxes: int = 0
    """Boxes in them."""
    map: float | None = None
    """COCO's mAP in [0, 1]."""
    ap50: float | None = None
    """At IoU 0.5."""
    ap75: float | None = None
    """At IoU 0.75."""
    map_small: float | None = None
    """Of boxes below 32 x 32 pixels."""
    map_medium: float | None = None
    """Of those up to 96 x 96."""
    map_large: float | None = None
    """Of larger ones."""
    classes: tuple[str, ...] = ()
    """Class names."""
    per_class: tuple[object, ...] = ()
    """mAP of each; None where there is no box."""
    per_class_50: tuple[object, ...] = ()
    """AP50 of each."""
    curves: tuple[object, ...] = ()
    """Precision at recalls 0, 0.01 ... 1 of each."""
    examples: Examples = field(default_factory=Examples)
    """Pictures with boxes drawn."""


def detection_sections(folder: Path, figures: Figures) -> list[Section]:
    """Sections of a run's folder; none where it is no detector's.

    Raises:
        UserError: its ``detection.json`` is damaged.
    """
    file = folder / "detection.json"
    if not file.is_file():
        return []
    record = from_json(DetectionRecord, read_json(file, "file", OWN), "detection.json")
    found = [_result(record, figures), _pictures(record, folder)]
    return [section for section in found if section is not None]


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _share(value: float | None) -> str:
    return words.UNKNOWN if value is None else words.percent(value)


def _result(record: DetectionRecord, figures: Figures) -> Section:
    """Figures over all, per class, and curves."""
    shown = (
        ("mAP", record.map, "IoU 0.5 to 0.95"),
        ("AP50", record.ap50, "IoU 0.5"),
        ("AP75", record.ap75, "IoU 0.75"),
    )
    sizes = (
        ("Small", record.map_small, "below 32 x 32 px"),
        ("Medium", record.map_medium, "up to 96 x 96 px"),
        ("Large", record.map_large, "larger"),
    )
    body = tiles(*(tile(name, _share(value), detail) for name, value, detail in (*shown, *sizes)))
    body += paragraph(f"On {record.n:,} pictures with {record.boxes:,} boxes ({record.split}), by COCO's rules.")
    each = list(zip(record.classes, record.per_class, record.per_class_50, strict=False))
    each.sort(key=lambda row: -(_number(row[1]) or 0.0))
    body += table(
        [Column(title="Class", kind="name"), Column(title="mAP", kind="n"), Column(title="AP50", kind="n")],
        [("", [cell(name), cell(_share(_number(a))), cell(_share(_number(b)))]) for name, a, b in each],
    )
    if (drawn := _curves(record)) is not None:
        body += figures.add(
            drawn, "Precision at each recall, IoU 0.5; the table has their areas.", label="Precision-recall curves"
        )
    return Section(title="Boxes", body=body, anchor="boxes")


def _curves(record: DetectionRecord) -> Figure | None:
    """Precision against recall of the classes."""
    import plotly.graph_objects as go

    rows: list[tuple[float, str, list[float]]] = []
    for name, curve, area in zip(record.classes, record.curves, record.per_class_50, strict=False):
        values = [_number(value) for value in curve] if isinstance(curve, Sequence) else []
        known = [value for value in values if value is not None]
        if known and len(known) == len(values) and (known_area := _number(area)) is not None:
            rows.append((known_area, name, known))
    if not rows:
        return None
    rows.sort(key=lambda row: -row[0])
    if len(rows) > MOST_CURVES:
        rows = [*rows[: MOST_CURVES // 2], *rows[-MOST_CURVES // 2 :]]
    figure = go.Figure()
    for number, (area, name, values) in enumerate(rows):
        recalls = [100 * at / max(1, len(values) - 1) for at in range(len(values))]
        label = f"{escape(words.shortened(name))} {words.percent(area)}"
        figure.add_trace(
            go.Scatter(
                x=recalls,
                y=[100 * value for value in values],
                mode="lines",
                name=label,
                line={"color": _COLOURS[number % len(_COLOURS)], "shape": "hv"},
            )
        )
    figure.update_layout(
        height=380,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        xaxis={"title": {"text": "recall, %"}, "range": [0, 100]},
        yaxis={"title": {"text": "precision, %"}, "range": [0, 102]},
    )
    return figure


def _pictures(record: DetectionRecord, folder: Path) -> Section | None:
    """The best and the worst pictures."""
    body = ""
    for title, rows in (("Answered worst", record.examples.worst), ("Answered best", record.examples.best)):
        shown = [one for each in rows if (one := _picture(each, folder)) is not None]
        if shown:
            body += titled(title, drawings(shown))
    if not body:
        return None
    lead = paragraph("Green: what is there. Other colours: what was said, with its score (0.3 and more).")
    return Section(title="Pictures", body=lead + body, anchor="pictures")


def _picture(example: Example, folder: Path) -> tuple[str, str, str] | None:
    """Data URI, name and text; None where the file is gone."""
    if Path(example.file).name != example.file:
        raise UserError(f"detection.json names {example.file!r} outside its folder; refused")
    path = folder / "examples" / example.file
    if not path.is_file():
        return None
    data = base64.b64encode(read_bytes(path, "picture")).decode()
    text = "" if example.quality is None else f"F1 {words.percent(example.quality)}"
    return f"data:image/png;base64,{data}", example.picture or example.file, text
