"""The tool that breaks lines on purpose, on a made-up tree of one module and its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import mutants as tool
from tools.mutants import Mutant, broken, digest_of, failed_of, load, main, read

TESTS = """
import time
from sums import add, double, slow

def test_add(): assert add(2, 3) == 5
def test_double(): assert double(0) == 0
def test_slow(): assert slow(0) == 0
def test_wrong(): assert add(1, 1) == 3
"""
SUMS = """
import time

def add(a, b):
    return a + b

def double(a):
    return a * 2

def slow(a):
    time.sleep(a)
    return a
"""
LIST = """
- {name: sum, file: sums.py, old: a + b, new: a - b, tests: [test_sums.py::test_add]}
- {name: twice, file: sums.py, old: a * 2, new: a * 3, tests: [test_sums.py::test_double], why: zero stays zero}
- {name: spin, file: sums.py, old: "time.sleep(a)", new: "while True: pass", tests: [test_sums.py::test_slow]}
- {name: gone, file: sums.py, old: a / b, new: a, tests: [test_sums.py::test_add]}
- {name: both, file: sums.py, old: return a, new: return 0, tests: [test_sums.py::test_add]}
- {name: red, file: sums.py, old: a + b, new: a * b, tests: [test_sums.py::test_wrong]}
- {name: text, file: sums.py, old: a + b, new: "a +", tests: [test_sums.py::test_add]}
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tools" / "mutants").mkdir(parents=True)
    (tmp_path / "tools" / "mutants" / "room.yaml").write_text(LIST)
    (tmp_path / "sums.py").write_text(SUMS)
    (tmp_path / "test_sums.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def _outcomes(tree: Path) -> dict[str, str]:
    return {name: row.outcome for name, row in read(tree / "results" / "mutants.jsonl").items()}


@pytest.mark.slow
def test_outcomes_are_told_apart_and_kept(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--limit", "4", "--jobs", "2"], tree, ("pytest",)) == 1
    assert _outcomes(tree) == {
        "room/sum": "killed",
        "room/twice": "survived",
        "room/spin": "timeout",
        "room/gone": "stale",
        "room/both": "stale",
        "room/red": "failing",
        "room/text": "error",
    }
    said = capsys.readouterr().out
    assert "survived: room/twice: zero stays zero" in said
    assert "stale: room/both: the old text stands 3 times in sums.py" in said
    assert "failing: room/red: test_sums.py::test_wrong fails without the break" in said
    assert "killed: 1 of 7 (14.3%, at least 92% asked)" in said
    assert (tree / "sums.py").read_text() == SUMS

    # What was run as it now is, is not run again; a break or a test file that changed is.
    rows = (tree / "results" / "mutants.jsonl").read_text()
    assert main(["--only", "room/t*"], root=tree) == 1
    assert "to run" not in capsys.readouterr().out
    assert (tree / "results" / "mutants.jsonl").read_text() == rows
    (tree / "test_sums.py").write_text(TESTS.replace("double(0) == 0", "double(1) == 2"))
    assert main(["--only", "room/tw*"], tree, ("pytest",)) == 0
    assert _outcomes(tree)["room/twice"] == "killed"
    assert _outcomes(tree)["room/spin"] == "timeout"
    assert len((tree / "results" / "mutants.jsonl").read_text().splitlines()) == 7


def test_listing_runs_nothing(tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "run", None)
    assert main(["--list", "--only", "*/s*"], root=tree) == 0
    assert capsys.readouterr().out == "room/sum: sums.py\nroom/spin: sums.py\n"
    assert not (tree / "results").exists()


def test_a_row_is_old_once_its_break_file_or_tests_change(tree: Path) -> None:
    mutant = load(tree / "tools" / "mutants")[0]
    first = digest_of(tree, mutant)
    assert digest_of(tree, mutant) == first
    for name in ("sums.py", "test_sums.py"):
        before = (tree / name).read_text()
        (tree / name).write_text(before + "\n")
        assert digest_of(tree, mutant) != first
        (tree / name).write_text(before)
    assert digest_of(tree, mutant) == first


def test_the_old_text_stands_exactly_once() -> None:
    mutant = Mutant(name="a/b", file="x", old="1", new="2", tests=("t",))
    assert broken("x = 1", mutant) == "x = 2"
    assert broken("x = 1 + 1", mutant) is None
    assert broken("x = 3", mutant) is None


def test_failed_tests_are_read_from_the_summary() -> None:
    said = "F.\nFAILED tests/a.py::test_b[x y-1] - assert 1\nERROR tests/c.py - boom\nFAILED tests/d.py::test_e"
    assert failed_of(said) == ["tests/a.py::test_b[x y-1]", "tests/c.py", "tests/d.py::test_e"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a - b, tests: [x.py]}\n- {name: sum, file: y, old: a, new: b", "the name room/sum comes twice"),
        ("a + b", "changes nothing"),
        ("a - b, who: me", "has the keys"),
    ],
)
def test_a_list_with_a_mistake_is_refused(tree: Path, change: str, message: str) -> None:
    (tree / "tools" / "mutants" / "room.yaml").write_text(LIST.replace("a - b", change, 1))
    with pytest.raises(ValueError, match=message):
        load(tree / "tools" / "mutants")


def test_the_projects_own_list_covers_every_room() -> None:
    """Whether an old text still stands is for the tool to say: an edit elsewhere does not fail the suite."""
    found = load(tool.ROOT / "tools" / "mutants")
    rooms = {path.name for path in (tool.ROOT / "convscale").iterdir() if (path / "__init__.py").is_file()}
    assert {mutant.room for mutant in found} == rooms | {"ground"}
    assert len(found) >= 120
