"""The section of a fit's report that lists candidates, and the one that reconciles the speeds of the chosen one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from convscale import words
from convscale.show.fit_parts import Candidate, Timed
from convscale.show.fit_record import FitRecord
from convscale.show.fit_speeds import SPREADS, kind_of, spread_of
from convscale.show.page import Column, Section, cell, folded, paragraph, table, tag
from convscale.show.states import STATES

SHOWN = 10
"""Candidates in the table; all of them fold out."""


def candidate_table(fit: FitRecord) -> Section | None:
    """Every candidate with why it was kept or lost."""
    if not fit.candidates:
        return None
    candidates = fit.fastest_first()
    released = any(c.published_top1 is not None or c.probe is not None for c in candidates)
    brief = any(c.brief_top1 is not None for c in candidates)
    kind = kind_of(candidates)
    columns = [
        Column(title="Candidate", kind="name"),
        Column(title="images/s", kind="n"),
        Column(title=SPREADS[kind], kind="n"),
        Column(title="px", kind="n"),
        Column(title="params", kind="n"),
        Column(title="MACs", kind="n"),
        *([Column(title="ImageNet", kind="n"), Column(title="features", kind="n long")] if released else []),
        *([Column(title="brief training", kind="n long")] if brief else []),
        Column(title="Why", kind="wide"),
    ]
    rows = [
        (
            {"winner": "winner", "rejected": "dim"}.get(state, ""),
            _candidate_cells(fit, c, state, kind, released=released, brief=brief),
        )
        for c, state in ((c, fit.state_of(c)) for c in candidates)
    ]
    near = _around(candidates, fit.constraint.min_throughput)
    shown = table(columns, [rows[i] for i in near])
    if len(near) < len(rows):
        shown += folded(f"all {len(rows)} candidates", table(columns, rows))
    warned: dict[str, list[str]] = {}
    for c in candidates:
        for text in c.timed.doubts if c.timed else ():
            warned.setdefault(text, []).append(fit.label_of(c))
    notes = "".join(paragraph(f"{', '.join(names)}: {text}", "note") for text, names in warned.items())
    if len(warned) > 3:
        notes = folded(f"{len(warned)} warnings about single speeds", notes)
    folds = {c.probe.folds for c in candidates if c.probe and c.probe.folds}
    judged = "; features are judged on all images in turns, a part at a time" if folds else ""
    speed = "is that of the exported network" if kind == "timed" else "is predicted, not measured"
    if kind == "both":
        speed = "was measured on the device where the spread is a share of it, and is predicted elsewhere"
    intro = f"Fastest first. Speed {speed}; accuracy is on the validation images{judged}."
    if any(fit.sure_of(told) for c in candidates for told in (c.probe, c.brief) if told is not None):
        intro += " Under it stands its 95 % interval."
    intro = paragraph(intro, "note")
    return Section(title="Candidates", body=intro + _front(fit) + shown + notes, anchor="candidates")


def _around(candidates: Sequence[Candidate], asked: float | None) -> list[int]:
    """Of candidates, fastest first, at most ``SHOWN``: the finalists and those nearest to the speed asked for."""
    if len(candidates) <= SHOWN or not asked:
        return list(range(len(candidates)))
    must = [i for i, c in enumerate(candidates) if c.finalist]

    def distance(i: int) -> float:
        return abs(math.log((candidates[i].images_per_s or 1e-9) / asked))

    others = sorted((i for i in range(len(candidates)) if i not in must), key=distance)
    return sorted([*must, *others[: max(0, SHOWN - len(must))]])


def _front(fit: FitRecord) -> str:
    """What the device can do, where no speed was asked for."""
    if not fit.front:
        return ""
    columns = [Column(title="What this device can do", kind="name"), Column(title="images/s", kind="n")]
    columns += [Column(title="px", kind="n"), Column(title="ImageNet", kind="n")]
    rows = [
        ("", [escape(r.name), words.rate(r.images_per_s), words.count(r.image_size), words.accuracy(r.top1)])
        for r in fit.front
    ]
    return table(columns, rows)


def _candidate_cells(fit: FitRecord, c: Candidate, state: str, kind: str, *, released: bool, brief: bool) -> list[str]:
    """One row, as HTML cells; ``kind``: how the table's speeds are known."""
    scaled = ", ".join(f"{key} × {value:.4g}" for key, value in (c.scaling or {}).items() if value not in (None, 1))
    extra = f"trained on {c.extra_data} too" if c.extra_data else ""
    under = " · ".join(text for text in (c.family or "", scaled, c.licence or "", extra) if text)
    trained = words.UNKNOWN
    if c.brief is not None and c.brief.top1 is not None:
        spent = f"{words.plural(c.brief.epochs or 0, 'epoch')}, {words.seconds(c.brief.seconds)}"
        trained = cell(words.percent(c.brief.top1), " · ".join(filter(None, (fit.sure_of(c.brief), spent))))
    probed = words.UNKNOWN
    if c.probe is not None:
        probed = cell(words.percent(c.probe.top1), fit.sure_of(c.probe))
    unknown = "not timed" if kind == "timed" else "speed not known"
    label = STATES[state].label.partition(",")[0] if c.images_per_s is not None else unknown
    why = c.reason or ""
    for start in (f"{label}: ", f"{label}, ", "not measured: "):
        why = why.removeprefix(start)
    return [
        cell(c.name, under),
        words.rate(c.images_per_s),
        spread_of(c),
        words.count(c.image_size),
        words.large(c.params),
        words.large(c.macs),
        *([words.accuracy(c.published_top1), probed] if released else []),
        *([trained] if brief else []),
        f"{tag(label, {'winner': 'good', 'rejected': 'bad'}.get(state, 'plain'))} {escape(why)}",
    ]


def speeds(fit: FitRecord) -> Section | None:
    """The speeds of the chosen network that stand in the record, one line each, and which of them is promised; nothing
    where there is one alone.
    """
    chosen, asked = fit.chosen, fit.constraint.min_throughput
    known: list[tuple[str, Timed]] = []
    if chosen is not None and chosen.measurement is not None:
        known.append(("As a candidate, untrained: what it was chosen by", chosen.measurement))
    if chosen is not None and chosen.tuned is not None:
        known.append(("Untrained, in the form and settings in which it would ship", chosen.tuned))
    shipped = fit.artifact.measurement
    if shipped is not None:
        known.append(("The trained artefact, timed once more at the end", shipped))
    known = [(what, timed) for what, timed in known if timed.speed]
    if len(known) < 2:
        return None
    promised = known[-1][1]
    columns = [Column(title="Timed", kind="name"), Column(title="images/s", kind="n")]
    columns += [Column(title="middle half", kind="n"), Column(title="of the promised", kind="n long")]
    rows = []
    for what, timed in known:
        low, high = timed.quartiles or (None, None)
        spread = f"{words.rate(low)} to {words.rate(high)}" if low is not None else words.UNKNOWN
        ratio = words.UNKNOWN if timed is promised else ratio_text(timed, promised)
        name = f"{escape(what)} {tag('promised', 'good')}" if timed is promised else escape(what)
        rows.append(("winner" if timed is promised else "", [name, words.rate(timed.speed), spread, ratio]))
    limit = f" Asked for: {words.rate(asked)} images/s or more." if asked else ""
    note = paragraph(
        "One network, timed at different moments and in different forms; the last line is the speed that is promised, "
        f"as the model card says it.{limit} A ratio's interval holds where both middle halves do.",
        "note",
    )
    return Section(title="Speed, reconciled", body=note + table(columns, rows), anchor="speeds")


def ratio_text(a: Timed, b: Timed) -> str:
    """``0.93 (0.90 to 0.97)``: the speed of ``a`` over that of ``b``, from the slower quartile over the faster to the
    faster over the slower.
    """
    if not a.speed or not b.speed:
        return words.UNKNOWN
    text = f"{a.speed / b.speed:.2f}"
    if a.quartiles is None or b.quartiles is None:
        return text
    return f"{text} ({a.quartiles[0] / b.quartiles[1]:.2f} to {a.quartiles[1] / b.quartiles[0]:.2f})"
