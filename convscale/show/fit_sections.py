"""The sections of a fit's report, each from the run's record alone; a section without data is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from convscale import words
from convscale.show import plots
from convscale.show.fit_parts import Data, Mistake, Predicted, Timed, Verification
from convscale.show.fit_record import FitRecord
from convscale.show.fit_speeds import drawn_text, how_known, kind_of
from convscale.show.page import (
    Column,
    Figures,
    Section,
    alert,
    beside,
    code,
    definitions,
    marked,
    paragraph,
    pictures,
    table,
    tag,
    taken_for,
    tile,
    tiles,
    titled,
)
from convscale.show.stated import Conditions, Machine

GALLERY = 48
"""Wrong pictures shown at most."""


def summary(fit: FitRecord) -> str:
    """The top of the page: what was chosen and why in words, then four numbers with their conditions."""
    told = verdict(fit)
    first = paragraph(told, "lead") + paragraph(story(fit)) if told else paragraph(story(fit), "lead")
    return first + "".join(alert(text, "bad") for text in problems(fit)) + _tiles(fit)


def verdict(fit: FitRecord) -> str:
    """One sentence: what there is, how fast, whether that was asked for, and how accurate; empty without a winner."""
    name, asked, shipped = fit.winner.name, fit.constraint.min_throughput, fit.artifact.measurement
    if not name:
        return ""
    text, speed = name, shipped.speed if shipped else None
    if speed:
        does = "runs at"
        if asked:
            does = "misses the" if speed < asked else "keeps the"
            does = f"{does} {words.rate(asked)} images/s asked for: its artefact runs at"
        text += f" {does} {words.rate(speed)} images/s"
    elif (told := fit.foretold) is not None:
        under = fit.constraint.conditions or Conditions()
        on = f"{under.device or 'its device'}{f' ({under.runtime})' if under.runtime else ''}"
        text += f" is predicted to run at {words.rate(told.images_per_s)} images/s on {on}"
    if fit.top1 is not None and fit.evaluation.mean_average_precision is None:
        sure = words.surely(fit.evaluation.top1_interval)
        text += f"{' and' if text != name else ''} is right on {words.percent(fit.top1)} of the test images{sure}"
    return f"{text}." if text != name else ""


def story(fit: FitRecord) -> str:
    """Plain words: how the choice came about."""
    asked, winner, parts = fit.constraint.min_throughput, fit.winner, []
    timed = [c for c in fit.candidates if c.images_per_s is not None]
    fast = [c for c in timed if (fit.keeps(c) if fit.missed else fit.state_of(c) != "rejected")]
    if timed:
        measured = f"Of {words.plural(len(timed), 'candidate')}, {how_known(fit, timed)}"
        limit = f", {len(fast)} kept the {words.rate(asked)} images/s asked for" if asked else ", all were compared"
        parts.append(measured + limit + ".")
    if len(fit.candidates) > len(timed):
        n = len(fit.candidates) - len(timed)
        more = f"{n} more {'was' if n == 1 else 'were'} not"
        parts.append(
            f"{more} timed: smaller members of {'its' if n == 1 else 'their'} family were too slow already."
            if kind_of(timed) == "timed"
            else f"{more} predicted."
        )
    finalists = [c for c in fit.candidates if c.brief_top1 is not None]
    if len(finalists) > 1:
        on = f" on {words.count(fit.data.validation)} validation images" if fit.data.validation else ""
        parts.append(f"{len(finalists)} of them were trained briefly and compared{on}.")
    probed = [c for c in fit.candidates if c.probe is not None]
    if len(probed) > 1:
        parts.append(f"A linear head on the features of {len(probed)} of them ranked them on these images.")
    if winner.name:
        reason = (winner.reason or "").strip().rstrip(".")
        parts.append(f"{winner.name} was chosen{': ' + reason if reason else ''}.")
    if fit.evaluation.mean_average_precision is not None:
        n = words.plural(fit.evaluation.n or 0, "test image")
        mean = words.percent(fit.evaluation.mean_average_precision)
        parts.append(f"Fully trained, it has a mean average precision of {mean} on {n}, seen once, at the end.")
    elif fit.top1 is not None:
        n = f" of {words.count(fit.evaluation.n)} test images" if fit.evaluation.n else " of the test images"
        n += words.surely(fit.evaluation.top1_interval)
        parts.append(f"Fully trained, it is right on {words.percent(fit.top1)}{n}, which it saw once, at the end.")
    return " ".join(parts)


def problems(fit: FitRecord) -> list[str]:
    """What a reader must not overlook, one plain line each."""
    found = []
    asked = fit.constraint.min_throughput
    shipped = fit.artifact.measurement.speed if fit.artifact.measurement else None
    if fit.missed:
        found.append(f"The speed asked for is missed: {fit.missed}.")
    elif asked and shipped is not None and shipped < asked:
        found.append(
            f"The finished artefact ran at {words.rate(shipped)} images/s when timed again, below the "
            f"{words.rate(asked)} asked for."
        )
    if fit.verification.passed is False:
        reason = fit.verification.reason or "it differs from the trained network"
        found.append(f"The artefact was withheld: {reason}.")
    found += [f"{note[:1].upper()}{note[1:]}." for note in fit.choice_notes]
    if skipped := len(fit.left_out or ()):
        found.append(f"{words.plural(skipped, 'test image')} could not be read and stayed out.")
    return found


def _tiles(fit: FitRecord) -> str:
    """Speed, accuracy, agreement, size."""
    return tiles(_speed_tile(fit), _accuracy_tile(fit), _agreement_tile(fit), _size_tile(fit))


def _speed_tile(fit: FitRecord) -> str:
    asked, chosen = fit.constraint.min_throughput, fit.chosen
    if fit.artifact.measurement is None and (told := fit.foretold) is not None:
        return _predicted_tile(fit, told)
    measurement = fit.artifact.measurement or (chosen.timed if chosen else None)
    if measurement is None or (speed := measurement.speed) is None:
        return ""
    limit = f"asked: {words.rate(asked)} or more · " if asked else ""
    detail = (
        f"{limit}IQR {words.percent(measurement.spread)} · {_conditions_of(measurement)} · {_machine_of(measurement)}"
    )
    state = "bad" if asked and speed < asked else "good"
    title = "Speed of the artefact" if fit.artifact.measurement else "Speed, untrained"
    return tile(title, words.rate(speed), detail, state, "images/s")


def _predicted_tile(fit: FitRecord, told: Predicted) -> str:
    """For a device that is not here."""
    asked, limits = fit.constraint.min_throughput, fit.constraint
    limit = f"asked: {words.rate(asked)} or more · " if asked else ""
    under = limits.conditions or Conditions()
    under = replace(under, precision=told.precision or under.precision)
    detail = f"{limit}80 %: {words.rate(told.low)} to {words.rate(told.high)} · {under}"
    return tile("Predicted speed", words.rate(told.images_per_s), detail, "bad" if fit.missed else "", "images/s")


def _conditions_of(measurement: Timed | None) -> str:
    """In words."""
    made = measurement.conditions if measurement else None
    return str(made or Conditions())


def _machine_of(measurement: Timed | None) -> str:
    """In words."""
    made = measurement.environment if measurement else None
    return str(made or Machine())


def _accuracy_tile(fit: FitRecord) -> str:
    if fit.top1 is None:
        return ""
    ends = words.interval(fit.evaluation.top1_interval)
    interval = f"95 % interval {ends} · " if ends else ""
    images = f"{words.count(fit.evaluation.n)} test images" if fit.evaluation.n else "the test images"
    several = fit.evaluation.mean_average_precision is not None
    title, interval = ("Mean average precision", "") if several else ("Test accuracy", interval)
    least = fit.evaluation.baseline
    always = "" if least is None else f" · always the most frequent class: {words.percent(least)}"
    return tile(title, words.percent(fit.top1, 2), interval + images + always)


def _agreement_tile(fit: FitRecord) -> str:
    checked = fit.verification
    if checked.top1_agreement is None:
        return ""
    of = f"of {words.count(checked.n)} images " if checked.n else ""
    state = "" if checked.passed is None else "good" if checked.passed else "bad"
    agreement = words.percent(checked.top1_agreement, 2)
    return tile("Artefact agrees with the network", agreement, f"same top answer {of}after export", state)


def _size_tile(fit: FitRecord) -> str:
    artifact, chosen = fit.artifact, fit.chosen
    size = [f"{words.number(artifact.bytes / 1e6)} MB"] if artifact.bytes else []
    size += [f"{words.large(chosen.params)} params"] if chosen and chosen.params else []
    if not size:
        return ""
    file = " · ".join(text for text in (artifact.format, f"opset {artifact.opset}" if artifact.opset else None) if text)
    return tile("Size", size[0], " · ".join([*size[1:], *([file] if file else [])]))


def picture(fit: FitRecord, figures: Figures) -> Section | None:
    """Accuracy against speed with the constraint drawn in."""
    timed = [c for c in fit.fastest_first() if c.images_per_s]
    if not timed:
        return None
    brief = any(c.brief_top1 is not None for c in timed)
    early = "reached after brief training" if brief else "are worth by a linear head on their features"
    known = f"what the finalists {early}, and the chosen one after" if plots.early_of(timed) else "the chosen one after"
    caption = f"Above: {known} full training, with 95 % intervals. Below: {drawn_text(fit, timed)}"
    winner = fit.chosen.name if fit.chosen else "none chosen"
    body = figures.add(
        plots.speed_accuracy(fit), caption, label=f"Accuracy and speed of {len(timed)} candidates; chosen: {winner}"
    )
    return Section(title="Accuracy and speed", body=body, anchor="picture")


def training(fit: FitRecord, figures: Figures) -> Section | None:
    """The winner's full training."""
    drawn = plots.curves(fit.history)
    if drawn is None:
        return None
    rated = [epoch for epoch in fit.history if epoch.val_top1 is not None]
    best = max(rated, key=lambda epoch: epoch.val_top1 or 0.0, default=None)
    spent = fit.history[-1].seconds  # counted from the start
    text = f"{words.plural(len(fit.history), 'epoch')} in {words.seconds(spent)}"
    rates = sorted(epoch.images_per_s for epoch in fit.history if epoch.images_per_s)
    if rates:
        text += f", {words.number(rates[len(rates) // 2])} images/s while training (median over epochs)"
    if best:
        text += f"; best on validation: {words.percent(best.val_top1, 2)} in epoch {best.epoch}"
    recipe = [str(fit.recipe[key]) for key in ("name", "source") if fit.recipe.get(key)]
    notes = " ".join(note.rstrip(".") + "." for note in fit.training_notes or ())
    facts = definitions([("Recipe", " · ".join(recipe)), ("Notes", notes)])
    loss = figures.add(drawn[0], label="Loss by epoch")
    accuracy = figures.add(drawn[1], label="Validation accuracy by epoch")
    return Section(title="Training", body=paragraph(text + ".") + facts + beside(loss, accuracy), anchor="training")


def mistakes(fit: FitRecord, figures: Figures) -> Section | None:
    """Confusion matrix, what is taken for what, accuracy by class."""
    evaluation, classes, matrix = fit.evaluation, fit.class_names(), fit.evaluation.confusion
    rates: Sequence[float | None] = evaluation.per_class
    if not rates and matrix:
        rates = [row[i] / sum(row) if sum(row) else None for i, row in enumerate(matrix)]
    left, right = _confusions(matrix, classes, figures) if matrix else ("", "")
    if rates:
        totals = [sum(row) for row in matrix] if matrix else None
        worst = f" (the worst {plots.WORST})" if len(rates) > plots.WORST else ""
        drawn = figures.add(plots.per_class(rates, classes, totals), label="Accuracy by class")
        right += titled(f"Right, by class{worst}", drawn)
    if not (left or right):
        return None
    top5 = words.percent(evaluation.top5) if evaluation.top5 is not None and len(classes) > 10 else ""
    error = evaluation.calibration_error
    calibration = (
        f"{words.percent(error)}: how far its confidence is from how often it is right, on average"
        if error is not None
        else ""
    )
    facts = definitions([("Top-5 accuracy", top5), ("Calibration error", calibration)])
    body = facts + beside(left, right)
    return Section(title="Where it errs", body=body, anchor="mistakes")


def _confusions(matrix: Sequence[Sequence[int]], classes: Sequence[str], figures: Figures) -> tuple[str, str]:
    """The confusion matrix as a picture, and its largest entries off the diagonal as a list."""
    rows = [
        (classes[i], classes[j], f"{words.count(n)} of {words.count(of)} ({words.percent(n / of)})")
        for i, j, n in confused(matrix)[:6]
        if (of := sum(matrix[i]))
    ]
    drawn = figures.add(plots.confusion(matrix, classes), label=f"Confusion matrix of {len(classes)} classes")
    return titled("What is taken for what", drawn), titled("Most frequent mistakes", taken_for(rows))


def confused(matrix: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """(true class, said class, images) off the diagonal, most frequent first."""
    pairs = [(i, j, n) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n > 0]
    return sorted(pairs, key=lambda pair: -pair[2])


def gallery(fit: FitRecord) -> Section | None:
    """Wrong examples as pictures, surest first."""
    shown = _gallery([(mistake.image, mistake) for mistake in fit.wrong or ()], fit)
    if not shown:
        return None
    intro = paragraph(
        "Test images that it gets wrong, the surest mistakes first: what is on the image, then what the network said.",
        "note",
    )
    return Section(title="Wrong examples", body=intro + shown, anchor="wrong")


def looked(fit: FitRecord) -> Section | None:
    """The wrong examples under the map of what the network said."""
    shown = _gallery([(mistake.map or "", mistake) for mistake in fit.wrong or ()], fit)
    if not shown:
        return None
    if any(mistake.map_method == "occlusion" for mistake in fit.wrong or ()):
        intro = paragraph(
            "The surest of them under an occlusion map (Zeiler and Fergus 2014) of what the network said: each place "
            "by what that class's output loses when it is covered, red most, gray least. This network has no exact "
            "class activation map.",
            "note",
        )
    else:
        intro = paragraph(
            "The same images under the class activation map of what the network said: red speaks most for that class, "
            "gray least.",
            "note",
        )
    return Section(title="What it looked at", body=intro + shown, anchor="maps")


def _gallery(pairs: Sequence[tuple[str, Mistake]], fit: FitRecord) -> str:
    """Pictures of mistakes, the surest first; nothing where there are none."""
    wrong = [(image, mistake) for image, mistake in pairs if image.startswith("data:image/")]
    if not wrong:
        return ""
    classes = fit.class_names()

    def named(value: object) -> str:
        known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes)
        return classes[value] if known else str(value)  # pyright: ignore[reportArgumentType, reportCallIssue]

    surest = sorted(wrong, key=lambda pair: -(pair[1].confidence or 0))[:GALLERY]
    rows = [
        (image, one.name or "", named(one.true), named(one.predicted), words.percent(one.confidence, 0))
        for image, one in surest
    ]
    return pictures(rows, small=bool(fit.data.image_size) and (fit.data.image_size or 0) <= 64)


def verification(fit: FitRecord) -> Section | None:
    """How the artefact was compared with the trained network."""
    v = fit.verification
    if v == Verification():
        return None
    verdict = (
        tag("not decided", "warn")
        if v.passed is None
        else tag("passed", "good")
        if v.passed
        else tag("withheld", "bad")
    )
    accuracy = largest = ""
    if v.accuracy_before is not None and v.accuracy_after is not None:
        before, after = (
            f"{words.percent(share, 2)} {what}{words.surely(ends)}"
            for share, what, ends in (
                (v.accuracy_before, "as trained", v.accuracy_before_interval),
                (v.accuracy_after, "as shipped", v.accuracy_after_interval),
            )
        )
        accuracy = f"{before}, {after}"
    if v.max_abs is not None:
        largest = f"{v.max_abs:.2e} absolute"
        largest += f", {v.max_rel:.2e} of the largest output" if v.max_rel is not None else ""
    rows = [
        ("Compared on", f"{words.count(v.n)} test images" if v.n else "test images"),
        ("Same top answer", words.percent(v.top1_agreement, 3) if v.top1_agreement is not None else ""),
        ("Accuracy" if fit.evaluation.mean_average_precision is None else "Mean average precision", accuracy),
        ("Largest difference", largest),
    ]
    body = marked(verdict, v.reason or "") + definitions(rows)
    return Section(title="Verification", body=body, anchor="verification")


def data(fit: FitRecord) -> Section | None:
    """What was learned from."""
    d = fit.data
    if d == Data():
        return None
    counts = ((d.train, "to train"), (d.validation, "to choose"), (d.test, "to test"))
    splits = [f"{words.count(n)} {label}" for n, label in counts if n is not None]
    names = fit.class_names()
    shown = ", ".join(names[:24]) + (f" and {len(names) - 24} more" if len(names) > 24 else "")
    channels = {1: "grey", 3: "colour"}.get(d.channels or 0, f"{d.channels} channels" if d.channels else "")
    rows = [
        ("Data set", d.name or ""),
        ("Images", ", ".join(splits)),
        ("Pixels", ", ".join(x for x in (f"{d.image_size} px" if d.image_size else "", channels) if x)),
        (f"{len(names)} classes", shown),
        ("From", d.path or ""),
        ("Notes", " ".join(note.rstrip(".") + "." for note in d.notes)),
    ]
    odd = "".join(alert(f"{line[:1].upper()}{line[1:]}.", "warn") for line in fit.data_warnings or ())
    return Section(title="Data", body=odd + definitions(rows) + _doubtful(fit), anchor="data")


def _doubtful(fit: FitRecord) -> str:
    """Train images whose labels a person should look at."""
    if not fit.doubtful:
        return ""
    columns = [Column(title="Train image", kind="name"), Column(title="labelled"), Column(title="looks like")]
    columns += [Column(title="sure", kind="n"), Column(title="of the label", kind="n")]
    rows = [
        (
            "",
            [
                escape(Path(one.name or "").name),
                escape(one.given or "without it"),
                escape(one.suggested or "none"),
                words.percent(one.suggested_confidence, 0),
                words.percent(one.confidence, 0),
            ],
        )
        for one in fit.doubtful
    ]
    about = paragraph("The labels that the trained network doubts most: worth a look.", "note")
    return titled("Perhaps mislabelled", about + table(columns, rows))


TIMINGS = {
    "check_s": "looking at the data",
    "measure_s": "measuring",
    "probe_s": "features",
    "brief_s": "brief trainings",
    "train_s": "full training",
    "export_s": "export and verification",
    "total_s": "in all",
}
"""Steps of a run in words."""


def conditions(fit: FitRecord) -> Section | None:
    """Under what the figures hold, and how long each part took."""
    machine, asked = fit.machine, fit.constraint
    under = str(asked.conditions or Conditions())
    spent = [f"{label} {words.seconds(fit.timings[key])}" for key, label in TIMINGS.items() if key in fit.timings]
    body = definitions(
        [
            ("Machine", str(machine) if machine.device_name else ""),
            ("Versions", ", ".join(f"{name} {value}" for name, value in machine.versions.items())),
            (
                "Speed asked for",
                f"{words.rate(asked.min_throughput)} images/s: {under}" if asked.min_throughput else "",
            ),
            *((key, str(value)) for key, value in machine.extra.items() if isinstance(value, str | int | float)),
            ("Time spent", ", ".join(spent)),
        ]
    )
    return Section(title="Conditions", body=body, anchor="conditions") if body else None


def use(fit: FitRecord, folder: Path) -> Section | None:
    """How to use what came out and how to make it again; the artefact's path is relative to ``folder``, the run's."""
    artifact, parts = fit.artifact, []
    if artifact.path and fit.verification.passed is not False:
        timed = artifact.measurement.conditions if artifact.measurement else None
        size = (timed.image_size if timed else None) or fit.data.image_size or "side"
        typed = (
            "import convscale as cs\n\n"
            f"net = cs.load_artifact({str(folder / artifact.path)!r})\n"
            f"probabilities = net(images)    # uint8, (n, {size}, {size}, {fit.data.channels or 3}) -> (n, "
            f"{len(fit.class_names()) or 'classes'})"
        )
        note = "Normalisation and softmax are inside; resizing is yours and is described in the artefact's folder."
        parts.append(titled("Use it", paragraph(note, "note") + code(typed)))
    if fit.command:
        parts.append(titled("Make it again", code(fit.command)))
    return Section(title="Use and reproduce", body="".join(parts), anchor="use") if parts else None
