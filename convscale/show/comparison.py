"""Two runs beside each other: what differs in how they were made, and in what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convscale import words
from convscale.conditions import size_text
from convscale.files import write_text
from convscale.show.page import (
    Column,
    Figures,
    Section,
    alert,
    beside,
    cell,
    page,
    paragraph,
    table,
)
from convscale.show.predictions import Predictions
from convscale.show.runs import Whole
from convscale.show.states import BLUE, GREEN, ORANGE, RED, SKY
from convscale.stats import mcnemar

COLOURS = (BLUE, ORANGE, GREEN, RED, SKY)
MOST_RUNS = len(COLOURS)
_EVALUATE = "`convscale evaluate RUN --data-dir DATA --predictions`"
WORST = 20
"""Classes, or pairs of them, that are shown at most."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A run against the first one."""

    old: str
    """The first run's folder."""
    new: str
    """This one's."""
    drop_points: float | None
    """By how much this one is less accurate, in points; None where that can not be said."""
    unlike: str = ""
    """Why it can not."""
    only_old: int | None = None
    """Test images that the first alone gets right; None where they were not kept, or are others."""
    only_new: int | None = None
    """Test images that this one alone gets right."""
    p: float | None = None
    """McNemar's exact two-sided p."""
    why_not: str = ""
    """Why there is no such test."""
    recipe: Mapping[str, tuple[object, object]]
    """Keys that differ, with both values."""
    per_class: Mapping[str, tuple[float | None, float | None]]
    """Share of each class's test images that are right, in both; where both say it."""
    same_data: bool | None
    """Whether both saw the same images and labels; None where one does not say."""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            **vars(self),
            "recipe": {key: list(pair) for key, pair in self.recipe.items()},
            "per_class": {key: list(pair) for key, pair in self.per_class.items()},
        }


def compare(old: Whole, new: Whole) -> Compared:
    """What differs between two runs."""
    a, b = old.run, new.run
    digests = (a.data_digest, b.data_digest)
    same_data = None if None in digests else digests[0] == digests[1]
    judged = (a.judged_digest, b.judged_digest)
    drop, unlike = _drop(old, new, same_data if None in judged else judged[0] == judged[1])
    counts, why = _discordant(old.predictions, new.predictions)
    keys = [*old.recipe, *(key for key in new.recipe if key not in old.recipe)]
    shares = {}
    if old.classes == new.classes and len(old.per_class) == len(new.per_class) == len(old.classes):
        shares = dict(zip(old.classes, zip(old.per_class, new.per_class, strict=True), strict=True))
    return Compared(
        old=str(a.path),
        new=str(b.path),
        drop_points=drop,
        unlike=unlike,
        only_old=None if counts is None else counts[0],
        only_new=None if counts is None else counts[1],
        p=None if counts is None else mcnemar(*counts),
        why_not=why,
        recipe={
            key: (old.recipe.get(key), new.recipe.get(key))
            for key in keys
            if old.recipe.get(key) != new.recipe.get(key)
        },
        per_class=shares,
        same_data=same_data,
    )


def _drop(old: Whole, new: Whole, same_images: bool | None) -> tuple[float | None, str]:
    """Points that the second is less accurate, or why that can not be said. Kept predictions tell of which images an
    accuracy is; where one run has none the data must do.
    """
    a, b = old.run, new.run
    if a.accuracy is None or b.accuracy is None:
        return None, "one has none"
    if a.metric != b.metric:
        return None, f"one is {a.metric}, the other {b.metric}; {_EVALUATE} tells of test images in both"
    if old.predictions is not None and new.predictions is not None:
        same_images = old.predictions.digest == new.predictions.digest
    if same_images is False:
        return None, f"they are of different images; {_EVALUATE} with the same data for both makes them comparable"
    return 100 * (a.accuracy - b.accuracy), ""


def _discordant(a: Predictions | None, b: Predictions | None) -> tuple[tuple[int, int] | None, str]:
    """Images that the first, and that the second alone gets right; or why that can not be said."""
    if a is None or b is None:
        missing = "neither run has" if a is None and b is None else "the first has no" if a is None else "it has no"
        return None, f"{missing} test_predictions.json ({_EVALUATE})"
    if a.digest != b.digest or a.labels != b.labels:
        return None, "they were tested on other images"
    pairs = list(zip(a.right, b.right, strict=True))
    return (sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)), ""


def verdict(found: Compared) -> str:
    """In one sentence."""
    if found.drop_points is None:
        return f"their accuracies can not be compared: {found.unlike}"
    points = abs(found.drop_points)
    text = "both are equally accurate"
    if points > 0:
        text = f"{words.number(points)} points {'less' if found.drop_points > 0 else 'more'} accurate"
    if found.p is None:
        return f"{text}; no test: {found.why_not}"
    likely = f"p = {found.p:.2g}" if found.p >= 1e-4 else "p < 0.0001"
    return (
        f"{text}; of the same test images {found.only_old} were right before only, {found.only_new} are right now only "
        f"(McNemar's exact test: {likely})"
    )


# ---------------------------------------------------------------- the page


def write_comparison(runs: Sequence[Whole], found: Sequence[Compared], path: Path) -> Path:
    """A page on several runs, each compared with the first."""
    figures = Figures()
    names = names_of(runs)
    head = "".join(
        alert(f"{name}: {verdict(one)}.", "good" if one.drop_points is not None and one.drop_points <= 0 else "warn")
        for name, one in zip(names[1:], found, strict=True)
    )
    sections = [
        _overview(runs, names),
        _curves(runs, names, figures),
        *(
            each
            for name, one in zip(names[1:], found, strict=True)
            for each in (_recipe(one, name), _classes(one, name))
        ),
        _confusions(runs, names),
        _forms(runs, names),
    ]
    text = page(
        title=" and ".join(names),
        kicker="convscale report · comparison",
        head=head,
        sections=[section for section in sections if section is not None],
        figures=figures,
    )
    write_text(path, text)
    return path


def names_of(runs: Sequence[Whole]) -> list[str]:
    """What tells the runs apart: as much of the end of each path as is needed."""
    parts = [run.run.path.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run.run.path) for run in runs]


def _overview(runs: Sequence[Whole], names: Sequence[str]) -> Section:
    columns = [Column(title="", kind="name"), *(Column(title=name, kind="n long") for name in names)]
    facts = [
        ("Kind", [run.run.kind for run in runs]),
        ("Network", [run.run.network for run in runs]),
        ("Image size", [_size(run.run.image_size) for run in runs]),
        ("Accuracy", [f"{words.percent(run.run.accuracy, 2)} ({run.run.metric})" for run in runs]),
        ("95 % interval", [_interval(run.run.interval) for run in runs]),
        ("Images", [words.count(run.run.images) for run in runs]),
        ("Images/s", [words.rate(run.run.images_per_s) for run in runs]),
        ("Measured", [run.run.conditions for run in runs]),
        ("Data", [run.run.data for run in runs]),
        ("Data digest", [run.run.data_digest or words.UNKNOWN for run in runs]),
        ("Cost", [words.seconds(run.run.seconds) for run in runs]),
        ("Commit", [(run.run.commit or words.UNKNOWN)[:12] for run in runs]),
    ]
    rows = [("", [cell(title), *(cell(value or words.UNKNOWN) for value in values)]) for title, values in facts]
    return Section(title="Overview", body=table(columns, rows), anchor="overview")


def _size(value: object) -> str:
    if isinstance(value, list | tuple):
        value = tuple(value)
    return f"{size_text(value)} px" if isinstance(value, int | tuple) else ""  # pyright: ignore[reportArgumentType]


def _interval(ends: tuple[float, float] | None) -> str:
    return words.UNKNOWN if ends is None else f"{words.percent(ends[0], 2)} to {words.percent(ends[1], 2)}"


def _curves(runs: Sequence[Whole], names: Sequence[str], figures: Figures) -> Section | None:
    """Loss and accuracy on validation, all runs in one picture each."""
    if not any(run.history for run in runs):
        return None
    import plotly.graph_objects as go

    made: list[str] = []
    for key, title, scale in (("val_loss", "validation loss", 1), ("val_top1", "validation accuracy, %", 100)):
        figure = go.Figure()
        for name, run, colour in zip(names, runs, COLOURS, strict=False):
            points = [
                (row.epoch, scale * value)
                for row in run.history
                if (value := getattr(row, key)) is not None and row.epoch
            ]
            x, y = [point[0] for point in points], [point[1] for point in points]
            figure.add_trace(
                go.Scatter(x=x, y=y, mode="lines+markers", name=name, line={"color": colour, "width": 2.2})
            )
        figure.update_layout(
            height=320,
            margin={"l": 10, "r": 10, "t": 30, "b": 10},
            hovermode="x unified",
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            xaxis={"title": {"text": "epoch"}},
            yaxis={"title": {"text": title}},
        )
        made.append(figures.add(figure, label=f"{title} by epoch of {', '.join(names)}"))
    return Section(title="Curves", body=beside(*made), anchor="curves")


def _recipe(found: Compared, name: str) -> Section | None:
    columns = [
        Column(title="key", kind="name"),
        Column(title="before", kind="n long"),
        Column(title=name, kind="n long"),
    ]
    rows = [("", [cell(key), cell(str(a)), cell(str(b))]) for key, (a, b) in found.recipe.items()]
    body = table(columns, rows) if rows else paragraph("Every key of the recipe is the same.")
    return Section(title=f"Recipe: {name}", body=body, anchor=f"recipe-{_anchor(name)}")


def _anchor(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _classes(found: Compared, name: str) -> Section | None:
    """The classes that changed most."""
    changed = sorted(
        ((title, a, b) for title, (a, b) in found.per_class.items() if a is not None and b is not None and a != b),
        key=lambda row: -abs(row[1] - row[2]),
    )[:WORST]
    if not changed:
        return None
    columns = [
        Column(title="class", kind="name"),
        Column(title="before", kind="n"),
        Column(title=name, kind="n"),
        Column(title="points", kind="n"),
    ]
    rows = [
        ("", [cell(title), cell(words.percent(a)), cell(words.percent(b)), cell(f"{100 * (b - a):+.1f}")])
        for title, a, b in changed
    ]
    return Section(title=f"Per class: {name}", body=table(columns, rows), anchor=f"classes-{_anchor(name)}")


def _confusions(runs: Sequence[Whole], names: Sequence[str]) -> Section | None:
    """Pairs of classes that are taken for each other, where the runs differ most."""
    if len({run.classes for run in runs}) != 1 or not all(len(run.confusion) == len(run.classes) > 0 for run in runs):
        return None
    classes = runs[0].classes
    pairs = [(i, j) for i in range(len(classes)) for j in range(len(classes)) if i != j]

    def counts(pair: tuple[int, int]) -> list[int]:
        return [run.confusion[pair[0]][pair[1]] for run in runs]

    pairs = [pair for pair in pairs if len(set(counts(pair))) > 1]
    pairs = sorted(pairs, key=lambda pair: min(counts(pair)) - max(counts(pair)))[:WORST]
    if not pairs:
        return None
    columns = [
        Column(title="is", kind="name"),
        Column(title="taken for"),
        *(Column(title=name, kind="n") for name in names),
    ]
    rows = [("", [cell(classes[i]), cell(classes[j]), *(cell(str(n)) for n in counts((i, j)))]) for i, j in pairs]
    return Section(title="Confusions that differ", body=table(columns, rows), anchor="confusions")


def _forms(runs: Sequence[Whole], names: Sequence[str]) -> Section | None:
    """Shipped forms, and what each ran at."""
    every = sorted({form for run in runs for form in run.forms})
    if not every:
        return None
    columns = [Column(title="form", kind="name"), *(Column(title=name, kind="n") for name in names)]
    rows = []
    for form in every:
        cells = [cell(form)]
        for run in runs:
            there = run.forms.get(form)
            speed = words.UNKNOWN if there is None else words.rate(there.images_per_s)
            cells.append(cell(speed, "shipped" if form == run.shipped else ""))
        rows.append(("", cells))
    return Section(title="Shipped forms, images/s", body=table(columns, rows), anchor="forms")
