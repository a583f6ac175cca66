"""The skeleton of every report: one self-contained HTML page that needs no network, in light and dark, on a desk and on
a phone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from convscale._version import __version__


@dataclass(frozen=True, kw_only=True)
class Section:
    """One card of the page."""

    title: str
    """Plain text; escaped by the page."""
    body: str
    """HTML; what came from data in it must be escaped already."""
    anchor: str
    """The id that the page's navigation points to."""


@dataclass(kw_only=True)
class Figures:
    """Collects plotly figures, so that a page holds each one's JSON once and the library once."""

    scripts: list[str] = field(default_factory=list)

    def add(self, figure: Any, caption: str = "", *, label: str) -> str:
        """HTML that stands where ``figure`` (a plotly ``Figure``) is to be drawn.

        Args:
            caption: plain text under it.
            label: plain text for those who do not see it.
        """
        name = f"figure-{len(self.scripts) + 1}"
        data = json.loads(figure.to_json())
        data["layout"].pop("template", None)
        height = data["layout"].get("height", 400)
        self.scripts.append(f'<script type="application/json" id="{name}">{script_json(data)}</script>')
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return (
            f'<figure><div class="plot" data-figure="{name}" role="img" aria-label="{escape(label)}" style="min-height:{height * 0.6:.0f}px"></div>'
            f"{below}</figure>"
        )


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return (
        text.replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    )


def tile(label: str, value: str, detail: str = "", state: str = "", unit: str = "") -> str:
    """A big number with what it depends on; plain text in. ``state``: ``good``, ``warn``, ``bad`` or nothing."""
    after = f' <span class="unit">{escape(unit)}</span>' if unit else ""
    return (
        f'<div class="tile {state}"><div class="label">{escape(label)}</div><div class="value">{escape(value)}{after}</div>'
        f'<div class="detail">{escape(detail)}</div></div>'
    )


def tag(text: str, state: str = "plain") -> str:
    """A short word in a rounded frame; plain text in."""
    return f'<span class="tag {state}">{escape(text)}</span>'


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; nothing for nothing."""
    if not text:
        return ""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def alert(text: str, state: str = "") -> str:
    """Plain text that must not be overlooked."""
    return f'<p class="alert {state}">{escape(text)}</p>'


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """Terms and their values, plain text; rows without a value are left out."""
    inner = "".join(f"<dt>{escape(term)}</dt><dd>{escape(value)}</dd>" for term, value in rows if value)
    return f"<dl>{inner}</dl>" if inner else ""


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
    head = "".join(f'<th class="{c.kind}">{escape(c.title)}</th>' for c in columns)
    body = []
    for kind, cells in rows:
        assert len(cells) == len(columns), (columns, cells)
        inner = "".join(
            f'<td class="{c.kind}" data-label="{escape(c.title)}"><div>{cell}</div></td>'
            for c, cell in zip(columns, cells, strict=True)
        )
        body.append(f'<tr class="{kind}">{inner}</tr>')
    return f'<div class="scroll"><table class="stack"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


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
    import plotly.offline

    room = files("convscale.show")
    metas = "".join(
        f'<meta name="{escape(name)}" content="{escape(content)}">' for name, content in (meta or {}).items()
    )
    nav = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    cards = "\n".join(
        f'<section class="card" id="{s.anchor}"><h2>{escape(s.title)}</h2>\n{s.body}</section>' for s in sections
    )
    library = f"<script>{plotly.offline.get_plotlyjs()}</script>" if figures.scripts else ""
    draw = f"<script>{(room / 'page.js').read_text(encoding='utf-8')}</script>" if figures.scripts else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="convscale {__version__}">
{metas}
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{(room / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>
{head}
<nav>{nav}</nav></header>
{cards}
<footer>Written by convscale {__version__}. The page is one file and asks nothing of the network.</footer>
</main>
{"".join(figures.scripts)}
{library}
{draw}
</body>
</html>
"""
