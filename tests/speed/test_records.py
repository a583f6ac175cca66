"""Records: round trips, several writers, damage, timm's tables."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.speed.records import Record, append_record, read_records, read_timm_csv, write_timm_csv
from convscale.speed.timing import Measurement

ENV = Environment(device_name="RTX 3090", cores=8)
INFER = """model,infer_img_size,infer_samples_per_sec,infer_step_time,infer_batch_size,param_count,infer_gmacs,\
infer_macts
resnet50,224,2000.00,512.0,1024,25.56,4.11,11.11
tresnet_m,224,2500.00,409.6,1024,31.39,5.74,7.31
"""
TRAIN = """model,train_samples_per_sec,train_step_time,train_batch_size,train_img_size,param_count
resnet50,800.0,320.0,256,224,25.56
"""


def record(name: str = "net", seconds: float = 0.25) -> Record:
    m = Measurement(
        times_s=(seconds, seconds),
        conditions=Conditions(batch_size=4, image_size=96, threads=2),
        environment=ENV,
        model=name,
    )
    return Record(model=name, measurement=m, params=1e6, macs=2e9, activations=3e6)


def test_append_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "speed.jsonl"
    append_record(path, record("a"))
    append_record(path, record("b").measurement)
    first, second = read_records(path)
    assert first == record("a")
    assert (second.model, second.params, second.measurement.images_per_s) == ("b", None, 16.0)


def test_several_processes_append_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    code = (
        "import sys; from convscale.speed.records import *; from convscale.speed.timing import *\n"
        "m = Measurement(times_s=(0.1,) * 3000, conditions=Conditions(), environment=Environment(device_name='x', "
        "cores=1), model=sys.argv[2])\n"
        "for _ in range(25): append_record(sys.argv[1], m)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), f"w{i}"]) for i in range(4)]
    assert [w.wait() for w in writers] == [0] * 4
    assert sorted(r.model for r in read_records(path)) == sorted(f"w{i}" for i in range(4) for _ in range(25))


def test_newer_schema_names_line(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    append_record(path, record())
    with open(path, "a") as file:
        file.write(json.dumps({**record().to_dict(), "schema": 99}) + "\n")
    with pytest.raises(UserError, match=r"line 2: a record has schema 99, this version of convscale reads up to 1"):
        read_records(path)


@pytest.mark.parametrize(
    ("line", "text"),
    [("{broken", "line 1 is not JSON"), ("[1]", "line 1 is not a record"), ("{}", "no schema version")],
)
def test_damaged_line(tmp_path: Path, line: str, text: str) -> None:
    path = tmp_path / "speed.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=text):
        read_records(path)


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    path.write_text('{"schema": 1, "mod')
    append_record(path, record("whole"))
    assert json.loads(path.read_text().splitlines()[1])["model"] == "whole"


@pytest.mark.parametrize("begun", ['{"schema": 1, "mod', '{"schema": 1, "measurement": {"conditions": {}}', "\0" * 9])
def test_a_torn_line_is_passed_over_and_said(tmp_path: Path, begun: str) -> None:
    """Of what was killed while it wrote, only the one line is lost; the others were refused with it."""
    path = tmp_path / "speed.jsonl"
    append_record(path, record("before"))
    with open(path, "a") as file:
        file.write(begun)
    append_record(path, record("behind"))
    told: list[str] = []
    assert [r.model for r in read_records(path, torn=told.append)] == ["before", "behind"]
    assert len(told) == 1
    assert told[0].startswith(f"records file {path}, line 2 is not JSON (")
    assert told[0].endswith("); it was only begun and is passed over")
    with pytest.raises(UserError, match=r"line 2 is not JSON \(.*\); it was only begun: remove that line$"):
        read_records(path)


_DAMAGED = [
    '{"schema": 1} {"schema": 1}',
    '{"schema": 1}{"sch',
    '{"a": 1,, "b": 2}',
    '{"a": "}", b}',
    '{"a": 1]}',
    "{'a': 1}",
]


@pytest.mark.parametrize(
    "line", ["model,images_per_s", "[1]", '{"schema": 99}', '{"a": NaN}', '{"a": 1, "a": 2}', *_DAMAGED]
)
def test_what_is_no_begun_record_is_not_passed_over(tmp_path: Path, line: str) -> None:
    (tmp_path / "speed.jsonl").write_text(f"{line}\n")
    told: list[str] = []
    with pytest.raises(UserError, match="line 1"):
        read_records(tmp_path / "speed.jsonl", torn=told.append)
    assert told == []


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        read_records(tmp_path / "nowhere.jsonl")


def test_timm_inference_table(tmp_path: Path) -> None:
    path = tmp_path / "infer.csv"
    path.write_text(INFER)
    rows = read_timm_csv(
        path, conditions=Conditions(device="rtx-3090", precision="amp", layout="nhwc"), environment=ENV
    )
    r = rows[0]
    assert (r.model, r.params, r.macs, r.activations) == ("resnet50", 25.56e6, 4.11e9, 11.11e6)
    assert r.measurement.images_per_s == pytest.approx(2000)
    c = r.measurement.conditions
    assert (c.mode, c.batch_size, c.image_size, c.layout, c.precision, c.device) == (
        "infer",
        1024,
        224,
        "nhwc",
        "amp",
        "rtx-3090",
    )
    assert r.source == "infer.csv"
    # Written again it is the same table, fastest first.
    write_timm_csv(tmp_path / "again.csv", rows)
    head, *lines = INFER.splitlines()
    written = (tmp_path / "again.csv").read_text().splitlines()
    assert written[0] == head
    assert [line.split(",")[0] for line in written[1:]] == ["tresnet_m", "resnet50"]
    assert [float(x) for x in written[2].split(",")[1:]] == [float(x) for x in lines[0].split(",")[1:]]


def test_timm_training_table(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(TRAIN)
    (r,) = read_timm_csv(path, conditions=Conditions(device="rtx-3090", mode="train"), environment=ENV)
    assert (r.measurement.conditions.mode, r.macs) == ("train", None)
    assert r.measurement.latency_s == pytest.approx(0.32)


def test_a_timm_table_is_read_in_the_mode_asked_for(tmp_path: Path) -> None:
    both, infer = tmp_path / "both.csv", tmp_path / "infer.csv"
    infer.write_text(INFER)
    both.write_text("model,infer_samples_per_sec,infer_batch_size,infer_img_size,train_samples_per_sec,")
    with both.open("a") as file:
        file.write("train_batch_size,train_img_size\nresnet50,2000,1024,224,800,256,192\n")
    for mode, speed, batch, size in (("infer", 2000, 1024, 224), ("train", 800, 256, 192)):
        (r,) = read_timm_csv(both, conditions=Conditions(mode=mode), environment=ENV)
        c = r.measurement.conditions
        assert (c.mode, c.batch_size, c.image_size) == (mode, batch, size)
        assert r.measurement.images_per_s == pytest.approx(speed)
    with pytest.raises(UserError, match="is of mode infer alone, asked is mode train; give --mode infer"):
        read_timm_csv(infer, conditions=Conditions(mode="train"), environment=ENV)


def test_timm_table_missing_columns(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("model,infer_samples_per_sec\nresnet50,10\n")
    with pytest.raises(UserError, match="lacks the columns infer_batch_size, infer_img_size"):
        read_timm_csv(path, conditions=Conditions(), environment=ENV)


def test_timm_table_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(INFER.replace("2500.00", "fast"))
    with pytest.raises(UserError, match="line 3: could not convert"):
        read_timm_csv(path, conditions=Conditions(), environment=ENV)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (INFER.encode() + b"\xff", "is no text in UTF-8"),
        (INFER.replace("2500.00", "1e-320").encode(), "line 3: 1e-320 images/s is no speed"),
        (INFER.replace("2500.00", "inf").encode(), "line 3: inf images/s is no speed"),
        (INFER.encode() + b"x" * 200_000, "is no CSV: field larger than field limit"),
        (
            b"model,infer_samples_per_sec,infer_batch_size,infer_img_size\nx,1,9999999999,224\n",
            "line 2: infer_batch_size",
        ),
        (
            b"model,infer_samples_per_sec,infer_batch_size,infer_img_size,param_count\nx,1,1,224,1e308\n",
            "line 2: cannot convert float infinity",
        ),
    ],
)
def test_a_timm_table_of_anything_else_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_timm_csv(tmp_path / "bad.csv", conditions=Conditions(), environment=ENV)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": True}, "a record's model is True; it must be text"),
        ({"params": "x"}, "a record's params is 'x'; it must be a count"),
        ({"source": None}, "a record's source is None; it must be text"),
        ({"measurement": {"environment": {"device_name": 3, "cores": 1}}}, r"environment\.device_name is 3"),
        ({"measurement": {"environment": {"device_name": "x", "cores": "1"}}}, r"environment\.cores is '1'"),
        (
            {"measurement": {"environment": {"device_name": "x", "cores": 1, "versions": 5}}},
            "versions must be an object",
        ),
        ({"measurement": {"conditions": {"device": ["cpu"]}}}, "device must be a name"),
        ({"measurement": {"peak_bytes": "x"}}, "peak_bytes is 'x'; it must be a number of bytes"),
        ({"measurement": {"form": 3, "chosen_from": "x"}}, "form is 3; it must be text"),
    ],
)
def test_a_part_of_a_record_that_can_not_be_used_is_named(change: dict[str, object], said: str) -> None:
    value = record().to_dict()
    for key, new in change.items():
        old = value.get(key)
        value[key] = {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new
    with pytest.raises(UserError, match=said):
        Record.from_dict(value)


def test_a_disk_that_fills_in_a_line_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    append_record(path, record())
    before, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:10]))
    with pytest.raises(OSError, match="No space left") as caught:
        append_record(path, record())
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before


def test_timm_table_of_two_modes_is_refused(tmp_path: Path) -> None:
    m = record().measurement
    train = Measurement(times_s=m.times_s, conditions=Conditions(mode="train", image_size=96), environment=ENV)
    with pytest.raises(UserError, match="one mode, got infer, train"):
        write_timm_csv(tmp_path / "x.csv", [record(), Record(model="t", measurement=train)])


def test_a_form_that_an_old_record_told_in_its_notes_is_a_field_now(tmp_path: Path) -> None:
    """A line as version 0.1.0 wrote it: what was chosen, and from what, stood among the notes."""
    old = {
        "model": "resnet18",
        "conditions": {
            "device": "cpu", "mode": "infer", "precision": "int8", "layout": "nchw", "batch_size": 8,
            "image_size": 224, "runtime": "openvino", "threads": 2,
        },
        "environment": {"device_name": "a processor", "cores": 2, "versions": {}},
        "times_s": [0.1, 0.1, 0.1, 0.1],
        "notes": ["the fastest of onnxruntime and openvino, float and 8 bits", "as openvino-int8 in openvino", "mind"],
        "peak_bytes": None,
    }  # fmt: skip
    m = Measurement.from_dict(old)
    assert (m.form, m.notes) == ("openvino-int8 in openvino", ("mind",))
    assert m.chosen_from == "the fastest of onnxruntime and openvino, float and 8 bits"
    assert Measurement.from_dict(m.to_dict()) == m
