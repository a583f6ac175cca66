"""The directives ``house`` and ``ground``: rooms by rank, and modules below them, in their own words."""

from __future__ import annotations

import ast
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

PACKAGE = Path(__file__).parents[2] / "convscale"


def purpose(path: Path) -> str | None:
    """The first paragraph of a module's or a package's docstring."""
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.is_file():
        return None
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    return " ".join(text.split("\n\n")[0].split()) if text else None


def modules_of(room: Path) -> list[str]:
    """The modules of a room, without those that are private."""
    return sorted(path.stem for path in room.glob("*.py") if not path.stem.startswith("_")) if room.is_dir() else []


class House(SphinxDirective):
    """A table; each line of the content is ``room: what it holds``, in the order of rank.

    The room's docstring stands instead of that line where there is one. A package that no line names is an error, so
    that a new room gets its rank here too.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        rooms = dict(line.split(":", 1) for line in self.content if line.strip())
        packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
        if missing := sorted(packages - set(rooms)):
            raise ExtensionError(f"docs/house.md names no rank for {', '.join(missing)}")
        lines = ["| rank | room | what it holds | its modules |", "|---|---|---|---|"]
        for rank, (room, fallback) in enumerate(rooms.items(), start=1):
            modules = ", ".join(f"`{name}`" for name in modules_of(PACKAGE / room))
            lines.append(f"| {rank} | `{room}` | {purpose(PACKAGE / room) or fallback.strip()} | {modules} |")
        return self.parse_text_to_nodes("\n".join(lines))


class Ground(SphinxDirective):
    """A table of the modules that stand directly in the package."""

    def run(self) -> list[nodes.Node]:
        lines = ["| module | what it holds |", "|---|---|"]
        lines += [f"| `{name}` | {purpose(PACKAGE / name) or ''} |" for name in modules_of(PACKAGE)]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("house", House)
    app.add_directive("ground", Ground)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
