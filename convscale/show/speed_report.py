"""Speeds become one HTML file that a person reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from convscale.errors import UserError
from convscale.files import write_text
from convscale.predictor.profile import Profile
from convscale.show import speed_sections as sections
from convscale.show.page import Figures, page, paragraph
from convscale.show.speed_plots import colours
from convscale.show.speed_points import SpeedPoint, by_setting, points_of
from convscale.show.speed_sections import Comparison
from convscale.speed.records import Record


def write_speed_report(
    records: Iterable[Record | SpeedPoint],
    out: str | os.PathLike[str],
    *,
    comparisons: Sequence[Comparison] = (),
    profiles: Sequence[Profile] = (),
    title: str = "Accuracy against throughput",
    lead: str = "",
    min_throughput: float | None = None,
) -> Path:
    """Write a self-contained page: accuracy against throughput, networks side by side, single networks layer by layer.

    Args:
        records: measured records, or points (predicted and published ones too). Points of different devices or
            conditions get a picture each; a record's accuracy is the published one of its weights at its image size,
            where there is one.
        out: the HTML file.
        comparisons: networks side by side.
        profiles: networks layer by layer.
        title: heading of the page.
        lead: plain text under the heading, before how many speeds there are.
        min_throughput: images/s asked for, drawn into the pictures.

    Returns:
        ``out``.

    Raises:
        UserError: there is nothing to show.
    """
    path = Path(out)
    write_text(
        path,
        speed_page(
            records, comparisons=comparisons, profiles=profiles, title=title, lead=lead, min_throughput=min_throughput
        ),
    )
    return path


def speed_page(
    records: Iterable[Record | SpeedPoint],
    *,
    comparisons: Sequence[Comparison] = (),
    profiles: Sequence[Profile] = (),
    title: str = "Accuracy against throughput",
    lead: str = "",
    min_throughput: float | None = None,
) -> str:
    """The page of ``write_speed_report`` as one HTML document. Raises as it."""
    points = points_of(records)
    if not (points or comparisons or profiles):
        raise UserError("nothing to report: no record, no comparison and no network to profile was given")
    groups = by_setting(points)
    palette = colours(sorted({p.family for p in points}))
    figures = Figures()
    found = [
        sections.accuracy_and_speed(setting, group, palette, figures, f"setting-{i}", min_throughput)
        for i, (setting, group) in enumerate(groups.items(), 1)
    ]
    found += [
        sections.side_by_side(comparison, figures, f"comparison-{i}") for i, comparison in enumerate(comparisons, 1)
    ]
    found += [sections.layers(profile, figures, f"network-{i}") for i, profile in enumerate(profiles, 1)]
    return page(
        title=title,
        kicker="convscale report",
        head=paragraph(lead, "lead") + sections.summary(groups),
        sections=found,
        figures=figures,
    )
