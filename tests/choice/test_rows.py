"""Rows of a device that is not here: what they measure, what they say of the rest, and what is refused; by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import convscale as cs
from convscale.choice.facts import Speed
from convscale.choice.rows import set_by
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.speed.records import Record, append_record
from convscale.speed.timing import Measurement

COLUMNS = 160
SPEED = Speed(images_per_s=1000.0, low=1000 / math.exp(0.5), high=1000 * math.exp(0.5), kind="predicted")


def test_without_rows_nothing_changes() -> None:
    assert set_by(SPEED, []) == SPEED


def test_one_row_moves_half_way() -> None:
    """By hand, with s = 0.5 / 1.2816 = 0.39014, s^2 = 0.15221: of a row 1.44 times as fast, half in the logarithm: 1.2.
    What is left: 0.15221 / 2 / 2 of the device's, and 4 * 0.15221 / 2 / 4 of the network's own: 0.11415; its root
    0.33787 times 1.2816 is 0.43301.
    """
    found = set_by(SPEED, [math.log(1.44)])
    assert found.images_per_s == pytest.approx(1200.0)
    assert found.high == pytest.approx(1200 * math.exp(0.43301), rel=1e-4)
    assert found.low == pytest.approx(1200 / math.exp(0.43301), rel=1e-4)
    assert found.kind == "predicted"


def test_three_rows_that_agree_narrow_it_and_three_that_do_not_widen_it() -> None:
    """Three at 0.8: exp(3/4 ln 0.8) = 0.84590 times. Left: 0.15221 / 2 / 4 + 4 * 0.15221 / 2 / 6 = 0.069763; its root
    times 1.2816: 0.33850. Three at -1, 0 and 1 in the logarithm: 0.019026 + (0.30442 + 2) / 6 = 0.40310: 0.81368.
    """
    found = set_by(SPEED, [math.log(0.8)] * 3)
    assert found.images_per_s == pytest.approx(845.90, rel=1e-4)
    assert math.log(found.high / found.images_per_s) == pytest.approx(0.33850, rel=1e-3)
    wild = set_by(SPEED, [-1.0, 0.0, 1.0])
    assert wild.images_per_s == pytest.approx(1000.0)
    assert math.log(wild.high / wild.images_per_s) == pytest.approx(0.81368, rel=1e-3)


def row(model: str, images_per_s: float, **changes: object) -> Record:
    """A row as a kit's script writes it on an L4; ``name`` and conditions may differ."""
    name = changes.pop("name", "NVIDIA L4")
    fields = {"device": "cuda:0", "precision": "amp", "batch_size": 64, "image_size": 64, "runtime": "onnxruntime"}
    conditions = Conditions(**{**fields, "threads": 8, **changes})  # type: ignore[arg-type]
    return Record(
        model=model,
        measurement=Measurement(
            times_s=(conditions.batch_size / images_per_s,) * 5,
            conditions=conditions,
            environment=Environment(device_name=str(name), cores=8),
        ),
        spec=cs.get_spec(model).to_dict(),
        source="kit",
    )


ASKED = {"device": "l4", "batch_size": 64, "image_sizes": [64], "candidates": ["resnet18", "resnet34", "resnet50"]}


def test_a_measured_network_goes_by_its_row_and_the_others_are_set_by_it(tmp_path: Path) -> None:
    before = cs.choose(**ASKED, runtime="onnxruntime", max_params_m=1000)
    old = {o.spec.name: o.images_per_s for o in before.options}
    assert old["resnet18"] is not None
    append_record(tmp_path / "rows.jsonl", row("resnet18", 1.44 * old["resnet18"]))
    c = cs.choose(**ASKED, measured=tmp_path / "rows.jsonl", max_params_m=1000)
    new = {o.spec.name: o for o in c.options}
    assert c.conditions.runtime == "onnxruntime", "the rows' own"
    assert c.kind == "measured and predicted"
    assert new["resnet18"].speed is not None
    assert new["resnet18"].speed.kind == "measured"
    assert new["resnet18"].images_per_s == pytest.approx(1.44 * old["resnet18"])
    for name in ("resnet34", "resnet50"):
        assert new[name].images_per_s == pytest.approx(1.2 * (old[name] or 0), rel=1e-9)
        assert new[name].speed is not None
        assert new[name].speed.kind == "predicted"
    assert all("measured" in o.reason for o in c.options if o.spec.name == "resnet18")
    assert any(
        note == "1 network measured (rows.jsonl); the others are predicted, their speeds times 1.20 by these"
        for note in c.notes
    )
    json.dumps(c.to_dict())


def test_a_file_does_not_choose_what_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a function that builds a network counts only where the user names that function."""
    (tmp_path / "nets_of_a_row.py").write_text(
        "from pathlib import Path\nfrom torch import nn\nPath('ran').write_text('')\n\n\ndef make(num_classes=5):\n"
        "    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), *pool, nn.Linear(4, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    rows, own = tmp_path / "rows.jsonl", "nets_of_a_row:make"
    append_record(rows, row("resnet18", 1_000.0))
    append_record(rows, replace(row("resnet18", 9_000.0), model=own, spec=None))
    cs.choose(**ASKED, measured=rows, max_params_m=1000)
    assert not (tmp_path / "ran").exists()
    found = cs.choose(**{**ASKED, "candidates": ["resnet18", own]}, measured=rows, max_params_m=1000)
    assert (tmp_path / "ran").exists()
    assert {o.spec.name: o.images_per_s for o in found.options}[own] == pytest.approx(9_000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "NVIDIA T4"}, "resnet18 was measured on 'NVIDIA T4', the choice is for NVIDIA L4"),
        ({"batch_size": 8}, "resnet18 was measured in batch 8, asked is batch 64"),
        ({"precision": "fp32"}, "resnet18 was measured in precision fp32, asked is precision amp"),
        ({"device": "cpu", "name": "NVIDIA L4"}, "the choice is for NVIDIA L4"),
    ],
)
def test_rows_of_other_conditions(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    append_record(tmp_path / "rows.jsonl", row("resnet18", 1000.0, **changes))
    with pytest.raises(UserError, match=message) as caught:
        cs.choose(**ASKED, measured=tmp_path / "rows.jsonl", min_throughput=1)
    assert "\n" not in str(caught.value)


def test_rows_that_can_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    options = {**ASKED, "measured": path, "min_throughput": 1}
    with pytest.raises(UserError, match="does not exist"):
        cs.choose(**options)
    path.write_text("")
    with pytest.raises(UserError, match=r"has no rows; the measure.py of a kit writes them"):
        cs.choose(**options)
    append_record(path, row("resnet18", 1000.0))
    path.write_text(path.read_text() + '{"schema": 1, "mod')
    with pytest.raises(UserError, match=r"rows.jsonl, line 2 is not JSON"):
        cs.choose(**options)
    path.unlink()
    append_record(path, row("resnet18", 1000.0))
    append_record(path, row("resnet34", 1000.0, runtime="tensorrt"))
    with pytest.raises(UserError, match="has rows of the runtimes onnxruntime and tensorrt; give each a file"):
        cs.choose(**options)
    with pytest.raises(UserError, match="resnet34 was measured in runtime tensorrt, asked is runtime onnxruntime"):
        cs.choose(**options, runtime="onnxruntime")
    path.unlink()
    append_record(path, replace(row("resnet18", 1000.0), spec=None, model="nobody's"))
    with pytest.raises(UserError, match="has no row of a network that is known here; of nobody's nothing is"):
        cs.choose(**options)


def test_rows_are_of_a_device_that_is_not_here(tmp_path: Path) -> None:
    append_record(tmp_path / "rows.jsonl", row("resnet18", 1000.0, device="cpu", name="a processor", precision="fp32"))
    with pytest.raises(UserError, match="device 'cpu' is measured here; rows of a device that is not here go with its"):
        cs.choose(device="cpu", measured=tmp_path / "rows.jsonl", min_throughput=1)


def test_the_table_says_which_is_which(tmp_path: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    append_record(tmp_path / "rows.jsonl", row("resnet18", 9000.0))
    args = ["--device", "l4", "-b", 64, "--img-size", 64, "--min-throughput", 8500]
    args += ["--model", "resnet18", "--model", "resnet50", "--measured", tmp_path / "rows.jsonl"]
    code, out, _ = call("choose", *args)
    assert code == 0
    assert "measured and predicted on NVIDIA L4: inference, onnxruntime, amp" in out
    assert "speed is" in out
    (chosen,) = [line.split() for line in out.splitlines() if line.lstrip().startswith("*")]
    assert chosen[2:4] == ["9,000", "measured"]
    assert chosen[4].startswith("resnet18.")
    code, _, err = call("choose", *args, "--scale", "resnet18")
    assert (code, "--scale takes" in err) == (2, True)
