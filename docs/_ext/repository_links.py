"""Links out of ``docs/`` (``../results/ship.md``) work in the repository; on the site they become downloads."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

OUTSIDE = re.compile(r"\]\((\.\./(?:\.\./)?(?:results|benchmarks|tests|tools)/[^)#\s]+)\)")


def as_downloads(text: str) -> str:
    """MyST takes ``path:`` for a file to copy beside the page."""
    return OUTSIDE.sub(r"](path:\1)", text)


def on_read(_app: Sphinx, _name: str, content: list[str]) -> None:
    """Before a page is parsed."""
    content[0] = as_downloads(content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", on_read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
