"""A workload's file: read back as it was written, predicted without torch; anything else is one line of an error."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from convscale.conditions import Conditions
from convscale.errors import UserError
from convscale.predictor.loading import eight_bits, workload_for
from convscale.predictor.predict import predict
from convscale.predictor.workload_file import from_dict, predict_stored, read_workload, save_workload, to_dict

CONDITIONS = Conditions(device="rtx-4090", precision="amp", batch_size=64, image_size=32)


def net() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 1))
    layers.in_chans = 8  # type: ignore[assignment]
    return layers


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("workloads") / "mine.workload.json"
    save_workload(net(), place, CONDITIONS, name="mine")
    return place


def test_what_is_read_is_what_was_written(path: Path) -> None:
    stored = read_workload(path)
    assert stored.name == "mine"
    assert stored.work == workload_for(net(), CONDITIONS)
    assert stored.conditions == dataclasses.replace(CONDITIONS, device="cpu")
    assert from_dict(to_dict(stored)) == stored
    made = predict_stored(stored, "RTX 4090")
    assert made == predict(net(), device="rtx-4090", image_size=32, batch_size=64)


def test_a_compiled_network_is_doubted_as_the_network_itself_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is predicted slower than eager, whose kernels lie beside its own; a file of before has none."""

    def doubt(compiled: float, eager: float) -> str:
        return f"slow: {compiled:.6g}, {eager:.6g}"

    for module in ("predict", "workload_file"):
        monkeypatch.setattr(f"convscale.predictor.{module}.compiler_doubt", doubt)
    conditions = dataclasses.replace(CONDITIONS, runtime="compiled")
    save_workload(net(), tmp_path / "a.workload.json", conditions)
    stored = read_workload(tmp_path / "a.workload.json")
    assert stored.eager is not None
    assert stored.eager.kernels == workload_for(net(), CONDITIONS).kernels != stored.work.kernels
    assert from_dict(to_dict(stored)) == stored
    told, eager = (predict(net(), "a100-40gb", image_size=32, batch_size=64, compiled=c) for c in (True, False))
    assert predict_stored(stored, "a100-40gb") == told
    assert f"slow: {told.images_per_s:.6g}, {eager.images_per_s:.6g}" in told.doubts
    value = {key: each for key, each in to_dict(stored).items() if key != "eager_kernels"}
    before = from_dict(value)
    assert before == dataclasses.replace(stored, eager=None)
    assert predict_stored(before, "a100-40gb").doubts == tuple(d for d in told.doubts if not d.startswith("slow"))
    save_workload(net(), tmp_path / "b.workload.json", CONDITIONS)
    assert "eager_kernels" not in json.loads((tmp_path / "b.workload.json").read_text(encoding="utf-8"))


def test_the_file_says_what_a_convolution_costs(path: Path) -> None:
    """By hand: 64 images of 32 x 32 pixels, 16 channels out of 8, 3 x 3."""
    value = json.loads(path.read_text(encoding="utf-8"))
    rows = [dict(zip(["count", *value["columns"]], row, strict=True)) for row in value["kernels"]]
    (conv,) = [row for row in rows if row["kind"] == "conv"]
    assert (conv["macs"], conv["in_bytes"]) == (64 * 32 * 32 * 16 * 8 * 9, 2 * 64 * 8 * 32 * 32)
    assert value["params"] == (8 * 9 + 1) * 16 + 2 * 16 + 17 * 16


def test_no_torch_is_needed(path: Path) -> None:
    code = f"""
import sys
from convscale.predictor.workload_file import predict_stored, read_workload
made = predict_stored(read_workload({str(path)!r}), "mi300x")
print(made.images_per_s > 0, any("AMD" in doubt for doubt in made.doubts), "torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "True", "False"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "record"}, "kind and format are 'record' and 1"),
        ({"format": 2}, "kind and format"),
        ({"conditions": {"threads": 1}}, "they must be an object of mode"),
        ({"conditions": {"mode": "sleep", "image_size": 32}}, "mode 'sleep' is unknown"),
        ({"columns": ["macs"]}, "they must be kind and some of"),
        ({"kernels": {"conv": 1}}, "kernels must be a list"),
        ({"kernels": []}, "kernels must be a list of 1 to 1,000,000 rows"),
        ({"eager_kernels": 3}, "eager_kernels must be a list"),
        ({"columns": ["kind", "macs"], "kernels": [[1, "conv"]]}, "it must be a count and 2 figures"),
        ({"columns": ["kind", "macs"], "kernels": [[1, "soup", 1]]}, "a kernel's kind is 'soup'"),
        ({"columns": ["kind", "macs"], "kernels": [[1, "conv", -1]]}, "a kernel's macs is -1"),
        ({"columns": ["kind", "macs"], "kernels": [[1, "conv", 1e400]]}, "a kernel's macs is inf"),
        ({"columns": ["kind", "nhwc"], "kernels": [[1, "conv", 1]]}, "must be true or false"),
        ({"peak_bytes": "many"}, "peak_bytes is 'many'"),
        ({"unsupported": ["odd"]}, "unsupported is"),
    ],
)
def test_other_files_are_refused_in_one_line(path: Path, change: dict[str, object], says: str) -> None:
    value = {**json.loads(path.read_text(encoding="utf-8")), **change}
    with pytest.raises(UserError, match=says) as refused:
        from_dict(value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.workload\.json"):
        read_workload(tmp_path / "none.workload.json")


def test_eight_bits_halve_maps_and_double_rates() -> None:
    """A large product in TensorRT: an A100 has 624 TOPS for it and 312 TFLOPS in half precision."""
    half = workload_for(net(), dataclasses.replace(CONDITIONS, precision="fp16", runtime="tensorrt"))
    made = eight_bits(half)
    for (before, _), (after, _) in zip(half.kernels, made.kernels, strict=True):
        assert after.in_bytes == before.in_bytes // 2
        assert after.macs == before.macs
        assert after.in_bytes // after.itemsize == before.in_bytes // before.itemsize  # as many elements
    wide = nn.Sequential(*(nn.Conv2d(2048, 2048, 3, padding=1) for _ in range(4)))
    wide.in_chans = 2048  # type: ignore[assignment]
    speeds = {
        p: predict(wide, device="a100-40gb", image_size=28, precision=p, runtime="tensorrt") for p in ("fp16", "int8")
    }
    assert speeds["int8"].images_per_s / speeds["fp16"].images_per_s == pytest.approx(2, rel=0.05)
    assert any("int8 is taken to reach every layer" in doubt for doubt in speeds["int8"].doubts)
    with pytest.raises(UserError, match="int8 in onnxruntime and tensorrt on a GPU"):
        predict(wide, device="a100-40gb", image_size=28, precision="int8")


def test_amp_says_in_which_half() -> None:
    plain, other = (predict(net(), device="a10", image_size=32, precision=p) for p in ("amp", "amp_bf16"))
    assert "amp (fp16)" in str(plain)
    assert "amp (bf16)" in str(other)
    assert other.images_per_s == plain.images_per_s
    whole, half = (predict(net(), device="a10", image_size=32, precision=p) for p in ("bf16", "fp16"))
    assert whole.images_per_s == half.images_per_s  # weights in it too, as `measure` times it: no casts
    slow = predict(net(), device="v100", image_size=32, precision="amp_bf16")
    assert any("no matrix units for bfloat16" in doubt for doubt in slow.doubts)
