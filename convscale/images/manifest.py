"""A manifest: a CSV or JSON-lines file with one image a line.

Columns: ``path`` (relative to the manifest's folder), ``label`` (one class name) or ``labels`` (several: a JSON list,
or names joined by ``|``), and optionally ``split`` (``train``, ``val`` | ``validation``, ``test``).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from convscale.errors import UserError, nearest
from convscale.images.splits import FileSplit, Split, labels_from_names

_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_COLUMNS = ("path", "label", "labels", "split")


def open_manifest(
    path: Path, *, channels: int, max_pixels: int, classes: Sequence[str] | None = None
) -> tuple[FileSplit, FileSplit | None, FileSplit | None]:
    """Train, validation and test set of a manifest; the last two None when it names none.

    Args:
        path: a ``.csv``, ``.jsonl`` or ``.json`` file (the latter: one list of objects, or JSON lines).
        channels: 3 or 1.
        max_pixels: cap on a picture's size.
        classes: the class list; None: the sorted labels of the train set.

    Raises:
        UserError: an unknown column or split, a missing value, a file that does not exist, a label outside the class
            list.
    """
    rows = _read_rows(path)
    if not rows:
        raise UserError(f"{path}: the manifest is empty")
    multilabel = "labels" in rows[0]
    parsed: dict[str, tuple[list[str], list[list[str]]]] = {"train": ([], []), "validation": ([], []), "test": ([], [])}
    missing = []
    for number, row in enumerate(rows, 1):
        split, file, labels = _parse_row(row, f"{path}, row {number}", multilabel)
        place = path.parent / file
        if not place.is_file():
            missing.append(str(place))
            continue
        parsed[split][0].append(str(place))
        parsed[split][1].append(labels)
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of {len(rows)} files do not exist (first: {missing[0]}); paths are relative to "
            "the manifest's folder"
        )
    if not parsed["train"][0]:
        raise UserError(f"{path}: no row belongs to the train split")
    names = tuple(classes) if classes else tuple(sorted({label for labels in parsed["train"][1] for label in labels}))
    made: dict[str, Split | None] = {}
    for split, (files, labels) in parsed.items():
        tensor = (
            _multi_hot(labels, names, path)
            if multilabel
            else labels_from_names([label[0] for label in labels], names, path)
        )
        made[split] = (
            FileSplit(
                split=split, classes=names, labels=tensor, channels=channels, paths=tuple(files), max_pixels=max_pixels
            )
            if files
            else None
        )
    return made["train"], made["validation"], made["test"]  # pyright: ignore[reportReturnType]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can not be read ({error})") from error
    if path.suffix.lower() == ".csv":
        try:
            reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            columns = list(reader.fieldnames or [])
            rows: list[dict[str, Any]] = list(reader)
        except csv.Error as error:
            raise UserError(f"{path}: not CSV ({error})") from error
        for number, row in enumerate(rows, 1):
            if None in row:
                raise UserError(
                    f"{path}, row {number}: more values than the {len(columns)} columns; quote a value that has a "
                    "comma in it"
                )
    else:
        try:
            whole = text.lstrip().startswith("[")
            rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: not JSON ({error})") from error
        if not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path}: every line must be a JSON object with path and label")
        columns = list(rows[0]) if rows else ["path", "label"]
    for column in columns:
        if column not in _COLUMNS:
            raise UserError(f"{path}: unknown column {column!r}{nearest(str(column), _COLUMNS)}")
    if "path" not in columns or ("label" in columns) == ("labels" in columns):
        raise UserError(
            f"{path}: needs the columns path and either label or labels, has {', '.join(map(str, columns))}"
        )
    return rows


def _parse_row(row: dict[str, Any], where: str, multilabel: bool) -> tuple[str, str, list[str]]:
    split = str(row.get("split") or "train").strip().lower()
    if split not in _SPLITS:
        raise UserError(f"{where}: unknown split {split!r} (known: train, validation, test)")
    file = row.get("path")
    if not file:
        raise UserError(f"{where}: no path")
    value = row.get("labels" if multilabel else "label")
    if not multilabel:
        if value is None or value == "":
            raise UserError(f"{where}: no label")
        return _SPLITS[split], str(file), [str(value)]
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: labels {value!r} are not a JSON list ({error})") from error
    elif isinstance(value, str):
        value = [part.strip() for part in value.split("|") if part.strip()]
    if not isinstance(value, list):
        raise UserError(f"{where}: labels must be a list or names joined by |, got {value!r}")
    return _SPLITS[split], str(file), [str(label) for label in value]


def _multi_hot(labels: list[list[str]], classes: tuple[str, ...], where: Path) -> torch.Tensor:
    out = torch.zeros(len(labels), len(classes))
    for row, names in enumerate(labels):
        if names:
            out[row, labels_from_names(names, classes, where)] = 1.0
    return out
