"""Records are what runs wrote: nobody edits them afterwards."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from benchmarks import fashion, records, ship_gate, train_speed, transfer
from benchmarks.accidents import __main__ as accidents
from benchmarks.accidents.__main__ import ALL
from benchmarks.accidents.play import Accident
from benchmarks.records import CODE, MADE, RESULTS, ROOT, is_of_this_code, made_of, replace_record, write_record
from benchmarks.ship_peers_table import ratio_of, table
from convscale.artifact.artifact import Artifact
from convscale.ship.pays import Slower

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


def test_rows_of_other_conditions_stand(tmp_path: Path) -> None:
    """One run at another batch took the place of the record's row; those without a field are of the usual value."""
    path = tmp_path / "speed.jsonl"
    keys, usual = ("model", "data", "run.threads"), {"data": "stamps", "run.threads": 2}
    path.write_text('{"model": "a", "x": 0}\n{"model": "a", "run": {"threads": 1}, "x": 1}\n')
    for x, data, threads in ((2, "stamps", 2), (3, "icons", 2), (4, "stamps", 1)):
        replace_record(path, {"model": "a", "data": data, "run": {"threads": threads}, "x": x}, keys, usual=usual)
    assert [json.loads(line)["x"] for line in path.read_text().splitlines()] == [2, 4, 3]


@pytest.mark.parametrize(
    ("module", "name"), [(transfer, "transfer"), (fashion, "fashion"), (train_speed, "train_speed")]
)
def test_what_tells_rows_apart_tells_those_of_the_record_apart(module: ModuleType, name: str) -> None:
    rows = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    usual = getattr(module, "USUAL", {})
    keys = [json.dumps([records._field(row, key, usual.get(key)) for key in module.KEYS]) for row in rows]
    assert len(set(keys)) == len(rows)
    assert not [key for key in keys if "null" in key], "each row says all of it, or is of the usual value"


def test_an_end_of_the_peer_s_grid_is_told() -> None:
    """It won on all five splits, and nobody saw it."""
    assert [transfer.at_an_end({"lr": lr}) for lr in (3e-3, 1e-3, 3e-4, 1e-4)] == [True, False, False, True]
    assert transfer.at_an_end({"lr": 3e-3, "layer_decay": 0.85})
    assert not transfer.at_an_end({"lr": 1e-3, "layer_decay": 0.85})
    row = {"split": 3, "method": "timm", "top1": 0.5, "balanced": 0.5, "detail": {"at_an_end": True}}
    assert "timm's parts chose an end of their grid on split 3: widen it." in transfer.summarise([row])


def test_a_line_of_our_own_in_another_runtime_is_no_peer_and_the_full_spread_is_shown() -> None:
    about = {"model": "resnet50", "batch_size": 8, "threads": 2, "image_size": 224, "row": "int8", "how": "x"}
    about |= {"p50_ms": 1.0, "p99_ms": 2.0, "peak_gflops": {"fp32": 1.0}}
    about |= {"environment": {"device_name": "cpu", "cores": 2, "versions": {}}}
    speeds = {"ours": 100.0, "ours, ONNX in ONNX Runtime": 95.0, "quantize_static by hand": 80.0}
    rows = [
        {**about, "contender": who, "images_per_s": speed, "quartiles": [speed - 4, speed + 4]}
        for who, speed in speeds.items()
    ]
    rows[1]["range"] = [50.0, 120.0]
    assert ratio_of(rows, "int8") == (1.25, 96 / 84, 104 / 76, "quantize_static by hand")
    text = table(rows)
    assert "| ours, ONNX in ONNX Runtime | x | 95.0 (91.0-99.0; 50.0-120.0) | 1.0, 2.0 |" in text
    assert "| ours | x | 100.0 (96.0-104.0) | 1.0, 2.0 |" in text


def test_records_from_before_digests_are_dated_by_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "code" / "deep").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "CODE", {"speed": ("code", "one.py"), "other": ("one.py",)})
    for name in ("one.py", "code/deep/two.py", "code/notes.txt"):
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    head = git("rev-parse", "--short=10", "HEAD").strip()

    def ages(commit: str) -> tuple[bool | None, bool | None]:
        made = {f"{name}.jsonl": {"sha256": "", "commit": commit, "code": None} for name in ("speed", "other")}
        (tmp_path / "results" / MADE).write_text(json.dumps(made))
        records._unchanged_since.cache_clear()
        records.code_digest.cache_clear()
        return is_of_this_code("speed"), is_of_this_code("other")

    assert ages(head) == (True, True)
    assert ages(f"{head}+") == (None, None)  # some file differed: perhaps one of these
    (tmp_path / "code" / "notes.txt").write_text("2\n")
    assert ages(head) == (True, True)
    (tmp_path / "code" / "deep" / "two.py").write_text("2\n")
    assert ages(head) == (False, True)
    assert ages(f"{head}+") == (False, None)
    assert ages("0123456789") == (None, None)  # a shallow clone does not have it
    records._unchanged_since.cache_clear()
    records.code_digest.cache_clear()


def test_what_benchmarks_patch_is_there() -> None:
    """One patched a name that had moved, and ended the run of all."""
    patched = [
        call.args[0].value
        for path in sorted((ROOT / "benchmarks").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("mock.patch", "patch") and call.args
        if isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)
    ]
    assert patched
    for name in patched:
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute), name


def test_what_make_bench_runs_needs_no_argument() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("BENCHMARKS ?= "))
    for name in line.split()[2:]:
        file = ROOT / "benchmarks" / f"{name}.py"
        source = (file if file.is_file() else ROOT / "benchmarks" / name / "__main__.py").read_text(encoding="utf-8")
        assert "required=True" not in source, name


def test_the_gate_s_benchmark_goes_on_without_fashion_mnist_and_where_int8_is_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slower(*given: object, **options: object) -> Artifact:
        raise Slower("artefact a is not written in INT8")

    monkeypatch.setattr(ship_gate, "export", slower)
    forms = [{"format": "onnx", "int8": True}]
    monkeypatch.setattr(ship_gate, "lite0", lambda args: ship_gate.ship_all(nn.Identity(), forms, "tiny"))
    monkeypatch.setattr(ship_gate, "withheld", lambda args: iter(()))
    monkeypatch.setattr(ship_gate, "DEMO_FOLDERS", (tmp_path / "none",))
    output = tmp_path / "gate.jsonl"
    monkeypatch.setattr(sys, "argv", ["ship_gate", "--output", str(output)])
    ship_gate.main()
    said = capsys.readouterr().out
    assert "the part fashion is left out: it needs the folder" in said
    (row,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert (row["model"], row["precision"], row["slower"]) == ("tiny", "int8", "artefact a is not written in INT8")
    assert "- tiny: artefact a is not written in INT8" in output.with_suffix(".md").read_text()
    monkeypatch.setattr(sys, "argv", ["ship_gate", "--part", "fashion", "--output", str(output)])
    with pytest.raises(SystemExit, match="the part fashion needs the folder of Fashion-MNIST's four files"):
        ship_gate.main()


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
