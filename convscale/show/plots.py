"""Figures of one `fit` run: plotly's, for the report and for a PNG."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from convscale import words
from convscale.errors import UserError
from convscale.show.fit_parts import Candidate, Epoch
from convscale.show.fit_record import FitRecord, read_fit
from convscale.show.fit_speeds import conditions_of, kind_of, place_of, spread_of
from convscale.show.picture import save_png
from convscale.show.states import BLUE, GREEN, ORANGE, RED, STATES
from convscale.stats import wilson

if TYPE_CHECKING:
    from plotly.graph_objects import Figure, Scatter

WORST = 20
"""Classes that the accuracy by class shows at most."""


def speed_accuracy(fit: FitRecord) -> Figure:
    """Accuracy against speed above, every candidate's speed below, one axis of images/s and the constraint through
    both.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    found = [c for c in fit.fastest_first() if c.images_per_s]
    early = early_of(found)
    asked = fit.constraint.min_throughput
    bars = 36 * max(3, len(found))
    # Without a trained candidate the upper panel would be empty; it shrinks to the room that the constraint's label
    # needs.
    above = 300 if early or fit.winner.validation_top1 is not None else 1
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09 * 400 / (bars + above), row_heights=[above, bars]
    )
    # A wild upper quartile may leave the figure; the medians and the constraint may not.
    right = 1.06 * max([min(c.high, 1.3 * (c.images_per_s or 0)) for c in found] + [asked or 0, 1e-9])
    under = _labelled_under(early, right)
    for state, (label, colour, marker, hatch) in STATES.items():
        mine = [c for c in found if fit.state_of(c) == state]
        if not mine:
            continue
        trained = [c for c in mine if c in early]
        if trained:
            figure.add_trace(
                go.Scatter(
                    x=[c.images_per_s for c in trained],
                    y=[100 * (c.early_top1 or 0) for c in trained],
                    error_x={**_quartile_bars(trained), "color": colour, "thickness": 1.2},
                    error_y=_interval_bars([(c.early_top1 or 0, _judged(c, fit)) for c in trained], colour),
                    mode="markers+text",
                    name=label,
                    marker={"color": colour, "size": 11 if state != "winner" else 16, "symbol": marker},
                    text=[escape(words.shortened(fit.label_of(c))) for c in trained],
                    meta={"narrow_text": [str(found.index(c) + 1) for c in trained]},
                    textposition=[
                        f"{'bottom' if c in under else 'top'} "
                        f"{'left' if (c.images_per_s or 0) > 0.6 * right else 'right'}"
                        for c in trained
                    ],
                    cliponaxis=False,
                    hovertext=[hover(fit, c, state) for c in trained],
                    hoverinfo="text",
                    showlegend=False,
                ),
                row=1,
                col=1,
            )
        figure.add_trace(
            go.Bar(
                x=[c.images_per_s for c in mine],
                y=[fit.label_of(c) for c in mine],
                orientation="h",
                name=label,
                marker={
                    "color": colour,
                    "pattern": {
                        "shape": hatch,
                        "fillmode": "overlay",
                        "fgcolor": "rgba(255,255,255,.75)",
                        "solidity": 0.3,
                    },
                },
                opacity=0.6 if state == "rejected" else 1,
                width=0.36,
                error_x={**_quartile_bars(mine), "color": "var(--ink)", "thickness": 1.2, "width": 3},
                hovertext=[hover(fit, c, state) for c in mine],
                hoverinfo="text",
            ),
            row=2,
            col=1,
        )
    _label_bars(figure, [(fit.label_of(c), c.images_per_s) for c in found])
    _final_accuracy(figure, fit, found)
    if asked:
        figure.add_shape(
            type="line",
            x0=asked,
            x1=asked,
            xref="x2",
            y0=0,
            y1=1,
            yref="paper",
            line={"color": RED, "width": 2, "dash": "dash"},
        )
        figure.add_shape(
            type="rect",
            x0=0,
            x1=asked,
            xref="x",
            y0=0,
            y1=1,
            yref="y domain",
            fillcolor="rgba(213,94,0,.07)",
            line_width=0,
            layer="below",
        )
        figure.add_annotation(
            x=asked,
            xref="x2",
            y=1,
            yref="paper",
            yshift=2,
            yanchor="bottom",
            xanchor="left" if asked < 0.4 * right else "right" if asked > 0.6 * right else "center",
            showarrow=False,
            text=f"asked for: {words.rate(asked)} images/s or more",
        )
    figure.update_xaxes(range=[0, right], showticklabels=True, row=1, col=1)
    figure.update_xaxes(title_text="images per second", range=[0, right], row=2, col=1)
    figure.update_yaxes(title_text="validation accuracy, %", row=1, col=1)
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=[fit.label_of(c) for c in reversed(found)],
        showticklabels=False,
        showgrid=False,
        row=2,
        col=1,
    )
    if above == 1:
        figure.update_xaxes(visible=False, row=1, col=1)
        figure.update_yaxes(visible=False, row=1, col=1)
    figure.update_layout(
        height=above + bars + 140,
        margin={"l": 10, "r": 10, "t": 40, "b": 40},
        barmode="overlay",
        legend={"orientation": "h", "y": -70 / (above + bars), "x": 0, "yanchor": "top", "traceorder": "normal"},
        hovermode="closest",
    )
    return figure


def hover(fit: FitRecord, c: Candidate, state: str) -> str:
    """What a candidate's point says when pointed at: HTML as plotly understands it."""
    spread = f"{'IQR' if c.timed else 'predicted, 80 %:'} {spread_of(c)}"
    lines = [
        f"<b>{escape(c.name)}</b> ({STATES[state].label})",
        f"{words.rate(c.images_per_s)} images/s, {spread}",
    ]
    if c.brief is not None and c.brief.top1 is not None:
        epochs = words.plural(c.brief.epochs or 0, "epoch")
        lines.append(f"{words.percent(c.brief.top1)} of validation right after {epochs}")
    elif c.probe is not None and c.probe.top1 is not None:
        lines.append(f"{words.percent(c.probe.top1)} right by a linear head on its features")
    lines.append(f"{words.large(c.params)} params, {words.large(c.macs)} MACs")
    lines.append(escape(conditions_of(fit, c)))
    if c.timed is not None:
        lines.append(escape(words.shortened(place_of(c), 60)))
    return "<br>".join(lines)


def early_of(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that were trained briefly; where none was, the finalists by their features."""
    brief = [c for c in found if c.brief_top1 is not None]
    return brief or [c for c in found if c.finalist and c.early_top1 is not None]


def _judged(c: Candidate, fit: FitRecord) -> int | None:
    """Images that told what was known of a candidate before its full training."""
    return fit.data.validation if c.brief or c.probe is None else c.probe.validation


def _labelled_under(early: Sequence[Candidate], right: float) -> list[Candidate]:
    """Those whose label stands under its point, since that of a near and better one stands above its own."""
    trained = sorted(early, key=lambda c: -(c.early_top1 or 0))
    under: list[Candidate] = []
    for better, c in pairwise(trained):
        near = (
            abs((better.images_per_s or 0) - (c.images_per_s or 0)) < 0.3 * right
            and (better.early_top1 or 0) - (c.early_top1 or 0) < 0.02
        )
        if near and better not in under:
            under.append(c)
    return under


def _quartile_bars(found: Sequence[Candidate]) -> dict[str, object]:
    """From the slower to the faster quartile of each one's times, or the 80 % interval of its prediction."""
    high = [c.high - (c.images_per_s or 0) for c in found]
    low = [(c.images_per_s or 0) - c.low for c in found]
    return {"type": "data", "symmetric": False, "array": high, "arrayminus": low}


def _interval_bars(shares: Sequence[tuple[float, int | None]], colour: str) -> dict[str, object]:
    """95 % Wilson intervals of shares, each of so many images, in percent; no bars where a number is not known."""
    known = [(share, n) for share, n in shares if n]
    if len(known) < len(shares):
        return {"visible": False}
    ends = [wilson(round(share * n), n) for share, n in known]
    high = [100 * max(0.0, end[1] - share) for end, (share, _) in zip(ends, known, strict=True)]
    low = [100 * max(0.0, share - end[0]) for end, (share, _) in zip(ends, known, strict=True)]
    return {"type": "data", "symmetric": False, "array": high, "arrayminus": low, "color": colour, "thickness": 1}


def _label_bars(figure: Figure, found: Sequence[tuple[str, float | None]]) -> None:
    """Each bar's name above it, so that names take no width from the axis on a phone."""
    for place, (label, speed) in enumerate(found, start=1):
        figure.add_annotation(
            x=0,
            y=label,
            xref="x2",
            yref="y2",
            xanchor="left",
            yanchor="bottom",
            yshift=5,
            showarrow=False,
            text=f"{place}&nbsp; {escape(words.shortened(label, 40))} · {words.rate(speed)}",
            font={"size": 11, "color": "var(--ink)"},
            bgcolor="var(--card)",
            borderpad=0,
        )


def _final_accuracy(figure: Figure, fit: FitRecord, found: Sequence[Candidate]) -> None:
    """Where full training took the winner, with an arrow from where it was after the brief one."""
    import plotly.graph_objects as go

    final = fit.winner.validation_top1
    winner = fit.chosen if fit.chosen in found else None
    if final is None or winner is None:
        return
    text = (
        f"<b>{escape(winner.name)}</b> fully trained<br>{words.percent(final)} of validation right<br>"
        f"{hover(fit, winner, 'winner').split('<br>', 1)[1]}"
    )
    figure.add_trace(
        go.Scatter(
            x=[winner.images_per_s],
            y=[100 * final],
            error_y=_interval_bars([(final, fit.data.validation)], GREEN),
            mode="markers",
            name="chosen, fully trained",
            marker={"color": GREEN, "size": 17, "symbol": "star-open", "line": {"width": 2}},
            hovertext=[text],
            hoverinfo="text",
        ),
        row=1,
        col=1,
    )
    if winner in early_of(found) and abs(final - (winner.early_top1 or 0)) > 0.005:
        ends = {
            "x": winner.images_per_s,
            "ax": winner.images_per_s,
            "y": 100 * final,
            "ay": 100 * (winner.early_top1 or 0),
        }
        refs = {"xref": "x", "yref": "y", "axref": "x", "ayref": "y"}
        figure.add_annotation(
            **ends,
            **refs,
            showarrow=True,
            arrowhead=2,
            arrowwidth=1.5,
            arrowcolor=GREEN,
            standoff=10,
            startstandoff=9,
            text="",
        )


def curves(history: Sequence[Epoch]) -> tuple[Figure, Figure] | None:
    """Loss, and validation accuracy, by epoch; None without a history."""
    import plotly.graph_objects as go

    rows = [row for row in history if row.epoch is not None]
    if not rows:
        return None
    loss, accuracy = go.Figure(), go.Figure()
    epochs = [row.epoch or 0 for row in rows]
    for key, label, colour, dash in (
        ("train_loss", "training", ORANGE, "dot"),
        ("val_loss", "validation", BLUE, "solid"),
    ):
        losses = [getattr(row, key) for row in rows]
        if any(value is not None for value in losses):
            loss.add_trace(_line(epochs, losses, label, colour, dash))
    accuracy.add_trace(
        _line(
            epochs,
            [None if row.val_top1 is None else 100 * row.val_top1 for row in rows],
            "validation",
            BLUE,
            "solid",
        )
    )
    for figure, title in ((loss, "loss"), (accuracy, "validation accuracy, %")):
        figure.update_layout(
            height=300,
            margin={"l": 10, "r": 10, "t": 30, "b": 10},
            hovermode="x unified",
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            xaxis={"title": {"text": "epoch"}, "dtick": 1 if len(rows) <= 12 else None},
            yaxis={"title": {"text": title}},
        )
    return loss, accuracy


def rates(history: Sequence[Epoch]) -> Figure:
    """Learning rate by epoch."""
    import plotly.graph_objects as go

    figure = go.Figure(
        _line([row.epoch or 0 for row in history], [row.lr for row in history], "learning rate", BLUE, "solid")
    )
    figure.update_layout(
        height=220,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        xaxis={"title": {"text": "epoch"}},
        yaxis={"title": {"text": "learning rate"}},
    )
    return figure


def _line(x: Sequence[float], y: Sequence[float | None], label: str, colour: str, dash: str) -> Scatter:
    import plotly.graph_objects as go

    line = {"color": colour, "dash": dash, "width": 2.2}
    return go.Scatter(
        x=list(x), y=list(y), mode="lines+markers", name=label, line=line, marker={"size": 5}, hovertemplate="%{y:.4g}"
    )


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Rows are what is on the image, columns what the network said; colour is the share of the row, on a scale that
    shows small errors.
    """
    import plotly.graph_objects as go

    totals = [max(1, sum(row)) for row in matrix]
    shares = [[n / total for n in row] for row, total in zip(matrix, totals, strict=True)]
    names = [escape(words.shortened(str(name), 16)) for name in classes]
    few = len(classes) <= 12
    # The square root spreads the small shares: one in a hundred is a tenth of the way, not a hundredth.
    text = [
        [
            f"<b>{names[i]}</b> taken for <b>{names[j]}</b>: "
            f"{words.count(n)} of {words.count(totals[i])} ({words.percent(shares[i][j])})"
            for j, n in enumerate(row)
        ]
        for i, row in enumerate(matrix)
    ]
    for i, row in enumerate(text):
        row[i] = (
            f"<b>{names[i]}</b> right: {words.count(matrix[i][i])} of {words.count(totals[i])} "
            f"({words.percent(shares[i][i])})"
        )
    ticks = (
        {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names}
        if len(names) <= 20
        else {"showticklabels": False}
    )
    figure = go.Figure(
        go.Heatmap(
            z=[[share**0.5 for share in row] for row in shares],
            zmin=0,
            zmax=1,
            colorscale=[[0, "rgba(31,131,196,0)"], [1, "rgba(31,131,196,1)"]],
            hovertext=text,
            hoverinfo="text",
            showscale=False,
            xgap=1 if few else 0,
            ygap=1 if few else 0,
        )
    )
    if few:
        for i, row in enumerate(matrix):
            for j, n in enumerate(row):
                if n:
                    colour = "#ffffff" if shares[i][j] ** 0.5 > 0.55 else "var(--ink)"
                    figure.add_annotation(x=j, y=i, text=str(n), showarrow=False, font={"size": 10, "color": colour})
    figure.update_layout(
        height=520,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        meta={"narrow_height": 0.82},
        xaxis={"title": {"text": "said"}, "showgrid": False, "zeroline": False, "tickangle": -45, **ticks},
        yaxis={"title": {"text": "true"}, "showgrid": False, "zeroline": False, "autorange": "reversed", **ticks},
    )
    return figure


def per_class(
    accuracies: Sequence[float | None], classes: Sequence[str], counts: Sequence[int] | None, most: int = WORST
) -> Figure:
    """Share of each class that was right, worst first; the worst ``most`` where there are more."""
    import plotly.graph_objects as go

    known = [
        (value, str(classes[i]), counts[i] if counts else None)
        for i, value in enumerate(accuracies)
        if value is not None
    ]
    rows = sorted(known, key=lambda row: row[0])[:most]
    figure = go.Figure(
        go.Bar(
            x=[100 * value for value, _, _ in rows],
            y=list(range(len(rows))),
            orientation="h",
            marker={"color": BLUE},
            hovertext=[
                f"<b>{escape(name)}</b>: {words.percent(value)}"
                + (f" of {words.plural(n, 'image')}" if n is not None else "")
                for value, name, n in rows
            ],
            hoverinfo="text",
        )
    )
    for i, (value, name, _) in enumerate(rows):
        inside = value > 0.5
        figure.add_annotation(
            x=0 if inside else 100 * value,
            y=i,
            xanchor="left",
            xshift=4,
            showarrow=False,
            text=f"{escape(words.shortened(name))} · {words.percent(value)}",
            font={"size": 11, "color": "#ffffff" if inside else "var(--ink)"},
        )
    figure.update_layout(
        height=60 + 25 * len(rows),
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        bargap=0.18,
        xaxis={"title": {"text": "right, %"}, "range": [0, 100]},
        yaxis={"autorange": "reversed", "showticklabels": False, "showgrid": False},
    )
    return figure


def save_fit_png(run_dir: str | os.PathLike[str], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """The report's picture of a run as a PNG: accuracy against speed with the constraint drawn in.

    Raises:
        UserError: as ``read_fit`` and ``save_png``; or no candidate of the run was measured or predicted.
    """
    fit = read_fit(run_dir)
    found = [c for c in fit.fastest_first() if c.images_per_s]
    if not found:
        raise UserError(f"{run_dir}/fit.json has no candidate with a speed to draw")
    first = next((c for c in found if c.timed is not None), found[0])
    under = f"{conditions_of(fit, first)}; {place_of(first)}"
    if kind_of(found) == "both":
        under += ", the others predicted"
    return save_png(speed_accuracy(fit), Path(path), title=title or "", caption=under)
