"""Manifests as people write them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.accidents.pictures import checked, count, notes
from benchmarks.accidents.play import Accident, Play
from benchmarks.accidents.stage import CLASSES, fill


def _filled(play: Play) -> list[tuple[str, str]]:
    """(path, class) of six pictures of each class beside where the manifest will be."""
    rows = []
    for at, name in enumerate(CLASSES):
        fill(play.here / name, 6, at)
        rows += [(f"{name}/{number:02d}.png", name) for number in range(6)]
    return rows


def _read(
    text: Callable[[list[tuple[str, str]]], str | bytes], note: str = "", *, ending: str = "csv"
) -> Callable[[Play], None]:
    """It must be read as two classes of six."""

    def act(play: Play) -> None:
        made = text(_filled(play))
        path = play.here / f"list.{ending}"
        path.write_bytes(made if isinstance(made, bytes) else made.encode())
        found = checked(play, path)
        play.expect(found.get("classes") == ["cat", "dog"], f"classes {found.get('classes')}")
        play.expect(count(found) == 12, f"{count(found)} pictures of 12")
        play.expect(note in notes(found), f"{note!r} is not said: {notes(found)[:200]}")

    return act


def _refused(
    text: Callable[[list[tuple[str, str]]], str | bytes], *words: str, ending: str = "csv"
) -> Callable[[Play], None]:
    def act(play: Play) -> None:
        made = text(_filled(play))
        path = play.here / f"list.{ending}"
        path.write_bytes(made if isinstance(made, bytes) else made.encode())
        play.refused(play.forked("check", path), *words)

    return act


def _table(rows: list[tuple[str, str]], *, joint: str = ",", head: str = "path,label", more: str = "") -> str:
    lines = [head.replace(",", joint), *(f"{path}{joint}{label}{more}" for path, label in rows)]
    return "\n".join(lines) + "\n"


def _pipe(play: Play) -> None:
    os.mkfifo(play.here / "list.csv")
    seen = play.forked("check", play.here / "list.csv")
    play.expect(seen.code == 2 and seen.one_line, f"exit code {seen.code}: {seen.err[-200:]}")


def _trains(play: Play) -> None:
    rows = _filled(play)
    path: Path = play.here / "list.csv"
    path.write_text(
        "\ufeff" + _table([(f" {file}", f" {label} ") for file, label in rows], joint=";"), encoding="utf-8"
    )
    play.done(play.forked(*play.stage.training(play.here / "run", data=path)))


ACCIDENTS = [
    Accident(
        name="manifests/blanks",
        did='labels " cat"',
        act=_read(lambda rows: _table([(f" {p} ", f" {c} ") for p, c in rows])),
    ),
    Accident(name="manifests/semicolons", did="values parted by ;", act=_read(lambda rows: _table(rows, joint=";"))),
    Accident(name="manifests/tabs", did="values parted by tabs", act=_read(lambda rows: _table(rows, joint="\t"))),
    Accident(
        name="manifests/columns",
        did="a column more",
        act=_read(
            lambda rows: _table(rows, head="path,label,photographer", more=",me"), "columns ignored: photographer"
        ),
    ),
    Accident(
        name="manifests/list",
        did='labels ["cat"] in the column for one',
        act=_read(lambda rows: _table([(p, f'"[""{c}""]"') for p, c in rows])),
    ),
    Accident(
        name="manifests/duplicates",
        did="each row twice",
        act=_read(lambda rows: _table(rows + rows), "rows that repeat another: 12"),
    ),
    Accident(
        name="manifests/mark",
        did="a byte order mark and Windows' ends of lines",
        act=_read(lambda rows: "\ufeff" + _table(rows).replace("\n", "\r\n")),
    ),
    Accident(name="manifests/case", did="PATH and Label", act=_read(lambda rows: _table(rows, head="PATH, Label"))),
    Accident(name="manifests/trains", did="a mark, ; and blanks; train", act=_trains),
    Accident(
        name="manifests/joined",
        did="labels cat,dog in the column for one",
        act=_refused(lambda rows: _table([*rows, ("cat/00.png", '"cat,dog"')]), "several labels"),
    ),
    Accident(
        name="manifests/joined list",
        did="labels parted by commas in the column for several",
        act=_refused(lambda rows: _table([(p, f'"{c},x"') for p, c in rows], head="path,labels"), "joined by a comma"),
    ),
    Accident(
        name="manifests/missing file",
        did="a file that is not there",
        act=_refused(lambda rows: _table([*rows, ("cat/99.png", "cat")]), "1 of 13 files do not exist"),
    ),
    Accident(
        name="manifests/typing error",
        did="a column lable",
        act=_refused(lambda rows: _table(rows, head="path,lable"), "'lable'"),
    ),
    Accident(
        name="manifests/no label",
        did="a row without its label",
        act=_refused(lambda rows: _table([*rows, ("cat/00.png", " ")]), "row 13: no label"),
    ),
    Accident(
        name="manifests/split",
        did="a split trian",
        act=_refused(lambda rows: _table(rows, head="path,label,split", more=",trian"), "unknown split"),
    ),
    Accident(
        name="manifests/latin-1",
        did="a text that is no UTF-8",
        act=_refused(lambda rows: b"path,label\n\xff.png,caf\xe9\n", "can not be read|UTF-8"),
    ),
    Accident(
        name="manifests/quote",
        did="a quote that never ends",
        act=_refused(lambda rows: _table(rows) + '"cat/00.png,cat\n', "not CSV"),
    ),
    Accident(
        name="manifests/zero byte",
        did="a zero byte in a path",
        act=_refused(lambda rows: _table(rows) + "cat/\0.png,cat\n", "zero byte|not CSV"),
    ),
    Accident(
        name="manifests/huge cell",
        did="a cell of 200,000 characters",
        act=_refused(lambda rows: _table(rows) + "x" * 200_000 + ",cat\n", "not CSV|do not exist"),
    ),
    Accident(name="manifests/empty", did="an empty file", act=_refused(lambda rows: "", "empty")),
    Accident(
        name="manifests/deep",
        did="100,000 brackets",
        act=_refused(lambda rows: "[" * 100_000, "not JSON|nested", ending="json"),
    ),
    Accident(
        name="manifests/number",
        did="a label of 10,000 digits",
        act=_refused(
            lambda rows: '{"path": "cat/00.png", "label": ' + "9" * 10_000 + "}", "not JSON|digits", ending="jsonl"
        ),
    ),
    Accident(
        name="manifests/true",
        did="a label that is true",
        act=_refused(
            lambda rows: json.dumps({"path": "cat/00.png", "label": True}), "neither text nor", ending="jsonl"
        ),
    ),
    Accident(name="manifests/pipe", did="a pipe called list.csv", act=_pipe),
]
