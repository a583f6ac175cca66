"""Figures of speeds: accuracy against throughput, networks side by side, where a network's time goes, its roofline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convscale import words
from convscale.errors import UserError
from convscale.predictor.profile import Profile
from convscale.show.picture import save_png
from convscale.show.speed_points import KINDS, SpeedPoint, front, hover_lines, told_apart
from convscale.show.states import GREY, RED

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PALETTE = ("#1f83c4", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f8c1f", "#b2554f", "#5a6775")
MARKERS = {"measured": "circle", "predicted": "diamond-open", "published": "square-open"}
DASHES = {"measured": "solid", "predicted": "dash", "published": "dot"}
BOUND = {"compute": "#d55e00", "memory": "#1f83c4", "launch": "#e69f00"}
"""What binds a kernel -> its colour."""


def colours(families: Sequence[str]) -> dict[str, str]:
    """A colour for each family, the same in every figure of a page; grey where there are more than colours. The two
    that this package is about have theirs however many others there are.
    """
    there = dict.fromkeys(families)
    first = [name for name in ("tresnet", "efficientnet") if name in there]
    order = [*first, *(family for family in there if family not in first)]
    return {family: PALETTE[i] if i < len(PALETTE) else GREY for i, family in enumerate(order)}


def _hover(p: SpeedPoint) -> str:
    return "<br>".join([f"<b>{escape(p.name)}</b>", *map(escape, hover_lines(p))])


def _log_ticks(low: float, high: float) -> dict[str, object]:
    """Ticks as plain numbers: at 1, 2 and 5 of each decade, at 1 alone where there are more than two and a half
    decades.
    """
    first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
    values = [m * 10.0**e for e in range(first, last + 1) for m in ((1, 2, 5) if high < 300 * low else (1,))]
    return {"type": "log", "tickvals": values, "ticktext": [words.number(v, 1) for v in values]}


def accuracy_speed(
    points: Sequence[SpeedPoint], palette: dict[str, str], min_throughput: float | None = None
) -> Figure:
    """Accuracy against images/s (logarithmic), a front per family and kind; points without a published accuracy are
    left out.

    Args:
        min_throughput: images/s asked for, drawn as a line.
    """
    import plotly.graph_objects as go

    known = [p for p in points if p.top1 is not None]
    figure = go.Figure()
    named: set[str] = set()
    for family in dict.fromkeys(p.family for p in known):
        for kind in KINDS:
            mine = [p for p in known if p.family == family and p.kind == kind]
            if not mine:
                continue
            edge = front(mine)
            colour = palette.get(family, GREY)
            line = {"color": colour, "dash": DASHES[kind], "width": 1.8}
            x, y = [p.images_per_s for p in edge], [p.top1 for p in edge]
            named, before = {*named, family}, named
            figure.add_trace(
                go.Scatter(x=x, y=y, mode="lines", line=line, legendgroup=family, showlegend=False, hoverinfo="skip")
            )
            bars = {"color": colour, "thickness": 1, "width": 0}
            error = {
                "type": "data",
                "symmetric": False,
                "array": [(p.high or p.images_per_s) - p.images_per_s for p in mine],
                "arrayminus": [p.images_per_s - (p.low or p.images_per_s) for p in mine],
            }
            figure.add_trace(
                go.Scatter(
                    x=[p.images_per_s for p in mine],
                    y=[p.top1 for p in mine],
                    error_x={**error, **bars} if kind == "predicted" else None,
                    mode="markers",
                    name=escape(family),
                    legendgroup=family,
                    showlegend=family not in before,
                    marker={
                        "color": colour,
                        "symbol": MARKERS[kind],
                        "size": [9 if p in edge else 6 for p in mine],
                        "line": {"width": 1.6, "color": colour},
                    },
                    opacity=0.95,
                    hovertext=[_hover(p) for p in mine],
                    hoverinfo="text",
                )
            )
    for p in known:
        if p.chosen:
            ring = {"color": "rgba(0,0,0,0)", "size": 20, "line": {"width": 2.4, "color": RED}}
            figure.add_trace(
                go.Scatter(x=[p.images_per_s], y=[p.top1], mode="markers", name="chosen", marker=ring, hoverinfo="skip")
            )
    speeds = [p.images_per_s for p in known] or [1.0]
    for p in labelled(known, min(speeds), max(speeds)):
        place = {
            "x": np.log10(p.images_per_s),
            "y": p.top1,
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
            "name": "front",
        }
        figure.add_annotation(
            **place,
            text=escape(p.name.partition(".")[0]),
            font={"size": 10, "color": "var(--muted)"},
            xshift=5,
            yshift=3,
        )
    if min_throughput is not None:
        speeds.append(min_throughput)
        figure.add_vline(x=min_throughput, line={"color": RED, "width": 2, "dash": "dash"})
        place = {"x": np.log10(min_throughput), "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        figure.add_annotation(**place, text=f"asked for: {words.rate(min_throughput)} or more")
    figure.update_layout(
        height=520,
        margin={"l": 10, "r": 10, "t": 10 if min_throughput is None else 26, "b": 10},
        meta={"narrow_height": 0.95, "narrow_hides": ["front"]},
        xaxis={"title": {"text": "images per second (logarithmic)"}, **_log_ticks(min(speeds), max(speeds))},
        yaxis={"title": {"text": "ImageNet top-1, %"}},
        legend={"orientation": "h", "y": -0.14, "yanchor": "top", "x": 0, "tracegroupgap": 0},
        hovermode="closest",
    )
    return figure


def labelled(
    points: Sequence[SpeedPoint], slowest: float, fastest: float, room: tuple[float, float] = (0.13, 0.05)
) -> list[SpeedPoint]:
    """Points whose names stand in the picture: the chosen one and the front's, but for those too close to another to be
    read.

    Args:
        room: what a name takes of the picture's width and height.
    """
    tops = [p.top1 or 0.0 for p in points] or [0.0]
    wide, high = max(np.log(fastest / slowest), 1e-9), max(max(tops) - min(tops), 1e-9)
    found: list[SpeedPoint] = []
    for p in sorted(front(points), key=lambda p: (not p.chosen, -(p.top1 or 0.0))):
        near = (
            abs(np.log(p.images_per_s / q.images_per_s)) < room[0] * wide
            and abs((p.top1 or 0) - (q.top1 or 0)) < room[1] * high
            for q in found
        )
        if not any(near):
            found.append(p)
    return found


def side_by_side(points: Sequence[SpeedPoint], relative_to: str = "") -> Figure:
    """Networks as rows, one bar per setting and kind; bars of the same setting share a colour, predicted and published
    ones are hatched.

    Args:
        relative_to: a network's name: bars are multiples of its speed in the same setting, so that a CPU stands beside
            a GPU.
    """
    import plotly.graph_objects as go

    names = list(dict.fromkeys(p.name for p in points))
    series = list(dict.fromkeys((p.setting, p.kind) for p in points))
    palette = colours([setting for setting, _ in series])
    _, labels = told_apart(series)
    figure = go.Figure()
    thick = 0.8 / max(1, len(series))
    for i, (setting, kind) in enumerate(series):
        mine = [p for p in points if (p.setting, p.kind) == (setting, kind)]
        unit = next((p.images_per_s for p in mine if p.name == relative_to), None) if relative_to else 1.0
        if unit is None:  # without the network that all others are stated in, nothing can be drawn of this setting
            continue
        hatch = {"measured": "", "predicted": "/", "published": "."}[kind]
        figure.add_trace(
            go.Bar(
                x=[p.images_per_s / unit for p in mine],
                y=[names.index(p.name) - 0.36 + thick * (i + 0.5) for p in mine],
                width=thick * 0.9,
                orientation="h",
                name=escape(labels[i]),
                marker={
                    "color": palette[setting],
                    "pattern": {
                        "shape": hatch,
                        "fillmode": "overlay",
                        "fgcolor": "rgba(255,255,255,.7)",
                        "solidity": 0.3,
                    },
                },
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [((p.high or p.images_per_s) - p.images_per_s) / unit for p in mine],
                    "arrayminus": [(p.images_per_s - (p.low or p.images_per_s)) / unit for p in mine],
                    "thickness": 1,
                    "width": 2,
                    "color": "var(--ink)",
                },
                hovertext=[_hover(p) for p in mine],
                hoverinfo="text",
            )
        )
    for i, name in enumerate(names):
        label = {"x": 0, "y": i - 0.36, "xanchor": "left", "yanchor": "bottom", "showarrow": False, "borderpad": 0}
        figure.add_annotation(
            **label,
            text=escape(words.shortened(name, 44)),
            font={"size": 11, "color": "var(--ink)"},
            bgcolor="var(--card)",
        )
    figure.update_layout(
        height=110 + len(names) * (26 + 15 * len(series)) + 18 * len(series),
        margin={"l": 10, "r": 10, "t": 14, "b": 10},
        barmode="overlay",
        xaxis={
            "title": {"text": f"speed as a multiple of {escape(relative_to)}" if relative_to else "images per second"},
            "rangemode": "tozero",
        },
        yaxis={"range": [len(names) - 0.4, -0.62], "showticklabels": False, "showgrid": False, "zeroline": False},
        legend={
            "orientation": "h",
            "y": -70 / (60 + len(names) * (26 + 15 * len(series))),
            "yanchor": "top",
            "x": 0,
            "traceorder": "normal",
        },
        hovermode="closest",
    )
    return figure


def time_by_part(profile: Profile) -> Figure:
    """Share of the time of each part of the network, split by what binds it."""
    import plotly.graph_objects as go

    parts = profile.parts()
    names = list(parts)
    whole = sum(layer.time_s for layer in profile.layers)
    figure = go.Figure()
    for bound, colour in BOUND.items():
        shares = [100 * sum(layer.time_s for layer in parts[name] if layer.bound_by == bound) / whole for name in names]
        if any(shares):
            text = [
                f"<b>{escape(name)}</b>: {words.percent(share / 100)} of the time bound by {bound}"
                for name, share in zip(names, shares, strict=True)
            ]
            figure.add_trace(
                go.Bar(
                    x=shares,
                    y=list(range(len(names))),
                    orientation="h",
                    name=f"bound by {bound}",
                    marker={"color": colour},
                    hovertext=text,
                    hoverinfo="text",
                )
            )
    for i, name in enumerate(names):
        share = 100 * sum(layer.time_s for layer in parts[name]) / whole
        text = f"{escape(words.shortened(name, 24))} · {words.percent(share / 100)}"
        figure.add_annotation(
            x=share, y=i, xanchor="left", xshift=4, showarrow=False, text=text, font={"size": 11, "color": "var(--ink)"}
        )
    top = max(sum(layer.time_s for layer in layers) for layers in parts.values()) / whole
    figure.update_layout(
        height=110 + 24 * len(names),
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        barmode="stack",
        bargap=0.2,
        xaxis={"title": {"text": "share of the time, %"}, "range": [0, 100 * top * 1.75]},
        yaxis={"autorange": "reversed", "showticklabels": False, "showgrid": False},
        legend={"orientation": "h", "y": -70 / (50 + 24 * len(names)), "yanchor": "top", "x": 0},
    )
    return figure


def roofline(profile: Profile) -> Figure:
    """Operations per second against operations per byte, under the device's roofs; a layer's area is its share of the
    time.
    """
    import plotly.graph_objects as go

    layers = [layer for layer in profile.layers if layer.macs > 0 and layer.time_s > 0]
    whole = sum(layer.time_s for layer in profile.layers)
    longest = max((layer.time_s for layer in layers), default=1.0)
    x = [2 * layer.macs / layer.nbytes for layer in layers]
    y = [2 * layer.macs / layer.time_s / 1e12 for layer in layers]
    figure = go.Figure()
    low, high = min(x, default=1.0) / 2, max([*x, 2 * profile.peak_tflops * 1e12 / profile.bandwidth_bytes_s]) * 2
    ridge = profile.peak_tflops * 1e12 / profile.bandwidth_bytes_s
    roof = {
        "x": [low, ridge, high],
        "y": [low * profile.bandwidth_bytes_s / 1e12, profile.peak_tflops, profile.peak_tflops],
    }
    figure.add_trace(
        go.Scatter(
            **roof, mode="lines", line={"color": "var(--muted)", "width": 2}, name="data sheet's roof", hoverinfo="skip"
        )
    )
    for bound, colour in BOUND.items():
        mine = [i for i, layer in enumerate(layers) if layer.bound_by == bound]
        if not mine:
            continue
        text = [
            f"<b>{escape(layers[i].name)}</b> ({escape(layers[i].kind)})<br>"
            f"{words.percent(layers[i].time_s / whole)} of the time, bound by {bound}<br>"
            f"{words.number(x[i])} operations a byte, {words.number(y[i])} TFLOPS<br>"
            f"{words.large(layers[i].macs)} MACs, {words.large(layers[i].nbytes, 'B')}"
            for i in mine
        ]
        sizes = [5 + 19 * (layers[i].time_s / longest) ** 0.5 for i in mine]
        figure.add_trace(
            go.Scatter(
                x=[x[i] for i in mine],
                y=[y[i] for i in mine],
                mode="markers",
                name=f"bound by {bound}",
                marker={
                    "color": colour,
                    "size": sizes,
                    "opacity": 0.65,
                    "line": {"width": 0.8, "color": "var(--card)"},
                },
                hovertext=text,
                hoverinfo="text",
            )
        )
    figure.update_layout(
        height=430,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        xaxis={"title": {"text": "operations per byte moved"}, **_log_ticks(low, high)},
        yaxis={
            "title": {"text": "10¹² operations per second"},
            **_log_ticks(min([*y, profile.peak_tflops]) / 2, profile.peak_tflops * 2),
        },
        legend={"orientation": "h", "y": -0.17, "yanchor": "top", "x": 0, "itemsizing": "constant"},
        hovermode="closest",
    )
    return figure


def save_speed_png(
    points: Sequence[SpeedPoint],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    min_throughput: float | None = None,
) -> Path:
    """Draw accuracy against throughput as a PNG for docs: points of one setting, those without a published accuracy
    left out.

    Args:
        min_throughput: images/s asked for, drawn as a line.

    Raises:
        UserError: the points are of several settings, or none has an accuracy.
    """
    settings = sorted({p.setting for p in points})
    if len(settings) != 1:
        raise UserError(f"one picture holds points of one setting, got {'; '.join(settings) or 'no point'}")
    known = [p for p in points if p.top1 is not None]
    if not known:
        raise UserError("no point has a published accuracy to draw")
    figure = accuracy_speed(known, colours([p.family for p in known]), min_throughput=min_throughput)
    return save_png(figure, Path(path), title=title or "", caption=settings[0])
