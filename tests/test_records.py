"""Records are what runs wrote: nobody edits them afterwards."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.accidents import __main__ as accidents
from benchmarks.accidents.__main__ import ALL
from benchmarks.accidents.play import Accident
from benchmarks.records import CODE, MADE, RESULTS, ROOT, is_of_this_code, made_of, replace_record, write_record

FILES = sorted(path for path in RESULTS.iterdir() if path.name != MADE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_record_is_as_its_run_wrote_it(path: Path) -> None:
    made = made_of()
    assert path.name in made, f"{path.name} was written by hand: let its benchmark write it (benchmarks/records.py)"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == made[path.name]["sha256"], "edited after its run: run again"


def test_what_is_kept_of_records_is_there() -> None:
    assert {*made_of()} == {path.name for path in FILES}


def test_the_code_that_records_tell_about_is_there() -> None:
    assert [place for places in CODE.values() for place in places if not (ROOT / place).exists()] == []


def test_rows_keep_who_made_them_and_age_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = tmp_path / "code.py"
    code.write_text("a = 1\n")
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "RESULTS", results)
    monkeypatch.setattr(records, "CODE", {"speed": ("code.py",)})
    path = results / "speed.jsonl"
    for model in ("a", "b"):
        records.code_digest.cache_clear()
        replace_record(path, {"model": model, "x": 1}, ("model",))
    assert is_of_this_code("speed")
    assert is_of_this_code("other") is None
    expected = hashlib.sha256(b"code.py\na = 1\n").hexdigest()[:16]
    assert [json.loads(line)["made"]["code"] for line in path.read_text().splitlines()] == [expected, expected]
    code.write_text("a = 2\n")
    records.code_digest.cache_clear()
    assert not is_of_this_code("speed")
    replace_record(path, {"model": "a", "x": 2}, ("model",))  # one of two is of this code
    assert not is_of_this_code("speed")
    replace_record(path, {"model": "b", "x": 2}, ("model",))
    assert is_of_this_code("speed")
    path.write_text(path.read_text().replace("2", "3"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() != made_of()["speed.jsonl"]["sha256"]
    records.code_digest.cache_clear()


def test_accidents_are_counted_over_all_rows() -> None:
    """Not over those alone that the last call was asked for."""
    rows = [json.loads(line) for line in (RESULTS / "accidents.jsonl").read_text(encoding="utf-8").splitlines()]
    (whole,) = (row for row in rows if row["name"] == ALL)
    played = [row for row in rows if row["name"] != ALL]
    verdicts = Counter(row["verdict"] for row in played)
    assert whole["accidents"] == len(played)
    assert {name: whole[name] for name in ("held", "failed", "skipped")} == {
        name: verdicts[name] for name in ("held", "failed", "skipped")
    }
    assert whole["commands"] == sum(row["commands"] for row in played)


def test_the_row_of_all_accidents_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the record has is not played again, and a call for one of three still counts three."""
    path = tmp_path / "accidents.jsonl"
    made = [("a/one", "held", 2, 1.4, "A"), ("a/two", "skipped", 0, 0.0, "B"), ("b/three", "held", 5, 3.2, "A")]
    columns = ("name", "verdict", "commands", "seconds", "machine")
    rows = [{"benchmark": "accidents", **dict(zip(columns, row, strict=True)), "code": "1"} for row in made]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(accidents, "ACCIDENTS", [Accident(name=n, did="", act=lambda _: None) for n, *_ in made])
    monkeypatch.setattr(accidents, "version", lambda: "1")
    monkeypatch.setattr(accidents, "_load", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which it sets, put back afterwards
    monkeypatch.setattr(sys, "argv", ["accidents", "--only", "a/one", "--output", str(path)])
    accidents.main()
    assert "1 of 1 accidents: 1 held" in capsys.readouterr().out
    whole = json.loads(path.read_text().splitlines()[-1])
    counts = {"accidents": 3, "held": 2, "failed": 0, "skipped": 1, "commands": 7, "seconds": 5, "of_this_code": 3}
    assert whole["name"] == ALL
    assert {key: whole[key] for key in counts} == counts
    assert whole["machine"] == "A; B"


def test_the_commit_of_a_record_has_a_plus_where_code_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records.commit() is None
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/a.jsonl"):
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "--short=10", "HEAD").strip()
    assert records.commit() == head
    (tmp_path / "results" / "a.jsonl").write_text("2\n")
    assert records.commit() == head
    (tmp_path / "code.py").write_text("2\n")
    assert records.commit() == f"{head}+"


def test_records_elsewhere_leave_the_list_alone(tmp_path: Path) -> None:
    before = (RESULTS / MADE).read_bytes()
    write_record(tmp_path / "mine.jsonl", "{}\n")
    assert (tmp_path / "mine.jsonl").read_text() == "{}\n"
    assert (RESULTS / MADE).read_bytes() == before
