"""Rows that say what an image file shows, as lines of CSV or JSON, and files of them that a later run goes on in."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TextIO

from convscale import words
from convscale.errors import UserError, nearest
from convscale.locks import OutputLock
from convscale.read import Limits, json_of

FORMATS = ("csv", "jsonl")
ROW = Limits(size=2**20, surrogates=True)
"""Of a row of an earlier run; names of files may hold any bytes."""
_SAID = ("classes", "boxes", "error")
"""What a row of JSON has one of, behind its path; a user's own list of files has none."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is said about one file."""

    path: str
    """As it was given."""
    classes: tuple[str, ...] = ()
    """The likeliest ones, best first."""
    probabilities: tuple[float, ...] = ()
    """Theirs."""
    labels: tuple[str, ...] | None = None
    """Of a network for several labels per image: the classes above their thresholds, in the network's order; else None.
    """
    boxes: tuple[tuple[float, float, float, float], ...] | None = None
    """Of a detector: for each of ``classes``, the surest first, where it is: x1, y1, x2, y2 in the upright picture's
    pixels; else None."""
    error: str = ""
    """Why there is none; empty where there is."""


def format_of(output: str | os.PathLike[str] | TextIO, format: str | None, *, boxes: bool = False) -> str:
    """The form of an output: as it was asked for, or by the ending of its name.

    Raises:
        UserError: it is unknown, or boxes have none in it.
    """
    if boxes:
        ending = Path(output).suffix.lower() if isinstance(output, (str, os.PathLike)) else ""
        if format == "csv" or ending == ".csv":
            raise UserError("a detector's boxes have no form in csv; use a .jsonl file")
        format = format or "jsonl"
    if format is None:
        ending = Path(output).suffix.lower() if isinstance(output, (str, os.PathLike)) else ".csv"
        format = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"}.get(ending, "csv")
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown{nearest(format, FORMATS)}")
    return format


def header_of(top: int, several: bool) -> str:
    """The first line of a table of CSV."""
    names = [
        "path",
        *(["labels"] if several else []),
        *(
            name
            for i in range(1, top + 1)
            for name in ((f"class_{i}", f"probability_{i}") if top > 1 else ("class", "probability"))
        ),
        "error",
    ]
    return ",".join(names) + "\n"


def csv_line(row: Row, top: int, several: bool) -> str:
    """One line, always: ends of lines in names are written as ``\\n``. No cell is a formula."""
    cells = [words.csv_cell(row.path)]
    if several:
        cells.append(words.csv_cell(json.dumps(row.labels or [], ensure_ascii=False)))
    for i in range(top):
        cells += [words.csv_cell(row.classes[i]), f"{row.probabilities[i]:.6g}"] if row.classes else ["", ""]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([*cells, words.csv_cell(row.error)])
    return text.getvalue()


def row_values(row: Row, several: bool) -> dict[str, object]:
    """A row as plain JSON values."""
    value: dict[str, object] = {"path": row.path}
    if row.error:
        value["error"] = row.error
    elif row.boxes is not None:
        value["boxes"] = [
            {"class": name, "score": round(score, 6), "box": [round(side, 2) for side in box]}
            for name, score, box in zip(row.classes, row.probabilities, row.boxes, strict=True)
        ]
    else:
        value["classes"] = [
            {"class": c, "probability": round(p, 6)} for c, p in zip(row.classes, row.probabilities, strict=True)
        ]
        if several:
            value["labels"] = list(row.labels or ())
    return value


def json_line(row: Row, top: int, several: bool) -> str:
    """One line of JSON."""
    return json.dumps(row_values(row, several)) + "\n"


def is_row_of(found: str, path: str, form: str) -> bool:
    """Whether a row's path is that of a file; up to 0.1.0 CSV only had the ends of lines written out."""
    if form != "csv":
        return found == path
    return found in (words.csv_cell(path), path.replace("\r", "\\r").replace("\n", "\\n"))


def prepare_output(
    output: Path, form: str, header: str, paths: Iterator[str], *, resume: bool, overwrite: bool, lock: OutputLock
) -> tuple[int, int]:
    """Make the output ready to be appended to, and lock it. Returns how many files it has rows for, and how many of
    them are bad; as many are taken from ``paths``. What is no table of such rows stays as it is.
    """
    try:
        if output.is_dir():
            raise UserError(f"output {output} is a folder; name a file")
        if output.exists() and not (output.is_file() or output.is_char_device()):
            raise UserError(f"output {output} is no regular file; name another, or none for standard output")
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.take(output, "output")
        if not output.exists() or output.stat().st_size == 0 or (overwrite and not resume):
            output.write_text("")
            lock.take(output, "output")
            return 0, 0
    except OSError as error:
        raise UserError(f"output {output} can not be written: {error.strerror}; name another") from error
    if not resume:
        raise UserError(f"output {output} exists; use --resume, --overwrite or another name")
    if (end := _end_of_whole_lines(output)) == 0:
        _check_torn(output, form, header)
    done = errors = 0
    with open(output, encoding="utf-8", errors="surrogateescape", newline="") as file:
        whole = takewhile(lambda line: line.endswith("\n"), file)
        for path, bad in rows_in(whole, form, header, output):
            expected = next(paths, None)
            if expected is None or not is_row_of(path, expected, form):
                raise UserError(
                    f"output {output} has a row for {path} where the list has {expected}; resume with the same images, "
                    "or name another output"
                )
            done, errors = done + 1, errors + bad
    os.truncate(output, end)
    return done, errors


class _Unfit(UserError):
    """An output that a run can not go on in."""


def rows_in(lines: Iterable[str], form: str, header: str, output: Path) -> Iterator[tuple[str, bool]]:
    """Of each row of an earlier run its path, and whether it has an error."""
    try:
        if form == "csv":
            rows = csv.reader(lines)
            head: Sequence[str] | None = next(rows, None)
            if head is None:  # not one whole line
                return
            if head[:1] != ["path"]:
                raise _no_table(output)
            if ",".join(head) + "\n" != header:
                raise _Unfit(
                    f"output {output} has other columns than {header.strip()}; resume with the same options, or name "
                    "another output"
                )
            error = len(head) - 1
            yield from ((row[0], bool(row[error])) for row in rows)
        else:
            for line in lines:
                row = json_of(line, "a row", ROW)
                if not any(key in row for key in _SAID):
                    raise _no_table(output)
                yield row["path"], bool(row.get("error"))
    except _Unfit:
        raise
    except (ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
        raise _no_table(output) from error


def _no_table(output: Path) -> _Unfit:
    return _Unfit(f"output {output} is no table of convscale classify; name another")


def _end_of_whole_lines(output: Path) -> int:
    """Where a last line begins that a crash left unfinished; the file's size where there is none."""
    with open(output, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
            end = start
    return 0


def _check_torn(output: Path, form: str, header: str) -> None:
    """Refuse a file without a whole line where no run of ours has begun what is in it: it would be cut off.

    Raises:
        UserError: none has.
    """
    with open(output, "rb") as file:
        torn = file.read(ROW.size + 1)
    if form == "csv":
        begun = header.encode().startswith(torn)
    else:
        begin = b'{"path": "'
        begun = begin.startswith(torn) or (torn.startswith(begin) and _may_be_row(torn))
    if not begun:
        raise _no_table(output)


def _may_be_row(torn: bytes) -> bool:
    """Whether a line of JSON is not whole, or a row of ours that only lacks its end of line."""
    try:
        row = json_of(torn.decode("utf-8", "surrogateescape"), "a row", ROW)
    except UserError:
        return len(torn) <= ROW.size
    return any(key in row for key in _SAID)


def appended(path: Path) -> TextIO:
    """A file to append rows to."""
    return open(path, "a", encoding="utf-8", errors="surrogateescape", newline="")
