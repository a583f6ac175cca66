"""The states of a candidate as figures and tables show them, and the colours that all pictures share."""

from __future__ import annotations

from typing import NamedTuple

GREEN, BLUE, SKY, ORANGE, RED, GREY = "#009e73", "#1f83c4", "#56b4e9", "#e69f00", "#d55e00", "#8a949e"
"""After the set of Okabe and Ito; states differ in marker and hatch too, so that nothing hangs on hue alone."""


class State(NamedTuple):
    """How a state is drawn."""

    label: str
    """In words."""
    colour: str
    marker: str
    """Plotly's symbol of a point."""
    hatch: str
    """Plotly's pattern of a bar."""


STATES = {
    "winner": State("chosen", GREEN, "star", ""),
    "finalist": State("finalist", BLUE, "circle", ""),
    "kept": State("fast enough, not trained", SKY, "diamond-open", "."),
    "rejected": State("too slow", RED, "x-thin", "/"),
}
"""By ``FitRecord.state_of``."""
