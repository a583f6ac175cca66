"""Tables on the terminal, laid out by rich: plain text without lines and colours, so that a pipe reads the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import typer

from convscale import words
from convscale.cli.options import terminal_width

GAP = 2
"""Blanks between columns."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    """Its heading; may be empty."""
    right: bool = False
    """Whether its cells stand at the right, as numbers do, and are never wrapped."""


def number_column(title: str) -> Column:
    """A column of numbers."""
    return Column(title, right=True)


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, indent: int = 0) -> None:
    """Print rows under headings. Cells wrap between words where the terminal is narrow; a word is never broken: a table
    whose words need more room is wider than the terminal instead.
    """
    shown = [[words.safe(cell) for cell in row] for row in rows]
    for line in table_lines(columns, shown, terminal_width() - indent):
        typer.echo(" " * indent + line)


def table_lines(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The lines of a table for ``width`` characters, without blanks at their ends."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    needed = 0
    for i, column in enumerate(columns):
        cells = [column.title, *(row[i] for row in rows)]
        unbroken = [part for cell in cells for part in ([cell] if column.right else cell.split())]
        least = max(map(cell_len, unbroken), default=0)
        needed += least + (GAP if i else 0)
        justify = "right" if column.right else "left"
        table.add_column(Text(column.title), justify=justify, no_wrap=column.right, min_width=least)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=max(width, needed), color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]
