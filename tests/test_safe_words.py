"""Names that people and accidents choose: one line, no formula, no escape sequence, no markup."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from convscale import words
from convscale.cli.options import say
from convscale.errors import UserError
from convscale.files import write_text
from convscale.ship.rows import Row, csv_line, is_row_of, json_line

EVIL = "\x1b]0;mine\x07\x1b[31m"
CAFE = "caf\udce9.jpg"
"""A name in Latin-1, as os.fsdecode gives it."""


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain name.jpg", "plain name.jpg"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("caf\udce9", "caf\\xe9"),  # Latin-1, as os.fsdecode gives it
        ("\ud800", "\\ud800"),
        ("a\u2028b\x85c\x9b0m", "a\\u2028b\\x85c\\x9b0m"),
        ("photo\u202egpj.exe", "photo\\u202egpj.exe"),
        ("Käfer 蟲 👩\u200d🌾", "Käfer 蟲 👩\u200d🌾"),
    ],
)
def test_safe(text: str, safe: str) -> None:
    assert words.safe(text) == safe
    assert words.safe(safe) == safe
    safe.encode()


@pytest.mark.parametrize("start", "=+-@")
def test_a_cell_is_no_formula(start: str) -> None:
    assert words.csv_cell(start + "1+1") == "'" + start + "1+1"
    assert words.csv_cell("x" + start) == "x" + start


def test_every_row_is_one_line_that_reads_back() -> None:
    names = [
        f"a{EVIL}.jpg",
        "=HYPERLINK(1).jpg",
        "-x.jpg",
        'b\n"c",d.jpg',
        "caf\udce9.jpg",
        "+1\r\n@2.jpg",
        "plain.jpg",
    ]
    for name in names:
        row = Row(path=name, classes=("@SUM(1)\n", "b\x1b"), probabilities=(0.75, 0.25), labels=("=1", "\n"))
        line = csv_line(row, 2, True)
        assert line.count("\n") == 1
        assert line.isprintable() is False  # for its end alone
        assert line[:-1].isprintable()
        line.encode()
        (cells,) = csv.reader(io.StringIO(line, newline=""))
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
        assert cells[2:6] == ["'@SUM(1)\\n", "0.75", "b\\x1b", "0.25"]
        assert is_row_of(cells[0], name, "csv")
        assert not is_row_of(cells[0], name + "x", "csv")
        text = json_line(row, 2, True)
        assert text.count("\n") == 1
        assert text.isascii()
        assert json.loads(text)["path"] == name
    assert is_row_of("a\\nb", "a\nb", "csv")
    assert is_row_of("-x.jpg", "-x.jpg", "csv")  # a row of an earlier version


def test_terminals_get_no_escapes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from convscale.cli import app
    from convscale.learn.progress import LiveProgress

    say(f"note: {EVIL}\nnext caf\udce9")
    with LiveProgress() as live:
        live({"kind": "note", "text": f"first: {EVIL}"})
    monkeypatch.setattr(sys, "argv", ["convscale", "classify", f"no{EVIL}\nwhere", "--model", "x"])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert "note: \\x1b]0;mine\\x07\\x1b[31m" in out
    assert err.count("\n") >= 1
    assert "no\\x1b]0;mine\\x07\\x1b[31m\\nwhere gives no image" in err


def test_files_take_any_name(tmp_path: Path) -> None:
    write_text(tmp_path / "x.html", "caf\udce9 ü")
    assert (tmp_path / "x.html").read_bytes() == "caf\\udce9 ü".encode()


def test_a_record_that_names_any_file_is_read_again(tmp_path: Path) -> None:
    """A byte of a file's name that is no UTF-8 must not make a run of hours unreadable."""
    from convscale.detect.pages import FIGURES
    from convscale.files import write_json
    from convscale.nas.result import RECORD, SCHEMA, begun
    from convscale.read import read_json_lines
    from convscale.show.detection import detection_sections
    from convscale.show.fit_record import FILE, read_fit
    from convscale.show.page import Figures
    from convscale.show.report import write_fit_report
    from convscale.show.runs import runs_below

    write_json(tmp_path / "fit" / FILE, {"schema": 1, "data": {"path": CAFE, "notes": [f"{CAFE}: cut short"]}})
    assert read_fit(tmp_path / "fit").data.path == CAFE
    assert "caf\\udce9" in write_fit_report(tmp_path / "fit").read_text(encoding="utf-8")
    asked = {"data": CAFE, "seed": 0}
    write_json(tmp_path / "search" / RECORD, {"schema": SCHEMA, "asked": asked, "result": None})
    assert begun(tmp_path / "search", asked)["asked"] == asked
    write_json(tmp_path / "coefficients" / "scaling.json", {"schema": 1, "asked": asked, "points": []})
    runs = {run.kind: run for run in runs_below(tmp_path)}
    assert (runs["search"].state, runs["search"].data, runs["scaling"].state) == ("unfinished", CAFE, "unfinished")
    shown = {"split": "test", "n": 1, "examples": {"best": [{"file": "1.png", "picture": CAFE}]}}
    write_json(tmp_path / "boxes" / FIGURES, shown)
    assert detection_sections(tmp_path / "boxes", Figures())
    (tmp_path / "log.jsonl").write_text(json.dumps({"skipped": [CAFE]}) + "\n")
    assert list(read_json_lines(tmp_path / "log.jsonl", "the log")) == [(1, {"skipped": [CAFE]})]


def test_markdown_shows_what_is_written() -> None:
    assert words.markdown("tresnet_m.miil_in21k") == "tresnet_m.miil_in21k"
    assert words.markdown("_a_ *b* [c](d) `e` | \\") == "\\_a\\_ \\*b\\* \\[c\\](d) \\`e\\` \\| \\\\"
    assert words.markdown("<img src=x> & \n# head") == "&lt;img src=x&gt; &amp; \\\\n# head"


def test_model_cards_escape_what_they_quote() -> None:
    from convscale.images.preprocess import Preprocessing
    from convscale.ship.card import model_card

    checked = SimpleNamespace(passed=True, n=1, images="<b>", reason="same", accuracy_before=None, accuracy_after=None)
    manifest = {"model": "m\n# not a head", "format": "onnx", "precision": "fp32", "baked": False}
    facts = {"data": "<script>alert(1)</script>", "licence": "[x](javascript:1)", "*k*": "a\n\n## b"}
    how = Preprocessing(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    text = model_card(manifest, ("a", "b"), how, checked, facts)  # pyright: ignore[reportArgumentType]
    assert "# m\\\\n# not a head\n" in text
    assert "- **Data**: &lt;script&gt;alert(1)&lt;/script&gt;\n" in text
    assert "- **Licence**: \\[x\\](javascript:1)\n" in text
    assert "- **\\*k\\***: a\\\\n\\\\n## b\n" in text
    assert "<script" not in text
    assert "## b" not in text.splitlines()


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names of files are UTF-8 there")
def test_classes_have_printable_names(tmp_path: Path) -> None:
    from PIL import Image

    from convscale.images.sources import open_dataset

    for name in (b"caf\xe9", b"a\nb", b"=1+1", b"\x1b[31m"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        for number in range(4):
            with open(os.path.join(folder, b"%d.png" % number), "wb") as file:
                Image.new("RGB", (4, 4), (number, len(name), 0)).save(file, "PNG")
    data = open_dataset(tmp_path)
    assert data.classes == ("=1+1", "\\x1b[31m", "a\\nb", "caf\\xe9")
    assert len(data.whole()) == 16
    assert data.train.read(0).shape == (4, 4, 3)
    os.rename(os.path.join(os.fsencode(tmp_path), b"=1+1"), os.path.join(os.fsencode(tmp_path), b"caf\\xe9"))
    with pytest.raises(UserError, match="can not be told apart in print"):
        open_dataset(tmp_path)
