"""A manifest: a CSV or JSON-lines file with one image a line.

Columns: ``path`` (relative to the manifest's folder), ``label`` (one class name) or ``labels`` (several: a JSON list,
or names joined by ``|``), and optionally ``split`` (its name, in any case, or a synonym). Others are ignored. Values of
CSV are parted by comma, semicolon or tab, whichever parts the names of the columns.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from convscale import words
from convscale.errors import UserError, nearest
from convscale.images.splits import SPLITS, FileSplit, labels_from_names, split_of
from convscale.images.walk import REPEATED, Tally
from convscale.read import Limits, json_of, read_text

_COLUMNS = ("path", "label", "labels", "split")
_SEPARATORS = (",", ";", "\t")
_TABLE = Limits(size=512 * 2**20, nodes=20_000_000)
"""Of a whole manifest; millions of rows are within it."""

Row = Mapping[str, object]
"""A row's values by the columns' names, in small letters."""


@dataclass(frozen=True, kw_only=True)
class _Line:
    """What a row says."""

    split: str
    path: Path
    labels: tuple[str, ...]


def open_manifest(
    path: Path,
    *,
    channels: int,
    max_pixels: int,
    classes: Sequence[str] | None = None,
    tally: Tally | None = None,
    notes: list[str] | None = None,
) -> tuple[FileSplit, FileSplit | None, FileSplit | None]:
    """Train, validation and test set of a manifest; the last two None when it names none.

    Args:
        path: a ``.csv``, ``.jsonl`` or ``.json`` file (the latter: one list of objects, or JSON lines).
        channels: 3 or 1.
        max_pixels: cap on a picture's size.
        classes: the class list; None: the sorted labels of the train set.
        tally: counts rows that repeat another.
        notes: gets a line on columns that are ignored.

    Raises:
        UserError: a column that is missing or nearly one, an unknown split, a missing value, several labels where one
            is meant, a file that does not exist, a label outside the class list.
    """
    columns, rows = _read_rows(path)
    if not rows:
        raise UserError(f"{path}: the manifest is empty")
    ignored = _check_columns(path, columns)
    if ignored and notes is not None:
        notes.append(f"{path}: columns ignored: {_in_short(ignored)}")
    multilabel = "labels" in columns
    lines = [_parse_row(row, f"{path}, row {number}", multilabel) for number, row in enumerate(rows, 1)]
    if multilabel:
        _refuse_joined_lists(rows, path)
    else:
        _refuse_joined([line.labels[0] for line in lines], path, classes)
    lines = _without_repeated([_found(line, path) for line in lines], tally)
    missing = [str(line.path) for line in lines if not os.path.isfile(line.path)]  # too long a name, too
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(rows)} files do not exist (first: {words.safe(missing[0])}); "
            "paths are relative to the manifest's folder"
        )
    train = [line for line in lines if line.split == "train"]
    if not train:
        raise UserError(f"{path}: no row belongs to the train split")
    names = tuple(classes) if classes else tuple(sorted({label for line in train for label in line.labels}))
    made: dict[str, FileSplit] = {}
    for split in SPLITS:
        chosen = [line for line in lines if line.split == split]
        labels = [line.labels for line in chosen]
        if chosen:
            made[split] = FileSplit(
                split=split,
                classes=names,
                labels=_multi_hot(labels, names, path)
                if multilabel
                else labels_from_names([each[0] for each in labels], names, path),
                channels=channels,
                paths=tuple(str(line.path) for line in chosen),
                max_pixels=max_pixels,
            )
    return made["train"], made.get("validation"), made.get("test")


def _read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """The columns' names and the rows."""
    text = read_text(path, "manifest", _TABLE)
    return _read_csv(path, text) if path.suffix.lower() == ".csv" else _read_json(path, text)


def _read_csv(path: Path, text: str) -> tuple[list[str], list[Row]]:
    head = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(_SEPARATORS, key=lambda each: _known(head.split(each)))
    try:
        values = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error})") from error
    if not values:
        return ["path", "label"], []
    columns = [name.strip().lower() for name in values[0]]
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise UserError(f"{path}: the column {twice[0]!r} is there twice")
    for number, row in enumerate(values[1:], 1):
        if any(cell.strip() for cell in row[len(columns) :]):
            what = {",": "comma", ";": "semicolon", "\t": "tab"}[separator]
            raise UserError(
                f"{path}, row {number}: more values than the {len(columns)} columns; quote a value that has a {what} "
                "in it"
            )
    return columns, [dict(zip(columns, row, strict=False)) for row in values[1:] if any(cell.strip() for cell in row)]


def _known(columns: Iterable[str]) -> int:
    """How many of these are columns of a manifest."""
    return sum(name.strip().strip('"').lower() in _COLUMNS for name in columns)


def _read_json(path: Path, text: str) -> tuple[list[str], list[Row]]:
    if text.lstrip().startswith("["):
        values = json_of(text, f"manifest {path}", _TABLE)
    else:
        lines = enumerate(text.split("\n"), start=1)
        values = [json_of(line, f"manifest {path}, line {number}") for number, line in lines if line.strip()]
    if not all(isinstance(row, dict) for row in values):
        raise UserError(f"{path}: every line must be a JSON object with path and label")
    rows: list[Row] = [{str(key).strip().lower(): value for key, value in row.items()} for row in values]
    columns = list(dict.fromkeys(key for row in rows for key in row)) if rows else ["path", "label"]
    return columns, rows


def _in_short(names: Sequence[str]) -> str:
    """Names of columns as one line, however many there are."""
    named = words.safe(", ".join(name[:40] for name in names[:12]))
    return named if len(names) <= 12 else f"{named} and {len(names) - 12} more"


def _check_columns(path: Path, columns: Sequence[str]) -> list[str]:
    """The columns that are ignored.

    Raises:
        UserError: a column is missing, or one that is not there is nearly there under another name.
    """
    extra = [name for name in columns if name not in _COLUMNS]
    absent = [name for name in _COLUMNS if name not in columns and not (name == "labels" and "label" in columns)]
    for name in extra:
        if get_close_matches(name, absent, n=1, cutoff=0.7):
            raise UserError(f"{path}: unknown column {name!r}{nearest(name, absent)}")
    if "path" not in columns or ("label" in columns) == ("labels" in columns):
        raise UserError(f"{path}: needs the columns path and either label or labels, has {_in_short(columns)}")
    return extra


def _parse_row(row: Row, where: str, multilabel: bool) -> _Line:
    named = str(row.get("split") or "train")
    split = split_of(named)
    if split is None:
        raise UserError(f"{where}: unknown split {named.strip()!r} (known: train, validation, test)")
    file = row.get("path")
    if not isinstance(file, str) or not file.strip():
        raise UserError(f"{where}: no path")
    if "\0" in file:
        raise UserError(f"{where}: the path {file!r} has a zero byte in it")
    value = _unpacked(row.get("labels" if multilabel else "label"), where)
    if multilabel:
        if isinstance(value, str):
            value = [part for part in value.split("|") if part.strip()]
        if not isinstance(value, list):
            raise UserError(f"{where}: labels must be a list or names joined by |, got {value!r}")
        labels = dict.fromkeys(_typed(each, where) for each in value)
        return _Line(split=split, path=Path(file.strip()), labels=tuple(labels))
    if isinstance(value, list):
        if len(value) > 1:
            raise UserError(
                f"{where}: several labels {value!r}; name the column labels where an image can have several"
            )
        value = value[0] if value else None
    if value is None or value == "":
        raise UserError(f"{where}: no label")
    return _Line(split=split, path=Path(file.strip()), labels=(_typed(value, where),))


def _unpacked(value: object, where: str) -> object:
    """A JSON list out of its text; else the value."""
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value
    return json_of(value, f"{where}: labels {value[:80]!r}")


def _typed(value: object, where: str) -> str:
    """A label as text, without space around it: 3 and 3.0 are ``3``."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: the label {value!r} is neither text nor a whole number")
    label = words.safe(str(value).strip())
    if not label:
        raise UserError(f"{where}: no label")
    return label


def _refuse_joined(labels: Sequence[str], path: Path, classes: Sequence[str] | None) -> None:
    """Refuse ``cat,dog`` where ``cat`` and ``dog`` are classes themselves: several labels in a column for one. A class
    that merely has a comma in its name (``tench, Tinca tinca``) is one.
    """
    known = set(classes or labels)
    for number, label in enumerate(labels, 1):
        for joint in (",", ";", "|"):
            parts = [part.strip() for part in label.split(joint)]
            if len(parts) > 1 and label not in (classes or ()) and all(part in known for part in parts):
                raise UserError(
                    f"{path}, row {number}: {label!r} is several labels, each a class of its own; name the column "
                    "labels and join them by |"
                )


def _refuse_joined_lists(rows: Sequence[Row], path: Path) -> None:
    """Refuse a column of several labels that are joined by commas or semicolons and never by ``|``."""
    texts = [str(row.get("labels")) for row in rows if isinstance(row.get("labels"), str)]
    plain = [text for text in texts if not text.strip().startswith("[")]
    if any("|" in text for text in plain):
        return
    for text in plain:
        if "," in text or ";" in text:
            raise UserError(
                f"{path}: the labels {text!r} are joined by a comma or semicolon; join them by |, or write a JSON list"
            )


def _found(line: _Line, manifest: Path) -> _Line:
    """The row with its file's place."""
    return _Line(split=line.split, path=Path(os.path.normpath(manifest.parent / line.path)), labels=line.labels)


def _without_repeated(lines: Sequence[_Line], tally: Tally | None) -> list[_Line]:
    """One row of those that say the same."""
    kept: dict[_Line, None] = {}
    for line in lines:
        if line in kept and tally is not None:
            tally.add(REPEATED, str(line.path))
        kept.setdefault(line)
    return list(kept)


def _multi_hot(labels: Sequence[Sequence[str]], classes: tuple[str, ...], where: Path) -> torch.Tensor:
    out = torch.zeros(len(labels), len(classes))
    for row, names in enumerate(labels):
        if names:
            out[row, labels_from_names(names, classes, where)] = 1.0
    return out
