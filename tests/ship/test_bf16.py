"""A form that computes in bfloat16: its own gate, and what happens where the processor has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from convscale.artifact.artifact import Artifact, load_artifact
from convscale.artifact.manifest import Manifest
from convscale.artifact.promise import Promise
from convscale.cli.classify import _told
from convscale.errors import UserError
from convscale.pipeline.finish import Finish
from convscale.pipeline.record import RunRecord
from convscale.runtimes.base import Opening, open_runtime
from convscale.runtimes.openvino import OpenVino
from convscale.ship.confirm import confirm
from convscale.ship.export import export, export_as
from convscale.ship.request import ExportRequest
from convscale.ship.stream import Classified
from convscale.ship.tune import tune
from convscale.ship.verify import MAX_RELATIVE, MIN_AGREEMENT, Verification, Withheld, _judge
from convscale.show.runs import runs_below
from convscale.speed.measuring import measure

native = pytest.mark.skipif(not OpenVino().native("bf16"), reason="this processor has no bfloat16")


@native
def test_computed_in_bf16_at_every_batch(tiny: nn.Module, images: np.ndarray, tmp_path: Path) -> None:
    art = export(tiny, tmp_path / "a", format="openvino", bf16=True, verify_images=images)
    assert (art.precision, art.manifest["computes"]) == ("bf16", "bf16")
    checked = art.verification
    assert checked is not None
    assert checked["batch_sizes"] == [1, 2, 7]
    # A number of bfloat16 has 8 significant bits: rounding is 2 ** -9, and float32's would be 2 ** -24.
    assert 2**-12 < checked["max_rel"] < MAX_RELATIVE["bf16"]
    exact = export(tiny, tmp_path / "b", format="openvino", verify_images=images)
    difference = np.abs(load_artifact(tmp_path / "a").logits(images) - exact.logits(images)).max()
    assert difference / np.abs(exact.logits(images)).max() == pytest.approx(checked["max_rel"], rel=0.5)


def test_where_there_is_none_it_is_said_and_nothing_is_written(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convscale.runtimes.openvino._has_bf16", lambda: False)
    with pytest.raises(UserError, match="no bf16 instructions: emulated it is slower than fp32; leave bf16 out"):
        export(tiny, tmp_path / "a", format="openvino", bf16=True, verify_images=images)
    assert list(tmp_path.iterdir()) == []


@native
def test_an_artefact_from_elsewhere_computes_in_float32_there(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tiny, tmp_path / "a", format="openvino", bf16=True, verify_images=images)
    exact = export(tiny, tmp_path / "b", format="openvino", verify_images=images).logits(images)
    monkeypatch.setattr("convscale.runtimes.openvino._has_bf16", lambda: False)
    assert np.abs(load_artifact(tmp_path / "a").logits(images) - exact).max() < 1e-5


@pytest.mark.parametrize(("has", "computed"), [(False, "fp32"), (True, "bf16")])
def test_what_was_computed_is_what_is_recorded(
    has: bool, computed: str, tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 time that is recorded as bfloat16's would calibrate predictions of another precision."""
    promise = Promise(
        device="cpu", runtime="openvino", precision="bf16", batch_size=2, image_size=32, threads=1,
        images_per_s=100.0, low=50.0, high=200.0,
    )  # fmt: skip
    art = export(tiny, tmp_path / "a", format="openvino", verify_images=images, promise=promise)
    art.keep(precision="bf16", computes="bf16")  # as one from a machine that has it
    art = load_artifact(tmp_path / "a")
    monkeypatch.setattr("convscale.runtimes.openvino._has_bf16", lambda: has)
    assert (art.computed_in("openvino"), art.computed_in("onnxruntime")) == (computed, "fp32")
    fallback = () if has else ("openvino has no bf16 here: float operations were computed in fp32",)
    done = Classified(images=8, errors=0, resumed=0, seconds=2.0)
    told = _told(done, load_artifact(tmp_path / "a"), "cpu", 4)
    assert told == f"8 images, 0 bad, 4.0 images/s end to end (cpu, openvino, {computed}, batch 4)"
    quick = {"threads": 1, "batch_size": 2, "min_seconds": 0.01, "max_seconds": 0.5}
    found = measure(art, **quick)  # pyright: ignore[reportArgumentType]
    assert (found.conditions.precision, found.notes) == (computed, fallback)
    confirmed = confirm(art, min_seconds=0.01)
    assert confirmed.measurement.conditions.precision == computed
    assert confirmed.notes == (*fallback, *(() if has else ("promised in bf16, the artefact is in fp32",)))
    tune(art, batch_sizes=(2,), threads=1, min_seconds=0.01)
    assert runs_below(tmp_path)[0].conditions.startswith(f"openvino, {computed}, batch 2, 1 threads, 1 streams; ")
    record = RunRecord(tmp_path, {}, resume=False)
    unused: Any = None
    finish = Finish(
        asked=unused, record=record, splits=unused, folder=tmp_path, basis=unused, min_throughput=0.0, say=unused
    )
    finish._keep(art, Verification.from_dict(art.verification or {}), None, None)
    assert record.now.artifact.precision == computed
    if has:
        assert measure(art, precision="bf16", **quick).conditions.precision == "bf16"  # pyright: ignore
        return
    with pytest.raises(UserError, match="is in bf16, and computed in fp32 by openvino here, got precision 'bf16'"):
        measure(art, precision="bf16", **quick)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx"}, "format onnx has no bf16 form; use format openvino"),
        ({"format": "torch"}, "format torch has no bf16 form; use format openvino"),
        ({"format": "openvino", "half": True}, "half and bf16 exclude each other"),
    ],
)
def test_bad_input(options: dict[str, object], message: str, tiny: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export(tiny, tmp_path / "a", bf16=True, **options)  # pyright: ignore[reportArgumentType]


def test_a_runtime_that_computes_in_float32_alone_says_so(onnx_art: Artifact) -> None:
    with pytest.raises(UserError, match="runtime onnxruntime computes in fp32, not in bf16"):
        open_runtime(onnx_art.model_path, "onnxruntime", Opening(precision="bf16"))


def test_a_record_with_another_precision_is_damaged(onnx_art: Artifact) -> None:
    values = {**onnx_art.manifest, "computes": "fp8"}
    with pytest.raises(UserError, match="it computes in 'fp8', known are fp32, bf16, fp16"):
        Manifest.from_dict(values, onnx_art.folder)


@pytest.mark.parametrize(
    ("precision", "agreement", "rel", "passed"),
    [
        ("bf16", 0.992, 0.02, True),
        ("bf16", 0.985, 0.02, False),
        ("bf16", 1.0, 0.04, False),
        ("fp32", 0.992, 1e-5, False),
        ("fp32", 1.0, 0.02, False),
    ],
)
def test_its_gate_is_wider_than_that_of_float32(precision: str, agreement: float, rel: float, passed: bool) -> None:
    v = Verification(
        n=1000, images="given", batch_sizes=(1,), top1_agreement=agreement, max_abs=rel, max_rel=rel, mean_abs=rel,
        precision=precision,
    )  # fmt: skip
    assert _judge(v)[0] is passed
    assert Withheld("x", v).verification is v


@native
def test_a_form_that_is_timed_and_thrown_away_need_not_agree(
    tiny: nn.Module, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MIN_AGREEMENT, "bf16", 2.0)
    request = ExportRequest(format="openvino", bf16=True, verify_images=images)
    with pytest.raises(Withheld, match="top-1 agrees on"):
        export_as(tiny, tmp_path / "a", request)
    assert export_as(tiny, tmp_path / "a", request, for_speed=True).precision == "bf16"
    monkeypatch.setitem(MIN_AGREEMENT, "fp32", 2.0)
    with pytest.raises(Withheld, match="top-1 agrees on"):
        export_as(tiny, tmp_path / "b", ExportRequest(verify_images=images), for_speed=True)
