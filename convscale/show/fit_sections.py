"""The sections of a fit's report, each from the run's record alone; a section without data is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from convscale import words
from convscale.show import plots
from convscale.show.fit_record import STATES, Candidate, candidates, measurement_warnings
from convscale.show.page import Column, Figures, Section, alert, definitions, paragraph, table, tag, tile

GALLERY = 48
"""Wrong pictures shown at most."""


def summary(fit: Mapping[str, Any]) -> str:
    """The top of the page: what was chosen and why in words, then four numbers with their conditions."""
    return paragraph(story(fit), "lead") + "".join(alert(text, "bad") for text in problems(fit)) + _tiles(fit)


def story(fit: Mapping[str, Any]) -> str:
    """Plain words: how the choice came about."""
    found = candidates(fit)
    asked = (fit.get("constraint") or {}).get("min_throughput")
    winner, evaluation = fit.get("winner") or {}, fit.get("evaluation") or {}
    data = fit.get("data") or {}
    parts = []
    timed = [c for c in found if c.images_per_s is not None]
    fast = [c for c in timed if c.state != "rejected"]
    if timed:
        measured = f"Of {words.plural(len(timed), 'candidate')}, exported untrained and timed as they would be shipped"
        limit = f", {len(fast)} kept the {words.rate(asked)} images/s asked for" if asked else ", all were compared"
        parts.append(measured + limit + ".")
    if len(found) > len(timed):
        n = len(found) - len(timed)
        parts.append(
            f"{n} more {'was' if n == 1 else 'were'} not timed: smaller members of {'its' if n == 1 else 'their'} "
            "family were too slow already."
        )
    finalists = [c for c in found if c.brief_top1 is not None]
    if len(finalists) > 1:
        on = f" on {words.count(data['validation'])} validation images" if data.get("validation") else ""
        parts.append(f"{len(finalists)} of them were trained briefly and compared{on}.")
    if winner.get("name"):
        reason = str(winner.get("reason") or "").strip().rstrip(".")
        parts.append(f"{winner['name']} was chosen{': ' + reason if reason else ''}.")
    top1 = _first(evaluation.get("top1"), winner.get("test_top1"))
    if top1 is not None:
        n = f" of {words.count(evaluation['n'])} test images" if evaluation.get("n") else " of the test images"
        parts.append(f"Fully trained, it is right on {words.percent(top1)}{n}, which it saw once, at the end.")
    return " ".join(parts)


def problems(fit: Mapping[str, Any]) -> list[str]:
    """What a reader must not overlook, one plain line each."""
    found = []
    asked = (fit.get("constraint") or {}).get("min_throughput")
    shipped = words.speed((fit.get("artifact") or {}).get("measurement"))
    if asked and shipped is not None and shipped < asked:
        found.append(
            f"The finished artefact ran at {words.rate(shipped)} images/s when timed again, below the "
            f"{words.rate(asked)} asked for."
        )
    verification = fit.get("verification") or {}
    if verification.get("passed") is False:
        reason = verification.get("reason") or "it differs from the trained network"
        found.append(f"The artefact was withheld: {reason}.")
    if skipped := len(fit.get("left_out") or ()):
        found.append(f"{words.plural(skipped, 'test image')} could not be read and stayed out.")
    return found


def _tiles(fit: Mapping[str, Any]) -> str:
    """Speed, accuracy, agreement, size."""
    tiles = []
    asked = (fit.get("constraint") or {}).get("min_throughput")
    artifact = fit.get("artifact") or {}
    winner = next((c for c in candidates(fit) if c.state == "winner"), None)
    measurement = artifact.get("measurement") or (winner.record.get("measurement") if winner else None)
    speed = words.speed(measurement)
    if measurement and speed is not None:
        spread = words.spread(measurement)
        limit = f"asked: {words.rate(asked)} or more · " if asked else ""
        where = f"{words.conditions(measurement.get('conditions'))} · {words.machine(measurement.get('environment'))}"
        detail = f"{limit}IQR {words.percent(spread)} · {where}"
        tiles.append(
            tile(
                "Speed of the artefact",
                words.rate(speed),
                detail,
                "bad" if asked and speed < asked else "good",
                "images/s",
            )
        )
    evaluation = fit.get("evaluation") or {}
    top1 = _first(evaluation.get("top1"), (fit.get("winner") or {}).get("test_top1"))
    if top1 is not None:
        low, high = evaluation.get("top1_interval") or (None, None)
        interval = f"95 % interval {words.percent(low)} to {words.percent(high)} · " if low is not None else ""
        images = f"{words.count(evaluation['n'])} test images" if evaluation.get("n") else "the test images"
        tiles.append(tile("Test accuracy", words.percent(top1, 2), interval + images))
    verification = fit.get("verification") or {}
    agreement = verification.get("top1_agreement")
    if agreement is not None:
        of = f"of {words.count(verification['n'])} images " if verification.get("n") else ""
        state = {True: "good", False: "bad"}.get(verification.get("passed"), "")  # type: ignore[arg-type]
        tiles.append(
            tile(
                "Artefact agrees with the network",
                words.percent(agreement, 2),
                f"same top answer {of}after export",
                state,
            )
        )
    size = []
    if artifact.get("bytes"):
        size.append(f"{words.number(artifact['bytes'] / 1e6)} MB")
    if winner and winner.record.get("params"):
        size.append(f"{words.large(winner.record['params'])} params")
    if size:
        detail = " · ".join(
            str(x)
            for x in (artifact.get("format"), f"opset {artifact['opset']}" if artifact.get("opset") else None)
            if x
        )
        tiles.append(tile("Size", size[0], " · ".join([*size[1:], *([detail] if detail else [])])))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def picture(fit: Mapping[str, Any], figures: Figures) -> Section | None:
    """Accuracy against speed with the constraint drawn in."""
    found = [c for c in candidates(fit) if c.images_per_s]
    if not found:
        return None
    m = found[0].record.get("measurement") or {}
    shared = words.conditions({**(m.get("conditions") or {}), "image_size": None})
    caption = (
        "Above: what the finalists reached after brief training, and the chosen one after full training. Below: the "
        "speed of every candidate "
        f"that was timed, with its interquartile range. All timed with: {shared}; "
        f"{words.machine(m.get('environment'))}."
    )
    winner = next((c.name for c in found if c.state == "winner"), "none chosen")
    body = figures.add(
        plots.speed_accuracy(fit), caption, label=f"Accuracy and speed of {len(found)} candidates; chosen: {winner}"
    )
    return Section(title="Accuracy and speed", body=body, anchor="picture")


def candidate_table(fit: Mapping[str, Any]) -> Section | None:
    """Every candidate with why it was kept or lost."""
    found = candidates(fit)
    if not found:
        return None
    columns = [
        Column(title="Candidate", kind="name"),
        Column(title="images/s", kind="n"),
        Column(title="IQR", kind="n"),
        Column(title="px", kind="n"),
        Column(title="params", kind="n"),
        Column(title="MACs", kind="n"),
        Column(title="brief training", kind="n long"),
        Column(title="Why", kind="wide"),
    ]
    rows = [({"winner": "winner", "rejected": "dim"}.get(c.state, ""), _candidate_cells(c)) for c in found]
    warned: dict[str, list[str]] = {}
    for c in found:
        for text in measurement_warnings(c.record.get("measurement")):
            warned.setdefault(str(text), []).append(c.name)
    notes = "".join(paragraph(f"{', '.join(names)}: {text}", "note") for text, names in warned.items())
    if len(warned) > 3:
        notes = f"<details><summary>{len(warned)} warnings about single speeds</summary>{notes}</details>"
    intro = paragraph(
        "Fastest first. Speed is that of the exported network; accuracy is on the validation images.", "note"
    )
    return Section(title="Candidates", body=intro + table(columns, rows) + notes, anchor="candidates")


def _candidate_cells(c: Candidate) -> list[str]:
    """One row, as HTML cells."""
    record = c.record
    brief = record.get("brief") or {}
    scaling = record.get("scaling") or {}
    scaled = ", ".join(f"{key} × {value:.4g}" for key, value in scaling.items() if value not in (None, 1, 1.0))
    under = " · ".join(escape(text) for text in (str(record.get("family") or ""), scaled) if text)
    name = escape(c.name) + (f'<span class="sub">{under}</span>' if under else "")
    state = {"winner": "good", "rejected": "bad"}.get(c.state, "plain")
    trained = words.UNKNOWN
    if c.brief_top1 is not None:
        spent = f"{words.plural(brief.get('epochs') or 0, 'epoch')}, {words.seconds(brief.get('seconds'))}"
        trained = f'{words.percent(c.brief_top1)}<span class="sub">{spent}</span>'
    label = STATES[c.state][0].partition(",")[0] if c.images_per_s is not None else "not timed"
    why = str(record.get("reason") or "")
    for start in (f"{label}: ", f"{label}, ", "not measured: "):
        why = why.removeprefix(start)
    return [
        name,
        words.rate(c.images_per_s),
        words.percent(c.iqr_rel),
        words.count(record.get("image_size")),
        words.large(record.get("params")),
        words.large(record.get("macs")),
        trained,
        f"{tag(label, state)} {escape(why)}",
    ]


def training(fit: Mapping[str, Any], figures: Figures) -> Section | None:
    """The winner's full training."""
    history = fit.get("history") or []
    drawn = plots.curves(history)
    if drawn is None:
        return None
    best = max(
        (row for row in history if row.get("val_top1") is not None), key=lambda row: row["val_top1"], default=None
    )
    spent = history[-1].get("seconds")  # counted from the start
    text = f"{words.plural(len(history), 'epoch')} in {words.seconds(spent)}"
    rates = sorted(row["images_per_s"] for row in history if row.get("images_per_s"))
    if rates:
        text += f", {words.number(rates[len(rates) // 2])} images/s while training (median over epochs)"
    if best:
        text += f"; best on validation: {words.percent(best['val_top1'], 2)} in epoch {best['epoch']}"
    recipe = fit.get("recipe") or {}
    facts = definitions(
        [
            ("Recipe", " · ".join(str(x) for x in (recipe.get("name"), recipe.get("source")) if x)),
            ("Notes", " ".join(str(note).rstrip(".") + "." for note in fit.get("training_notes") or ())),
        ]
    )
    body = figures.add(drawn[0], label="Loss by epoch") + figures.add(drawn[1], label="Validation accuracy by epoch")
    return Section(
        title="Training", body=paragraph(text + ".") + facts + f'<div class="two">{body}</div>', anchor="training"
    )


def mistakes(fit: Mapping[str, Any], figures: Figures) -> Section | None:
    """Confusion matrix, what is taken for what, accuracy by class."""
    evaluation = fit.get("evaluation") or {}
    matrix = evaluation.get("confusion")
    classes = class_names(fit)
    rates = evaluation.get("per_class")
    if not rates and matrix:
        rates = [row[i] / sum(row) if sum(row) else None for i, row in enumerate(matrix)]
    parts = []
    facts = [
        (
            "Top-5 accuracy",
            words.percent(evaluation["top5"]) if evaluation.get("top5") is not None and len(classes) > 5 else "",
        )
    ]
    if evaluation.get("calibration_error") is not None:
        facts.append(
            (
                "Calibration error",
                f"{words.percent(evaluation['calibration_error'])}: how far its confidence is from how often it is "
                "right, on average",
            )
        )
    parts.append(definitions(facts))
    if matrix:
        pairs = confused(matrix)[:6]
        lines = "".join(
            f"<li><strong>{escape(classes[i])}</strong> taken for <strong>{escape(classes[j])}</strong>: {n:,} of "
            f"{sum(matrix[i]):,} "
            f"({words.percent(n / sum(matrix[i]))})</li>"
            for i, j, n in pairs
        )
        drawn = figures.add(plots.confusion(matrix, classes), label=f"Confusion matrix of {len(classes)} classes")
        left = f"<h3>What is taken for what</h3>{drawn}"
        right = f'<h3>Most frequent mistakes</h3><ul class="plain">{lines or "<li>none</li>"}</ul>'
    else:
        left = right = ""
    if rates:
        totals = [sum(row) for row in matrix] if matrix else None
        worst = f" (the worst {plots.WORST})" if len(rates) > plots.WORST else ""
        right += f"<h3>Right, by class{worst}</h3>" + figures.add(
            plots.per_class(rates, classes, totals), label="Accuracy by class"
        )
    if not (left or right):
        return None
    parts.append(f'<div class="two"><div>{left}</div><div>{right}</div></div>')
    return Section(title="Where it errs", body="".join(parts), anchor="mistakes")


def confused(matrix: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(true class, said class, images) off the diagonal, most frequent first."""
    pairs = [(i, j, n) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n > 0]
    return sorted(pairs, key=lambda pair: -pair[2])


def class_names(fit: Mapping[str, Any]) -> list[str]:
    """Names by index; made up where the record has fewer than its matrix."""
    evaluation = fit.get("evaluation") or {}
    names = [str(name) for name in (fit.get("data") or {}).get("classes") or ()]
    n = max(len(evaluation.get("confusion") or ()), len(evaluation.get("per_class") or ()), len(names))
    return [*names, *(f"class {i}" for i in range(len(names), n))]


def gallery(fit: Mapping[str, Any]) -> Section | None:
    """Wrong examples as pictures, surest first."""
    wrong = [w for w in fit.get("wrong") or () if str(w.get("image", "")).startswith("data:image/")]
    if not wrong:
        return None
    classes = class_names(fit)

    def named(value: Any) -> str:
        known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes)
        return escape(classes[value] if known else str(value))

    small = " class='small'" if ((fit.get("data") or {}).get("image_size") or 0) <= 64 else ""
    wrong = sorted(wrong, key=lambda w: -(w.get("confidence") or 0))
    cells = "".join(
        f'<figure><img{small} loading="lazy" src="{escape(str(w["image"]))}" alt="test image {escape(str(w.get("name", "")))}">'
        f"<figcaption><strong>{named(w.get('true'))}</strong><br>said {named(w.get('predicted'))}, "
        f"{words.percent(w.get('confidence'), 0)} sure</figcaption></figure>"
        for w in wrong[:GALLERY]
    )
    intro = paragraph(
        "Test images that it gets wrong, the surest mistakes first: what is on the image, then what the network said.",
        "note",
    )
    return Section(title="Wrong examples", body=intro + f'<div class="gallery">{cells}</div>', anchor="wrong")


def verification(fit: Mapping[str, Any]) -> Section | None:
    """How the artefact was compared with the trained network."""
    v = fit.get("verification") or {}
    if not v:
        return None
    verdict = {True: tag("passed", "good"), False: tag("withheld", "bad")}.get(
        v.get("passed"), tag("not decided", "warn")
    )  # type: ignore[arg-type]
    reason = f" {escape(str(v['reason']))}" if v.get("reason") else ""
    images = f"{words.count(v['n'])} test images" if v.get("n") else "test images"
    before, after = v.get("accuracy_before"), v.get("accuracy_after")
    rows = [
        ("Compared on", images),
        ("Same top answer", words.percent(v["top1_agreement"], 3) if v.get("top1_agreement") is not None else ""),
        (
            "Accuracy",
            f"{words.percent(before, 2)} as trained, {words.percent(after, 2)} as shipped"
            if None not in (before, after)
            else "",
        ),
        (
            "Largest difference",
            f"{v['max_abs']:.2e} absolute"
            + (f", {v['max_rel']:.2e} of the largest output" if v.get("max_rel") is not None else "")
            if v.get("max_abs") is not None
            else "",
        ),
    ]
    return Section(title="Verification", body=f"<p>{verdict}{reason}</p>{definitions(rows)}", anchor="verification")


def data(fit: Mapping[str, Any]) -> Section | None:
    """What was learned from."""
    d = fit.get("data") or {}
    if not d:
        return None
    splits = [
        f"{words.count(d[key])} {label}"
        for key, label in (("train", "to train"), ("validation", "to choose"), ("test", "to test"))
        if d.get(key) is not None
    ]
    names = class_names(fit)
    shown = ", ".join(names[:24]) + (f" and {len(names) - 24} more" if len(names) > 24 else "")
    channels = {1: "grey", 3: "colour"}.get(
        d.get("channels"), f"{d.get('channels')} channels" if d.get("channels") else ""
    )  # type: ignore[arg-type]
    rows = [
        ("Data set", str(d.get("name") or "")),
        ("Images", ", ".join(splits)),
        ("Pixels", ", ".join(x for x in (f"{d['image_size']} px" if d.get("image_size") else "", channels) if x)),
        (f"{len(names)} classes", shown),
        ("From", str(d.get("path") or "")),
        ("Notes", " ".join(str(note).rstrip(".") + "." for note in d.get("notes") or ())),
    ]
    return Section(title="Data", body=definitions(rows), anchor="data")


def conditions(fit: Mapping[str, Any]) -> Section | None:
    """Under what the figures hold, and how long each part took."""
    environment, timings = fit.get("environment") or {}, fit.get("timings") or {}
    constraint = fit.get("constraint") or {}
    versions = environment.get("versions") or {}
    rows = [
        ("Machine", words.machine(environment) if environment.get("device_name") else ""),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
        (
            "Speed asked for",
            f"{words.rate(constraint['min_throughput'])} images/s: {words.conditions(constraint.get('conditions'))}"
            if constraint.get("min_throughput")
            else "",
        ),
    ]
    plain = {
        key: value
        for key, value in environment.items()
        if key not in ("device_name", "cores", "versions") and isinstance(value, str | int | float)
    }
    rows += [(str(key), str(value)) for key, value in plain.items()]
    labels = {
        "measure_s": "measuring",
        "brief_s": "brief trainings",
        "train_s": "full training",
        "export_s": "export and verification",
        "total_s": "in all",
    }
    spent = [f"{label} {words.seconds(timings[key])}" for key, label in labels.items() if timings.get(key) is not None]
    rows.append(("Time spent", ", ".join(spent)))
    body = definitions(rows)
    return Section(title="Conditions", body=body, anchor="conditions") if body else None


def use(fit: Mapping[str, Any], folder: Path) -> Section | None:
    """How to use what came out and how to make it again; the artefact's path is relative to ``folder``, the run's."""
    artifact, d = fit.get("artifact") or {}, fit.get("data") or {}
    parts = []
    passed = (fit.get("verification") or {}).get("passed")
    if artifact.get("path") and passed is not False:
        timed = ((artifact.get("measurement") or {}).get("conditions") or {}).get("image_size")
        size = timed or d.get("image_size") or "side"
        code = (
            "import convscale as cs\n\n"
            f"net = cs.load_artifact({str(folder / str(artifact['path']))!r})\n"
            f"probabilities = net(images)    # uint8, (n, {size}, {size}, {d.get('channels') or 3}) -> (n, "
            f"{len(class_names(fit)) or 'classes'})"
        )
        parts.append(
            "<h3>Use it</h3>"
            + paragraph(
                "Normalisation and softmax are inside; resizing is yours and is described in the artefact's folder.",
                "note",
            )
        )
        parts.append(f"<pre><code>{escape(code)}</code></pre>")
    if fit.get("command"):
        parts.append(f"<h3>Make it again</h3><pre><code>{escape(str(fit['command']))}</code></pre>")
    return Section(title="Use and reproduce", body="".join(parts), anchor="use") if parts else None


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)
