"""The report of a search: what it found, when, and which choices mattered."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convscale import words
from convscale.arch.block import StageSpec
from convscale.arch.spec import NetSpec
from convscale.arch.zoo import get_spec
from convscale.choice.decide import describe_speed
from convscale.files import write_text
from convscale.nas.records import TrialRecord, front_of, hypervolume
from convscale.nas.result import Study, read_study
from convscale.show import page as parts
from convscale.show.page import Column, Figures, Section, page
from convscale.show.states import BLUE, GREEN, GREY, ORANGE, RED

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BESIDE = ("efficientnet_b0", "tresnet_m")
"""The papers' networks, drawn beside the one found."""
_MOST_BARS = 14
_PARTS = (("a quarter", 0.25), ("half", 0.5), ("all", 1.0))
_COLOURS = {"trained": BLUE, "pruned": ORANGE, "too slow": RED, "failed": GREY}
_MARKERS = {"trained": "circle", "pruned": "triangle-down", "too slow": "x-thin", "failed": "square-open"}


def write_search_report(folder: str | os.PathLike[str], output: str | os.PathLike[str] | None = None) -> Path:
    """Write ``report.html`` into the folder of ``convscale search``, or another file.

    Returns:
        The path of the report.

    Raises:
        UserError: the folder holds no search with a result.
    """
    path = Path(folder) / "report.html" if output is None else Path(output)
    write_text(path, search_page(read_study(folder)))
    return path


def search_page(study: Study) -> str:
    """The report of a search as one HTML document."""
    figures, best = Figures(), study.best
    sections = [
        _speeds(study, figures),
        _over_time(study, figures),
        _importance(study, figures),
        _drawn(best),
        _trials(study),
        _conditions(study),
    ]
    return page(
        title=best.spec.name,
        kicker=f"convscale search · {study.space.name}",
        head=_head(study),
        sections=[section for section in sections if section is not None],
        figures=figures,
        meta={"convscale-winner": best.spec.name},
    )


def _head(study: Study) -> str:
    best, shipped = study.best, study.shipped
    trained = [trial for trial in study.trials if trial.state == "trained"]
    shown = best.speed if shipped is None else shipped
    speed = None if shown is None else shown.images_per_s
    kind = "" if shown is None else f"{shown.kind}, {study.basis.conditions.device}"
    return parts.tiles(
        parts.tile("Validation top-1", words.percent(best.accuracy, 2), "after a brief training", "good"),
        parts.tile("Speed", words.rate(speed), kind),
        parts.tile("Parameters", words.large(best.params)),
        parts.tile("MACs", words.large(best.macs), f"{best.spec.input.size} px"),
        parts.tile("Trained", str(len(trained)), f"of {len(study.trials)} candidates"),
    ) + parts.paragraph(f"Wanted: {study.reward}.")


def _layout(figure: Figure, x: str, y: str, height: int = 320) -> Figure:
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"title": {"text": x}},
        yaxis={"title": {"text": y}},
    )
    return figure


def _speeds(study: Study, figures: Figures) -> Section:
    """Accuracy against speed of all trials that were trained, with the target and the front."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for state, colour in _COLOURS.items():
        mine = [t for t in study.trials if t.state == state and t.accuracy is not None and t.images_per_s]
        if mine:
            figure.add_trace(_points(mine, state, colour))
    front = study.front
    line = {"color": GREEN, "width": 2}
    figure.add_trace(
        go.Scatter(
            x=[t.images_per_s for t in front],
            y=[100 * (t.accuracy or 0.0) for t in front],
            mode="lines",
            name="front",
            line=line,
            hoverinfo="skip",
        )
    )
    figure.add_trace(_points([study.best], "chosen", GREEN, marker="star", size=15))
    if study.reward.by == "throughput" and study.reward.target:
        figure.add_vline(x=study.reward.target, line={"color": RED, "dash": "dash", "width": 1.5})
    figure.update_xaxes(type="log")
    slow = sum(trial.state == "too slow" for trial in study.trials)
    caption = f"{words.plural(slow, 'candidate')} too slow or too large, never trained." if slow else ""
    drawn = figures.add(
        _layout(figure, "images/s", "validation top-1, %", 380), caption, label="Accuracy against speed of all trials"
    )
    return Section(title="Accuracy against speed", body=drawn, anchor="speed")


def _points(trials: Sequence[TrialRecord], name: str, colour: str, marker: str = "", size: int = 9) -> Any:
    import plotly.graph_objects as go

    texts = [f"{escape(t.spec.name)}<br>{escape(describe_speed(t.speed))}" for t in trials]
    return go.Scatter(
        x=[t.images_per_s for t in trials],
        y=[100 * (t.accuracy or 0.0) for t in trials],
        mode="markers",
        name=name,
        marker={"color": colour, "size": size, "symbol": marker or _MARKERS.get(name, "circle")},
        hovertext=texts,
        hoverinfo="text+y",
    )


def _over_time(study: Study, figures: Figures) -> Section | None:
    """The best and the front so far, by the seconds in training."""
    import plotly.graph_objects as go

    at, best = 0.0, -1.0
    x, y = list[float](), list[float]()
    when = list[float]()
    for trial in study.trials:
        at += 0.0 if trial.result is None else trial.result.seconds
        when.append(at / 60)
        if trial.value is not None and trial.value > best:
            best = trial.value
            x.append(at / 60)
            y.append(100 * (trial.accuracy or 0.0))
    grown = _growth(study)
    if len(x) < 2 and len(grown) < 2:
        return None
    best_line = {"shape": "hv", "color": BLUE}
    figure = go.Figure(go.Scatter(x=[*x, when[-1]], y=[*y, *y[-1:]], mode="lines+markers", line=best_line, name="best"))
    figure.add_trace(
        go.Scatter(
            x=[*(when[count - 1] for count, _ in grown), when[-1]],
            y=[100 * area for _, area in [*grown, *grown[-1:]]],
            mode="lines",
            line={"shape": "hv", "color": GREEN, "dash": "dot"},
            name="area below the front",
            yaxis="y2",
        )
    )
    second = {"title": {"text": "area, % of the last"}, "overlaying": "y", "side": "right", "range": [0, 105]}
    figure.update_layout(
        yaxis2={**second, "tickmode": "auto", "showgrid": False}, legend={"orientation": "h", "y": 1.15}
    )
    parts_of = [(word, front_of(study.trials[: math.ceil(len(study.trials) * part)])) for word, part in _PARTS]
    told = [f"{words.plural(len(front), 'network')} after {word}" for word, front in parts_of]
    caption = f"The front has {', '.join(told)} of the candidates."
    drawn = figures.add(
        _layout(figure, "minutes of training", "validation top-1 of the best, %", 260),
        caption,
        label="The best so far and the front by time",
    )
    return Section(title="The best and the front over time", body=drawn, anchor="time")


def _growth(study: Study) -> list[tuple[int, float]]:
    """Where the front grew: the number of candidates until then, and the area below it as a share of the last one."""
    whole, found = hypervolume(study.trials), list[tuple[int, float]]()
    for count, trial in enumerate(study.trials, 1):
        if trial.state == "trained" and whole:
            area = hypervolume(study.trials[:count]) / whole
            if not found or area > found[-1][1]:
                found.append((count, area))
    return found


def _importance(study: Study, figures: Figures) -> Section | None:
    """Which choices decide the value."""
    import plotly.graph_objects as go

    shares = dict(list(study.importance.items())[:_MOST_BARS])
    if not shares:
        return None
    names = [_in_words(name) for name in reversed(shares)]
    figure = go.Figure(
        go.Bar(x=[100 * share for share in reversed(shares.values())], y=names, orientation="h", marker_color=BLUE)
    )
    caption = (
        "Share of what a linear model of the trained networks says; it knows nothing of choices that act together."
    )
    drawn = figures.add(
        _layout(figure, "share, %", "", 60 + 26 * len(names)), caption, label="Importance of each choice"
    )
    return Section(title="Which choices mattered", body=drawn, anchor="importance")


def _in_words(name: str) -> str:
    """``2.kernel`` as ``stage 2: kernel``."""
    stage, dot, field = name.partition(".")
    return f"stage {stage}: {field.replace('_', ' ')}" if dot else name.replace("_", " ")


def _drawn(best: TrialRecord) -> Section:
    """The network stage by stage beside those of the papers."""
    nets = [best.spec, *(get_spec(name) for name in BESIDE)]
    rows = [("", [parts.cell("input"), *(parts.cell(f"{net.input.size} px") for net in nets)])]
    rows.append(("", [parts.cell("stem"), *(parts.cell(_stem(net)) for net in nets)]))
    for at in range(max(len(net.stages) for net in nets)):
        cells = [_stage(net.stages[at]) if at < len(net.stages) else ("", "") for net in nets]
        rows.append(("", [parts.cell(f"stage {at}"), *(parts.cell(text, under) for text, under in cells)]))
    rows.append(("", [parts.cell("head"), *(parts.cell(str(net.head.width or "none")) for net in nets)]))
    columns = [Column(title=""), *(Column(title=net.name, kind="name") for net in nets)]
    return Section(title="The network found", body=parts.table(columns, rows), anchor="network")


def _stem(net: NetSpec) -> str:
    return f"{net.stem.kind.replace('_', ' ')}, {net.stem.widths[-1]} channels, 1/{net.stem.reduction}"


def _stage(stage: StageSpec) -> tuple[str, str]:
    """A stage in words, and its details."""
    block = stage.runs[0].block
    kernels = "/".join(map(str, block.kernels)) or "no"
    text = f"{stage.depth} x {block.kind.replace('_', ' ')}, {block.width} channels"
    details = [f"kernel {kernels}", f"stride {stage.stride}"]
    if block.traits.takes_ratio:
        details.append(f"inside x {block.inner_ratio:g}")
    details.append("SE" if block.se else "no SE")
    details.append(block.activation.kind)
    return text, ", ".join(details)


def _trials(study: Study) -> Section:
    columns = [
        Column(title="network", kind="name"),
        Column(title="state"),
        Column(title="top-1", kind="n"),
        Column(title="speed", kind="wide"),
        Column(title="params", kind="n"),
        Column(title="MACs", kind="n"),
    ]
    best = study.best
    rows = [
        (
            "winner" if t.number == best.number else "dim" if t.state in ("too slow", "failed") else "",
            [
                parts.cell(f"{t.number}: {t.spec.name}"),
                parts.cell(t.state, t.reason),
                parts.cell(words.percent(t.accuracy, 2)),
                parts.cell(describe_speed(t.speed)),
                parts.cell(words.large(t.params)),
                parts.cell(words.large(t.macs)),
            ],
        )
        for t in sorted(study.trials, key=lambda t: -(t.value or -1.0))
    ]
    return Section(title="All candidates", body=parts.folded("Show", parts.table(columns, rows)), anchor="trials")


def _conditions(study: Study) -> Section:
    stated = study.basis.conditions.to_dict()
    facts = [(str(key).replace("_", " "), str(value)) for key, value in stated.items() if value is not None]
    facts += [(f"time: {name}", words.seconds(seconds)) for name, seconds in study.times.items()]
    facts += [("space", f"{study.space.name}, {study.space.size_text} networks. {study.space.source}")]
    return Section(title="Conditions", body=parts.definitions(facts), anchor="conditions")
