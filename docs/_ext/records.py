"""Figures from ``results/``: the role ``record`` for one in a sentence, the directive ``record-table`` for many.

A figure is named by where it stands, so it can not differ from its record::

    {record}`ship[model=resnet50, contender=ours fastest].images_per_s : .1f`
    {record}`a[...].x / b[...].y : .2f`          a ratio
    {record}`a[...].bytes / 1e6 : .1f MB`        in another unit

``ship`` is ``results/ship.jsonl``; ``predictor.records`` is a list in ``results/predictor.json``. ``[key=value, ...]``
keeps the one record whose fields say so; fields of fields are joined by dots. After the colon stands Python's format.
A name that is not there, and a choice that leaves none or several, end the build with the reason.

A table has a row for each record. Its content says a column a line, ``heading = expression``. A path without a file
is of the row's own record, and ``$key`` in a lookup is the row's value. Words with lookups in braces make a cell of
several: ``{low : .0f} to {high : .0f}``::

    ```{record-table} kill_loop
    loader processes = workers
    kills = kills
    ```
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import TypeAlias

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from benchmarks.records import is_of_this_code, made_of

RESULTS = Path(__file__).parents[2] / "results"
LOOKUP = re.compile(r"(?P<file>[\w-]+)(?:\.(?P<list>\w+)(?=\[))?(?:\[(?P<where>[^\]]*)\])?(?:\.(?P<path>.+))?")
FORMAT = re.compile(r" *(?P<python>[+,]*(?:\.\d+)?[a-z%]?)(?P<unit>.*)")

Json: TypeAlias = dict[str, "Json"] | list["Json"] | str | float | int | bool | None


@cache
def records_of(name: str) -> tuple[Json, ...]:
    """The records of ``results/NAME.jsonl`` or, a single one, of ``results/NAME.json``."""
    lines = RESULTS / f"{name}.jsonl"
    if lines.is_file():
        return tuple(json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.strip())
    single = RESULTS / f"{name}.json"
    if single.is_file():
        return (json.loads(single.read_text(encoding="utf-8")),)
    raise ValueError(f"there is no results/{name}.jsonl")


def field(record: Json, path: str) -> Json:
    """The value at ``path``: keys joined by dots, numbers for places in a list. A key with dots in it is tried whole.

    A measurement keeps raw times: its ``images_per_s`` and ``iqr_rel`` are made from them.
    """
    value: Json = record
    parts = path.strip().split(".")
    while parts:
        for length in range(len(parts), 0, -1):
            key = ".".join(parts[:length])
            if isinstance(value, dict) and key in value:
                value = value[key]
                break
            if isinstance(value, list) and length == 1 and key.lstrip("-").isdigit():
                value = value[int(key)]
                break
            if isinstance(value, dict) and key in DERIVED and "times_s" in value:
                value = DERIVED[key](value)
                break
        else:
            raise ValueError(
                f"no field {'.'.join(parts)!r}; there are {', '.join(value) if isinstance(value, dict) else value!r}"
            )
        parts = parts[length:]
    return value


def images_per_s(measurement: dict[str, Json]) -> float:
    """The batch over the median of the calls."""
    return number(field(measurement, "conditions.batch_size")) / median(times_of(measurement))


def iqr_rel(measurement: dict[str, Json]) -> float:
    """The interquartile range of the calls, as a share of their median."""
    low, _, high = quantiles(times_of(measurement), n=4, method="inclusive")
    return (high - low) / median(times_of(measurement))


def times_of(measurement: dict[str, Json]) -> list[float]:
    """Seconds of each call."""
    times = measurement["times_s"]
    assert isinstance(times, list)
    return [number(seconds) for seconds in times]


DERIVED = {"images_per_s": images_per_s, "iqr_rel": iqr_rel}


def matches(record: Json, conditions: str | None) -> bool:
    """Whether a record's fields have the values of ``key=value, key=value``; a value may have commas in it."""
    for condition in filter(None, (part.strip() for part in re.split(r",(?=\s*[\w.]+=)", conditions or ""))):
        key, _, wanted = condition.partition("=")
        try:
            if str(field(record, key)) != wanted.strip():
                return False
        except ValueError:
            return False
    return True


def look_up(expression: str, row: Json = None) -> Json:
    """One value: a number as it stands; of ``row`` when no file is named; else of the one record that is named.

    ``$key`` stands for the row's own value.
    """
    with suppress(ValueError):
        return float(expression)
    if row is not None and "[" not in expression:
        return field(row, expression)
    if row is not None:
        expression = re.sub(r"\$([\w.]+)", lambda key: str(field(row, key[1])), expression)
    match = LOOKUP.fullmatch(expression.strip())
    if match is None:
        raise ValueError(f"{expression!r} is not FILE[key=value, ...].field")
    fitting = rows_of(match)
    if len(fitting) != 1:
        raise ValueError(f"{len(fitting)} records of results/{match['file']} have {match['where']}, one is needed")
    return field(fitting[0], match["path"] or "")


def evaluate(text: str, row: Json = None) -> str:
    """``lookup``, ``lookup / lookup`` or either with ``: format``, as words.

    Text may follow the format: ``: .1f MB``, ``: .2fx``.
    """
    expression, _, form = text.partition(" : ")
    terms = [look_up(term, row) for term in expression.split(" / ")]
    value = terms[0]
    for divisor in terms[1:]:
        value = number(value) / number(divisor)
    if isinstance(value, bool):
        return "yes" if value else "no"
    match = FORMAT.fullmatch(form)
    assert match is not None, "the pattern takes any text"
    return f"{value:{match['python'].strip()}}{match['unit']}"


def number(value: Json) -> float:
    """A term of a ratio."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)


class RecordRole(SphinxRole):
    """A figure in a sentence."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            return [nodes.Text(evaluate(self.text))], []
        except (ValueError, TypeError) as error:
            message = self.inliner.reporter.error(f"record {self.text!r}: {error}", line=self.lineno)
            return [], [message]


class RecordTable(SphinxDirective):
    """A table of records."""

    has_content = True
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        try:
            return self.parse_text_to_nodes(table_of(self.arguments[0], list(self.content)))
        except (ValueError, TypeError) as error:
            raise self.error(f"record-table {self.arguments[0]}: {error}") from error


class RecordAges(SphinxDirective):
    """A table of all records: the commit that made each, and whether the code that it tells about is that of today."""

    def run(self) -> list[nodes.Node]:
        said = {True: "of this code", False: "**older than the code**: run it again", None: "not known"}
        lines = ["| record | commit | |", "|---|---|---|"]
        for file, row in made_of().items():
            age = said[is_of_this_code(Path(file).stem)]
            lines.append(f"| `{file}` | {row['commit']} | {age} |")
        return self.parse_text_to_nodes("\n".join(lines))


def table_of(argument: str, content: list[str]) -> str:
    """The directive's table as Markdown: its argument names the records, each line of its content a column.

    Raises:
        ValueError: of a name that is not there, and where no record fits.
    """
    match = LOOKUP.fullmatch(argument)
    columns = [line.split(" = ", 1) for line in content if line.strip()]
    if match is None or any(len(column) != 2 for column in columns):
        raise ValueError("takes FILE[key=value, ...] and lines of heading = expression")
    rows = rows_of(match)
    if not rows:
        raise ValueError(f"no record of results/{match['file']} has {match['where']}")
    head = [heading.strip() for heading, _ in columns]
    cells = [["".join(part_of(part, row) for part in parts_of(text)) for _, text in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *cells))


def rows_of(match: re.Match[str]) -> list[Json]:
    """The records that fit, or the items that fit of a list in the one record of a file."""
    records = records_of(match["file"])
    if match["list"]:
        items = field(records[0], match["list"])
        records = tuple(items) if isinstance(items, list) else ()
    return [record for record in records if matches(record, match["where"])]


def parts_of(expression: str) -> list[str]:
    """A column's expression: a lookup, or words with lookups in braces, as in ``{low : .0f} to {high : .0f}``."""
    return re.findall(r"\{[^}]*\}|[^{}]+", expression) if "{" in expression else ["{" + expression + "}"]


def part_of(part: str, row: Json) -> str:
    """Words as they stand, a lookup as its value."""
    return evaluate(part[1:-1].strip(), row) if part.startswith("{") else part


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_role("record", RecordRole())
    app.add_directive("record-table", RecordTable)
    app.add_directive("record-ages", RecordAges)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
