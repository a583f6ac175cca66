"""A page as a browser leaves it after its scripts ran."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

OFF = ("background-networking", "component-update", "sync", "extensions", "gpu", "quic")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=10000",
    *(f"--disable-{name}" for name in OFF),
]


def dump_dom(chromium: Path, page: Path, profile: Path, width: int = 1280) -> str:
    """The document's HTML once loaded; scripts and styles cut out, so that what is found in it is what is shown."""
    command = [
        str(chromium),
        *QUIET,
        f"--user-data-dir={profile}",
        f"--window-size={width},2000",
        "--dump-dom",
        page.as_uri(),
    ]
    html = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL)


class Elements(HTMLParser):
    """Counts elements and collects text, by the id of the section they stand in."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.section = ""
        self.classes: dict[tuple[str, str], int] = {}
        self.tags: dict[str, int] = {}
        self.text: dict[str, list[str]] = {}
        self.root: dict[str, str | None] = {}
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "html":
            self.root = values
        if tag == "section":
            self.section = values.get("id") or ""
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name in (values.get("class") or "").split():
            self.classes[self.section, name] = self.classes.get((self.section, name), 0) + 1

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.setdefault(self.section, []).append(data.strip())

    def said(self, section: str) -> str:
        """All text of a section."""
        return " ".join(self.text.get(section, []))
