"""The skeleton of every report: one self-contained HTML page that needs no network, in light and dark, on a desk and on
a phone. Its HTML stands in ``templates/``.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader

from convscale._version import __version__

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True)
class Section:
    """One card of the page."""

    title: str
    """Plain text; escaped by the page."""
    body: str
    """HTML; what came from data in it must be escaped already."""
    anchor: str
    """The id that the page's navigation points to."""


@dataclass(frozen=True, kw_only=True)
class Script:
    """A figure's data in the page."""

    name: str
    """Its element's id."""
    json: str
    """JSON that can stand inside a script element."""


@dataclass(kw_only=True)
class Figures:
    """Collects plotly figures, so that a page holds each one's JSON once and the library once."""

    scripts: list[Script] = field(default_factory=list)

    def add(self, figure: Figure, caption: str = "", *, label: str) -> str:
        """HTML that stands where ``figure`` is to be drawn.

        Args:
            caption: plain text under it.
            label: plain text for those who do not see it.
        """
        name = f"figure-{len(self.scripts) + 1}"
        data = json.loads(figure.to_json() or "{}")
        data["layout"].pop("template", None)
        self.scripts.append(Script(name=name, json=script_json(data)))
        height = round(0.6 * data["layout"].get("height", 400))
        return _part("figure", name, label, height, caption)


@cache
def _templates() -> Environment:
    """What is not marked as HTML is escaped."""
    return Environment(loader=PackageLoader("convscale.show"), autoescape=True, keep_trailing_newline=True)


def _part(name: str, *values: object) -> str:
    """A macro of ``templates/parts.html``."""
    return str(getattr(_templates().get_template("parts.html").module, name)(*values))


def script_json(value: object) -> str:
    """JSON that can stand inside a script element whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return (
        text.replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def tile(label: str, value: str, detail: str = "", state: str = "", unit: str = "") -> str:
    """A big number with what it depends on; plain text in. ``state``: ``good``, ``warn``, ``bad`` or nothing."""
    return _part("tile", label, value, detail, state, unit)


def tag(text: str, state: str = "plain") -> str:
    """A short word in a rounded frame; plain text in."""
    return _part("tag", text, state)


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; nothing for nothing."""
    return _part("paragraph", text, kind)


def alert(text: str, state: str = "") -> str:
    """Plain text that must not be overlooked."""
    return paragraph(text, f"alert {state}")


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Terms and their values, plain text; rows without a value are left out."""
    return _part("definitions", [(term, value) for term, value in rows if value])


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table."""

    title: str
    """Plain text; at phone width it stands before each value."""
    kind: str = ""
    """``n`` for numbers (right-aligned; ``n long`` takes a phone's whole width), ``name`` for what a row is about,
    ``wide`` for a sentence."""


def table(columns: Sequence[Column], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table that becomes one block a row at phone width.

    Args:
        rows: CSS class of the row (``winner``, ``dim`` or nothing) and one HTML cell a column.
    """
    listed = [(kind, list(cells)) for kind, cells in rows]
    assert all(len(cells) == len(columns) for _, cells in listed), (columns, listed)
    return _part("table", columns, listed)


def cell(text: str, under: str = "", *, breaks: bool = False) -> str:
    """A table's cell: plain text, and smaller plain text under it.

    Args:
        breaks: it may break behind its first dot: a network's name behind its architecture.
    """
    return _part("cell", text, under, breaks)


def titled(title: str, body: str) -> str:
    """HTML under a heading of plain text."""
    return _part("titled", title, body)


def folded(summary: str, body: str) -> str:
    """HTML that folds out under a line of plain text."""
    return _part("folded", summary, body)


def beside(*bodies: str) -> str:
    """Pieces of HTML side by side where there is room."""
    return _part("beside", bodies)


def tiles(*made: str) -> str:
    """Those tiles that are there, in a row; nothing for none."""
    there = [one for one in made if one]
    return _part("tiles", there) if there else ""


def code(text: str) -> str:
    """Plain text as it would be typed."""
    return _part("code", text)


def marked(mark: str, text: str) -> str:
    """A paragraph that begins with a tag; plain text behind it."""
    return _part("marked", mark, text)


def taken_for(rows: Sequence[tuple[str, str, str]]) -> str:
    """(what it is, what it was taken for, how often) as a list."""
    return _part("taken_for", rows)


def pictures(rows: Sequence[tuple[str, str, str, str, str]], *, small: bool) -> str:
    """(data URI, name, what it is, what was said, how sure) as pictures; ``small``: their pixels are shown."""
    return _part("gallery", rows, small)


def drawings(rows: Sequence[tuple[str, str, str]]) -> str:
    """(data URI, name, what is to be said) as larger pictures."""
    return _part("drawings", rows)


def page(
    *,
    title: str,
    kicker: str,
    head: str,
    sections: Sequence[Section],
    figures: Figures,
    meta: Mapping[str, str] | None = None,
) -> str:
    """The whole document.

    Args:
        title: plain text of the heading and the window.
        kicker: plain text above the heading.
        head: HTML under the heading, before the navigation.
        meta: ``<meta>`` names and contents, for programs that read the page.
    """
    return _document(figures, title=title, kicker=kicker, head=head, sections=sections, meta=meta or {}, bare=False)


def document(*, title: str, body: str, figures: Figures, bare: bool = True) -> str:
    """A page that holds nothing but a title and one piece of HTML."""
    return _document(figures, title=title, body=body, sections=(), meta={}, bare=bare)


@cache
def _plotly() -> str:
    """The library packed, 2.0 MB instead of 4.8: gzip as base64, which ``page.js`` unpacks."""
    import plotly.offline

    return base64.b64encode(gzip.compress(plotly.offline.get_plotlyjs().encode(), 9, mtime=0)).decode("ascii")


def _document(figures: Figures, **values: object) -> str:
    room = files("convscale.show")
    return (
        _templates()
        .get_template("document.html")
        .render(
            version=__version__,
            style=(room / "page.css").read_text(encoding="utf-8"),
            draw=(room / "page.js").read_text(encoding="utf-8"),
            plotly=_plotly() if figures.scripts else "",
            figures=figures,
            **values,
        )
    )
