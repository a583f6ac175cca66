"""The directive ``cli-reference``: every command of ``convscale`` with what it takes, from the parser itself."""

from __future__ import annotations

import inspect
import tomllib
from importlib import import_module
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer import Context
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


def command_tree() -> dict[str, TyperCommand]:
    """Every command by its name, as the parser of the installed ``convscale`` knows it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, _ = project["scripts"]["convscale"].partition(":")
    group = get_command(import_module(module).app)
    assert isinstance(group, TyperGroup)
    return {name: command for name, command in group.commands.items() if isinstance(command, TyperCommand)}


def page_of(name: str, command: TyperCommand) -> str:
    """One command as Markdown: what it does, how it is called, and a table of what it takes."""
    context = Context(command, info_name=f"convscale {name}")
    usage = " ".join([f"convscale {name}", *command.collect_usage_pieces(context)])
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            left, right = (part.replace("|", "\\|").replace("\n", " ") for part in record)
            rows.append(f"| `{left.strip()}` | {plain(right)} |")
    return "\n".join(
        [
            f"## {name}",
            "",
            plain(inspect.cleandoc(command.help or "")),
            "",
            "```text",
            usage,
            "```",
            "",
            "| takes | what it is |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def plain(text: str) -> str:
    """Help is no Markdown: what would be markup is shown as it stands, but for names in backquotes."""
    return text.replace("*", "\\*").replace("<", "\\<").replace("[", "\\[").replace("]", "\\]")


class CliReference(SphinxDirective):
    """Every command, in the order of ``convscale --help``."""

    def run(self) -> list[nodes.Node]:
        text = "\n".join(page_of(name, command) for name, command in command_tree().items())
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("cli-reference", CliReference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
