"""The sections of a speed report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from convscale import words
from convscale.conditions import size_text
from convscale.predictor.profile import Profile
from convscale.show import speed_plots
from convscale.show.page import Column, Figures, Section, beside, cell, folded, paragraph, table, tag, titled
from convscale.show.speed_points import SpeedPoint, front, told_apart
from convscale.show.stated import Conditions

SHOWN = 20
"""Rows of a table before the rest is folded away."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Networks side by side."""

    title: str
    """Heading of the section."""
    points: Sequence[SpeedPoint]
    """In the order to be shown; points of one name stand together."""
    intro: str = ""
    """What is compared and what it shows, plain text."""
    baseline: str = ""
    """The network that the others are stated as multiples of; empty: no multiples."""
    relative: bool = False
    """Whether the bars are multiples of ``baseline`` too, for settings whose speeds lie far apart."""
    labels: Sequence[str] = ()
    """A line about each network under its name, by order of first appearance; empty: none."""


def accuracy_and_speed(
    setting: str,
    points: Sequence[SpeedPoint],
    palette: dict[str, str],
    figures: Figures,
    anchor: str,
    min_throughput: float | None = None,
) -> Section:
    """One setting's picture and table."""
    known = [p for p in points if p.top1 is not None]
    body = []
    if len(known) > 1:
        kinds = sorted({p.kind for p in known})
        missing = len(points) - len(known)
        caption = "A front per family: nothing of its family is both faster and more accurate. " + _kinds_in_words(
            kinds
        )
        sources = "; ".join(dict.fromkeys(p.accuracy_source for p in known if p.accuracy_source))
        caption += f" Accuracy is published, not measured here: {sources}." if sources else ""
        if missing:
            caption += (
                f" {words.plural(missing, 'network')} without a published accuracy at that size: in the table only."
            )
        label = f"Accuracy against throughput of {words.plural(len(known), 'network')}: {setting}"
        body.append(figures.add(speed_plots.accuracy_speed(known, palette, min_throughput), caption, label=label))
    else:
        few = (
            "Only one of these networks has a published accuracy at its size"
            if known
            else "None of these networks has a published accuracy at its size"
        )
        body.append(paragraph(f"{few}, so there is no picture; accuracy is not guessed.", "note"))
    body.append(point_table(points))
    return Section(title=setting, body="".join(body), anchor=anchor)


def _kinds_in_words(kinds: Sequence[str]) -> str:
    """How the kinds are told apart."""
    marks = {
        "measured": "filled circles and solid lines are measured",
        "predicted": "open diamonds and dashed lines are predicted (bars: 80 % interval)",
    }
    marks["published"] = "open squares and dotted lines are published by others"
    text = "; ".join(marks[kind] for kind in kinds)
    return text[:1].upper() + text[1:] + "."


def point_table(points: Sequence[SpeedPoint]) -> str:
    """All points, the chosen one and then the fastest first; those on the front of all families marked, the tail folded
    away.
    """
    columns = [
        Column(title="Network", kind="name"),
        Column(title="images/s", kind="n long"),
        Column(title="top-1", kind="n"),
        Column(title="px", kind="n"),
        Column(title="batch", kind="n"),
        Column(title="params", kind="n"),
        Column(title="MACs", kind="n"),
        Column(title="How known", kind="wide"),
    ]
    edge = {id(p) for p in front(points)}
    common = common_notes(points)
    rows = []
    for p in sorted(points, key=lambda p: (not p.chosen, -p.images_per_s)):
        known = p.low is not None and p.high is not None
        interval = f"{words.rate(p.low)} to {words.rate(p.high)}" if known else ""
        how = tag(p.kind, {"measured": "good", "predicted": "warn"}.get(p.kind, "plain"))
        if p.chosen:
            how += " " + tag("chosen", "good")
        if id(p) in edge:
            how += " " + tag("on the front", "good")
        if p.bound_by:
            how += cell(f" bound by {p.bound_by}")
        if own := [note for note in p.notes if note not in common]:
            how += cell("", "; ".join(own))
        weights = p.weights if p.weights and p.weights != p.name else ""
        sizes = [
            words.UNKNOWN if p.conditions.image_size is None else size_text(p.conditions.image_size),
            words.count(p.conditions.batch_size),
            words.large(p.params),
            words.large(p.macs),
        ]
        rows.append(
            (
                "winner" if p.chosen else "",
                [
                    cell(p.name, weights, breaks=True),
                    cell(words.rate(p.images_per_s), interval),
                    words.accuracy(p.top1),
                    *sizes,
                    how,
                ],
            )
        )
    html = table(columns, rows[:SHOWN])
    if len(rows) > SHOWN:
        html += folded(f"{words.count(len(rows) - SHOWN)} more", table(columns, rows[SHOWN:]))
    return html + "".join(paragraph(f"Of all {kind}: {note}.", "note") for kind, note in common.values())


def common_notes(points: Sequence[SpeedPoint]) -> dict[str, tuple[str, str]]:
    """Notes that stand on every point of a kind, said once instead: note -> (kind, note)."""
    found: dict[str, tuple[str, str]] = {}
    for kind in dict.fromkeys(p.kind for p in points):
        mine = [p for p in points if p.kind == kind]
        if len(mine) > 1:
            found |= {note: (kind, note) for note in mine[0].notes if all(note in p.notes for p in mine)}
    return found


def side_by_side(comparison: Comparison, figures: Figures, anchor: str) -> Section:
    """Networks as rows of a figure and of a table, one column a setting."""
    points = list(comparison.points)
    names = list(dict.fromkeys(p.name for p in points))
    series = list(dict.fromkeys((p.setting, p.kind) for p in points))
    shared, labels = told_apart(series)
    known = {(p.name, p.setting, p.kind): p for p in points}
    columns = [Column(title="Network", kind="name"), *(Column(title=label, kind="n long") for label in labels)]
    rows = []
    for i, name in enumerate(names):
        cells = [cell(name, comparison.labels[i] if i < len(comparison.labels) else "")]
        for setting, kind in series:
            p = known.get((name, setting, kind))
            base = known.get((comparison.baseline, setting, kind))
            times = p and base and name != comparison.baseline and p.images_per_s / base.images_per_s
            speed = words.rate(p.images_per_s) if p else words.UNKNOWN
            cells.append(cell(speed, f"× {words.number(times)}" if times else ""))
        rows.append(("winner" if name == comparison.baseline else "", cells))
    notes = list(dict.fromkeys(f"{p.name}: {note}" for p in points for note in p.notes))
    told = "".join(paragraph(note, "note") for note in notes)
    if len(notes) > 3:
        told = folded(f"{words.plural(len(notes), 'note')} on single networks", told)
    reference = f"All: {shared}. " if shared else ""
    reference += f"Multiples are of {comparison.baseline} in the same column." if comparison.baseline else ""
    drawn = speed_plots.side_by_side(points, comparison.baseline if comparison.relative else "")
    body = paragraph(comparison.intro) + figures.add(drawn, reference, label=f"{comparison.title}: {', '.join(names)}")
    return Section(title=comparison.title, body=body + table(columns, rows) + told, anchor=anchor)


def layers(profile: Profile, figures: Figures, anchor: str) -> Section:
    """Where one network's time goes and what binds each layer, as predicted."""
    whole = sum(layer.time_s for layer in profile.layers)
    conditions = Conditions.of({**profile.conditions, "device": profile.device})
    batch = conditions.batch_size or 1
    share = {
        bound: sum(layer.time_s for layer in profile.layers if layer.bound_by == bound) / whole
        for bound in speed_plots.BOUND
    }
    quiet = sum(layer.time_s for layer in profile.layers if not layer.macs and layer.kind != "host") / whole
    parts = ", ".join(f"{words.percent(value, 0)} bound by {bound}" for bound, value in share.items() if value >= 0.005)
    text = (
        f"Predicted, not measured: {words.seconds(whole)} a batch, {words.rate(batch / whole)} images/s "
        f"({conditions}). Of that time, {parts}; "
        f"{words.percent(quiet, 0)} goes to layers that multiply nothing (norms, activations, pooling, copies)."
    )
    columns = [
        Column(title="Layer", kind="name"),
        Column(title="time", kind="n"),
        Column(title="share", kind="n"),
        Column(title="MACs", kind="n"),
        Column(title="moved", kind="n"),
        Column(title="op/byte", kind="n"),
        Column(title="kernels", kind="n"),
        Column(title="Bound by"),
    ]
    state = {"compute": "bad", "memory": "plain", "launch": "warn"}
    rows = [
        (
            "",
            [
                cell(layer.name, layer.kind),
                words.seconds(layer.time_s),
                words.percent(layer.time_s / whole),
                words.large(layer.macs) if layer.macs else words.UNKNOWN,
                words.large(layer.nbytes, "B"),
                words.number(2 * layer.macs / layer.nbytes, 2) if layer.macs and layer.nbytes else words.UNKNOWN,
                words.count(layer.launches),
                tag(layer.bound_by, state[layer.bound_by]),
            ],
        )
        for layer in profile.layers
    ]
    longest = sorted(range(len(rows)), key=lambda i: -profile.layers[i].time_s)[:12]
    top = table(columns, [rows[i] for i in longest])
    every = folded(f"All {words.plural(len(rows), 'layer')} in order", table(columns, rows)) if len(rows) > 12 else ""
    by_part = figures.add(speed_plots.time_by_part(profile), label=f"Share of time by part of {profile.name}")
    roof = figures.add(
        speed_plots.roofline(profile),
        "A circle is a layer that multiplies; its area is its share of the time.",
        label=f"Roofline of {profile.name}",
    )
    drawn = beside(titled("Time by part", by_part), titled("Roofline", roof))
    body = paragraph(text) + drawn + titled("Where most of the time goes", top + every)
    return Section(title=f"{profile.name}, layer by layer", body=body, anchor=anchor)


def summary(groups: dict[str, list[SpeedPoint]]) -> str:
    """The top of the page in words: how many, how known, and each setting's front."""
    points = [p for group in groups.values() for p in group]
    if not points:
        return ""
    counts = [
        f"{words.plural(n, 'speed')} {kind}"
        for kind in ("measured", "predicted", "published")
        if (n := sum(p.kind == kind for p in points))
    ]
    sizes = "One picture" if len(groups) == 1 else "A picture each"
    text = (
        f"{', '.join(counts)}, under {words.plural(len(groups), 'setting')}. {sizes}: speeds of different settings are "
        "never mixed."
    )
    return paragraph(text, "lead")
