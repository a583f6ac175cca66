"""What is asked of a processor that is not here: what no processor has, or no table holds, is refused at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convscale.choice.basis import Asked, basis_of
from convscale.choice.facts import NetworkFacts
from convscale.choice.rows import asked_by_rows, note_of, rows_of
from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.machine import Environment
from convscale.predictor.fitted import check_predicted
from convscale.ship.kit import check_kit
from convscale.speed.records import Record
from convscale.speed.timing import Measurement
from tests.predictor.calibrations import calibration_file

NAME = "Intel(R) Core(TM) i9-10940X CPU @ 3.30GHz"


def row(threads: int, device: str = "cpu", name: str = NAME) -> Record:
    """Measured in ONNX Runtime with those threads."""
    conditions = Conditions(device=device, batch_size=1, image_size=224, runtime="onnxruntime", threads=threads)
    made = Measurement(times_s=(0.01,), conditions=conditions, environment=Environment(device_name=name, cores=28))
    return Record(model="resnet18", measurement=made)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"threads": 4},
            "threads is 4, and the tables hold i9-10940x with all its cores; leave threads out, or give what was "
            r"measured there with 4: a calibration \(calibrate --threads 4\), or a kit's rows \(measure.py --threads 4",
        ),
        *(
            (
                {"precision": "int8", "runtime": runtime},
                "precision 'int8' is predicted on GPUs alone, got device i9-10940x; fp32 is predicted there, and on "
                "that machine device cpu measures int8",
            )
            for runtime in (None, "onnxruntime", "compiled")
        ),
        (
            {"runtime": "tensorrt"},
            "runtime tensorrt runs on GPUs, got device i9-10940x; eager, compiled or onnxruntime can be predicted",
        ),
        (
            {"runtime": "openvino"},
            "speeds on i9-10940x are predicted for eager or compiled PyTorch, and by them for onnxruntime$",
        ),
    ],
)
def test_what_no_table_holds_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        basis_of(Asked(device="I9-10940X", **given))
    assert "\n" not in str(caught.value)


def test_a_prediction_of_one_network_refuses_it_too() -> None:
    for runtime, precision, message in (
        ("tensorrt", "fp32", "runtime tensorrt runs on GPUs, got device i9-10940x"),
        ("onnxruntime", "int8", "precision 'int8' is predicted on GPUs alone"),
    ):
        with pytest.raises(UserError, match=message):
            check_predicted(Conditions(device="Intel Core i9-10940X", runtime=runtime, precision=precision))


def test_a_kit_for_it_is_in_float32(tmp_path: Path) -> None:
    for precision in ("amp", "fp16"):
        conditions = Conditions(device="i9-10940x", batch_size=1, runtime="onnxruntime", precision=precision)
        message = f"a processor computes half precision in float32, got precision '{precision}' for device i9-10940x; "
        with pytest.raises(UserError, match=f"{message}choose with precision fp32"):
            check_kit(conditions, tmp_path / "kit")
    check_kit(replace(conditions, precision="fp32"), tmp_path / "kit")


def test_threads_that_something_was_measured_with_are_taken(tmp_path: Path) -> None:
    asked = Asked(device="i9-10940x")
    path = calibration_file(tmp_path, "i9-10940x", 4)
    assert basis_of(asked, path).conditions.threads == 4
    assert basis_of(Asked(device="i9-10940x", threads=4), path).conditions.threads == 4
    with pytest.raises(UserError, match="the calibration was made with 4 threads, not 8"):
        basis_of(Asked(device="i9-10940x", threads=8), path)
    assert basis_of(asked, calibration_file(tmp_path, "i9-10940x")).conditions.threads is None
    assert basis_of(Asked(device="l4", threads=4)).conditions.threads == 4  # the card computes


@pytest.mark.parametrize(
    ("device", "threads", "counts", "wanted"),
    [
        ("i9-10940x", None, (4, 4), 4),
        ("i9-10940x", 4, (4, 4), 4),
        ("i9-10940x", 4, (4, 28), 4),
        ("l4", None, (4, 4), None),
        ("l4", None, (4, 28), None),
    ],
)
def test_rows_bring_their_threads(
    device: str, threads: int | None, counts: tuple[int, ...], wanted: int | None
) -> None:
    asked = asked_by_rows(Asked(device=device, threads=threads), [row(count) for count in counts], "rows.jsonl")
    conditions = basis_of(asked).conditions
    assert (conditions.threads, conditions.runtime) == (wanted, "onnxruntime")


AT_64 = replace(row(28).measurement.conditions, batch_size=64)


def test_rows_of_several_numbers_of_threads_are_not_mixed() -> None:
    records = [row(28), row(4), replace(row(4), model="resnet50"), row(8)]
    with pytest.raises(UserError, match=r"^rows.jsonl has rows of 4, 8 and 28 threads; give --threads, by which of"):
        asked_by_rows(Asked(device="i9-10940x"), records, "rows.jsonl")
    asked = asked_by_rows(Asked(device="i9-10940x", threads=4), records, "rows.jsonl")
    found = rows_of(records, basis_of(asked), "rows.jsonl")
    assert sorted(network.spec.name for network in found.measured) == ["resnet18", "resnet50"]
    assert {measurement.conditions.threads for measurement in found.measured.values()} == {4}
    facts = {network: NetworkFacts(params=1, macs=1) for network in found.measured}
    assert note_of(found, facts).endswith("; 2 rows of other numbers of threads left out")
    assert "left out" not in note_of(replace(found, left_out=0), facts)
    strange = replace(
        records[0], measurement=replace(records[0].measurement, conditions=AT_64)
    )  # looked at all the same
    with pytest.raises(UserError, match=r"^rows.jsonl: resnet18 was measured in batch 64, asked is batch 1$"):
        rows_of([strange, *records], basis_of(asked), "rows.jsonl")
    none = r"^rows.jsonl has no row of 3 threads; its rows are of 4, 8 and 28$"
    three = Asked(device="i9-10940x", threads=3, by_rows=True, runtime="onnxruntime")
    with pytest.raises(UserError, match=none):
        asked_by_rows(three, records, "rows.jsonl")
    with pytest.raises(UserError, match=none):
        rows_of(records, basis_of(three), "rows.jsonl")
