"""Manifests as people write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from convscale.errors import UserError
from convscale.images import walk
from convscale.images.sources import open_dataset
from convscale.images.splits import DataSplits

Open = Callable[..., DataSplits]


@pytest.fixture
def opened(make_tree: Callable[..., Path]) -> Open:
    """Opens a manifest of this text beside twelve pictures, x/000.jpg and on."""
    folder = make_tree({"x": 12}, root="pictures")

    def open_it(text: str, name: str = "m.csv", **options: object) -> DataSplits:
        (folder / name).write_text(text, encoding="utf-8")
        return open_dataset(folder / name, **options)  # pyright: ignore[reportArgumentType]

    return open_it


def rows(*labels: str, sep: str = ",") -> str:
    return "\n".join(f"x/{number:03d}.jpg{sep}{label}" for number, label in enumerate(labels))


def counts(data: DataSplits) -> dict[str, int]:
    return dict(zip(data.classes, data.whole().class_counts().tolist(), strict=True))


def test_labels_are_stripped_and_unpacked(opened: Open) -> None:
    labels = ("cat", " cat", "cat ", '"[""cat""]"', "dog", "\tdog", "dog", "dog")
    assert counts(opened("path,label\n" + rows(*labels))) == {"cat": 4, "dog": 4}
    values = ["cat", " cat", ["cat"], 3, 3.0, "3", "cat", " 3"]
    lines = [json.dumps({"path": f"x/{n:03d}.jpg", "label": value}) for n, value in enumerate(values)]
    assert counts(opened("\n".join(lines), "m.jsonl")) == {"3": 4, "cat": 4}


@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_separators_are_found(opened: Open, sep: str) -> None:
    text = f"\ufeffPath {sep}Label\n" + rows("a", "a", "a", "b,c", "b,c", "b,c", sep=sep).replace(
        "b,c", '"b,c"' if sep == "," else "b,c"
    )
    data = opened(text)
    assert counts(data) == {"a": 3, "b,c": 3}
    assert not any("ignored" in note for note in data.notes)


@pytest.mark.parametrize(
    "text", ["pat\x1ch,la\x0bbel\nx/000.jpg,a\n", "path,label\nx/0\x1e.jpg,a\n", '"pa\nth",b\n1,2\n']
)
def test_what_a_manifest_says_breaks_no_message(opened: Open, text: str) -> None:
    """Found by fuzzing: Python takes more than a line feed for an end of a line."""
    with pytest.raises(UserError) as caught:
        opened(text)
    assert len(str(caught.value).splitlines()) == 1


def test_other_columns_are_ignored_with_a_note(opened: Open) -> None:
    data = opened("id,path,label,author\n" + "\n".join(f"{n},x/{n:03d}.jpg,{'ab'[n % 2]},me" for n in range(8)))
    assert counts(data) == {"a": 4, "b": 4}
    assert data.notes[0].endswith("m.csv: columns ignored: id, author")


def test_splits_by_case_and_synonym(opened: Open) -> None:
    named = ("Train", "TRAINING", "Dev", "valid", "eval", " Test ")
    text = "path,label,split\n" + "\n".join(f"x/{n:03d}.jpg,{'ab'[n % 2]},{name}" for n, name in enumerate(named))
    data = opened(text)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [2, 2, 2]


def test_repeated_rows_are_counted(opened: Open) -> None:
    text = "path,label\n" + rows(*"aaabbb") + "\nx/000.jpg,a\n./x/000.jpg,a\nx/001.jpg,b"
    data = opened(text)
    assert counts(data) == {"a": 3, "b": 4}
    assert data.preflight.count(walk.REPEATED) == 2
    assert any("1 pair of the same picture with different labels" in note for note in data.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n" + rows("cat", "dog", '"cat, dog"'), "row 3: 'cat, dog' is several labels"),
        ("path,label\n" + rows("cat", "dog", "dog|cat"), r"row 3: 'dog\|cat' is several labels"),
        ("path,label\n" + rows("cat", '"[""cat"", ""dog""]"'), "several labels .'cat', 'dog'.; name the column labels"),
        (
            "path,labels\n" + rows('"a,b"', '"b,c"', '"a"'),
            r"labels 'a,b' are joined by a comma or semicolon; join them by",
        ),
        ("path,label,spilt\n" + rows("a,train"), r"unknown column 'spilt' \(nearest: split"),
        ("path,label,label\n" + rows("a,b"), "column 'label' is there twice"),
        ("path,label\n" + rows("a", "  "), "row 2: no label"),
        ("path;label\n" + rows("a;b", sep=";"), "more values than the 2 columns; quote a value that has a semicolon"),
        ("path,label,split\n" + rows("a,holdout"), "unknown split 'holdout'"),
        ("file,label\n" + rows("a"), "needs the columns path and either label or labels, has file, label"),
        ("path,label\nx/0\0.jpg,a", "zero byte|NUL|not CSV"),
    ],
)
def test_what_is_refused(opened: Open, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"path": "x/000.jpg", "label": ' + "9" * 5000 + "}",
        '{"path": "x/000.jpg", "label": true}',
        '{"path": "x/000.jpg", "label": {"a": 1}}',
        '{"path": 7, "label": "a"}',
        '["a"]',
        "[]",
        "",
        "{",
    ],
)
def test_odd_json_is_one_line(opened: Open, text: str) -> None:
    with pytest.raises(UserError) as caught:
        opened(text, "m.json")
    assert "\n" not in str(caught.value)


def test_a_class_may_have_a_comma_in_its_name(opened: Open) -> None:
    text = "path,label\n" + rows(*['"tench, Tinca tinca"'] * 3, *["goldfish"] * 3)
    assert counts(opened(text)) == {"goldfish": 3, "tench, Tinca tinca": 3}
